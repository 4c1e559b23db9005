/* silu: contract in ops/silu.h. */

#define SILU_BLOCK 16384 /* elements per task */

typedef struct {
    int64_t n;
    const float *x, *dy;
    float *out;
} silu_job;

static size_t silu_workspace(const pm_ctx *ctx, const pm_silu_args *g, bool backward)
{
    (void)ctx, (void)g, (void)backward;
    return 0;
}

/* y = x s, s = sigmoid(x) */
static void silu_forward_task(void *arg, int64_t task, int worker)
{
    (void)worker;
    const silu_job *j = arg;
    int64_t end = pm_min(j->n, (task + 1) * SILU_BLOCK);
    for (int64_t i = task * SILU_BLOCK; i < end; i += PM_WIDTH) {
        vf x = v_get(j->x + i, end - i);
        v_put(j->out + i, x * v_sigmoid(x), end - i);
    }
}

static pm_status silu_forward(pm_ctx *ctx, const pm_silu_args *g, void *scratch)
{
    (void)scratch;
    silu_job job = {g->N * g->D, g->x, NULL, g->y};
    pm_parallel(ctx->pool, pm_blocks(job.n, SILU_BLOCK), silu_forward_task, &job);
    return PM_OK;
}

/* dy/dx = s + x s (1 - s) */
static void silu_backward_task(void *arg, int64_t task, int worker)
{
    (void)worker;
    const silu_job *j = arg;
    int64_t end = pm_min(j->n, (task + 1) * SILU_BLOCK);
    for (int64_t i = task * SILU_BLOCK; i < end; i += PM_WIDTH) {
        vf x = v_get(j->x + i, end - i), s = v_sigmoid(x);
        vf slope = v_fma(x * s, v_set(1.0f) - s, s);
        v_put(j->out + i, v_get(j->dy + i, end - i) * slope, end - i);
    }
}

static pm_status silu_backward(pm_ctx *ctx, const pm_silu_args *g, const pm_silu_grads *d,
                               void *scratch)
{
    (void)scratch;
    if (!d->dx)
        return PM_OK;
    silu_job job = {g->N * g->D, g->x, d->dy, d->dx};
    pm_parallel(ctx->pool, pm_blocks(job.n, SILU_BLOCK), silu_backward_task, &job);
    return PM_OK;
}
