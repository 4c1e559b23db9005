/* rectified_flow: contract in ops/rectified_flow.h. Tasks and noise: gaussian_noise.c. */

typedef struct {
    const pm_rectified_flow_args *g;
    float *s;     /* (B): the time of each sample, 0..1 */
    int64_t *bad; /* (tasks): the first sample with an element that is not finite, or B */
} flow_job;

static size_t rectified_flow_workspace(const pm_ctx *ctx, const pm_rectified_flow_args *g,
                                       bool backward)
{
    (void)ctx, (void)backward;
    return pm_round64((size_t)g->B * sizeof(float)) +
           pm_round64((size_t)noise_tasks(g->B, g->C * g->V) * sizeof(int64_t));
}

static bool flow_finite(const float *x, int64_t n)
{
    int32_t bad = 0;
    for (int64_t i = 0; i < n; i++)
        bad |= (pm_float_bits(x[i]) & 0x7fffffff) >= 0x7f800000;
    return !bad;
}

static void flow_check_task(void *arg, int64_t task, int worker)
{
    (void)worker;
    const flow_job *const job = arg;
    const pm_rectified_flow_args *const g = job->g;
    const int64_t M = g->C * g->V;
    const noise_range at = noise_place(g->B, M, task);
    int64_t b = at.b;
    while (b < at.b_end && flow_finite(g->x0 + b * M + at.i, at.n))
        b++;
    job->bad[task] = b < at.b_end ? b : g->B;
}

static pm_status flow_check(pm_ctx *ctx, const flow_job *job)
{
    const pm_rectified_flow_args *const g = job->g;
    if (!isfinite(g->logit_mean) || !isfinite(g->logit_std) || !isfinite(g->sigmoid_scale))
        return pm_fail(ctx, PM_EINVAL,
                       "rectified_flow: logit_mean, logit_std and sigmoid_scale must be finite");
    if (!(g->shift > 0 && isfinite(g->shift)))
        return pm_fail(ctx, PM_EINVAL, "rectified_flow: shift must be above 0, got %g", g->shift);
    if (!(g->drop_prob >= 0 && g->drop_prob <= 1))
        return pm_fail(ctx, PM_EINVAL, "rectified_flow: drop_prob must be in 0..1, got %g",
                       g->drop_prob);
    for (int64_t b = 0; b < g->B; b++)
        if (g->y[b] < 0 || g->y[b] > g->null_label)
            return pm_fail(ctx, PM_EINVAL, "rectified_flow: y[%lld] is %lld, not in 0..%lld",
                           (long long)b, (long long)g->y[b], (long long)g->null_label);
    const int64_t tasks = noise_tasks(g->B, g->C * g->V);
    pm_parallel(ctx->pool, tasks, flow_check_task, (void *)job);
    int64_t bad = g->B;
    for (int64_t task = 0; task < tasks; task++)
        bad = pm_min(bad, job->bad[task]);
    if (bad < g->B)
        return pm_fail(ctx, PM_EDATA, "rectified_flow: x0[%lld] has an element that is not finite",
                       (long long)bad);
    return PM_OK;
}

/* s in 0..1, the time of one sample. No product is added but in an fmaf (base/fmath.h). */
static float flow_time(const pm_rectified_flow_args *g, int64_t position)
{
    uint32_t word[4];
    pm_philox(g->key[0], PM_STREAM_TIME, position, 0, word);
    float u = pm_unit(word[0]);
    if (g->density == PM_DENSITY_LOGIT_NORMAL) {
        float n, other;
        pm_normal_pair(word[0], word[1], &n, &other);
        u = pm_sigmoid((float)g->sigmoid_scale *
                       fmaf((float)g->logit_std, n, (float)g->logit_mean));
    } else if (g->density == PM_DENSITY_MODE) {
        float sine, cosine;
        pm_sincos2pi(0.25f * u, &sine, &cosine);
        u = fmaf(-1.29f, fmaf(cosine, cosine, u - 1.0f), 1.0f - u);
        u = u < 0 ? 0 : u > 1 ? 1 : u; /* rounding, next to 0 and 1 */
    }
    return (float)g->shift * u / fmaf((float)(g->shift - 1), u, 1.0f);
}

static void flow_task(void *arg, int64_t task, int worker)
{
    (void)worker;
    const flow_job *const job = arg;
    const pm_rectified_flow_args *const g = job->g;
    const int64_t M = g->C * g->V;
    const noise_range at = noise_place(g->B, M, task);
    for (int64_t b = at.b; b < at.b_end; b++) {
        const float s = job->s[b], *const x0 = g->x0 + b * M + at.i;
        float *const xt = g->xt + b * M + at.i, *const target = g->target + b * M + at.i;
        noise_draws(g->key[0], PM_STREAM_NOISE, noise_position(g->key, b), at.i, at.n, target);
        for (int64_t i = 0; i < at.n; i++) {
            xt[i] = (1 - s) * x0[i] + s * target[i];
            target[i] -= x0[i];
        }
    }
}

static pm_status rectified_flow_forward(pm_ctx *ctx, const pm_rectified_flow_args *g, void *scratch)
{
    const int64_t tasks = noise_tasks(g->B, g->C * g->V);
    flow_job job = {.g = g};
    job.s = pm_take(&scratch, (size_t)g->B * sizeof(float));
    job.bad = pm_take(&scratch, (size_t)tasks * sizeof(int64_t));
    PM_TRY(flow_check(ctx, &job));

    for (int64_t b = 0; b < g->B; b++) {
        const int64_t position = noise_position(g->key, b);
        uint32_t word[4];
        pm_philox(g->key[0], PM_STREAM_DROP, position, 0, word);
        job.s[b] = flow_time(g, position);
        g->t[b] = 1000 * job.s[b];
        g->label[b] = pm_unit(word[0]) < g->drop_prob ? g->null_label : g->y[b];
    }
    pm_parallel(ctx->pool, tasks, flow_task, &job);
    return PM_OK;
}
