/* prototypical_routing: contract in ops/prototypical_routing.h. */

static size_t prototypical_routing_workspace(const pm_ctx *ctx, const pm_prototypical_routing_args *g, bool backward)
{
    (void)ctx, (void)g, (void)backward;
    return 0;
}

static pm_status prototypical_routing_forward(pm_ctx *ctx, const pm_prototypical_routing_args *g, void *scratch)
{
    (void)g, (void)scratch;
    return pm_fail(ctx, PM_EINTERNAL, "prototypical_routing: not written yet");
}

static pm_status prototypical_routing_backward(pm_ctx *ctx, const pm_prototypical_routing_args *g, const pm_prototypical_routing_grads *d, void *scratch)
{
    (void)g, (void)d, (void)scratch;
    return pm_fail(ctx, PM_EINTERNAL, "prototypical_routing: not written yet");
}
