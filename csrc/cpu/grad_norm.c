/* grad_norm: contract in ops/grad_norm.h. */

enum { GRAD_NORM_BLOCK = 65536 };
/* Floats ahead that are fetched into L2, and from there into L1: 16 KB and 1 KB. Without them the
 * hardware's own fetching stops at every page, and a core reads at 60 % of its bandwidth. */
enum { GRAD_NORM_FAR = 4096, GRAD_NORM_NEAR = 256 };

typedef struct {
    const pm_grad_norm_args *g;
    double *sums; /* (tasks) */
} grad_norm_job;

static size_t grad_norm_workspace(const pm_ctx *ctx, const pm_grad_norm_args *g, bool backward)
{
    (void)ctx, (void)backward;
    return pm_round64((size_t)pm_blocks(g->M, GRAD_NORM_BLOCK) * sizeof(double));
}

/* The product of two floats is exact in double. Sixteen partial sums side by side, so that the
 * chain of additions does not set the pace; the same ones on every level, so the same bits.
 * The compiler does not find the vectors by itself. */
enum { GRAD_NORM_LANES = PM_WIDTH / 2, GRAD_NORM_SUMS = 16 / GRAD_NORM_LANES };
typedef double grad_norm_vd __attribute__((vector_size(8 * GRAD_NORM_LANES)));
typedef float grad_norm_vf __attribute__((vector_size(4 * GRAD_NORM_LANES), aligned(4), may_alias));

static void grad_norm_task(void *arg, int64_t task, int worker)
{
    (void)worker;
    const grad_norm_job *const job = arg;
    const float *const x = job->g->g + task * GRAD_NORM_BLOCK;
    const int64_t n = pm_min(GRAD_NORM_BLOCK, job->g->M - task * GRAD_NORM_BLOCK);
    grad_norm_vd sum[GRAD_NORM_SUMS] = {0};
    int64_t i = 0;
    for (; i + 16 <= n; i += 16) {
        __builtin_prefetch(x + i + GRAD_NORM_FAR, 0, 2);
        __builtin_prefetch(x + i + GRAD_NORM_NEAR);
        _Pragma("GCC unroll 8")
        for (int k = 0; k < GRAD_NORM_SUMS; k++) {
            const grad_norm_vf *from = (const grad_norm_vf *)(x + i + k * GRAD_NORM_LANES);
            const grad_norm_vd wide = __builtin_convertvector(*from, grad_norm_vd);
            sum[k] += wide * wide;
        }
    }
    double part[16];
    memcpy(part, sum, sizeof part);
    for (int k = 0; i < n; i++, k++)
        part[k] += (double)x[i] * (double)x[i];
    for (int half = 8; half; half /= 2)
        for (int k = 0; k < half; k++)
            part[k] += part[k + half];
    job->sums[task] = part[0];
}

static pm_status grad_norm_forward(pm_ctx *ctx, const pm_grad_norm_args *g, void *scratch)
{
    const int64_t tasks = pm_blocks(g->M, GRAD_NORM_BLOCK);
    grad_norm_job job = {g, scratch};
    pm_parallel(ctx->pool, tasks, grad_norm_task, &job);
    double sum = 0;
    for (int64_t task = 0; task < tasks; task++)
        sum += job.sums[task];
    *g->norm = sqrt(sum);
    return PM_OK;
}
