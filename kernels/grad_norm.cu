// grad_norm.cu: contract in csrc/ops/grad_norm.h. g is read once, 16 bytes at a time (4 M bytes), by blocks
// of 256 threads; the sums stay on the device.
//
// Order of the sum, in double: a thread adds the squares of every 256th pack of its block's
// 32768, in four chains; then the chains, a tree over the threads, and one block over the slots: a
// thread adds every 256th, then a tree. It depends on M alone. The square of a float is exact in double.
#include "common.cuh"

namespace {

// Numbers of a slot: 32 packs in a row for a thread, so that launching a block costs nothing beside
// them, and only 1/16384 of the bytes of g for the slots.
constexpr int64_t SLOT = 32768;
constexpr int PACK = pm_pack<float>::SIZE;

template <bool WIDE>
__global__ void __launch_bounds__(256)
    slot_kernel(int64_t count, const float *__restrict__ g, double *__restrict__ slots)
{
    __shared__ double part[32];
    const int64_t begin = blockIdx.x * SLOT;
    const int64_t end = begin + SLOT < count ? begin + SLOT : count;
    double sum[PACK] = {};
#pragma unroll 4
    for (int64_t i = begin + PACK * threadIdx.x; i < end; i += PACK * 256) {
        pm_pack<float> x = {};
        if (WIDE && i + PACK <= end)
            x = *reinterpret_cast<const pm_pack<float> *>(g + i);
        else
            for (int k = 0; k < PACK && i + k < end; k++)
                x.v[k] = g[i + k];
#pragma unroll
        for (int k = 0; k < PACK; k++)
            sum[k] += (double)x.v[k] * (double)x.v[k];
    }
    const double total = pm_block_sum((sum[0] + sum[1]) + (sum[2] + sum[3]), part);
    if (threadIdx.x == 0)
        slots[blockIdx.x] = total;
}

__global__ void __launch_bounds__(256)
    norm_kernel(int64_t count, const double *__restrict__ slots, double *__restrict__ norm)
{
    __shared__ double part[32];
    double sum = 0;
#pragma unroll 8
    for (int64_t i = threadIdx.x; i < count; i += 256)
        sum += slots[i];
    sum = pm_block_sum(sum, part);
    if (threadIdx.x == 0)
        *norm = sqrt(sum);
}

} // namespace

template <class T> size_t grad_norm_workspace(const pm_ctx *, const pm_grad_norm_args *g, bool)
{
    return pm_room(pm_blocks(g->M, SLOT), sizeof(double));
}

template <class T>
pm_status grad_norm_forward(pm_ctx *ctx, const pm_grad_norm_args *g, void *scratch)
{
    const unsigned count = pm_blocks(g->M, SLOT);
    double *const slots = pm_take<double>(&scratch, count);
    if (pm_aligned(g->g))
        PM_RUN(ctx, slot_kernel<true>, count, 256, 0, g->M, g->g, slots);
    else
        PM_RUN(ctx, slot_kernel<false>, count, 256, 0, g->M, g->g, slots);
    PM_RUN(ctx, norm_kernel, 1, 256, 0, (int64_t)count, slots, g->norm);
    return PM_OK;
}

PM_INSTANTIATE_FORWARD(grad_norm)
