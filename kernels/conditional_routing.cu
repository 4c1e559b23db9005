// conditional_routing.cu: contract in csrc/ops/conditional_routing.h. A thread per token: 4 B T bytes are
// written; the label of an image is read by its threads, from the cache.
#include "common.cuh"

namespace {

__global__ void part_kernel(int64_t count, int64_t T, const int64_t *__restrict__ y,
                            int64_t null_label, int32_t group, int32_t *__restrict__ part)
{
    const int64_t i = pm_thread();
    if (i < count)
        part[i] = y[i / T] == null_label ? group : -1;
}

} // namespace

template <class T>
size_t conditional_routing_workspace(const pm_ctx *, const pm_conditional_routing_args *, bool)
{
    return 0;
}

template <class T>
pm_status conditional_routing_forward(pm_ctx *ctx, const pm_conditional_routing_args *g, void *)
{
    if (g->group < -1 || g->group > INT32_MAX)
        return pm_fail(ctx, PM_EINVAL,
                       "conditional_routing: group is %lld, expected -1 or a plan group",
                       (long long)g->group);
    PM_RUN(ctx, part_kernel, pm_blocks(g->B * g->T, 256), 256, 0, g->B * g->T, g->T, g->y,
           g->null_label, (int32_t)g->group, g->part);
    return PM_OK;
}

PM_INSTANTIATE_FORWARD(conditional_routing)
