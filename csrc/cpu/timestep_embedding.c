/* timestep_embedding: contract in ops/timestep_embedding.h. */

#define TIMESTEP_EMBEDDING_BLOCK 256 /* cosines per task */

typedef struct {
    const pm_timestep_embedding_args *g;
    int64_t frequencies; /* per task */
} timestep_embedding_job;

static size_t timestep_embedding_workspace(const pm_ctx *ctx, const pm_timestep_embedding_args *g,
                                           bool backward)
{
    (void)ctx, (void)g, (void)backward;
    return 0;
}

/* One task: a few frequencies, every image. */
static void timestep_embedding_task(void *arg, int64_t task, int worker)
{
    (void)worker;
    const timestep_embedding_job *j = arg;
    const pm_timestep_embedding_args *g = j->g;
    int64_t half = g->F / 2, end = pm_min(half, (task + 1) * j->frequencies);
    for (int64_t i = task * j->frequencies; i < end; i++) {
        double frequency = exp(-log(g->max_period) * (double)i / (double)half);
        for (int64_t b = 0; b < g->B; b++) {
            double angle = (double)g->t[b] * frequency;
            g->e[b * g->F + i] = (float)cos(angle);
            g->e[b * g->F + half + i] = (float)sin(angle);
        }
    }
}

static pm_status timestep_embedding_forward(pm_ctx *ctx, const pm_timestep_embedding_args *g,
                                            void *scratch)
{
    (void)scratch;
    if (g->F % 2)
        return pm_fail(ctx, PM_EINVAL, "timestep_embedding: F must be even, not %lld",
                       (long long)g->F);
    if (!g->B)
        return PM_OK;
    timestep_embedding_job job = {g, pm_max(1, TIMESTEP_EMBEDDING_BLOCK / g->B)};
    pm_parallel(ctx->pool, pm_blocks(g->F / 2, job.frequencies), timestep_embedding_task, &job);
    return PM_OK;
}
