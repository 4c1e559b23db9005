/* residual_layernorm_modulate: contract in ops/residual_layernorm_modulate.h. */

static size_t residual_layernorm_modulate_workspace(const pm_ctx *ctx, const pm_residual_layernorm_modulate_args *g, bool backward)
{
    (void)ctx, (void)g, (void)backward;
    return 0;
}

static pm_status residual_layernorm_modulate_forward(pm_ctx *ctx, const pm_residual_layernorm_modulate_args *g, void *scratch)
{
    (void)g, (void)scratch;
    return pm_fail(ctx, PM_EINTERNAL, "residual_layernorm_modulate: not written yet");
}

static pm_status residual_layernorm_modulate_backward(pm_ctx *ctx, const pm_residual_layernorm_modulate_args *g, const pm_residual_layernorm_modulate_grads *d, void *scratch)
{
    (void)g, (void)d, (void)scratch;
    return pm_fail(ctx, PM_EINTERNAL, "residual_layernorm_modulate: not written yet");
}
