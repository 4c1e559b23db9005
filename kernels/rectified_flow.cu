// rectified_flow.cu: contract in csrc/ops/rectified_flow.h; every bit as on a CPU. First a thread per
// sample draws its time and label, then a thread per Philox block draws four numbers of noise and
// reads x0, writes xt and target once.
#include <cmath>

#include "noise.cuh"

namespace {

struct settings {
    int density;
    float logit_mean, logit_std, sigmoid_scale, shift, shift_less_one;
    double drop_prob;
    int64_t null_label;
};

// s in 0..1. No product is added but in an fmaf (csrc/base/fmath.h).
PM_DEVICE float time_of(const settings &g, int64_t seed, int64_t position)
{
    uint32_t w[4];
    pm_philox_words(seed, PM_STREAM_TIME, position, 0, w);
    float u = pm_unit(w[0]);
    if (g.density == PM_DENSITY_LOGIT_NORMAL) {
        float n, other;
        pm_normal_pair(w[0], w[1], &n, &other);
        u = pm_sigmoid(PM_PRODUCT(g.sigmoid_scale, fmaf(g.logit_std, n, g.logit_mean)));
    } else if (g.density == PM_DENSITY_MODE) {
        float sine, cosine;
        pm_sincos2pi(0.25f * u, &sine, &cosine);
        u = fmaf(-1.29f, fmaf(cosine, cosine, u - 1.0f), 1.0f - u);
        u = u < 0 ? 0 : u > 1 ? 1 : u;
    }
    return PM_PRODUCT(g.shift, u) / fmaf(g.shift_less_one, u, 1.0f);
}

__global__ void sample_kernel(int64_t B, settings g, const int64_t *__restrict__ key,
                              const int64_t *__restrict__ y, float *__restrict__ s,
                              float *__restrict__ t, int64_t *__restrict__ label,
                              unsigned long long *fault)
{
    const int64_t b = pm_thread();
    if (b >= B)
        return;
    const int64_t position = pm_position(key, b);
    if (y[b] < 0 || y[b] > g.null_label)
        pm_fault(fault, PM_FAULT_FLOW_LABEL, b);
    uint32_t w[4];
    pm_philox_words(key[0], PM_STREAM_DROP, position, 0, w);
    s[b] = time_of(g, key[0], position);
    t[b] = PM_PRODUCT(1000.0f, s[b]);
    label[b] = pm_unit(w[0]) < g.drop_prob ? g.null_label : y[b];
}

__global__ void mix_kernel(int64_t B, int64_t M, const int64_t *__restrict__ key,
                           const float *__restrict__ s, const float *__restrict__ x0,
                           float *__restrict__ xt, float *__restrict__ target,
                           unsigned long long *fault)
{
    const int64_t blocks = (M + 3) / 4, k = pm_thread(), b = k / blocks, block = k % blocks;
    if (b >= B)
        return;
    float noise[4];
    pm_normal_draws(key[0], PM_STREAM_NOISE, pm_position(key, b), (uint32_t)block, noise);
    const float sb = s[b];
#pragma unroll
    for (int i = 0; i < 4; i++) {
        const int64_t at = b * M + 4 * block + i;
        if (4 * block + i >= M)
            break;
        const float x = x0[at];
        if (!isfinite(x))
            pm_fault(fault, PM_FAULT_FLOW_DATA, b);
        xt[at] = PM_PRODUCT(1 - sb, x) + PM_PRODUCT(sb, noise[i]);
        target[at] = noise[i] - x;
    }
}

pm_status check(pm_ctx *ctx, const pm_rectified_flow_args *g)
{
    if (!std::isfinite(g->logit_mean) || !std::isfinite(g->logit_std) ||
        !std::isfinite(g->sigmoid_scale))
        return pm_fail(ctx, PM_EINVAL,
                       "rectified_flow: logit_mean, logit_std and sigmoid_scale must be finite");
    if (!(g->shift > 0 && std::isfinite(g->shift)))
        return pm_fail(ctx, PM_EINVAL, "rectified_flow: shift must be above 0, got %g", g->shift);
    if (!(g->drop_prob >= 0 && g->drop_prob <= 1))
        return pm_fail(ctx, PM_EINVAL, "rectified_flow: drop_prob must be in 0..1, got %g",
                       g->drop_prob);
    return PM_OK;
}

} // namespace

template <class T>
size_t rectified_flow_workspace(const pm_ctx *, const pm_rectified_flow_args *g, bool)
{
    return pm_room(g->B, sizeof(float));
}

template <class T>
pm_status rectified_flow_forward(pm_ctx *ctx, const pm_rectified_flow_args *g, void *scratch)
{
    PM_TRY(check(ctx, g));
    const int64_t M = g->C * g->V;
    float *const s = pm_take<float>(&scratch, g->B);
    const settings set = {
        g->density,      (float)g->logit_mean,  (float)g->logit_std, (float)g->sigmoid_scale,
        (float)g->shift, (float)(g->shift - 1), g->drop_prob,        g->null_label};
    PM_RUN(ctx, sample_kernel, pm_blocks(g->B, 128), 128, 0, g->B, set, g->key, g->y, s, g->t,
           g->label, pm_device().fault);
    PM_RUN(ctx, mix_kernel, pm_blocks(g->B * ((M + 3) / 4), 256), 256, 0, g->B, M, g->key, s, g->x0,
           g->xt, g->target, pm_device().fault);
    return PM_OK;
}

PM_INSTANTIATE_FORWARD(rectified_flow)
