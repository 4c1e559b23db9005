// common.cuh: what every kernel file sees. README.md beside it says how an op is added.
//
// An op is written once, as templates over T, the type of an activation in memory: float ("fp32",
// "tf32") or bf16 ("bf16"). Arithmetic outside products is float, sums of many terms have a fixed
// order, and everything runs on one stream: an op launches and returns.
#pragma once
#include <cuda_bf16.h>
#include <cuda_runtime.h>

#include <cstdint>
#include <type_traits>

#define PM_ACT void // activations are T
extern "C" {
#include "../csrc/promoe.h"
}
#include "ptx.cuh"

using bf16 = __nv_bfloat16;

// ---------------------------------------------------------------- the device

struct pm_gpu {
    cudaStream_t stream;
    int processors;            // SMs
    bool hopper;               // sm_90: wgmma
    size_t shared_most;        // bytes of shared memory that a block may ask for
    unsigned long long *fault; // pm_fault below
};
const pm_gpu &pm_device();

// Launches on the stream, unless the grid is empty, and returns from the op when that fails:
//     PM_RUN(ctx, (scale<T>), pm_blocks(n, 256), 256, 0, n, x, y);
#define PM_RUN(ctx, kernel, grid, block, shared_bytes, ...)                                        \
    do {                                                                                           \
        const dim3 pm_grid(grid);                                                                  \
        if (pm_grid.x && pm_grid.y && pm_grid.z) {                                                 \
            PM_TRY(pm_prepare(ctx, #kernel, (const void *)(kernel), shared_bytes));                \
            PM_LAUNCH(kernel, pm_grid, dim3(block), shared_bytes, pm_device().stream,              \
                      __VA_ARGS__);                                                                \
            PM_TRY(pm_launched(ctx, #kernel));                                                     \
        }                                                                                          \
    } while (0)
pm_status pm_prepare(pm_ctx *ctx, const char *kernel, const void *function, size_t shared_bytes);
pm_status pm_launched(pm_ctx *ctx, const char *kernel);
// Of a call of CUDA: the status and message of an error.
pm_status pm_cuda(pm_ctx *ctx, const char *what, cudaError_t error);

// ---------------------------------------------------------------- wrong contents

// What an op finds in an array while it runs (faults.def) is reported by the next read or sync: the
// op has returned long before. The kernel goes on without reading or writing out of bounds. Of
// several faults the first of faults.def, and there the lowest index, is reported.
enum pm_fault_code {
#define PM_FAULT(name, status, text) PM_FAULT_##name,
#include "faults.def"
#undef PM_FAULT
};
static __device__ __forceinline__ void pm_fault(unsigned long long *fault, pm_fault_code code,
                                                int64_t index)
{
    atomicMin(fault, (unsigned long long)code << 48 | (unsigned long long)index);
}

// ---------------------------------------------------------------- sizes and scratch

constexpr unsigned PM_ALL = 0xffffffffu; // lanes

// Blocks for n elements; the grid's x goes to 2^31 - 1.
static inline unsigned pm_blocks(int64_t n, int64_t per_block)
{
    return (unsigned)((n + per_block - 1) / per_block);
}

// Scratch is taken from the front, in pieces aligned to 256 bytes; workspace() adds pm_room of each.
static inline size_t pm_room(int64_t count, size_t bytes_of_one)
{
    return ((size_t)count * bytes_of_one + 255) & ~(size_t)255;
}
template <class T> T *pm_take(void **scratch, int64_t count)
{
    T *piece = static_cast<T *>(*scratch);
    *scratch = static_cast<char *>(*scratch) + pm_room(count, sizeof(T));
    return piece;
}

// A weight matrix of F*D numbers in the type of the products: w itself, its derived twin, or, where
// there is none (an op called by itself), rounded into scratch, which pm_weight_room counts.
template <class T> size_t pm_weight_room(const pm_weight &weight, int64_t count)
{
    return std::is_same<T, bf16>::value && !weight.derived ? pm_room(count, sizeof(T)) : 0;
}
template <class T>
pm_status pm_weight_as(pm_ctx *ctx, const pm_weight &weight, int64_t count, void **scratch,
                       const T **out);
// to[i] = the nearest bf16 of from[i]
pm_status pm_round(pm_ctx *ctx, int64_t count, const float *from, bf16 *to);
// to[i] += from[i]
pm_status pm_add(pm_ctx *ctx, int64_t count, const float *from, float *to);

// ---------------------------------------------------------------- in kernels

#define PM_DEVICE static __device__ __forceinline__

PM_DEVICE float pm_float(float x) { return x; }
PM_DEVICE float pm_float(bf16 x) { return __bfloat162float(x); }
template <class T> PM_DEVICE T pm_to(float x);
template <> __device__ __forceinline__ float pm_to<float>(float x) { return x; }
template <> __device__ __forceinline__ bf16 pm_to<bf16>(float x) { return __float2bfloat16_rn(x); }

// 16 bytes of T, for accesses of full width.
template <class T> struct alignas(16) pm_pack {
    static constexpr int SIZE = 16 / sizeof(T);
    T v[SIZE];
};
// Host: whether an array may be accessed in packs. NULL may.
static inline bool pm_aligned(const void *p) { return reinterpret_cast<uintptr_t>(p) % 16 == 0; }

// Threads of the grid, for loops over n elements: for (i = pm_thread(); i < n; i += pm_threads()).
PM_DEVICE int64_t pm_thread() { return (int64_t)blockIdx.x * blockDim.x + threadIdx.x; }
PM_DEVICE int64_t pm_threads() { return (int64_t)gridDim.x * blockDim.x; }

// Over the 32 lanes, which must all be there; every lane gets the result. A fixed tree.
template <class T> PM_DEVICE T pm_warp_sum(T x)
{
#pragma unroll
    for (int lanes = 16; lanes > 0; lanes /= 2)
        x += __shfl_xor_sync(PM_ALL, x, lanes);
    return x;
}
PM_DEVICE float pm_warp_max(float x)
{
#pragma unroll
    for (int lanes = 16; lanes > 0; lanes /= 2)
        x = fmaxf(x, __shfl_xor_sync(PM_ALL, x, lanes));
    return x;
}

// Over the block (a multiple of 32 threads); part: 32 numbers of shared memory, free to be used again
// after the next barrier. Every thread gets the result.
template <class T> PM_DEVICE T pm_block_sum(T x, T *part)
{
    const int warp = threadIdx.x / 32, lane = threadIdx.x % 32, warps = blockDim.x / 32;
    x = pm_warp_sum(x);
    if (lane == 0)
        part[warp] = x;
    __syncthreads();
    return pm_warp_sum(lane < warps ? part[lane] : T(0));
}

// gelu_tanh(x) = x/2 (1 + tanh(u)), u = sqrt(2/pi) (x + 0.044715 x^3), and its derivative.
PM_DEVICE float pm_gelu(float x)
{
    const float u = 0.7978845608f * (x + 0.044715f * x * x * x);
    return 0.5f * x * (1.0f + tanhf(u));
}
PM_DEVICE float pm_dgelu(float x)
{
    const float u = 0.7978845608f * (x + 0.044715f * x * x * x), t = tanhf(u);
    return 0.5f * (1.0f + t) +
           0.5f * x * (1.0f - t * t) * 0.7978845608f * (1.0f + 3.0f * 0.044715f * x * x);
}
PM_DEVICE float pm_sigmoid_of(float x) { return 1.0f / (1.0f + expf(-x)); }

// ---------------------------------------------------------------- the ops

// Declared here from ops.def, defined in <op>.cu, which ends with PM_INSTANTIATE_BOTH(<op>) or
// PM_INSTANTIATE_FORWARD(<op>).
#define PM_DECLARE_FORWARD(op)                                                                     \
    template <class T> pm_status op##_forward(pm_ctx *, const pm_##op##_args *, void *);           \
    template <class T> size_t op##_workspace(const pm_ctx *, const pm_##op##_args *, bool);
#define PM_DECLARE_BOTH(op)                                                                        \
    PM_DECLARE_FORWARD(op)                                                                         \
    template <class T>                                                                             \
    pm_status op##_backward(pm_ctx *, const pm_##op##_args *, const pm_##op##_grads *, void *);
#define PM_OP(op, OP, direction) PM_DECLARE_##direction(op)
#include "../csrc/ops.def"
#undef PM_OP

#define PM_INSTANTIATE_FORWARD_OF(op, T)                                                           \
    template pm_status op##_forward<T>(pm_ctx *, const pm_##op##_args *, void *);                  \
    template size_t op##_workspace<T>(const pm_ctx *, const pm_##op##_args *, bool);
#define PM_INSTANTIATE_BACKWARD_OF(op, T)                                                          \
    template pm_status op##_backward<T>(pm_ctx *, const pm_##op##_args *, const pm_##op##_grads *, \
                                        void *);
#define PM_INSTANTIATE_FORWARD(op)                                                                 \
    PM_INSTANTIATE_FORWARD_OF(op, float) PM_INSTANTIATE_FORWARD_OF(op, bf16)
#define PM_INSTANTIATE_BOTH(op)                                                                    \
    PM_INSTANTIATE_FORWARD(op)                                                                     \
    PM_INSTANTIATE_BACKWARD_OF(op, float) PM_INSTANTIATE_BACKWARD_OF(op, bf16)
