/* call.h: one call of an op in progress, between bind.c (its arrays, its dims, running it) and read.c (its
 * words and numbers). */
#ifndef PM_PYTHON_CALL_H
#define PM_PYTHON_CALL_H

#include "array.h"
#include "bind.h"

/* values[i] is the argument of field i, values[count + i] that of its gradient; borrowed. */
typedef struct {
    const bind_op *op;
    bool backward;
    PyObject *values[2 * BIND_MOST_FIELDS]; /* NULL: not given, or None */
    bool none[2 * BIND_MOST_FIELDS];        /* given as None */
    PyObject *made[2 * BIND_MOST_FIELDS];   /* arrays made here; owned */
    array_view views[2 * BIND_MOST_FIELDS]; /* of the values that are arrays */
    void *mirrors[2 * BIND_MOST_FIELDS];    /* host copies of indices on a device; owned */
    bool on_device;                         /* an argument is: so is what is made */
    const pm_backend *backend;
    PyObject *where[2]; /* device, compute; NULL: not given */
    bind_dims dims;
} call;

/* The arguments that say where an op runs. */
extern const char *const CALL_WHERE[2];

#define CALL_FUNCTION(c) (c)->op->name, (c)->backward ? "backward" : "forward"

/* The name of the argument of slot i: the field's, or d<field>. */
const char *call_slot_name(const call *c, int i, char buffer[64]);

/* Stores every argument in its slot; then the attributes go into args, and the dims that are keywords
 * into c->dims. */
int call_read_arguments(call *c, PyObject *const *arguments, Py_ssize_t count, PyObject *keywords);
int call_read_scalars(call *c, char *args);

/* Raises "<function>: <argument> must be <expected>; got ...". */
int call_wrong_type(const call *c, int slot, const char *expected);

#endif
