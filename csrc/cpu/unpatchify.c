/* unpatchify: contract in ops/unpatchify.h. A permutation over the patch grid of patch_embed.c. */

typedef struct {
    const pm_unpatchify_args *g;
    const pm_unpatchify_grads *d; /* NULL in forward */
    patch_grid patches;
    int64_t *offset; /* (P): patch_offsets */
} unpatchify_job;

#define UNPATCHIFY_ELEMENTS 16384 /* moved by a task, about */

static size_t unpatchify_workspace(const pm_ctx *ctx, const pm_unpatchify_args *g, bool backward)
{
    (void)ctx, (void)backward;
    return pm_round64((size_t)g->P * sizeof(int64_t));
}

static int64_t unpatchify_rows(const pm_unpatchify_args *g)
{
    return pm_max(1, UNPATCHIFY_ELEMENTS / pm_max(1, g->P));
}

static void unpatchify_task(void *arg, int64_t task, int worker)
{
    (void)worker;
    const unpatchify_job *job = arg;
    const pm_unpatchify_args *g = job->g;
    int64_t begin = task * unpatchify_rows(g),
            end = pm_min(g->B * g->T, begin + unpatchify_rows(g));
    for (int64_t n = begin; n < end; n++) {
        int64_t start = n / g->T * g->C * g->V + patch_origin(&job->patches, n % g->T);
        if (job->d)
            for (int64_t p = 0; p < g->P; p++)
                job->d->dx[n * g->P + p] = job->d->dy[start + job->offset[p]];
        else
            for (int64_t p = 0; p < g->P; p++)
                g->y[start + job->offset[p]] = g->x[n * g->P + p];
    }
}

static pm_status unpatchify_run(pm_ctx *ctx, const pm_unpatchify_args *g,
                                const pm_unpatchify_grads *d, void *scratch)
{
    const int64_t size[3] = {g->s0, g->s1, g->s2}, patch[3] = {g->p0, g->p1, g->p2};
    unpatchify_job job = {.g = g, .d = d, .offset = scratch};
    PM_TRY(patch_grid_make(ctx, "unpatchify", size, patch, g->C, g->V, g->T, g->P, &job.patches));
    patch_offsets(&job.patches, g->C, true, job.offset);
    pm_parallel(ctx->pool, pm_blocks(g->B * g->T, unpatchify_rows(g)), unpatchify_task, &job);
    return PM_OK;
}

/* y (B, C, V) = x (B*T, P), moved */
static pm_status unpatchify_forward(pm_ctx *ctx, const pm_unpatchify_args *g, void *scratch)
{
    return unpatchify_run(ctx, g, NULL, scratch);
}

/* dx = dy, moved back */
static pm_status unpatchify_backward(pm_ctx *ctx, const pm_unpatchify_args *g,
                                     const pm_unpatchify_grads *d, void *scratch)
{
    return d->dx ? unpatchify_run(ctx, g, d, scratch) : PM_OK;
}
