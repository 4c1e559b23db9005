/* label_embedding: contract in ops/label_embedding.h. */

static size_t label_embedding_workspace(const pm_ctx *ctx, const pm_label_embedding_args *g, bool backward)
{
    (void)ctx, (void)g, (void)backward;
    return 0;
}

static pm_status label_embedding_forward(pm_ctx *ctx, const pm_label_embedding_args *g, void *scratch)
{
    (void)g, (void)scratch;
    return pm_fail(ctx, PM_EINTERNAL, "label_embedding: not written yet");
}

static pm_status label_embedding_backward(pm_ctx *ctx, const pm_label_embedding_args *g, const pm_label_embedding_grads *d, void *scratch)
{
    (void)g, (void)d, (void)scratch;
    return pm_fail(ctx, PM_EINTERNAL, "label_embedding: not written yet");
}
