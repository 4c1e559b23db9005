/* adamw: contract in ops/adamw.h. */

static size_t adamw_workspace(const pm_ctx *ctx, const pm_adamw_args *g, bool backward)
{
    (void)ctx, (void)g, (void)backward;
    return 0;
}

static pm_status adamw_forward(pm_ctx *ctx, const pm_adamw_args *g, void *scratch)
{
    (void)g, (void)scratch;
    return pm_fail(ctx, PM_EINTERNAL, "adamw: not written yet");
}
