// mse_loss.cu: contract in csrc/ops/mse_loss.h. forward: pred (its first C channels) and target read
// once; blocks of 256 threads sum 16384 squares in double into a slot each, one block adds the slots, in
// order. backward: one pass.
#include "common.cuh"

namespace {

constexpr int64_t SQUARES = 16384; // of a block

// sums[block]: a thread adds every 256th square, a tree the threads.
__global__ void __launch_bounds__(256)
    part_kernel(int64_t count, int64_t used, int64_t all, const float *__restrict__ pred,
                const float *__restrict__ target, double *__restrict__ sums)
{
    __shared__ double part[32];
    const int64_t begin = blockIdx.x * SQUARES;
    const int64_t end = begin + SQUARES < count ? begin + SQUARES : count;
    double sum = 0;
    for (int64_t i = begin + threadIdx.x; i < end; i += 256) {
        const double e = pred[i / used * all + i % used] - target[i];
        sum += e * e;
    }
    sum = pm_block_sum(sum, part);
    if (threadIdx.x == 0)
        sums[blockIdx.x] = sum;
}

__global__ void __launch_bounds__(256)
    total_kernel(int64_t count, int64_t parts, const double *__restrict__ sums,
                 float *__restrict__ loss)
{
    __shared__ double part[32];
    double sum = 0;
    for (int64_t i = threadIdx.x; i < parts; i += 256)
        sum += sums[i];
    sum = pm_block_sum(sum, part);
    if (threadIdx.x == 0)
        *loss = count ? (float)(sum / (double)count) : 0.0f;
}

__global__ void backward_kernel(int64_t count, int64_t used, int64_t all, double terms,
                                const float *__restrict__ pred, const float *__restrict__ target,
                                const float *__restrict__ dloss, float *__restrict__ dpred)
{
    const float scale = terms > 0 ? (float)(2.0 * *dloss / terms) : 0.0f;
    for (int64_t i = pm_thread(); i < count; i += pm_threads()) {
        const int64_t b = i / all, at = i % all;
        dpred[i] = at < used ? scale * (pred[i] - target[b * used + at]) : 0.0f;
    }
}

int64_t terms(const pm_mse_loss_args *g) { return g->B * g->C * g->V; }

} // namespace

template <class T>
size_t mse_loss_workspace(const pm_ctx *, const pm_mse_loss_args *g, bool backward)
{
    return backward ? 0 : pm_room(pm_blocks(terms(g), SQUARES), sizeof(double));
}

template <class T> pm_status mse_loss_forward(pm_ctx *ctx, const pm_mse_loss_args *g, void *scratch)
{
    const unsigned parts = pm_blocks(terms(g), SQUARES);
    double *const sums = pm_take<double>(&scratch, parts);
    PM_RUN(ctx, part_kernel, parts, 256, 0, terms(g), g->C * g->V, g->M * g->V, g->pred, g->target,
           sums);
    PM_RUN(ctx, total_kernel, 1, 256, 0, terms(g), (int64_t)parts, sums, g->loss);
    return PM_OK;
}

template <class T>
pm_status mse_loss_backward(pm_ctx *ctx, const pm_mse_loss_args *g, const pm_mse_loss_grads *d,
                            void *)
{
    const int64_t count = d->dpred ? g->B * g->M * g->V : 0;
    PM_RUN(ctx, backward_kernel, pm_blocks(count, 1024), 256, 0, count, g->C * g->V, g->M * g->V,
           (double)terms(g), g->pred, g->target, d->dloss, d->dpred);
    return PM_OK;
}

PM_INSTANTIATE_BOTH(mse_loss)
