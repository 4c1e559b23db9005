/* rectified_flow: contract in ops/rectified_flow.h. */

static size_t rectified_flow_workspace(const pm_ctx *ctx, const pm_rectified_flow_args *g, bool backward)
{
    (void)ctx, (void)g, (void)backward;
    return 0;
}

static pm_status rectified_flow_forward(pm_ctx *ctx, const pm_rectified_flow_args *g, void *scratch)
{
    (void)g, (void)scratch;
    return pm_fail(ctx, PM_EINTERNAL, "rectified_flow: not written yet");
}
