/* gaussian_noise: contract in ops/gaussian_noise.h. */

static size_t gaussian_noise_workspace(const pm_ctx *ctx, const pm_gaussian_noise_args *g, bool backward)
{
    (void)ctx, (void)g, (void)backward;
    return 0;
}

static pm_status gaussian_noise_forward(pm_ctx *ctx, const pm_gaussian_noise_args *g, void *scratch)
{
    (void)g, (void)scratch;
    return pm_fail(ctx, PM_EINTERNAL, "gaussian_noise: not written yet");
}
