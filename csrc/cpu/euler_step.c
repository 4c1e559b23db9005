/* euler_step: contract in ops/euler_step.h. */

static size_t euler_step_workspace(const pm_ctx *ctx, const pm_euler_step_args *g, bool backward)
{
    (void)ctx, (void)g, (void)backward;
    return 0;
}

static pm_status euler_step_forward(pm_ctx *ctx, const pm_euler_step_args *g, void *scratch)
{
    (void)g, (void)scratch;
    return pm_fail(ctx, PM_EINTERNAL, "euler_step: not written yet");
}
