/* token_choice: contract in ops/token_choice.h. */

#define TOKEN_CHOICE_BLOCK 1024 /* tokens per task */

static size_t token_choice_workspace(const pm_ctx *ctx, const pm_token_choice_args *g,
                                     bool backward)
{
    (void)ctx, (void)g, (void)backward;
    return 0;
}

/* Whether score a goes before b, which has the lower index: not on a tie. A NaN goes before nothing. */
static inline bool token_choice_before(float a, float b) { return a > b || (b != b && a == a); }

/* The A best of s[0..E), best first, by insertion: an expert that is not among the A best so far
 * costs one comparison. */
static inline void token_choice_top(int64_t E, int64_t A, const float *s, int32_t *choice,
                                    float *weight)
{
    for (int64_t i = 0; i < E; i++) {
        int64_t at = i;
        if (i >= A) {
            at = A - 1;
            if (!token_choice_before(s[i], weight[at]))
                continue;
        }
        for (; at > 0 && token_choice_before(s[i], weight[at - 1]); at--) {
            choice[at] = choice[at - 1];
            weight[at] = weight[at - 1];
        }
        choice[at] = (int32_t)i;
        weight[at] = s[i];
    }
}

static void token_choice_task(void *arg, int64_t task, int worker)
{
    (void)worker;
    const pm_token_choice_args *g = arg;
    int64_t E = g->E, A = g->A, n1 = pm_min(g->N, (task + 1) * TOKEN_CHOICE_BLOCK);
    for (int64_t n = task * TOKEN_CHOICE_BLOCK; n < n1; n++) {
        int32_t part = g->part ? g->part[n] : -1, *choice = g->choice + n * A;
        float *weight = g->weight + n * A;
        if (part == -1) {
            token_choice_top(E, A, g->s + n * E, choice, weight);
            continue;
        }
        for (int64_t a = 0; a < A; a++) {
            choice[a] = -1;
            weight[a] = 0.0f;
        }
        if (part >= 0) {
            choice[0] = part;
            weight[0] = 1.0f;
        }
    }
}

static pm_status token_choice_forward(pm_ctx *ctx, const pm_token_choice_args *g, void *scratch)
{
    (void)scratch;
    if (g->A < 1 || g->A > g->E)
        return pm_fail(ctx, PM_EINVAL, "token_choice: A is %lld, expected 1 to E = %lld",
                       (long long)g->A, (long long)g->E);
    pm_token_choice_args args = *g;
    pm_parallel(ctx->pool, pm_blocks(g->N, TOKEN_CHOICE_BLOCK), token_choice_task, &args);
    return PM_OK;
}

/* ds[n, choice[n, a]] = dweight[n, a] */
static pm_status token_choice_backward(pm_ctx *ctx, const pm_token_choice_args *g,
                                       const pm_token_choice_grads *d, void *scratch)
{
    (void)scratch;
    int64_t E = g->E, A = g->A;
    if (!d->ds)
        return PM_OK;
    memset(d->ds, 0, (size_t)(g->N * E) * sizeof(float));
    for (int64_t n = 0; n < g->N; n++) {
        if (g->part && g->part[n] != -1)
            continue;
        for (int64_t a = 0; a < A; a++) {
            int32_t i = g->choice[n * A + a];
            if (i < 0 || i >= E)
                return pm_fail(
                    ctx, PM_EINVAL,
                    "token_choice: choice of token %lld, slot %lld is %d, expected 0 to %lld",
                    (long long)n, (long long)a, (int)i, (long long)(E - 1));
            d->ds[n * E + i] = d->dweight[n * A + a];
        }
    }
    return PM_OK;
}
