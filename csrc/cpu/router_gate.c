/* router_gate: contract in ops/router_gate.h. */

static size_t router_gate_workspace(const pm_ctx *ctx, const pm_router_gate_args *g, bool backward)
{
    (void)ctx, (void)g, (void)backward;
    return 0;
}

static pm_status router_gate_forward(pm_ctx *ctx, const pm_router_gate_args *g, void *scratch)
{
    (void)g, (void)scratch;
    return pm_fail(ctx, PM_EINTERNAL, "router_gate: not written yet");
}

static pm_status router_gate_backward(pm_ctx *ctx, const pm_router_gate_args *g, const pm_router_gate_grads *d, void *scratch)
{
    (void)g, (void)d, (void)scratch;
    return pm_fail(ctx, PM_EINTERNAL, "router_gate: not written yet");
}
