/* mse_loss: contract in ops/mse_loss.h. The first C of the M channels of a sample lie together, so
 * a sample is a run of C V elements of the M V in pred, and all of target. */

enum { MSE_BLOCK = 16384 };

typedef struct {
    const pm_mse_loss_args *g;
    double *sums; /* (tasks) */
    float *dpred;
    float scale; /* 2 dloss / (B C V) */
} mse_job;

static size_t mse_loss_workspace(const pm_ctx *ctx, const pm_mse_loss_args *g, bool backward)
{
    (void)ctx;
    return backward ? 0
                    : pm_round64((size_t)pm_blocks(g->B * g->C * g->V, MSE_BLOCK) * sizeof(double));
}

/* Eight partial sums side by side: the same ones on every level, so the same bits. */
static double mse_sum(const float *pred, const float *target, int64_t n)
{
    double part[8] = {0};
    int64_t i = 0;
    for (; i + 8 <= n; i += 8)
        for (int k = 0; k < 8; k++) {
            const double e = pred[i + k] - target[i + k];
            part[k] += e * e;
        }
    for (int k = 0; i < n; i++, k++) {
        const double e = pred[i] - target[i];
        part[k] += e * e;
    }
    return ((part[0] + part[4]) + (part[2] + part[6])) +
           ((part[1] + part[5]) + (part[3] + part[7]));
}

static void mse_forward_task(void *arg, int64_t task, int worker)
{
    (void)worker;
    const mse_job *const job = arg;
    const pm_mse_loss_args *const g = job->g;
    const int64_t used = g->C * g->V, all = g->M * g->V;
    const int64_t end = pm_min(g->B * used, (task + 1) * MSE_BLOCK);
    double sum = 0;
    for (int64_t i = task * MSE_BLOCK, n; i < end; i += n) {
        const int64_t b = i / used, at = i % used;
        n = pm_min(used - at, end - i);
        sum += mse_sum(g->pred + b * all + at, g->target + i, n);
    }
    job->sums[task] = sum;
}

static pm_status mse_loss_forward(pm_ctx *ctx, const pm_mse_loss_args *g, void *scratch)
{
    const int64_t count = g->B * g->C * g->V, tasks = pm_blocks(count, MSE_BLOCK);
    mse_job job = {.g = g, .sums = scratch};
    pm_parallel(ctx->pool, tasks, mse_forward_task, &job);
    double sum = 0;
    for (int64_t task = 0; task < tasks; task++)
        sum += job.sums[task];
    *g->loss = count ? (float)(sum / (double)count) : 0;
    return PM_OK;
}

static void mse_backward_task(void *arg, int64_t task, int worker)
{
    (void)worker;
    const mse_job *const job = arg;
    const pm_mse_loss_args *const g = job->g;
    const int64_t used = g->C * g->V, all = g->M * g->V;
    const int64_t end = pm_min(g->B * all, (task + 1) * MSE_BLOCK);
    for (int64_t i = task * MSE_BLOCK, n; i < end; i += n) {
        const int64_t b = i / all, at = i % all;
        float *const dpred = job->dpred + i;
        if (at < used) {
            n = pm_min(used - at, end - i);
            const float *const pred = g->pred + i, *const target = g->target + b * used + at;
            for (int64_t k = 0; k < n; k++)
                dpred[k] = job->scale * (pred[k] - target[k]);
        } else {
            n = pm_min(all - at, end - i);
            memset(dpred, 0, (size_t)n * sizeof(float));
        }
    }
}

static pm_status mse_loss_backward(pm_ctx *ctx, const pm_mse_loss_args *g,
                                   const pm_mse_loss_grads *d, void *scratch)
{
    (void)scratch;
    if (!d->dpred)
        return PM_OK;
    const double count = (double)(g->B * g->C * g->V);
    mse_job job = {.g = g, .dpred = d->dpred};
    job.scale = count > 0 ? (float)(2.0 * *d->dloss / count) : 0;
    pm_parallel(ctx->pool, pm_blocks(g->B * g->M * g->V, MSE_BLOCK), mse_backward_task, &job);
    return PM_OK;
}
