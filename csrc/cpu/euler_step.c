/* euler_step: contract in ops/euler_step.h. */

enum { EULER_BLOCK = 16384 };

typedef struct {
    const pm_euler_step_args *g;
    float cfg, dsigma;
} euler_job;

static size_t euler_step_workspace(const pm_ctx *ctx, const pm_euler_step_args *g, bool backward)
{
    (void)ctx, (void)g, (void)backward;
    return 0;
}

/* A sample is a run of C V elements in x and y, the first of the M V in cond and uncond. */
static void euler_step_task(void *arg, int64_t task, int worker)
{
    (void)worker;
    const euler_job *const job = arg;
    const pm_euler_step_args *const g = job->g;
    const int64_t used = g->C * g->V, all = g->M * g->V;
    const int64_t end = pm_min(g->B * used, (task + 1) * EULER_BLOCK);
    const float cfg = job->cfg, dsigma = job->dsigma;
    for (int64_t i = task * EULER_BLOCK, n; i < end; i += n) {
        const int64_t from = i / used * all + i % used;
        const float *const x = g->x + i, *const cond = g->cond + from;
        float *const y = g->y + i; /* may be x */
        n = pm_min(used - i % used, end - i);
        if (g->uncond) {
            const float *const uncond = g->uncond + from;
            for (int64_t k = 0; k < n; k++)
                y[k] = x[k] + dsigma * (uncond[k] + cfg * (cond[k] - uncond[k]));
        } else
            for (int64_t k = 0; k < n; k++)
                y[k] = x[k] + dsigma * cond[k];
    }
}

static pm_status euler_step_forward(pm_ctx *ctx, const pm_euler_step_args *g, void *scratch)
{
    (void)scratch;
    const euler_job job = {g, (float)g->schedule[2], (float)(g->schedule[1] - g->schedule[0])};
    pm_parallel(ctx->pool, pm_blocks(g->B * g->C * g->V, EULER_BLOCK), euler_step_task,
                (void *)&job);
    return PM_OK;
}
