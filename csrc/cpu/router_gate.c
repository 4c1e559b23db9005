/* router_gate: contract in ops/router_gate.h. */

#define ROUTER_GATE_BLOCK 256 /* tokens per task */

static size_t router_gate_workspace(const pm_ctx *ctx, const pm_router_gate_args *g, bool backward)
{
    (void)ctx, (void)g, (void)backward;
    return 0;
}

typedef struct {
    const pm_router_gate_args *g;
    const pm_router_gate_grads *d;
} router_gate_job;

/* s = exp(s) or 1/(1+exp(-s)), n numbers. */
static inline void router_gate_map(vf (*f)(vf), int64_t n, float *s)
{
    int64_t i = 0;
    for (; i + PM_WIDTH <= n; i += PM_WIDTH)
        v_store(s + i, f(v_load(s + i)));
    if (i < n)
        v_store_n(s + i, f(v_load_n(s + i, n - i)), n - i);
}

/* The rows of a block are contiguous, so exp and sigmoid run over the block as a whole, at full
 * vector width for any E; what is left are short sums per row. */
static void router_gate_task(void *arg, int64_t task, int worker)
{
    (void)worker;
    const router_gate_job *j = arg;
    const pm_router_gate_args *g = j->g;
    int64_t E = g->E, n0 = task * ROUTER_GATE_BLOCK, n1 = pm_min(g->N, n0 + ROUTER_GATE_BLOCK);
    memcpy(g->s + n0 * E, g->z + n0 * E, (size_t)((n1 - n0) * E) * sizeof(float));
    if (g->gate == PM_GATE_SIGMOID)
        router_gate_map(v_sigmoid, (n1 - n0) * E, g->s + n0 * E);
    if (g->gate == PM_GATE_SOFTMAX) {
        for (int64_t n = n0; n < n1; n++) {
            float *s = g->s + n * E, largest = s[0];
            for (int64_t i = 1; i < E; i++)
                largest = s[i] > largest ? s[i] : largest;
            for (int64_t i = 0; i < E; i++)
                s[i] -= largest;
        }
        router_gate_map(v_exp, (n1 - n0) * E, g->s + n0 * E);
        for (int64_t n = n0; n < n1; n++) {
            float *s = g->s + n * E, sum = 0.0f;
            for (int64_t i = 0; i < E; i++)
                sum += s[i];
            for (int64_t i = 0; i < E; i++)
                s[i] /= sum;
        }
    }
    if (g->part)
        for (int64_t n = n0; n < n1; n++)
            if (g->part[n] != -1)
                memset(g->s + n * E, 0, (size_t)E * sizeof(float));
}

static pm_status router_gate_forward(pm_ctx *ctx, const pm_router_gate_args *g, void *scratch)
{
    (void)scratch;
    router_gate_job j = {g, NULL};
    if (g->E) /* a row without experts has no largest score */
        pm_parallel(ctx->pool, pm_blocks(g->N, ROUTER_GATE_BLOCK), router_gate_task, &j);
    return PM_OK;
}

/* identity  dz += ds
 * sigmoid   dz += ds s (1 - s)
 * softmax   dz += s (ds - sum_j ds_j s_j) */
static void router_gate_back_task(void *arg, int64_t task, int worker)
{
    (void)worker;
    const router_gate_job *j = arg;
    const pm_router_gate_args *g = j->g;
    int64_t E = g->E, n1 = pm_min(g->N, (task + 1) * ROUTER_GATE_BLOCK);
    for (int64_t n = task * ROUTER_GATE_BLOCK; n < n1; n++) {
        const float *s = g->s + n * E, *ds = j->d->ds + n * E;
        float *dz = j->d->dz + n * E;
        if (g->part && g->part[n] != -1)
            continue;
        if (g->gate == PM_GATE_IDENTITY) {
            for (int64_t i = 0; i < E; i++)
                dz[i] += ds[i];
        } else if (g->gate == PM_GATE_SIGMOID) {
            for (int64_t i = 0; i < E; i++)
                dz[i] += ds[i] * (s[i] * (1.0f - s[i]));
        } else {
            float mean = 0.0f;
            for (int64_t i = 0; i < E; i++)
                mean += ds[i] * s[i];
            for (int64_t i = 0; i < E; i++)
                dz[i] += s[i] * (ds[i] - mean);
        }
    }
}

static pm_status router_gate_backward(pm_ctx *ctx, const pm_router_gate_args *g,
                                      const pm_router_gate_grads *d, void *scratch)
{
    (void)scratch;
    router_gate_job j = {g, d};
    if (d->dz)
        pm_parallel(ctx->pool, pm_blocks(g->N, ROUTER_GATE_BLOCK), router_gate_back_task, &j);
    return PM_OK;
}
