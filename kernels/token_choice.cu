// token_choice.cu: contract in csrc/ops/token_choice.h. A part of a warp per token (rows.cuh). forward: s is
// read once from memory and A times from the cache, choice and weight are written: 4 N E + 8 N A bytes.
// backward: a thread per score of the row looks its expert up among the A choices: 4 N E bytes written,
// 8 N A read.
//
// The a-th best is the largest of what comes after the (a-1)-th in one order of all scores: a number per
// score, its rank above its index turned around. So no lane has to remember what is taken, no two are
// equal, and the order in which lanes are compared means nothing.
#include "rows.cuh"

namespace {

// Ascending with the scores; a NaN below everything, -0 as 0. Equal ones: the lower index is larger.
// Never 0, which is nobody's.
PM_DEVICE unsigned long long key_of(float score, int64_t index)
{
    uint32_t bits = __float_as_uint(score == 0 ? 0.0f : score);
    bits ^= bits >> 31 ? 0xffffffffu : 0x80000000u;
    const unsigned long long rank = score == score ? bits : 0;
    return rank << 32 | (0xffffffffu - (uint32_t)index);
}
PM_DEVICE int32_t index_of(unsigned long long key)
{
    return (int32_t)(0xffffffffu - (uint32_t)key);
}

__global__ void __launch_bounds__(PM_ROW_THREADS)
    forward_kernel(int64_t N, int64_t E, int64_t A, int lanes, const float *__restrict__ s,
                   const int32_t *__restrict__ part, int32_t *__restrict__ choice,
                   float *__restrict__ weight)
{
    const pm_row at = pm_row_of(lanes);
    const bool there = at.row < N;
    const int32_t group = there && part ? part[at.row] : -1;
    const float *const scores = s + at.row * E;
    unsigned long long last = ~0ull;
    for (int64_t a = 0; a < A; a++) {
        unsigned long long best = 0;
        if (there && group == -1)
            for (int64_t i = at.lane; i < E; i += lanes) {
                const unsigned long long key = key_of(scores[i], i);
                best = key < last && key > best ? key : best;
            }
        last = pm_row_max(best, lanes);
        if (!there || at.lane != 0)
            continue;
        const bool forced = a == 0 && group >= 0;
        choice[at.row * A + a] = group == -1 ? index_of(last) : forced ? group : -1;
        weight[at.row * A + a] = group == -1 ? scores[index_of(last)] : forced ? 1.0f : 0.0f;
    }
}

// ds[n, choice[n, a]] = dweight[n, a]
__global__ void __launch_bounds__(PM_ROW_THREADS)
    backward_kernel(int64_t N, int64_t E, int64_t A, int lanes, const int32_t *__restrict__ part,
                    const int32_t *__restrict__ choice, const float *__restrict__ dweight,
                    float *__restrict__ ds, unsigned long long *fault)
{
    const pm_row at = pm_row_of(lanes);
    if (at.row >= N)
        return;
    const bool routable = !part || part[at.row] == -1;
    const int64_t first = at.row * A;
    if (routable)
        for (int64_t a = at.lane; a < A; a += lanes)
            if (choice[first + a] < 0 || choice[first + a] >= E)
                pm_fault(fault, PM_FAULT_CHOICE, first + a);
    for (int64_t i = at.lane; i < E; i += lanes) {
        float d = 0;
        if (routable)
            for (int64_t a = 0; a < A; a++)
                d = choice[first + a] == i ? dweight[first + a] : d;
        ds[at.row * E + i] = d;
    }
}

} // namespace

template <class T> size_t token_choice_workspace(const pm_ctx *, const pm_token_choice_args *, bool)
{
    return 0;
}

template <class T>
pm_status token_choice_forward(pm_ctx *ctx, const pm_token_choice_args *g, void *)
{
    if (g->A < 1 || g->A > g->E)
        return pm_fail(ctx, PM_EINVAL, "token_choice: A is %lld, expected 1 to E = %lld",
                       (long long)g->A, (long long)g->E);
    if (g->E > INT32_MAX)
        return pm_fail(ctx, PM_EINVAL, "token_choice: E is %lld, at most 2^31 - 1",
                       (long long)g->E);
    const int lanes = pm_row_lanes(g->E);
    PM_RUN(ctx, forward_kernel, pm_row_blocks(g->N, lanes), PM_ROW_THREADS, 0, g->N, g->E, g->A,
           lanes, g->s, g->part, g->choice, g->weight);
    return PM_OK;
}

template <class T>
pm_status token_choice_backward(pm_ctx *ctx, const pm_token_choice_args *g,
                                const pm_token_choice_grads *d, void *)
{
    const int lanes = pm_row_lanes(g->E);
    if (d->ds)
        PM_RUN(ctx, backward_kernel, pm_row_blocks(g->N, lanes), PM_ROW_THREADS, 0, g->N, g->E,
               g->A, lanes, g->part, g->choice, d->dweight, d->ds, pm_device().fault);
    return PM_OK;
}

PM_INSTANTIATE_BOTH(token_choice)
