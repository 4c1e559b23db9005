/* conditional_routing: contract in ops/conditional_routing.h. */

static size_t conditional_routing_workspace(const pm_ctx *ctx, const pm_conditional_routing_args *g, bool backward)
{
    (void)ctx, (void)g, (void)backward;
    return 0;
}

static pm_status conditional_routing_forward(pm_ctx *ctx, const pm_conditional_routing_args *g, void *scratch)
{
    (void)g, (void)scratch;
    return pm_fail(ctx, PM_EINTERNAL, "conditional_routing: not written yet");
}
