/* routing_plan: contract in ops/routing_plan.h. */

static size_t routing_plan_workspace(const pm_ctx *ctx, const pm_routing_plan_args *g, bool backward)
{
    (void)ctx, (void)g, (void)backward;
    return 0;
}

static pm_status routing_plan_forward(pm_ctx *ctx, const pm_routing_plan_args *g, void *scratch)
{
    (void)g, (void)scratch;
    return pm_fail(ctx, PM_EINTERNAL, "routing_plan: not written yet");
}

static pm_status routing_plan_backward(pm_ctx *ctx, const pm_routing_plan_args *g, const pm_routing_plan_grads *d, void *scratch)
{
    (void)g, (void)d, (void)scratch;
    return pm_fail(ctx, PM_EINTERNAL, "routing_plan: not written yet");
}
