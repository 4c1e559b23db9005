// silu.cu: contract in csrc/ops/silu.h. One pass: x (and dy) read, y (or dx) written; 4 numbers a thread.
#include "common.cuh"

namespace {

template <class T>
__global__ void forward_kernel(int64_t count, const T *__restrict__ x, T *__restrict__ y)
{
    for (int64_t i = pm_thread(); i < count; i += pm_threads()) {
        const float value = pm_float(x[i]);
        y[i] = pm_to<T>(value * pm_sigmoid_of(value));
    }
}

// dy/dx = s + x s (1 - s)
template <class T>
__global__ void backward_kernel(int64_t count, const T *__restrict__ x, const T *__restrict__ dy,
                                T *__restrict__ dx)
{
    for (int64_t i = pm_thread(); i < count; i += pm_threads()) {
        const float value = pm_float(x[i]), s = pm_sigmoid_of(value);
        dx[i] = pm_to<T>(pm_float(dy[i]) * fmaf(value * s, 1.0f - s, s));
    }
}

} // namespace

template <class T> size_t silu_workspace(const pm_ctx *, const pm_silu_args *, bool) { return 0; }

template <class T> pm_status silu_forward(pm_ctx *ctx, const pm_silu_args *g, void *)
{
    const int64_t count = g->N * g->D;
    PM_RUN(ctx, forward_kernel<T>, pm_blocks(count, 1024), 256, 0, count,
           static_cast<const T *>(g->x), static_cast<T *>(g->y));
    return PM_OK;
}

template <class T>
pm_status silu_backward(pm_ctx *ctx, const pm_silu_args *g, const pm_silu_grads *d, void *)
{
    const int64_t count = d->dx ? g->N * g->D : 0;
    PM_RUN(ctx, backward_kernel<T>, pm_blocks(count, 1024), 256, 0, count,
           static_cast<const T *>(g->x), static_cast<const T *>(d->dy), static_cast<T *>(d->dx));
    return PM_OK;
}

PM_INSTANTIATE_BOTH(silu)
