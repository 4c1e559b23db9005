/* conditional_routing: contract in ops/conditional_routing.h. */

static size_t conditional_routing_workspace(const pm_ctx *ctx, const pm_conditional_routing_args *g,
                                            bool backward)
{
    (void)ctx, (void)g, (void)backward;
    return 0;
}

/* One comparison per image and one store per token: never worth a task of its own. */
static pm_status conditional_routing_forward(pm_ctx *ctx, const pm_conditional_routing_args *g,
                                             void *scratch)
{
    (void)scratch;
    if (g->group < -1 || g->group > INT32_MAX)
        return pm_fail(ctx, PM_EINVAL,
                       "conditional_routing: group is %lld, expected -1 or a plan group",
                       (long long)g->group);
    for (int64_t b = 0; b < g->B; b++) {
        int32_t part = g->y[b] == g->null_label ? (int32_t)g->group : -1;
        for (int64_t i = 0; i < g->T; i++)
            g->part[b * g->T + i] = part;
    }
    return PM_OK;
}
