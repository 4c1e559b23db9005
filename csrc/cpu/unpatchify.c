/* unpatchify: contract in ops/unpatchify.h. */

static size_t unpatchify_workspace(const pm_ctx *ctx, const pm_unpatchify_args *g, bool backward)
{
    (void)ctx, (void)g, (void)backward;
    return 0;
}

static pm_status unpatchify_forward(pm_ctx *ctx, const pm_unpatchify_args *g, void *scratch)
{
    (void)g, (void)scratch;
    return pm_fail(ctx, PM_EINTERNAL, "unpatchify: not written yet");
}

static pm_status unpatchify_backward(pm_ctx *ctx, const pm_unpatchify_args *g, const pm_unpatchify_grads *d, void *scratch)
{
    (void)g, (void)d, (void)scratch;
    return pm_fail(ctx, PM_EINTERNAL, "unpatchify: not written yet");
}
