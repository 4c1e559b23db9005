/* token_choice: contract in ops/token_choice.h. */

static size_t token_choice_workspace(const pm_ctx *ctx, const pm_token_choice_args *g, bool backward)
{
    (void)ctx, (void)g, (void)backward;
    return 0;
}

static pm_status token_choice_forward(pm_ctx *ctx, const pm_token_choice_args *g, void *scratch)
{
    (void)g, (void)scratch;
    return pm_fail(ctx, PM_EINTERNAL, "token_choice: not written yet");
}

static pm_status token_choice_backward(pm_ctx *ctx, const pm_token_choice_args *g, const pm_token_choice_grads *d, void *scratch)
{
    (void)g, (void)d, (void)scratch;
    return pm_fail(ctx, PM_EINTERNAL, "token_choice: not written yet");
}
