/* twins.c: a level's makers of twins, for test_twins.py, which compiles it with -DLEVEL="the level's file". */
#include LEVEL

/* The tables of the level name these; nobody calls them here. */
#pragma weak pm_cpu_alloc
#pragma weak pm_cpu_free
#pragma weak pm_cpu_copy
#pragma weak pm_cpu_zero
#pragma weak pm_cpu_sync

const int twins_panel = PM_NR;

int twins_multiple(const pm_backend *table) { return (int)product_multiple(table->products); }

size_t twins_bytes(const pm_backend *table, int64_t F, int64_t D)
{
    return table->derived_bytes(&(pm_ctx){.backend = table}, F, D);
}

/* As a load makes them. */
pm_status twins_derive(const pm_backend *table, int64_t F, int64_t D, const float *w, void *derived)
{
    return table->derive(&(pm_ctx){.backend = table}, F, D, w, derived);
}

/* As an op packs a weight that has none. */
void twins_pack(const pm_backend *table, int64_t F, int64_t D, const float *w, void *derived)
{
    const product_kind kind = table->products;
    product_pack_rows(kind, F, D, w, D, derived);
    product_pack_cols(kind, D, F, w, D, product_backward_panels(kind, derived, F, D));
}

/* As an update does. */
pm_status twins_update(const pm_backend *table, int threads, const pm_adamw_args *g)
{
    pm_ctx ctx = {.backend = table, .pool = pm_pool_create(threads)};
    void *const scratch = ctx.pool ? malloc(adamw_workspace(&ctx, g, false)) : NULL;
    const pm_status status = scratch ? adamw_forward(&ctx, g, scratch) : PM_ENOMEM;
    free(scratch);
    pm_pool_destroy(ctx.pool);
    return status;
}
