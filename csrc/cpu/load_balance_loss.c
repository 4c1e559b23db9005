/* load_balance_loss: contract in ops/load_balance_loss.h.
 *
 * Counts and sums are taken per image; "batch" then adds the images. */

#define LOAD_BALANCE_LOSS_TOKENS 1024 /* at least so many tokens (whole images) per task */

typedef struct {
    const pm_load_balance_loss_args *g;
    const pm_load_balance_loss_grads *d;
    double *sum;    /* (B, E) of p over the routable tokens of an image */
    int64_t *slots; /* (B, E) slots of those tokens that chose i */
    int64_t *size;  /* (B) routable tokens; "batch", in backward: of all images, in each */
    double scale;   /* backward: dloss * weight / images that count */
} load_balance_loss_job;

static size_t load_balance_loss_workspace(const pm_ctx *ctx, const pm_load_balance_loss_args *g,
                                          bool backward)
{
    (void)ctx;
    size_t pairs = backward ? 0 : (size_t)(g->B * g->E);
    return 2 * pm_round64(pairs * 8) + pm_round64((size_t)g->B * 8);
}

static inline int64_t load_balance_loss_images(const pm_load_balance_loss_args *g)
{
    return pm_blocks(LOAD_BALANCE_LOSS_TOKENS, pm_max(1, g->T));
}

static void load_balance_loss_task(void *arg, int64_t task, int worker)
{
    (void)worker;
    const load_balance_loss_job *j = arg;
    const pm_load_balance_loss_args *g = j->g;
    int64_t T = g->T, E = g->E, A = g->A, images = load_balance_loss_images(g);
    for (int64_t b = task * images; b < pm_min(g->B, (task + 1) * images); b++) {
        double *sum = j->sum + b * E;
        int64_t *slots = j->slots + b * E;
        memset(sum, 0, (size_t)E * sizeof *sum);
        memset(slots, 0, (size_t)E * sizeof *slots);
        j->size[b] = 0;
        for (int64_t n = b * T; n < (b + 1) * T; n++) {
            if (g->part && g->part[n] != -1)
                continue;
            j->size[b]++;
            for (int64_t i = 0; i < E; i++)
                sum[i] += (double)g->p[n * E + i];
            for (int64_t a = 0; a < A; a++) {
                int32_t i = g->choice[n * A + a];
                if (i >= 0 && i < E)
                    slots[i]++;
            }
        }
    }
}

/* sum_i f_i P_i of one set S; f goes to frac when it is not NULL. An empty S has f = 0. */
static double load_balance_loss_of(const pm_load_balance_loss_args *g, const double *sum,
                                   const int64_t *slots, int64_t size, float *frac)
{
    double loss = 0.0;
    for (int64_t i = 0; i < g->E; i++) {
        double f = size ? (double)g->E * (double)slots[i] / ((double)g->A * (double)size) : 0.0;
        if (frac)
            frac[i] = (float)f;
        if (size)
            loss += f * (sum[i] / (double)size);
    }
    return loss;
}

static pm_status load_balance_loss_forward(pm_ctx *ctx, const pm_load_balance_loss_args *g,
                                           void *scratch)
{
    int64_t B = g->B, E = g->E;
    load_balance_loss_job j = {.g = g};
    *g->loss = 0.0f;
    if (!B)
        return PM_OK;
    j.sum = pm_take(&scratch, (size_t)(B * E) * sizeof *j.sum);
    j.slots = pm_take(&scratch, (size_t)(B * E) * sizeof *j.slots);
    j.size = pm_take(&scratch, (size_t)B * sizeof *j.size);
    pm_parallel(ctx->pool, pm_blocks(B, load_balance_loss_images(g)), load_balance_loss_task, &j);

    double loss = 0.0;
    if (g->per == PM_PER_SEQUENCE) {
        int64_t images = 0;
        for (int64_t b = 0; b < B; b++) {
            loss += load_balance_loss_of(g, j.sum + b * E, j.slots + b * E, j.size[b],
                                         g->frac ? g->frac + b * E : NULL);
            images += j.size[b] > 0;
        }
        if (images)
            loss /= (double)images;
    } else {
        for (int64_t b = 1; b < B; b++) { /* all images into the first */
            j.size[0] += j.size[b];
            for (int64_t i = 0; i < E; i++) {
                j.sum[i] += j.sum[b * E + i];
                j.slots[i] += j.slots[b * E + i];
            }
        }
        loss = load_balance_loss_of(g, j.sum, j.slots, j.size[0], g->frac);
        if (g->frac)
            for (int64_t b = 1; b < B; b++)
                memcpy(g->frac + b * E, g->frac, (size_t)E * sizeof(float));
    }
    *g->loss = (float)(g->weight * loss);
    return PM_OK;
}

/* dp[n, i] = dloss weight f_i / |S|, over the number of images for "sequence" */
static void load_balance_loss_back_task(void *arg, int64_t task, int worker)
{
    (void)worker;
    const load_balance_loss_job *j = arg;
    const pm_load_balance_loss_args *g = j->g;
    int64_t T = g->T, E = g->E, images = load_balance_loss_images(g);
    for (int64_t b = task * images; b < pm_min(g->B, (task + 1) * images); b++) {
        double scale = j->size[b] ? j->scale / (double)j->size[b] : 0.0;
        for (int64_t n = b * T; n < (b + 1) * T; n++) {
            bool routable = !g->part || g->part[n] == -1;
            for (int64_t i = 0; i < E; i++)
                j->d->dp[n * E + i] = routable ? (float)(scale * (double)g->frac[b * E + i]) : 0.0f;
        }
    }
}

static pm_status load_balance_loss_backward(pm_ctx *ctx, const pm_load_balance_loss_args *g,
                                            const pm_load_balance_loss_grads *d, void *scratch)
{
    if (!d->dp)
        return PM_OK;
    load_balance_loss_job j = {.g = g, .d = d, .size = scratch};
    int64_t images = 0, all = 0;
    for (int64_t b = 0; b < g->B; b++) {
        j.size[b] = 0;
        for (int64_t n = b * g->T; n < (b + 1) * g->T; n++)
            j.size[b] += !g->part || g->part[n] == -1;
        images += j.size[b] > 0;
        all += j.size[b];
    }
    j.scale = (double)*d->dloss * g->weight;
    if (g->per == PM_PER_SEQUENCE)
        j.scale /= (double)pm_max(1, images);
    else
        for (int64_t b = 0; b < g->B; b++)
            j.size[b] = all;
    pm_parallel(ctx->pool, pm_blocks(g->B, load_balance_loss_images(g)),
                load_balance_loss_back_task, &j);
    return PM_OK;
}
