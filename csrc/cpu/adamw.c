/* adamw: contract in ops/adamw.h. Bound by memory: every array is read once and written once. */

enum { ADAMW_BLOCK = 16384 };

/* What is the same for all elements, worked out in double. */
typedef struct {
    const pm_adamw_args *g;
    bool skip;
    float scale;             /* c, of the clip */
    float decay;             /* lr weight_decay */
    float beta1, beta1_rest; /* rest: 1 - beta */
    float beta2, beta2_rest;
    float step; /* lr / (1 - beta1^step) */
    float root; /* 1 / sqrt(1 - beta2^step) */
    float eps;
    float ema_rest; /* 1 - ema */
} adamw_job;

static size_t adamw_workspace(const pm_ctx *ctx, const pm_adamw_args *g, bool backward)
{
    (void)ctx, (void)g, (void)backward;
    return 0;
}

/* PM_WIDTH elements; p is updated in place and returned. */
static inline vf adamw_move(const adamw_job *job, vf p, vf g, vf *m, vf *v)
{
    g *= v_set(job->scale);
    *m = v_fma(v_set(job->beta1_rest), g, v_set(job->beta1) * *m);
    *v = v_fma(v_set(job->beta2_rest) * g, g, v_set(job->beta2) * *v);
    const vf size = v_fma(v_sqrt(*v), v_set(job->root), v_set(job->eps));
    p = v_fma(v_set(-job->decay), p, p);
    return v_fma(v_set(-job->step), *m / size, p);
}

/* The average moves by a part of what it lacks: exact when it lacks nothing. */
static inline vf adamw_average(const adamw_job *job, vf avg, vf p)
{
    return v_fma(v_set(job->ema_rest), p - avg, avg);
}

static void adamw_task(void *arg, int64_t task, int worker)
{
    (void)worker;
    const adamw_job *const job = arg;
    const pm_adamw_args *const a = job->g;
    const int64_t begin = task * ADAMW_BLOCK, end = pm_min(a->M, begin + ADAMW_BLOCK);
    int64_t i = begin;
    if (job->skip) {
        memset(a->grad + begin, 0, (size_t)(end - begin) * sizeof(float));
        return;
    }
    for (; i + PM_WIDTH <= end; i += PM_WIDTH) {
        vf m = v_load(a->m + i), v = v_load(a->v + i);
        const vf p = adamw_move(job, v_load(a->param + i), v_load(a->grad + i), &m, &v);
        v_store(a->param + i, p);
        v_store(a->m + i, m);
        v_store(a->v + i, v);
        v_store(a->grad + i, v_zero());
        if (a->avg)
            v_store(a->avg + i, adamw_average(job, v_load(a->avg + i), p));
    }
    if (i < end) {
        const int64_t n = end - i;
        vf m = v_load_n(a->m + i, n), v = v_load_n(a->v + i, n);
        const vf p = adamw_move(job, v_load_n(a->param + i, n), v_load_n(a->grad + i, n), &m, &v);
        v_store_n(a->param + i, p, n);
        v_store_n(a->m + i, m, n);
        v_store_n(a->v + i, v, n);
        v_store_n(a->grad + i, v_zero(), n);
        if (a->avg)
            v_store_n(a->avg + i, adamw_average(job, v_load_n(a->avg + i, n), p), n);
    }
}

static pm_status adamw_forward(pm_ctx *ctx, const pm_adamw_args *g, void *scratch)
{
    (void)scratch;
    const double *const h = g->hyper, norm = *g->norm;
    const double beta1 = h[PM_HYPER_BETA1], beta2 = h[PM_HYPER_BETA2], step = h[PM_HYPER_STEP];
    if (!(step >= 1) || !(beta1 >= 0 && beta1 < 1) || !(beta2 >= 0 && beta2 < 1))
        return pm_fail(ctx, PM_EINVAL,
                       "adamw: step %g must be at least 1, betas %g and %g in 0 <= beta < 1", step,
                       beta1, beta2);
    if (!isfinite(h[PM_HYPER_LR]) || !isfinite(h[PM_HYPER_WEIGHT_DECAY]) ||
        !(h[PM_HYPER_EPS] >= 0) || !(h[PM_HYPER_CLIP] >= 0) ||
        !(h[PM_HYPER_EMA] >= 0 && h[PM_HYPER_EMA] <= 1))
        return pm_fail(ctx, PM_EINVAL,
                       "adamw: lr and weight_decay must be finite, eps and clip at least 0, "
                       "ema in 0..1");
    const double clip = h[PM_HYPER_CLIP] / (norm + 1e-6);
    const adamw_job job = {
        .g = g,
        .skip = !isfinite(norm),
        .scale = h[PM_HYPER_CLIP] > 0 && clip < 1 ? (float)clip : 1,
        .decay = (float)(h[PM_HYPER_LR] * h[PM_HYPER_WEIGHT_DECAY]),
        .beta1 = (float)beta1,
        .beta1_rest = (float)(1 - beta1),
        .beta2 = (float)beta2,
        .beta2_rest = (float)(1 - beta2),
        .step = (float)(h[PM_HYPER_LR] / (1 - pow(beta1, step))),
        .root = (float)(1 / sqrt(1 - pow(beta2, step))),
        .eps = (float)h[PM_HYPER_EPS],
        .ema_rest = (float)(1 - h[PM_HYPER_EMA]),
    };
    pm_parallel(ctx->pool, pm_blocks(g->M, ADAMW_BLOCK), adamw_task, (void *)&job);
    return PM_OK;
}
