/* linear: contract in ops/linear.h. */

static size_t linear_workspace(const pm_ctx *ctx, const pm_linear_args *g, bool backward)
{
    (void)ctx, (void)g, (void)backward;
    return 0;
}

static pm_status linear_forward(pm_ctx *ctx, const pm_linear_args *g, void *scratch)
{
    (void)g, (void)scratch;
    return pm_fail(ctx, PM_EINTERNAL, "linear: not written yet");
}

static pm_status linear_backward(pm_ctx *ctx, const pm_linear_args *g, const pm_linear_grads *d, void *scratch)
{
    (void)g, (void)d, (void)scratch;
    return pm_fail(ctx, PM_EINTERNAL, "linear: not written yet");
}
