/* plugin.h: a backend in a library of its own (promoe/_cuda.so), which is loaded when it is asked for.
 *
 * The library and the extension must have been built from the same contracts. They compare what the
 * compiler made of them: sizes, and the field lists themselves as text. */
#ifndef PM_PLUGIN_H
#define PM_PLUGIN_H

#include "promoe.h"

enum { PM_PLUGIN_VERSION = 1 }; /* counts changes of meaning that no size and no field list shows */

typedef struct {
    const char *op, *fields;
    size_t args, grads; /* bytes of the structs */
} pm_plugin_op;

typedef struct {
    size_t version, context, backend, act_bytes_at, first_op_at, ops; /* pm_plugin_shape */
} pm_plugin_shape;

typedef struct {
    pm_plugin_shape shape;
    const pm_plugin_op *ops;
    /* The backend, its device ready; NULL and a message that says why there is none and what to do. */
    const pm_backend *(*open)(pm_compute compute, char *message, size_t message_bytes);
} pm_plugin;

/* The one symbol of a library. */
#define PM_PLUGIN_SYMBOL "pm_plugin_entry"
const pm_plugin *pm_plugin_entry(void);

#define PM_PLUGIN_FIELD(kind, ...) #kind "(" #__VA_ARGS__ ") "
/* clang-format off */
static const pm_plugin_op pm_plugin_ops[] = {
#define PM_OP(op, OP, direction)                                                                   \
    {#op, #direction " " PM_##OP(PM_PLUGIN_FIELD), sizeof(pm_##op##_args), sizeof(pm_##op##_grads)},
#include "ops.def"
#undef PM_OP
};
/* clang-format on */

static const pm_plugin_shape pm_plugin_own_shape = {
    PM_PLUGIN_VERSION,
    sizeof(pm_ctx),
    sizeof(pm_backend),
    offsetof(pm_backend, act_bytes),
    offsetof(pm_backend, gaussian_noise),
    sizeof pm_plugin_ops / sizeof *pm_plugin_ops,
};

#endif
