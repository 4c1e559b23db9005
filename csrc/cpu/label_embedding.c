/* label_embedding: contract in ops/label_embedding.h. */

#define LABEL_EMBEDDING_BLOCK 16384 /* elements per task */

typedef struct {
    const pm_label_embedding_args *g;
    const pm_label_embedding_grads *d;
    int64_t columns; /* per task; a multiple of a cache line */
} label_embedding_job;

static size_t label_embedding_workspace(const pm_ctx *ctx, const pm_label_embedding_args *g,
                                        bool backward)
{
    (void)ctx, (void)g, (void)backward;
    return 0;
}

/* All labels are checked before anything is written. */
static pm_status label_embedding_check(pm_ctx *ctx, const pm_label_embedding_args *g)
{
    for (int64_t b = 0; b < g->B; b++)
        if (g->y[b] < 0 || g->y[b] >= g->Y)
            return pm_fail(ctx, PM_EINVAL, "label_embedding: y[%lld] is %lld, expected 0..%lld",
                           (long long)b, (long long)g->y[b], (long long)g->Y - 1);
    return PM_OK;
}

/* Tasks own columns: two images of one class add to the same row of dtable, in the order of b. */
static label_embedding_job label_embedding_cut(const pm_label_embedding_args *g,
                                               const pm_label_embedding_grads *d)
{
    return (label_embedding_job){g, d, pm_blocks(LABEL_EMBEDDING_BLOCK, pm_max(1, g->B) * 16) * 16};
}

static void label_embedding_forward_task(void *arg, int64_t task, int worker)
{
    (void)worker;
    const label_embedding_job *j = arg;
    const pm_label_embedding_args *g = j->g;
    int64_t D = g->D, start = task * j->columns, end = pm_min(D, start + j->columns);
    for (int64_t b = 0; b < g->B; b++) {
        const float *row = g->table + g->y[b] * D;
        if (g->add)
            for (int64_t i = start; i < end; i++)
                g->c[b * D + i] = g->add[b * D + i] + row[i];
        else
            memcpy(g->c + b * D + start, row + start, (size_t)(end - start) * sizeof(float));
    }
}

static pm_status label_embedding_forward(pm_ctx *ctx, const pm_label_embedding_args *g,
                                         void *scratch)
{
    (void)scratch;
    PM_TRY(label_embedding_check(ctx, g));
    label_embedding_job job = label_embedding_cut(g, NULL);
    pm_parallel(ctx->pool, pm_blocks(g->D, job.columns), label_embedding_forward_task, &job);
    return PM_OK;
}

static void label_embedding_backward_task(void *arg, int64_t task, int worker)
{
    (void)worker;
    const label_embedding_job *j = arg;
    const pm_label_embedding_args *g = j->g;
    const pm_label_embedding_grads *d = j->d;
    int64_t D = g->D, start = task * j->columns, end = pm_min(D, start + j->columns);
    for (int64_t b = 0; b < g->B; b++) {
        const float *dc = d->dc + b * D;
        if (d->dtable) {
            float *row = d->dtable + g->y[b] * D;
            for (int64_t i = start; i < end; i++)
                row[i] += dc[i];
        }
        if (d->dadd)
            memmove(d->dadd + b * D + start, dc + start, (size_t)(end - start) * sizeof(float));
    }
}

static pm_status label_embedding_backward(pm_ctx *ctx, const pm_label_embedding_args *g,
                                          const pm_label_embedding_grads *d, void *scratch)
{
    (void)scratch;
    PM_TRY(label_embedding_check(ctx, g));
    label_embedding_job job = label_embedding_cut(g, d);
    pm_parallel(ctx->pool, pm_blocks(g->D, job.columns), label_embedding_backward_task, &job);
    return PM_OK;
}
