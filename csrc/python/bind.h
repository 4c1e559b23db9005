/* bind.h: how Python calls an op.
 *
 * A field list (promoe.h) becomes a table of bind_field; bind_call reads the arguments of a Python
 * call by that table, checks every one of them, finds the dimensions, makes the arrays that were not
 * given, runs the op without the GIL and returns a dict. There is no code per op but the few facts
 * that a field list cannot say (bind_facts, in ops_py.c). */
#ifndef PM_PYTHON_BIND_H
#define PM_PYTHON_BIND_H

#include "core.h"

typedef enum {
    BIND_DIM,
    BIND_LD,
    BIND_IN,
    BIND_OPT,
    BIND_OUT,
    BIND_SAVED,
    BIND_INOUT,
    BIND_INOPT,
    BIND_INT,
    BIND_REAL,
    BIND_ENUM,
} bind_kind;

typedef enum { BIND_act, BIND_f32, BIND_f64, BIND_i32, BIND_i64, BIND_weight } bind_type;
typedef enum { BIND_NONE, BIND_SET, BIND_ADD, BIND_GRAD, BIND_MAYBE } bind_gradient;

enum { BIND_MOST_FIELDS = 40, BIND_MOST_AXES = 4, BIND_LETTERS = 26 };
enum { BIND_ARGS_BYTES = 1024, BIND_GRADS_BYTES = 512 };

typedef struct {
    bind_kind kind;
    bind_type type;
    bind_gradient grad;
    const char *name;
    const char *text; /* an array's shape, an enum's words, the dense dim of a LD */
    double value;     /* the default of INT, REAL and ENUM */
    size_t at;        /* offset in pm_<op>_args */
    size_t grad_at;   /* of d<name> in pm_<op>_grads, when grad is not BIND_NONE */
} bind_field;

/* One value per dimension letter. */
typedef struct {
    int64_t value[BIND_LETTERS];
    bool known[BIND_LETTERS];
    const char *from[BIND_LETTERS]; /* the argument that fixed it */
} bind_dims;

/* What a field list cannot say. Lists of names are words between spaces: " y loss ". */
typedef struct {
    const char *op;
    const char *unread;   /* outputs whose values backward does not read: optional there */
    const char *nullable; /* OUT that may be None in forward */
    const char *aliases;  /* written=read pairs that may be the same memory: " xo=x dx=dxo " */
    /* Fixes dims that the attributes or the contents of arrays determine; args has the attributes and
     * the arrays that were given. The dims that it leaves unknown must be given as keywords. */
    void (*infer)(bind_dims *dims, const void *args);
    /* False when the op has no use for this SAVED: it is neither made nor asked for. */
    bool (*wants)(const void *args, const char *saved);
    /* Checks what the op takes on trust (indices, widths), so that no call from Python can write out
     * of bounds. The message begins with the argument's name. */
    pm_status (*check)(pm_ctx *ctx, const void *args, bool backward);
} bind_facts;

typedef struct {
    const char *name;
    const bind_field *fields;
    int count;
    bool has_backward;
    size_t (*workspace)(const pm_ctx *ctx, const void *args, bool backward);
    pm_status (*forward)(pm_ctx *ctx, const void *args, void *scratch);
    pm_status (*backward)(pm_ctx *ctx, const void *args, const void *grads, void *scratch);
    const bind_facts *facts; /* NULL: nothing to add */
} bind_op;

static inline bool bind_is_array(const bind_field *f)
{
    return f->kind >= BIND_IN && f->kind <= BIND_INOPT;
}
static inline bool bind_is_input(const bind_field *f)
{
    return bind_is_array(f) && f->kind != BIND_OUT && f->kind != BIND_SAVED;
}
static inline bool bind_is_output(const bind_field *f)
{
    return f->kind == BIND_OUT || f->kind == BIND_SAVED;
}
/* d<name> is written by backward. */
static inline bool bind_has_grad(const bind_field *f)
{
    return f->grad == BIND_SET || f->grad == BIND_ADD;
}
/* d<name> is read by backward. */
static inline bool bind_has_upstream(const bind_field *f)
{
    return f->grad == BIND_GRAD || f->grad == BIND_MAYBE;
}

/* name is one of the words of list (which may be NULL). */
bool bind_listed(const char *list, const char *name);
/* Inputs that may be given by position: those before the first required one that follows an optional. */
int bind_positional(const bind_op *op);
/* Whether a call must give this array of the field list. */
bool bind_required(const bind_op *op, const bind_field *f, bool backward);

/* An int to Python: not a bool, a float, nor an array. */
bool bind_is_int(PyObject *value);

/* "float32" and so on. */
const char *bind_type_name(bind_type type);

/* METH_FASTCALL | METH_KEYWORDS */
PyObject *bind_call(PyObject *module, const bind_op *op, bool backward, PyObject *const *arguments,
                    Py_ssize_t count, PyObject *keywords);

/* The docstring of a function, with its text signature, by malloc; NULL: out of memory (docs.c). */
char *bind_docstring(const bind_op *op, bool backward);

/* For tests: fill scratch and new outputs with 0xff bytes (NaN, -1) first, and watch the scratch's end. */
extern bool bind_poison;

#endif
