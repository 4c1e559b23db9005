/* attention: contract in ops/attention.h. */

static size_t attention_workspace(const pm_ctx *ctx, const pm_attention_args *g, bool backward)
{
    (void)ctx, (void)g, (void)backward;
    return 0;
}

static pm_status attention_forward(pm_ctx *ctx, const pm_attention_args *g, void *scratch)
{
    (void)g, (void)scratch;
    return pm_fail(ctx, PM_EINTERNAL, "attention: not written yet");
}

static pm_status attention_backward(pm_ctx *ctx, const pm_attention_args *g, const pm_attention_grads *d, void *scratch)
{
    (void)g, (void)d, (void)scratch;
    return pm_fail(ctx, PM_EINTERNAL, "attention: not written yet");
}
