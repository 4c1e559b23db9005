/* silu: contract in ops/silu.h. */

static size_t silu_workspace(const pm_ctx *ctx, const pm_silu_args *g, bool backward)
{
    (void)ctx, (void)g, (void)backward;
    return 0;
}

static pm_status silu_forward(pm_ctx *ctx, const pm_silu_args *g, void *scratch)
{
    (void)g, (void)scratch;
    return pm_fail(ctx, PM_EINTERNAL, "silu: not written yet");
}

static pm_status silu_backward(pm_ctx *ctx, const pm_silu_args *g, const pm_silu_grads *d, void *scratch)
{
    (void)g, (void)d, (void)scratch;
    return pm_fail(ctx, PM_EINTERNAL, "silu: not written yet");
}
