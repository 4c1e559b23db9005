// timestep_embedding.cu: contract in csrc/ops/timestep_embedding.h. A thread per angle, in double: B*F/2 of
// them are too few to matter.
#include "common.cuh"

namespace {

template <class T>
__global__ void forward_kernel(int64_t B, int64_t half, double log_period,
                               const float *__restrict__ t, T *__restrict__ e)
{
    const int64_t k = pm_thread();
    if (k >= B * half)
        return;
    const int64_t b = k / half, i = k % half;
    const double angle = (double)t[b] * exp(-log_period * (double)i / (double)half);
    e[b * 2 * half + i] = pm_to<T>((float)cos(angle));
    e[b * 2 * half + half + i] = pm_to<T>((float)sin(angle));
}

} // namespace

template <class T>
size_t timestep_embedding_workspace(const pm_ctx *, const pm_timestep_embedding_args *, bool)
{
    return 0;
}

template <class T>
pm_status timestep_embedding_forward(pm_ctx *ctx, const pm_timestep_embedding_args *g, void *)
{
    if (g->F % 2)
        return pm_fail(ctx, PM_EINVAL, "timestep_embedding: F must be even, not %lld",
                       (long long)g->F);
    PM_RUN(ctx, forward_kernel<T>, pm_blocks(g->B * (g->F / 2), 256), 256, 0, g->B, g->F / 2,
           log(g->max_period), g->t, static_cast<T *>(g->e));
    return PM_OK;
}

PM_INSTANTIATE_FORWARD(timestep_embedding)
