/* grad_norm: contract in ops/grad_norm.h. */

static size_t grad_norm_workspace(const pm_ctx *ctx, const pm_grad_norm_args *g, bool backward)
{
    (void)ctx, (void)g, (void)backward;
    return 0;
}

static pm_status grad_norm_forward(pm_ctx *ctx, const pm_grad_norm_args *g, void *scratch)
{
    (void)g, (void)scratch;
    return pm_fail(ctx, PM_EINTERNAL, "grad_norm: not written yet");
}
