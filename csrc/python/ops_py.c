/* ops_py.c: every op of ops.def as a pair of Python functions, made from its field list. */
#include <string.h>

#include "bind.h"

/* ---------------------------------------------------------------- from field lists to tables */

#define AT_SET(name) offsetof(grads, d##name)
#define AT_ADD(name) offsetof(grads, d##name)
#define AT_GRAD(name) offsetof(grads, d##name)
#define AT_MAYBE(name) offsetof(grads, d##name)
#define AT_NONE(name) 0

#define ARRAY(kind_, name_, type_, shape_, grad_)                                                  \
    {.kind = kind_,                                                                                \
     .type = BIND_##type_,                                                                         \
     .grad = BIND_##grad_,                                                                         \
     .name = #name_,                                                                               \
     .text = shape_,                                                                               \
     .at = offsetof(args, name_),                                                                  \
     .grad_at = AT_##grad_(name_)},
#define SCALAR(kind_, name_, text_, value_)                                                        \
    {.kind = kind_, .name = #name_, .text = text_, .value = value_, .at = offsetof(args, name_)},

#define FIELD(kind, ...) FIELD_##kind(__VA_ARGS__)
#define FIELD_DIM(name) SCALAR(BIND_DIM, name, NULL, 0)
#define FIELD_LD(name, dense) SCALAR(BIND_LD, name, #dense, 0)
#define FIELD_IN(name, type, shape, grad) ARRAY(BIND_IN, name, type, shape, grad)
#define FIELD_OPT(name, type, shape, grad) ARRAY(BIND_OPT, name, type, shape, grad)
#define FIELD_OUT(name, type, shape, grad) ARRAY(BIND_OUT, name, type, shape, grad)
#define FIELD_SAVED(name, type, shape) ARRAY(BIND_SAVED, name, type, shape, NONE)
#define FIELD_INOUT(name, type, shape) ARRAY(BIND_INOUT, name, type, shape, NONE)
#define FIELD_INOPT(name, type, shape) ARRAY(BIND_INOPT, name, type, shape, NONE)
#define FIELD_TWINS(name) /* not Python's */
#define FIELD_INT(name, value) SCALAR(BIND_INT, name, NULL, value)
#define FIELD_REAL(name, value) SCALAR(BIND_REAL, name, NULL, value)
#define FIELD_ENUM(name, words, value) SCALAR(BIND_ENUM, name, words, value)

#define HAS_BACKWARD_FORWARD false
#define HAS_BACKWARD_BOTH true

/* The table of an op, in a function so that offsetof can name its structs. */
#define PM_OP(op, OP, direction)                                                                   \
    static size_t op##_workspace(const pm_ctx *ctx, const void *args, bool backward)               \
    {                                                                                              \
        return ctx->backend->op.workspace(ctx, args, backward);                                    \
    }                                                                                              \
    static pm_status op##_run_forward(pm_ctx *ctx, const void *args, void *scratch)                \
    {                                                                                              \
        return ctx->backend->op.forward(ctx, args, scratch);                                       \
    }                                                                                              \
    static pm_status op##_run_backward(pm_ctx *ctx, const void *args, const void *grads,           \
                                       void *scratch)                                              \
    {                                                                                              \
        return ctx->backend->op.backward(ctx, args, grads, scratch);                               \
    }                                                                                              \
    static bind_op op##_table(void)                                                                \
    {                                                                                              \
        typedef pm_##op##_args args;                                                               \
        typedef pm_##op##_grads grads;                                                             \
        static const bind_field fields[] = {PM_##OP(FIELD)};                                       \
        _Static_assert(sizeof fields / sizeof *fields <= BIND_MOST_FIELDS,                         \
                       #op ": too many fields");                                                   \
        _Static_assert(sizeof(args) <= BIND_ARGS_BYTES && sizeof(grads) <= BIND_GRADS_BYTES, #op); \
        return (bind_op){                                                                          \
            .name = #op,                                                                           \
            .fields = fields,                                                                      \
            .count = sizeof fields / sizeof *fields,                                               \
            .has_backward = HAS_BACKWARD_##direction,                                              \
            .workspace = op##_workspace,                                                           \
            .forward = op##_run_forward,                                                           \
            .backward = op##_run_backward,                                                         \
        };                                                                                         \
    }
#include "../ops.def"
#undef PM_OP

enum {
#define PM_OP(op, OP, direction) OP_##op,
#include "../ops.def"
#undef PM_OP
    OPS
};

static bind_op table[OPS]; /* filled at the first import; the same for every interpreter */

#define PM_OP(op, OP, direction)                                                                   \
    static PyObject *py_##op##_forward(PyObject *m, PyObject *const *a, Py_ssize_t n, PyObject *k) \
    {                                                                                              \
        return bind_call(m, &table[OP_##op], false, a, n, k);                                      \
    }                                                                                              \
    static PyObject *py_##op##_backward(PyObject *m, PyObject *const *a, Py_ssize_t n,             \
                                        PyObject *k)                                               \
    {                                                                                              \
        return bind_call(m, &table[OP_##op], true, a, n, k);                                       \
    }
#include "../ops.def"
#undef PM_OP

/* ---------------------------------------------------------------- what field lists cannot say */

/* Fixes a dim that is still unknown. */
static void infer(bind_dims *dims, char letter, int64_t value)
{
    const int l = letter - 'A';
    if (dims->known[l] || value < 0)
        return;
    dims->value[l] = value;
    dims->known[l] = true;
    dims->from[l] = "the attributes";
}

static bool knows(const bind_dims *dims, char letter) { return dims->known[letter - 'A']; }
static int64_t dim(const bind_dims *dims, char letter) { return dims->value[letter - 'A']; }

static bool linear_wants(const void *args, const char *saved)
{
    return strcmp(saved, "pre") || ((const pm_linear_args *)args)->activation != PM_ACT_NONE;
}

/* V, T and the number of voxels of a patch; -1 when the sizes make no sense. */
typedef struct {
    int64_t voxels, tokens, patch;
} patch_sizes;

static patch_sizes patch_count(const int64_t s[3], const int64_t p[3])
{
    patch_sizes z = {1, 1, 1};
    bool wrong = false;
    for (int i = 0; i < 3; i++) {
        if (s[i] < 1 || p[i] < 1 || s[i] % p[i])
            return (patch_sizes){-1, -1, -1};
        wrong |= __builtin_mul_overflow(z.voxels, s[i], &z.voxels);
        wrong |= __builtin_mul_overflow(z.tokens, s[i] / p[i], &z.tokens);
        wrong |= __builtin_mul_overflow(z.patch, p[i], &z.patch);
    }
    return wrong ? (patch_sizes){-1, -1, -1} : z;
}

static pm_status patch_check(pm_ctx *ctx, patch_sizes z, int64_t V, int64_t T, int64_t P, int64_t C)
{
    if (z.voxels < 0)
        return pm_fail(ctx, PM_EINVAL, "s0, s1, s2 must be positive multiples of p0, p1, p2");
    if (z.voxels != V)
        return pm_fail(ctx, PM_EINVAL, "s0*s1*s2 is %lld, but V is %lld", (long long)z.voxels,
                       (long long)V);
    if (z.tokens != T)
        return pm_fail(ctx, PM_EINVAL, "(s0/p0)*(s1/p1)*(s2/p2) is %lld, but T is %lld",
                       (long long)z.tokens, (long long)T);
    if (P % z.patch || P / z.patch != C)
        return pm_fail(ctx, PM_EINVAL, "C*p0*p1*p2 is %lld*%lld, but P is %lld", (long long)C,
                       (long long)z.patch, (long long)P);
    return PM_OK;
}

#define PATCH_COUNT(g)                                                                             \
    patch_count((const int64_t[]){(g)->s0, (g)->s1, (g)->s2},                                      \
                (const int64_t[]){(g)->p0, (g)->p1, (g)->p2})

static void patch_embed_infer(bind_dims *dims, const void *args)
{
    infer(dims, 'T', PATCH_COUNT((const pm_patch_embed_args *)args).tokens);
}

static pm_status patch_embed_check(pm_ctx *ctx, const void *args, bool backward)
{
    (void)backward;
    const pm_patch_embed_args *g = args;
    return patch_check(ctx, PATCH_COUNT(g), g->V, g->T, g->P, g->C);
}

static void unpatchify_infer(bind_dims *dims, const void *args)
{
    const patch_sizes z = PATCH_COUNT((const pm_unpatchify_args *)args);
    infer(dims, 'T', z.tokens);
    infer(dims, 'V', z.voxels);
    if (z.patch > 0 && knows(dims, 'P') && dim(dims, 'P') % z.patch == 0)
        infer(dims, 'C', dim(dims, 'P') / z.patch);
}

static pm_status unpatchify_check(pm_ctx *ctx, const void *args, bool backward)
{
    (void)backward;
    const pm_unpatchify_args *g = args;
    return patch_check(ctx, PATCH_COUNT(g), g->V, g->T, g->P, g->C);
}

/* Every index of an array is in low..high. */
static pm_status check_range(pm_ctx *ctx, const char *name, const int32_t *index, int64_t count,
                             int64_t low, int64_t high)
{
    for (int64_t i = 0; i < count; i++)
        if (index[i] < low || index[i] > high)
            return pm_fail(ctx, PM_EINVAL, "%s has %d at %lld; it must be in %lld..%lld", name,
                           index[i], (long long)i, (long long)low, (long long)high);
    return PM_OK;
}

/* Without cond every image has a condition of its own. */
static void residual_infer(bind_dims *dims, const void *args)
{
    if (((const pm_residual_layernorm_modulate_args *)args)->cond)
        return;
    if (knows(dims, 'B'))
        infer(dims, 'C', dim(dims, 'B'));
    if (knows(dims, 'C'))
        infer(dims, 'B', dim(dims, 'C'));
}

static pm_status residual_check(pm_ctx *ctx, const void *args, bool backward)
{
    const pm_residual_layernorm_modulate_args *g = args;
    if (g->cond)
        PM_TRY(check_range(ctx, "cond", g->cond, g->B, 0, g->C - 1));
    else if (g->C != g->B)
        return pm_fail(ctx, PM_EINVAL, "C is %lld and B is %lld: without cond they are the same",
                       (long long)g->C, (long long)g->B);
    if (g->branch && !g->xo)
        return pm_fail(ctx, PM_EINVAL, "xo is missing: %s",
                       backward ? "backward reads it when there is a branch"
                                : "there is a branch to add");
    return PM_OK;
}

static pm_status attention_check(pm_ctx *ctx, const void *args, bool backward)
{
    (void)backward;
    const pm_attention_args *g = args;
    if (!g->q_weight != !g->q_bias || !g->q_weight != !g->k_weight || !g->q_weight != !g->k_bias)
        return pm_fail(ctx, PM_EINVAL,
                       "q_weight, q_bias, k_weight and k_bias must all be given, or none");
    return PM_OK;
}

/* Offsets: 0 first, never falling, at most (exact: equal to) total at the end. */
static pm_status check_offsets(pm_ctx *ctx, const char *name, const int32_t *offset, int64_t count,
                               int64_t total, bool exact)
{
    for (int64_t i = 0; i < count; i++)
        if (offset[i + 1] < offset[i])
            return pm_fail(ctx, PM_EINVAL, "%s falls at %lld", name, (long long)i + 1);
    if (offset[0] != 0 || offset[count] > total || (exact && offset[count] != total))
        return pm_fail(ctx, PM_EINVAL, "%s must go from 0 to %s%lld; it goes from %d to %d", name,
                       exact ? "" : "at most ", (long long)total, offset[0], offset[count]);
    return PM_OK;
}

static pm_status contrastive_check(pm_ctx *ctx, const void *args, bool backward)
{
    (void)backward;
    const pm_routing_contrastive_loss_args *g = args;
    return check_range(ctx, "choice", g->choice, g->N * g->A, -1, INT32_MAX);
}

/* The widest of groups from..to-1. */
static int64_t widest(const int32_t *foff, int64_t from, int64_t to)
{
    int64_t most = 0;
    for (int64_t g = from; g < to; g++)
        if ((int64_t)foff[g + 1] - foff[g] > most)
            most = (int64_t)foff[g + 1] - foff[g];
    return most;
}

/* Pre-activations of a hidden unit. */
static int64_t experts_halves(const pm_experts_args *g)
{
    return g->activation == PM_EXPERTS_SWIGLU ? 2 : 1;
}

/* Without a plan there are no plan groups and no rows; widths are those of the widest groups. */
static void experts_infer(bind_dims *dims, const void *args)
{
    const pm_experts_args *g = args;
    if (knows(dims, 'F') && dim(dims, 'F') <= INT64_MAX / 2)
        infer(dims, 'P', experts_halves(g) * dim(dims, 'F'));
    if (!g->row_off)
        infer(dims, 'G', 0);
    if (!g->row_token && !g->tok_row && !g->row_weight)
        infer(dims, 'R', 0);
    if (!knows(dims, 'G') || !knows(dims, 'S'))
        return;
    infer(dims, 'W', experts_halves(g) * widest(g->foff, 0, dim(dims, 'G')));
    infer(dims, 'Z',
          experts_halves(g) * widest(g->foff, dim(dims, 'G'), dim(dims, 'G') + dim(dims, 'S')));
}

static pm_status experts_check(pm_ctx *ctx, const void *args, bool backward)
{
    (void)backward;
    const pm_experts_args *g = args;
    const int64_t halves = experts_halves(g);
    PM_TRY(check_offsets(ctx, "foff", g->foff, g->G + g->S, g->F, true));
    if (g->P % halves || g->P / halves != g->F)
        return pm_fail(ctx, PM_EINVAL, "up has %lld rows; with F = %lld there are %s%lld",
                       (long long)g->P, (long long)g->F, halves == 2 ? "2*" : "", (long long)g->F);
    if (g->W < halves * widest(g->foff, 0, g->G))
        return pm_fail(ctx, PM_EINVAL, "W is %lld; a plan group of foff is wider", (long long)g->W);
    if (g->Z < halves * widest(g->foff, g->G, g->G + g->S))
        return pm_fail(ctx, PM_EINVAL, "Z is %lld; a shared group of foff is wider",
                       (long long)g->Z);
    const int given = !!g->row_off + !!g->row_token + !!g->row_weight + !!g->tok_off + !!g->tok_row;
    if (given != 5 && (given || g->G))
        return pm_fail(ctx, PM_EINVAL,
                       "row_off, row_token, row_weight, tok_off and tok_row must all be given "
                       "(none, when G is 0)");
    if (!given)
        return PM_OK;
    PM_TRY(check_offsets(ctx, "row_off", g->row_off, g->G, g->R, false));
    const int64_t rows = g->row_off[g->G];
    PM_TRY(check_offsets(ctx, "tok_off", g->tok_off, g->N, rows, true));
    PM_TRY(check_range(ctx, "row_token", g->row_token, rows, 0, g->N - 1));
    PM_TRY(check_range(ctx, "tok_row", g->tok_row, rows, 0, rows - 1));
    for (int64_t n = 0; n < g->N; n++)
        for (int32_t i = g->tok_off[n]; i < g->tok_off[n + 1]; i++)
            if (g->row_token[g->tok_row[i]] != n)
                return pm_fail(ctx, PM_EINVAL,
                               "tok_row says that row %d is of token %lld, row_token that "
                               "it is of %d",
                               g->tok_row[i], (long long)n, g->row_token[g->tok_row[i]]);
    return PM_OK;
}

static pm_status mse_loss_check(pm_ctx *ctx, const void *args, bool backward)
{
    (void)backward;
    const pm_mse_loss_args *g = args;
    return g->M < g->C ? pm_fail(ctx, PM_EINVAL, "pred must have at least the channels of target")
                       : PM_OK;
}

static pm_status euler_step_check(pm_ctx *ctx, const void *args, bool backward)
{
    (void)backward;
    const pm_euler_step_args *g = args;
    return g->M < g->C ? pm_fail(ctx, PM_EINVAL, "cond must have at least the channels of x")
                       : PM_OK;
}

static const bind_facts facts[OPS] = {
    [OP_patch_embed] = {.unread = " y ", .infer = patch_embed_infer, .check = patch_embed_check},
    [OP_linear] = {.unread = " y ", .wants = linear_wants},
    [OP_label_embedding] = {.unread = " c "},
    [OP_silu] = {.unread = " y "},
    [OP_residual_layernorm_modulate] = {.unread = " xo y ",
                                        .nullable = " xo ",
                                        .aliases = " xo=x dx=dxo ",
                                        .infer = residual_infer,
                                        .check = residual_check},
    [OP_attention] = {.check = attention_check},
    [OP_token_choice] = {.unread = " weight "},
    [OP_routing_plan] = {.unread = " row_off row_token row_weight tok_off tok_row "},
    [OP_routing_contrastive_loss] = {.unread = " loss ", .check = contrastive_check},
    [OP_load_balance_loss] = {.unread = " loss "},
    [OP_experts] = {.unread = " y ", .infer = experts_infer, .check = experts_check},
    [OP_unpatchify] = {.unread = " y ", .infer = unpatchify_infer, .check = unpatchify_check},
    [OP_mse_loss] = {.unread = " loss ", .check = mse_loss_check},
    [OP_euler_step] = {.aliases = " y=x ", .check = euler_step_check},
};

/* ---------------------------------------------------------------- registration */

/* The field tables as Python data: {op: ((kind, name, type, text, grad, default), ...)}. */
static PyObject *fields(PyObject *Py_UNUSED(module), PyObject *Py_UNUSED(none))
{
    static const char *const kinds[] = {"DIM",   "LD",    "IN",  "OPT",  "OUT", "SAVED",
                                        "INOUT", "INOPT", "INT", "REAL", "ENUM"};
    static const char *const grads[] = {"NONE", "SET", "ADD", "GRAD", "MAYBE"};
    PyObject *dict = PyDict_New();
    for (int o = 0; dict && o < OPS; o++) {
        PyObject *tuple = PyTuple_New(table[o].count);
        for (int i = 0; tuple && i < table[o].count; i++) {
            const bind_field *f = &table[o].fields[i];
            PyObject *row = Py_BuildValue("(ssszsd)", kinds[f->kind], f->name,
                                          !bind_is_array(f)        ? ""
                                          : f->type == BIND_weight ? "weight"
                                                                   : bind_type_name(f->type),
                                          f->text, grads[f->grad], f->value);
            if (row)
                PyTuple_SET_ITEM(tuple, i, row);
            else
                Py_CLEAR(tuple);
        }
        if (!tuple || PyDict_SetItemString(dict, table[o].name, tuple) < 0)
            Py_CLEAR(dict);
        Py_XDECREF(tuple);
    }
    return dict;
}

/* Two functions per op, then fields, then the end. */
static PyMethodDef methods[2 * OPS + 2];

#define FUNCTION(f) (PyCFunction)(void (*)(void))(f)

static void add_method(PyMethodDef **method, const char *name, PyCFunction function,
                       const char *doc)
{
    *(*method)++ = (PyMethodDef){name, function, METH_FASTCALL | METH_KEYWORDS, doc};
}

static int fill_tables(void)
{
    PyMethodDef *method = methods;
    if (method->ml_name)
        return 0;
#define PM_OP(op, OP, direction)                                                                   \
    table[OP_##op] = op##_table();                                                                 \
    table[OP_##op].facts = &facts[OP_##op];
#include "../ops.def"
#undef PM_OP
    char *docs[OPS][2];
    for (int o = 0; o < OPS; o++)
        for (int b = 0; b < 2; b++)
            if (!(docs[o][b] = bind_docstring(&table[o], b))) {
                PyErr_NoMemory();
                return -1;
            }
#define PM_OP(op, OP, direction)                                                                   \
    add_method(&method, #op "_forward", FUNCTION(py_##op##_forward), docs[OP_##op][0]);            \
    if (HAS_BACKWARD_##direction)                                                                  \
        add_method(&method, #op "_backward", FUNCTION(py_##op##_backward), docs[OP_##op][1]);
#include "../ops.def"
#undef PM_OP
    *method =
        (PyMethodDef){"_fields", fields, METH_NOARGS,
                      "_fields($module, /)\n--\n\n"
                      "The field lists: {op: ((kind, name, type, text, grad, default), ...)}."};
    return 0;
}

int ops_py_register(PyObject *module)
{
    return fill_tables() < 0 ? -1 : PyModule_AddFunctions(module, methods);
}
