/* experts: contract in ops/experts.h. */

static size_t experts_workspace(const pm_ctx *ctx, const pm_experts_args *g, bool backward)
{
    (void)ctx, (void)g, (void)backward;
    return 0;
}

static pm_status experts_forward(pm_ctx *ctx, const pm_experts_args *g, void *scratch)
{
    (void)g, (void)scratch;
    return pm_fail(ctx, PM_EINTERNAL, "experts: not written yet");
}

static pm_status experts_backward(pm_ctx *ctx, const pm_experts_args *g, const pm_experts_grads *d, void *scratch)
{
    (void)g, (void)d, (void)scratch;
    return pm_fail(ctx, PM_EINTERNAL, "experts: not written yet");
}
