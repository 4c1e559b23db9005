/* table.h: the table PM_TABLE of a level's ops, which computes PM_COMPUTE by the kind PM_PRODUCTS of
 * products (product.h). Included by level.h. */
#define PM_BACKWARD_FORWARD(op) NULL
#define PM_BACKWARD_BOTH(op) op##_backward
const pm_backend PM_TABLE = {
    .name = "cpu",
    .level = PM_TEXT(PM_LEVEL),
    .compute = PM_COMPUTE,
    .products = PM_PRODUCTS,
    .host = true,
    .act_bytes = sizeof(float),
    .alloc = pm_cpu_alloc,
    .free = pm_cpu_free,
    .write = pm_cpu_copy,
    .read = pm_cpu_copy,
    .copy = pm_cpu_copy,
    .zero = pm_cpu_zero,
    .sync = pm_cpu_sync,
    .derived_bytes = product_derived_bytes,
    .derive = twin_derive,
#define PM_OP(op, OP, direction) .op = {op##_forward, PM_BACKWARD_##direction(op), op##_workspace},
#include "../ops.def"
#undef PM_OP
};
#undef PM_BACKWARD_FORWARD
#undef PM_BACKWARD_BOTH
#undef PM_COMPUTE
#undef PM_PRODUCTS
#undef PM_TABLE
