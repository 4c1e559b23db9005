// ptx_on_cpu.h: the other half of kernels/ptx.cuh, where its functions are documented.
#pragma once
#include "device.h"

#define PM_LAUNCH(kernel, grid, block, shared_bytes, stream, ...)                                  \
    pm_host::launch((kernel), (grid), (block), (shared_bytes), (stream)__VA_OPT__(, )     \
                        __VA_ARGS__)

namespace pm_host {

extern const Collective MMA_BF16, MMA_TF32, LDMATRIX, LDMATRIX_TRANS, WGMMA, WGMMA_BEGIN, WGMMA_COMMIT,
    WGMMA_WAIT;

struct Mma { // d (m, n, 4), a (m, 4), b (n, 2)
    float *d;
    const uint32_t *a, *b;
    int m, n;
};
struct Ldmatrix {
    uint32_t *r; // (count)
    const void *row;
    int count;
};

inline void mma(const Collective &what, float *d, const uint32_t *a, const uint32_t *b, int m, int n,
                const char *file, int line)
{
    Mma operand = {d, a, b, m, n};
    rendezvous(what, 0xffffffffu, &operand, file, line);
}
inline void ldmatrix(const Collective &what, uint32_t *r, const void *row, int count,
                     const char *file, int line)
{
    Ldmatrix operand = {r, row, count};
    rendezvous(what, 0xffffffffu, &operand, file, line);
}

} // namespace pm_host

struct wgmma_operand { // of a descriptor
    const char *at;
    int64_t leading, stride;
};

namespace pm_host {
struct Wgmma {
    float *d;
    wgmma_operand a, b;
    int n;
    bool a_minor, b_minor;
};
} // namespace pm_host

inline wgmma_operand wgmma_describe(const void *shared, int leading, int stride)
{
    return {(const char *)shared, leading, stride};
}
inline wgmma_operand wgmma_advance(wgmma_operand of, int bytes)
{
    return {of.at + bytes, of.leading, of.stride};
}
inline void fence_proxy_async() { pm_host::wgmma_fence_copies(); }
inline void wgmma_begin(PM_SITE)
{
    pm_host::rendezvous(pm_host::WGMMA_BEGIN, 0xffffffffu, nullptr, file, line);
}
inline void wgmma_commit(PM_SITE)
{
    pm_host::rendezvous(pm_host::WGMMA_COMMIT, 0xffffffffu, nullptr, file, line);
}
template <int GROUPS, int COUNT> void wgmma_wait(float (&)[COUNT], PM_SITE)
{
    int groups = GROUPS;
    pm_host::rendezvous(pm_host::WGMMA_WAIT, 0xffffffffu, &groups, file, line);
}
template <int N, bool A_MINOR, bool B_MINOR>
void wgmma_m64k16(float (&d)[N / 2], wgmma_operand a, wgmma_operand b, PM_SITE)
{
    static_assert(N % 8 == 0 && N <= 256, "what the instruction has");
    pm_host::Wgmma operand = {d, a, b, N, A_MINOR, B_MINOR};
    pm_host::rendezvous(pm_host::WGMMA, 0xffffffffu, &operand, file, line);
}

#define PM_MMA(name, what)                                                                         \
    inline void name(float (&d)[4], const uint32_t (&a)[4], const uint32_t (&b)[2], PM_SITE)       \
    {                                                                                              \
        pm_host::mma(pm_host::what, d, a, b, 1, 1, file, line);                                    \
    }                                                                                              \
    template <int M, int N>                                                                        \
    void name(float (&d)[M][N][4], const uint32_t (&a)[M][4], const uint32_t (&b)[N][2], PM_SITE)  \
    {                                                                                              \
        pm_host::mma(pm_host::what, d[0][0], a[0], b[0], M, N, file, line);                        \
    }
PM_MMA(mma_m16n8k16, MMA_BF16)
PM_MMA(mma_m16n8k8_tf32, MMA_TF32)
#undef PM_MMA

inline void pm_keep(int &) {}
template <class T> void pm_keep(T *&) {}

inline uint32_t pm_tf32(float x)
{
    uint32_t u = __float_as_uint(x);
    return (x != x ? u : u + 0x1000u) & ~0x1fffu; // half an ulp of tf32: ties away from zero
}

inline float pm_exp2(float x) { return x < -126.0f ? 0.0f : exp2f(x); }

#define PM_LDMATRIX(name, count, what)                                                             \
    inline void name(uint32_t (&r)[count], const void *row, PM_SITE)                               \
    {                                                                                              \
        pm_host::ldmatrix(pm_host::what, r, row, count, file, line);                               \
    }
PM_LDMATRIX(ldmatrix_x1, 1, LDMATRIX)
PM_LDMATRIX(ldmatrix_x2, 2, LDMATRIX)
PM_LDMATRIX(ldmatrix_x4, 4, LDMATRIX)
PM_LDMATRIX(ldmatrix_x1_trans, 1, LDMATRIX_TRANS)
PM_LDMATRIX(ldmatrix_x2_trans, 2, LDMATRIX_TRANS)
PM_LDMATRIX(ldmatrix_x4_trans, 4, LDMATRIX_TRANS)
#undef PM_LDMATRIX

template <int BYTES> void cp_async(void *shared, const void *global, PM_SITE)
{
    static_assert(BYTES == 4 || BYTES == 8 || BYTES == 16, "cp.async copies 4, 8 or 16 bytes");
    pm_host::async_copy(shared, global, BYTES, BYTES, file, line);
}
template <int BYTES>
void cp_async_zfill(void *shared, const void *global, int source_bytes, PM_SITE)
{
    static_assert(BYTES == 4 || BYTES == 8 || BYTES == 16, "cp.async copies 4, 8 or 16 bytes");
    pm_host::async_copy(shared, global, BYTES, source_bytes, file, line);
}
inline void cp_async_commit() { pm_host::async_commit(); }
template <int GROUPS> void cp_async_wait() { pm_host::async_wait(GROUPS); }
inline void cp_async_wait_all() { pm_host::async_wait(-1); }
