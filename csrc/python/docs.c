/* docs.c: docstrings of the op functions, from the field tables. */
#include <stdarg.h>
#include <string.h>

#include "bind.h"

typedef struct {
    char *text;
    size_t length, room;
} page;

__attribute__((format(printf, 2, 3))) static void add(page *p, const char *format, ...)
{
    if (!p->text)
        return;
    for (;;) {
        va_list list;
        va_start(list, format);
        const int n = vsnprintf(p->text + p->length, p->room - p->length, format, list);
        va_end(list);
        if (p->length + (size_t)n < p->room) {
            p->length += (size_t)n;
            return;
        }
        char *larger = realloc(p->text, 2 * p->room + (size_t)n);
        if (!larger) {
            free(p->text);
            p->text = NULL;
            return;
        }
        p->text = larger;
        p->room = 2 * p->room + (size_t)n;
    }
}

/* "(N, D)" */
static void add_shape(page *p, const char *shape)
{
    add(p, "(");
    for (const char *s = shape; *s; s++)
        add(p, *s == ',' ? ", " : "%c", *s);
    add(p, strchr(shape, ',') ? ")" : ",)");
}

/* The word number `index` of "a|b|c". */
static void add_word(page *p, const char *words, int index)
{
    for (; index > 0; index--)
        words = strchr(words, '|') + 1;
    add(p, "'%.*s'", (int)strcspn(words, "|"), words);
}

static bool optional(const bind_op *op, const bind_field *f, bool backward)
{
    const bool only_sometimes = f->kind == BIND_SAVED && op->facts && op->facts->wants;
    return !bind_required(op, f, backward) || only_sometimes;
}

/* A float as Python writes it: 1.0, 1e-06. */
static void add_real(page *p, double value)
{
    char *text = PyOS_double_to_string(value, 'r', 0, Py_DTSF_ADD_DOT_0, NULL);
    add(p, "%s", text ? text : "...");
    PyMem_Free(text);
}

/* experts_forward($module, /, x, row_off=None, ..., *, foff, ...) */
static void add_signature(page *p, const bind_op *op, bool backward)
{
    add(p, "%s_%s($module, /", op->name, backward ? "backward" : "forward");
    const int positional = bind_positional(op);
    int n = 0;
    for (int i = 0; i < op->count; i++) {
        const bind_field *f = &op->fields[i];
        if (!bind_is_input(f))
            continue;
        if (n++ == positional)
            add(p, ", *");
        add(p, ", %s%s", f->name, optional(op, f, backward) ? "=None" : "");
    }
    if (n <= positional)
        add(p, ", *");
    for (int i = 0; i < op->count; i++) {
        const bind_field *f = &op->fields[i];
        if (bind_is_output(f))
            add(p, ", %s%s", f->name, optional(op, f, backward) ? "=None" : "");
    }
    for (int i = 0; backward && i < op->count; i++)
        if (bind_has_upstream(&op->fields[i]))
            add(p, ", d%s%s", op->fields[i].name, op->fields[i].grad == BIND_MAYBE ? "=None" : "");
    for (int i = 0; backward && i < op->count; i++)
        if (bind_has_grad(&op->fields[i]))
            add(p, ", d%s=None", op->fields[i].name);
    for (int i = 0; i < op->count; i++) {
        const bind_field *f = &op->fields[i];
        if (f->kind == BIND_INT)
            add(p, ", %s=%lld", f->name, (long long)f->value);
        if (f->kind == BIND_REAL) {
            add(p, ", %s=", f->name);
            add_real(p, f->value);
        }
        if (f->kind == BIND_ENUM) {
            add(p, ", %s=", f->name);
            add_word(p, f->text, (int)f->value);
        }
    }
    for (int i = 0; i < op->count; i++)
        if (op->fields[i].kind == BIND_DIM)
            add(p, ", %s=None", op->fields[i].name);
    add(p, ", device='cpu', compute='fp32')\n--\n\n");
}

static void add_array(page *p, const char *prefix, const bind_field *f, const char *type,
                      const char *more)
{
    add(p, "%s%s : %s array of shape ", prefix, f->name, type);
    add_shape(p, f->text);
    add(p, "%s\n", more);
}

static void add_parameters(page *p, const bind_op *op, bool backward)
{
    add(p, "Parameters\n----------\n");
    for (int i = 0; i < op->count; i++) {
        const bind_field *f = &op->fields[i];
        if (!bind_is_input(f))
            continue;
        const bool maybe = f->kind == BIND_OPT || f->kind == BIND_INOPT;
        add_array(p, "", f, bind_type_name(f->type), maybe ? ", optional" : "");
        if (f->kind == BIND_INOUT || f->kind == BIND_INOPT)
            add(p, "    Updated in place.\n");
    }
    for (int i = 0; i < op->count; i++) {
        const bind_field *f = &op->fields[i];
        if (!bind_is_output(f))
            continue;
        add_array(p, "", f, bind_type_name(f->type), optional(op, f, backward) ? ", optional" : "");
        if (backward)
            add(p, "    From %s_forward.\n", op->name);
        else
            add(p, "    Where to write it%s.\n", f->kind == BIND_SAVED ? "; None: not wanted" : "");
    }
    for (int i = 0; backward && i < op->count; i++) {
        const bind_field *f = &op->fields[i];
        if (bind_has_upstream(f)) {
            add_array(p, "d", f, "float32", f->grad == BIND_MAYBE ? ", optional" : "");
            add(p, "    The gradient of %s%s.\n", f->name,
                f->grad == BIND_MAYBE ? "; None: zero" : "");
        }
    }
    for (int i = 0; backward && i < op->count; i++) {
        const bind_field *f = &op->fields[i];
        if (bind_has_grad(f)) {
            add_array(p, "d", f, "float32", ", optional");
            add(p, f->grad == BIND_ADD
                       ? "    The gradient is added to it (default: to zeros); None: not wanted.\n"
                       : "    Where to write the gradient; None: not wanted.\n");
        }
    }
    for (int i = 0; i < op->count; i++) {
        const bind_field *f = &op->fields[i];
        if (f->kind == BIND_INT)
            add(p, "%s : int, default %lld\n", f->name, (long long)f->value);
        if (f->kind == BIND_REAL) {
            add(p, "%s : float, default ", f->name);
            add_real(p, f->value);
            add(p, "\n");
        }
        if (f->kind == BIND_ENUM) {
            add(p, "%s : {", f->name);
            int words = 1;
            for (const char *s = f->text; *s; s++)
                words += *s == '|';
            for (int w = 0; w < words; w++) {
                add(p, "%s", w ? ", " : "");
                add_word(p, f->text, w);
            }
            add(p, "}, default ");
            add_word(p, f->text, (int)f->value);
            add(p, "\n");
        }
    }
    const char *comma = "";
    for (int i = 0; i < op->count; i++)
        if (op->fields[i].kind == BIND_DIM) {
            add(p, "%s%s", comma, op->fields[i].name);
            comma = ", ";
        }
    add(p, " : int, optional\n    Dimensions; needed only where no array determines them.\n");
    add(p, "device : str, default 'cpu'\n    Or 'cuda': NumPy arrays are copied there and back, "
           "arrays of the GPU are used where they are.\n"
           "compute : str, default 'fp32'\n    What products multiply, as of promoe.Model: 'bf16', "
           "'bf16-emulated' (a CPU) or\n    'tf32' (a GPU). In 'bf16' a GPU also keeps activations "
           "so, and rounds NumPy arrays.\n\n");
}

static void add_returns(page *p, const bind_op *op, bool backward)
{
    add(p, "Returns\n-------\ndict\n");
    for (int i = 0; i < op->count; i++) {
        const bind_field *f = &op->fields[i];
        if (backward ? !bind_has_grad(f) : f->kind < BIND_OUT || f->kind > BIND_INOPT)
            continue;
        add(p, "    ");
        add_array(p, backward ? "d" : "", f, backward ? "float32" : bind_type_name(f->type),
                  f->kind == BIND_SAVED ? ", for backward" : "");
    }
    add(p, "\n");
}

/* The comment that opens ops/<op>.h; contracts.def is written by setup.py. */
static const char *contract(const char *op)
{
#define PM_CONTRACT(name, text)                                                                    \
    if (!strcmp(op, #name))                                                                        \
        return text;
#include "contracts.def"
#undef PM_CONTRACT
    return op;
}

char *bind_docstring(const bind_op *op, bool backward)
{
    page p = {.text = malloc(4096), .room = 4096};
    add_signature(&p, op, backward);
    if (backward)
        add(&p, "Gradients of %s_forward.\n\n", op->name);
    add(&p, "%s\n\n", contract(op->name));
    add_parameters(&p, op, backward);
    add_returns(&p, op, backward);
    add(&p, "Raises\n------\n"
            "TypeError\n    A missing or unknown argument, or one of the wrong type.\n"
            "ValueError\n    A wrong shape, layout or value; arrays are never converted. The "
            "message names the\n"
            "    argument, what was expected and what was given.\n");
    return p.text;
}
