// device.h: what a kernel sees of CUDA when the host's compiler compiles it.
//
// A kernel may use:
//   - plain CUDA C++: __global__, __device__, __shared__ arrays in kernels (not in __device__
//     functions), one dynamic array `extern __shared__ __align__(16) unsigned char pm_shared[];`,
//     threadIdx ..., vector types, templates;
//   - __syncthreads (also _count, _and, _or), __syncwarp, __shfl_*_sync, votes, __reduce_*_sync,
//     __match_any_sync; integer atomics (a float atomic does not compile: sums have an order);
//   - kernels/ptx.cuh: PM_LAUNCH, mma, ldmatrix, cp.async, wgmma;
//   - the math of CUDA listed below. Approximations (__expf, rsqrtf) are at least as accurate here.
// It may not use: cooperative groups, named barriers, spinning on memory that another thread of the
// block writes (reported after the time limit), textures, printf of pointers as results, TMA.
#pragma once
#include <cmath>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <type_traits>

#include "engine.h"

#define __global__
#define __device__
#define __host__
#define __forceinline__ inline __attribute__((always_inline))
#define __noinline__ __attribute__((noinline))
#define __launch_bounds__(...)
#define __constant__
#define __restrict__ __restrict
#define __align__(n) __attribute__((aligned(n)))
#define __grid_constant__
// Thread-local storage is the block's: fibres share their host thread. The engine finds a kernel's
// variables by their symbols, poisons them before every block and checks their size.
#define __shared__ thread_local

// ------------------------------------------------------------------ vector types
#define PM_VECTORS(T, name, align2, align4)                                                        \
    struct name##1 { T x; };                                                                       \
    struct alignas(align2) name##2 { T x, y; };                                                    \
    struct name##3 { T x, y, z; };                                                                 \
    struct alignas(align4) name##4 { T x, y, z, w; };                                              \
    inline name##1 make_##name##1(T x) { return {x}; }                                             \
    inline name##2 make_##name##2(T x, T y) { return {x, y}; }                                     \
    inline name##3 make_##name##3(T x, T y, T z) { return {x, y, z}; }                             \
    inline name##4 make_##name##4(T x, T y, T z, T w) { return {x, y, z, w}; }
struct uint1 { unsigned x; };
struct alignas(8) uint2 { unsigned x, y; };
struct alignas(16) uint4 { unsigned x, y, z, w; };
inline uint1 make_uint1(unsigned x) { return {x}; }
inline uint2 make_uint2(unsigned x, unsigned y) { return {x, y}; }
inline uint3 make_uint3(unsigned x, unsigned y, unsigned z) { return {x, y, z}; }
inline uint4 make_uint4(unsigned x, unsigned y, unsigned z, unsigned w) { return {x, y, z, w}; }
PM_VECTORS(signed char, char, 2, 4)
PM_VECTORS(unsigned char, uchar, 2, 4)
PM_VECTORS(short, short, 4, 8)
PM_VECTORS(unsigned short, ushort, 4, 8)
PM_VECTORS(int, int, 8, 16)
PM_VECTORS(long long, longlong, 16, 16)
PM_VECTORS(unsigned long long, ulonglong, 16, 16)
PM_VECTORS(float, float, 8, 16)
PM_VECTORS(double, double, 16, 16)
#undef PM_VECTORS

// ------------------------------------------------------------------ barriers
#define PM_SITE const char *file = __builtin_FILE(), int line = __builtin_LINE()
inline void __syncthreads(PM_SITE) { pm_host::block_barrier(false, "__syncthreads", file, line); }
inline int __syncthreads_count(int p, PM_SITE)
{
    return pm_host::block_barrier(p != 0, "__syncthreads_count", file, line);
}
inline int __syncthreads_or(int p, PM_SITE)
{
    return pm_host::block_barrier(p != 0, "__syncthreads_or", file, line) != 0;
}
inline int __syncthreads_and(int p, PM_SITE)
{
    return pm_host::block_barrier(p == 0, "__syncthreads_and", file, line) == 0;
}
inline void __threadfence() {}
inline void __threadfence_block() {}

// ------------------------------------------------------------------ warp collectives
namespace pm_host {

extern const Collective SYNCWARP, SHFL, SHFL_UP, SHFL_DOWN, SHFL_XOR, BALLOT, MATCH_ANY, REDUCE_ADD,
    REDUCE_MIN, REDUCE_MAX, REDUCE_UMIN, REDUCE_UMAX, REDUCE_AND, REDUCE_OR, REDUCE_XOR;

struct Exchange {
    uint64_t value; // in: this lane's; out: the result
    int lane;       // argument: lane, delta or lane mask
    int width;
};

template <class T> T shuffle(const Collective &what, unsigned mask, T value, int lane, int width,
                             const char *file, int line)
{
    static_assert(sizeof(T) == 4 || sizeof(T) == 8 || sizeof(T) == 2, "a shuffle takes 2, 4 or 8 bytes");
    Exchange e = {0, lane, width};
    memcpy(&e.value, &value, sizeof value);
    rendezvous(what, mask, &e, file, line);
    memcpy(&value, &e.value, sizeof value);
    return value;
}

inline uint32_t reduce(const Collective &what, unsigned mask, uint32_t value, const char *file, int line)
{
    Exchange e = {value, 0, 32};
    rendezvous(what, mask, &e, file, line);
    return (uint32_t)e.value;
}

} // namespace pm_host

inline void __syncwarp(unsigned mask = 0xffffffffu, PM_SITE)
{
    pm_host::rendezvous(pm_host::SYNCWARP, mask, nullptr, file, line);
}
template <class T> T __shfl_sync(unsigned mask, T v, int lane, int width = 32, PM_SITE)
{
    return pm_host::shuffle(pm_host::SHFL, mask, v, lane, width, file, line);
}
template <class T> T __shfl_up_sync(unsigned mask, T v, unsigned delta, int width = 32, PM_SITE)
{
    return pm_host::shuffle(pm_host::SHFL_UP, mask, v, (int)delta, width, file, line);
}
template <class T> T __shfl_down_sync(unsigned mask, T v, unsigned delta, int width = 32, PM_SITE)
{
    return pm_host::shuffle(pm_host::SHFL_DOWN, mask, v, (int)delta, width, file, line);
}
template <class T> T __shfl_xor_sync(unsigned mask, T v, int lanes, int width = 32, PM_SITE)
{
    return pm_host::shuffle(pm_host::SHFL_XOR, mask, v, lanes, width, file, line);
}
inline unsigned __ballot_sync(unsigned mask, int p, PM_SITE)
{
    return pm_host::reduce(pm_host::BALLOT, mask, p != 0, file, line);
}
inline int __any_sync(unsigned mask, int p, PM_SITE)
{
    return pm_host::reduce(pm_host::BALLOT, mask, p != 0, file, line) != 0;
}
inline int __all_sync(unsigned mask, int p, PM_SITE)
{
    return pm_host::reduce(pm_host::BALLOT, mask, p == 0, file, line) == 0;
}
template <class T> unsigned __match_any_sync(unsigned mask, T v, PM_SITE)
{
    return pm_host::shuffle<uint64_t>(pm_host::MATCH_ANY, mask, (uint64_t)v, 0, 32, file, line);
}
#define PM_REDUCE(name, T, what)                                                                   \
    inline T name(unsigned mask, T v, PM_SITE)                                                     \
    {                                                                                              \
        return (T)pm_host::reduce(pm_host::what, mask, (uint32_t)v, file, line);                   \
    }
PM_REDUCE(__reduce_add_sync, int, REDUCE_ADD)
PM_REDUCE(__reduce_add_sync, unsigned, REDUCE_ADD)
PM_REDUCE(__reduce_min_sync, int, REDUCE_MIN)
PM_REDUCE(__reduce_min_sync, unsigned, REDUCE_UMIN)
PM_REDUCE(__reduce_max_sync, int, REDUCE_MAX)
PM_REDUCE(__reduce_max_sync, unsigned, REDUCE_UMAX)
PM_REDUCE(__reduce_and_sync, unsigned, REDUCE_AND)
PM_REDUCE(__reduce_or_sync, unsigned, REDUCE_OR)
PM_REDUCE(__reduce_xor_sync, unsigned, REDUCE_XOR)
#undef PM_REDUCE
unsigned __activemask() = delete; // what has converged is not defined: name the lanes

// ------------------------------------------------------------------ atomics, integers only
namespace pm_host {
template <class T, class F>
__attribute__((noinline, no_sanitize("thread"))) T atomic(T *p, F change)
{
    static_assert(!__is_same(T, float) && !__is_same(T, double),
                  "no atomics on floats: the order of a sum would not be defined");
    check_aligned(p, sizeof(T), "an atomic");
    race_atomic(p, sizeof(T), __builtin_return_address(0));
    T old = *p;
    *p = change(old);
    return old;
}
} // namespace pm_host
#define PM_ATOMIC(name, expression)                                                                \
    template <class T> T name(T *p, std::common_type_t<T> v)                                       \
    {                                                                                              \
        return pm_host::atomic(p, [v](T old) -> T { return expression; });                         \
    }
PM_ATOMIC(atomicAdd, old + v)
PM_ATOMIC(atomicSub, old - v)
PM_ATOMIC(atomicExch, ((void)old, v))
PM_ATOMIC(atomicMin, old < v ? old : v)
PM_ATOMIC(atomicMax, old > v ? old : v)
PM_ATOMIC(atomicAnd, old &v)
PM_ATOMIC(atomicOr, old | v)
PM_ATOMIC(atomicXor, old ^ v)
PM_ATOMIC(atomicInc, old >= v ? 0 : old + 1)
PM_ATOMIC(atomicDec, old == 0 || old > v ? v : old - 1)
#undef PM_ATOMIC
template <class T> T atomicCAS(T *p, std::common_type_t<T> expected, std::common_type_t<T> v)
{
    return pm_host::atomic(p, [=](T old) -> T { return old == expected ? v : old; });
}

// ------------------------------------------------------------------ loads, bits
#define PM_LOAD(name) template <class T> T name(const T *p) { return *p; }
PM_LOAD(__ldg)
PM_LOAD(__ldca)
PM_LOAD(__ldcg)
PM_LOAD(__ldcs)
PM_LOAD(__ldlu)
PM_LOAD(__ldcv)
#undef PM_LOAD
#define PM_STORE(name) template <class T> void name(T *p, std::common_type_t<T> v) { *p = v; }
PM_STORE(__stwb)
PM_STORE(__stcg)
PM_STORE(__stcs)
PM_STORE(__stwt)
#undef PM_STORE

namespace pm_host {
template <class To, class From> To bits(From v)
{
    static_assert(sizeof(To) == sizeof(From));
    To to;
    memcpy(&to, &v, sizeof to);
    return to;
}
} // namespace pm_host
inline float __int_as_float(int v) { return pm_host::bits<float>(v); }
inline int __float_as_int(float v) { return pm_host::bits<int>(v); }
inline float __uint_as_float(unsigned v) { return pm_host::bits<float>(v); }
inline unsigned __float_as_uint(float v) { return pm_host::bits<unsigned>(v); }
inline double __longlong_as_double(long long v) { return pm_host::bits<double>(v); }
inline long long __double_as_longlong(double v) { return pm_host::bits<long long>(v); }
inline int __popc(unsigned v) { return __builtin_popcount(v); }
inline int __popcll(unsigned long long v) { return __builtin_popcountll(v); }
inline int __clz(int v) { return v ? __builtin_clz((unsigned)v) : 32; }
inline int __clzll(long long v) { return v ? __builtin_clzll((unsigned long long)v) : 64; }
inline int __ffs(int v) { return __builtin_ffs(v); }
inline int __ffsll(long long v) { return __builtin_ffsll(v); }
inline unsigned __brev(unsigned v)
{
    unsigned r = 0;
    for (int i = 0; i < 32; i++)
        r |= (v >> i & 1) << (31 - i);
    return r;
}
inline unsigned __umulhi(unsigned a, unsigned b) { return (uint64_t)a * b >> 32; }
inline int __mulhi(int a, int b) { return (int)((int64_t)a * b >> 32); }
inline unsigned long long __umul64hi(unsigned long long a, unsigned long long b)
{
    return (unsigned __int128)a * b >> 64;
}
inline unsigned __funnelshift_l(unsigned lo, unsigned hi, unsigned n)
{
    return (uint32_t)(((uint64_t)hi << 32 | lo) << (n & 31) >> 32);
}
inline unsigned __funnelshift_r(unsigned lo, unsigned hi, unsigned n)
{
    return (uint32_t)(((uint64_t)hi << 32 | lo) >> (n & 31));
}
inline unsigned __byte_perm(unsigned a, unsigned b, unsigned s)
{
    uint64_t both = (uint64_t)b << 32 | a;
    unsigned r = 0;
    for (int i = 0; i < 4; i++) {
        unsigned byte = both >> (s >> 4 * i & 7) * 8 & 0xff;
        r |= (s >> 4 * i & 8 ? (byte & 0x80 ? 0xffu : 0u) : byte) << 8 * i;
    }
    return r;
}
[[noreturn]] inline void __trap() { pm_host::fail("__trap"); }
inline size_t __cvta_generic_to_shared(const void *) = delete; // ptx.cuh has what needs it

// ------------------------------------------------------------------ math
// Global min and max, as CUDA has them.
inline int min(int a, int b) { return a < b ? a : b; }
inline int max(int a, int b) { return a > b ? a : b; }
inline unsigned min(unsigned a, unsigned b) { return a < b ? a : b; }
inline unsigned max(unsigned a, unsigned b) { return a > b ? a : b; }
inline long min(long a, long b) { return a < b ? a : b; }
inline long max(long a, long b) { return a > b ? a : b; }
inline unsigned long min(unsigned long a, unsigned long b) { return a < b ? a : b; }
inline unsigned long max(unsigned long a, unsigned long b) { return a > b ? a : b; }
inline long long min(long long a, long long b) { return a < b ? a : b; }
inline long long max(long long a, long long b) { return a > b ? a : b; }
inline unsigned long long min(unsigned long long a, unsigned long long b) { return a < b ? a : b; }
inline unsigned long long max(unsigned long long a, unsigned long long b) { return a > b ? a : b; }
inline float min(float a, float b) { return fminf(a, b); }
inline float max(float a, float b) { return fmaxf(a, b); }
inline double min(double a, double b) { return fmin(a, b); }
inline double max(double a, double b) { return fmax(a, b); }

inline float rsqrtf(float x) { return (float)(1.0 / sqrt((double)x)); }
inline double rsqrt(double x) { return 1.0 / sqrt(x); }
inline float __fadd_rn(float a, float b) { return a + b; }
inline float __fsub_rn(float a, float b) { return a - b; }
inline float __fmul_rn(float a, float b) { return a * b; }
inline float __fdiv_rn(float a, float b) { return a / b; }
inline float __fmaf_rn(float a, float b, float c) { return fmaf(a, b, c); }
inline float __frcp_rn(float a) { return 1.0f / a; }
inline float __fsqrt_rn(float a) { return sqrtf(a); }
inline float __frsqrt_rn(float a) { return rsqrtf(a); }
inline double __dadd_rn(double a, double b) { return a + b; }
inline double __dmul_rn(double a, double b) { return a * b; }
inline double __fma_rn(double a, double b, double c) { return fma(a, b, c); }
inline float __fdividef(float a, float b) { return a / b; }
inline float __expf(float x) { return expf(x); }
inline float __exp10f(float x) { return (float)pow(10.0, x); }
inline float __logf(float x) { return logf(x); }
inline float __log2f(float x) { return log2f(x); }
inline float __log10f(float x) { return log10f(x); }
inline float __powf(float x, float y) { return powf(x, y); }
inline float __sinf(float x) { return sinf(x); }
inline float __cosf(float x) { return cosf(x); }
inline float __tanf(float x) { return tanf(x); }
inline float __tanhf(float x) { return tanhf(x); }
inline void __sincosf(float x, float *s, float *c) { *s = sinf(x), *c = cosf(x); }
inline float __saturatef(float x) { return x > 0 ? x < 1 ? x : 1 : 0; } // a NaN becomes 0
inline float sinpif(float x) { return (float)sin(M_PI * fmod((double)x, 2.0)); }
inline float cospif(float x) { return (float)cos(M_PI * fmod((double)x, 2.0)); }
inline void sincospif(float x, float *s, float *c) { *s = sinpif(x), *c = cospif(x); }
inline int __float2int_rn(float x) { return (int)nearbyintf(x); }
inline int __float2int_rz(float x) { return (int)x; }
inline int __float2int_rd(float x) { return (int)floorf(x); }
inline int __float2int_ru(float x) { return (int)ceilf(x); }
inline unsigned __float2uint_rn(float x) { return (unsigned)nearbyintf(x); }
inline unsigned __float2uint_rz(float x) { return (unsigned)x; }
inline float __int2float_rn(int x) { return (float)x; }
inline float __uint2float_rn(unsigned x) { return (float)x; }
inline float __double2float_rn(double x) { return (float)x; }
