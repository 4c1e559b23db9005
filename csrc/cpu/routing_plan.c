/* routing_plan: contract in ops/routing_plan.h.
 *
 * A counting sort of N*A slots by group. It is one task: it touches a few numbers per token, where
 * the layer that the plan is for multiplies thousands. */

static size_t routing_plan_workspace(const pm_ctx *ctx, const pm_routing_plan_args *g,
                                     bool backward)
{
    (void)ctx;
    return backward ? 0 : pm_round64((size_t)g->G * 4);
}

static pm_status routing_plan_forward(pm_ctx *ctx, const pm_routing_plan_args *g, void *scratch)
{
    int64_t N = g->N, A = g->A, G = g->G;
    if (N && A > INT32_MAX / N)
        return pm_fail(ctx, PM_EINVAL,
                       "routing_plan: %lld tokens with %lld slots, at most 2^31 - 1 rows",
                       (long long)N, (long long)A);

    /* row_off[g+1] = rows of group g; a group that a token names twice is one row */
    int32_t *last = scratch; /* (G) the last token with a row in the group */
    memset(g->row_off, 0, (size_t)(G + 1) * sizeof(int32_t));
    for (int64_t i = 0; i < G; i++)
        last[i] = -1;
    for (int64_t n = 0; n < N; n++)
        for (int64_t a = 0; a < A; a++) {
            int32_t group = g->choice[n * A + a];
            if (group < -1 || group >= G)
                return pm_fail(
                    ctx, PM_EINVAL,
                    "routing_plan: choice of token %lld, slot %lld is %d, expected -1 to %lld",
                    (long long)n, (long long)a, (int)group, (long long)(G - 1));
            if (group < 0 || last[group] == n)
                continue;
            last[group] = (int32_t)n;
            g->row_off[group + 1]++;
        }
    for (int64_t i = 0; i < G; i++)
        g->row_off[i + 1] += g->row_off[i];

    /* tokens ascending, so the rows of a group are too */
    int32_t *next = scratch; /* (G) the next free row of the group */
    memcpy(next, g->row_off, (size_t)G * sizeof(int32_t));
    int32_t used = 0;
    for (int64_t n = 0; n < N; n++) {
        g->tok_off[n] = used;
        for (int64_t a = 0; a < A; a++) {
            int32_t group = g->choice[n * A + a], row = -1;
            if (group >= 0) {
                row = next[group] - 1;
                if (row >= g->row_off[group] && g->row_token[row] == n) {
                    g->row_weight[row] += g->weight[n * A + a];
                } else {
                    row = next[group]++;
                    g->row_token[row] = (int32_t)n;
                    g->row_weight[row] = g->weight[n * A + a];
                    g->tok_row[used++] = row;
                }
            }
            if (g->choice_row)
                g->choice_row[n * A + a] = row;
        }
    }
    g->tok_off[N] = used;
    for (int64_t r = used; r < N * A; r++) {
        g->row_token[r] = g->tok_row[r] = -1;
        g->row_weight[r] = 0.0f;
    }
    return PM_OK;
}

/* dweight[n, a] = drow_weight[choice_row[n, a]] */
static pm_status routing_plan_backward(pm_ctx *ctx, const pm_routing_plan_args *g,
                                       const pm_routing_plan_grads *d, void *scratch)
{
    (void)scratch;
    int64_t slots = g->N * g->A;
    if (!d->dweight)
        return PM_OK;
    for (int64_t k = 0; k < slots; k++) {
        int32_t row = g->choice_row[k];
        if (row < -1 || row >= slots)
            return pm_fail(
                ctx, PM_EINVAL,
                "routing_plan: choice_row of token %lld, slot %lld is %d, expected -1 to %lld",
                (long long)(k / g->A), (long long)(k % g->A), (int)row, (long long)(slots - 1));
        d->dweight[k] = row < 0 ? 0.0f : d->drow_weight[row];
    }
    return PM_OK;
}
