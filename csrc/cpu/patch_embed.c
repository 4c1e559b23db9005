/* patch_embed: contract in ops/patch_embed.h. */

static size_t patch_embed_workspace(const pm_ctx *ctx, const pm_patch_embed_args *g, bool backward)
{
    (void)ctx, (void)g, (void)backward;
    return 0;
}

static pm_status patch_embed_forward(pm_ctx *ctx, const pm_patch_embed_args *g, void *scratch)
{
    (void)g, (void)scratch;
    return pm_fail(ctx, PM_EINTERNAL, "patch_embed: not written yet");
}

static pm_status patch_embed_backward(pm_ctx *ctx, const pm_patch_embed_args *g, const pm_patch_embed_grads *d, void *scratch)
{
    (void)g, (void)d, (void)scratch;
    return pm_fail(ctx, PM_EINTERNAL, "patch_embed: not written yet");
}
