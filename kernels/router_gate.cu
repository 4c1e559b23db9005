// router_gate.cu: contract in csrc/ops/router_gate.h. A part of a warp per token (rows.cuh). forward: z is
// read, s written, 8 N E bytes (softmax: z comes three times, twice of them from the cache); backward:
// s and ds read, dz read and written, 16 N E bytes. Of tokens that are not routable nothing is read.
//
// Sums over the experts: a lane adds every lanes-th, then a tree.
#include "rows.cuh"

namespace {

__global__ void __launch_bounds__(PM_ROW_THREADS)
    forward_kernel(int64_t N, int64_t E, int lanes, int gate, const float *__restrict__ z,
                   const int32_t *__restrict__ part, float *__restrict__ s)
{
    const pm_row at = pm_row_of(lanes);
    const bool there = at.row < N, routable = there && (!part || part[at.row] == -1);
    const float *const from = z + at.row * E;
    float *const to = s + at.row * E;
    float largest = -INFINITY, sum = 0;
    if (gate == PM_GATE_SOFTMAX) { // all lanes of the warp are here
        if (routable)
            for (int64_t i = at.lane; i < E; i += lanes)
                largest = fmaxf(largest, from[i]);
        largest = pm_row_max(largest, lanes);
        if (routable)
            for (int64_t i = at.lane; i < E; i += lanes)
                sum += expf(from[i] - largest);
        sum = pm_row_sum(sum, lanes);
    }
    if (!there)
        return;
    for (int64_t i = at.lane; i < E; i += lanes)
        to[i] = !routable                 ? 0.0f
                : gate == PM_GATE_SIGMOID ? pm_sigmoid_of(from[i])
                : gate == PM_GATE_SOFTMAX ? expf(from[i] - largest) / sum
                                          : from[i];
}

// identity  dz += ds
// sigmoid   dz += ds s (1 - s)
// softmax   dz += s (ds - sum_j ds_j s_j)
__global__ void __launch_bounds__(PM_ROW_THREADS)
    backward_kernel(int64_t N, int64_t E, int lanes, int gate, const int32_t *__restrict__ part,
                    const float *__restrict__ s, const float *__restrict__ ds,
                    float *__restrict__ dz)
{
    const pm_row at = pm_row_of(lanes);
    const bool routable = at.row < N && (!part || part[at.row] == -1);
    const int64_t first = at.row * E;
    float mean = 0;
    if (gate == PM_GATE_SOFTMAX) {
        if (routable)
            for (int64_t i = at.lane; i < E; i += lanes)
                mean = fmaf(ds[first + i], s[first + i], mean);
        mean = pm_row_sum(mean, lanes);
    }
    if (!routable)
        return;
    for (int64_t i = at.lane; i < E; i += lanes) {
        const float d = ds[first + i];
        float *const to = dz + first + i;
        if (gate == PM_GATE_IDENTITY)
            *to += d;
        else if (gate == PM_GATE_SIGMOID)
            *to = fmaf(d, s[first + i] * (1.0f - s[first + i]), *to);
        else
            *to = fmaf(s[first + i], d - mean, *to);
    }
}

} // namespace

template <class T> size_t router_gate_workspace(const pm_ctx *, const pm_router_gate_args *, bool)
{
    return 0;
}

template <class T> pm_status router_gate_forward(pm_ctx *ctx, const pm_router_gate_args *g, void *)
{
    const int lanes = pm_row_lanes(g->E);
    PM_RUN(ctx, forward_kernel, pm_row_blocks(g->N, lanes), PM_ROW_THREADS, 0, g->N, g->E, lanes,
           g->gate, g->z, g->part, g->s);
    return PM_OK;
}

template <class T>
pm_status router_gate_backward(pm_ctx *ctx, const pm_router_gate_args *g,
                               const pm_router_gate_grads *d, void *)
{
    const int lanes = pm_row_lanes(g->E);
    if (d->dz)
        PM_RUN(ctx, backward_kernel, pm_row_blocks(g->N, lanes), PM_ROW_THREADS, 0, g->N, g->E,
               lanes, g->gate, g->part, g->s, d->ds, d->dz);
    return PM_OK;
}

PM_INSTANTIATE_BOTH(router_gate)
