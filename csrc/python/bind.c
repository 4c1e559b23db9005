/* bind.c: a call of an op by its field table: its arrays and dims are checked and made, and it runs. */
#include "call.h"

#include <limits.h>
#include <stdlib.h>
#include <string.h>

#include "errors.h"
#include "place.h"
#include "shape.h"

bool bind_poison;

/* ---------------------------------------------------------------- facts about fields */

bool bind_listed(const char *list, const char *name)
{
    const size_t n = strlen(name);
    for (const char *at = list; at && (at = strstr(at, name)); at++)
        if (at > list && at[-1] == ' ' && at[n] == ' ')
            return true;
    return false;
}

int bind_positional(const bind_op *op)
{
    bool optional = false;
    int count = 0;
    for (int i = 0; i < op->count; i++) {
        const bind_field *f = &op->fields[i];
        if (!bind_is_input(f))
            continue;
        if (f->kind == BIND_OPT || f->kind == BIND_INOPT)
            optional = true;
        else if (optional)
            break;
        count++;
    }
    return count;
}

bool bind_required(const bind_op *op, const bind_field *f, bool backward)
{
    switch (f->kind) {
    case BIND_IN:
    case BIND_INOUT:
        return true;
    case BIND_OUT:
        return backward && !(op->facts && bind_listed(op->facts->unread, f->name));
    case BIND_SAVED:
        return backward;
    default:
        return false;
    }
}

static int type_num(bind_type type)
{
    switch (type) {
    case BIND_f64:
        return NPY_FLOAT64;
    case BIND_i32:
        return NPY_INT32;
    case BIND_i64:
        return NPY_INT64;
    default:
        return NPY_FLOAT32;
    }
}

/* Of the arrays of a device: activations there are what the backend computes with. */
static array_type device_type(const pm_backend *backend, bind_type type)
{
    switch (type) {
    case BIND_f64:
        return ARRAY_F64;
    case BIND_i32:
        return ARRAY_I32;
    case BIND_i64:
        return ARRAY_I64;
    case BIND_act:
        return backend->act_bytes == 2 ? ARRAY_BF16 : ARRAY_F32;
    default:
        return ARRAY_F32;
    }
}

static int64_t type_bytes(bind_type type) { return type == BIND_f64 || type == BIND_i64 ? 8 : 4; }

const char *bind_type_name(bind_type type)
{
    switch (type) {
    case BIND_f64:
        return "float64";
    case BIND_i32:
        return "int32";
    case BIND_i64:
        return "int64";
    default:
        return "float32";
    }
}

/* ---------------------------------------------------------------- shapes */

/* "float32 (3, 4)": what was given. */
static PyObject *given(const call *c, int slot)
{
    PyObject *value = c->values[slot];
    if (PyArray_Check(value)) {
        PyObject *shape = PyObject_GetAttrString(value, "shape");
        PyObject *text =
            shape ? PyUnicode_FromFormat("%S %S", PyArray_DESCR((PyArrayObject *)value), shape)
                  : NULL;
        Py_XDECREF(shape);
        return text;
    }
    char shape[160] = "";
    size_t used = 0;
    for (int i = 0; i < c->views[slot].axes; i++)
        used += (size_t)snprintf(shape + used, sizeof shape - used, "%s%lld", i ? ", " : "",
                                 (long long)c->views[slot].shape[i]);
    return PyUnicode_FromFormat("%s of shape (%s)", Py_TYPE(value)->tp_name, shape);
}

/* Raises "what was expected; what was given". */
static int wrong_array(const call *c, int slot, PyObject *type, const char *problem)
{
    char name[64], letters[96], numbers[160], origins[256];
    const bind_field *f = &c->op->fields[slot % c->op->count];
    shape_text(f->text, letters, sizeof letters);
    shape_values(f->text, &c->dims, numbers, sizeof numbers);
    shape_origins(f->text, &c->dims, origins, sizeof origins);
    PyObject *what = given(c, slot);
    if (what)
        PyErr_Format(type, "%s_%s: %s must be a C-contiguous %s array of shape %s = %s%s; got %S%s",
                     CALL_FUNCTION(c), call_slot_name(c, slot, name),
                     bind_type_name(slot >= c->op->count ? BIND_f32 : f->type), letters, numbers,
                     origins, what, problem);
    Py_XDECREF(what);
    return -1;
}

/* Learns what it can from the shape of one array; *learnt is set when a dim became known. */
static int learn_dims(call *c, int slot, bool *learnt)
{
    const bind_field *f = &c->op->fields[slot % c->op->count];
    const int64_t *shape = c->views[slot].shape;
    const char *text = f->text;
    for (int i = 0; text; i++) {
        const axis a = axis_read(&text, &c->dims);
        if (a.many || a.overflow || (a.unknown >= 0 && a.factor == 0))
            continue;
        if (a.unknown < 0 ? shape[i] != a.rest
                          : shape[i] < a.rest || (shape[i] - a.rest) % a.factor)
            return wrong_array(c, slot, PyExc_ValueError, "");
        if (a.unknown >= 0) {
            c->dims.value[a.unknown] = (shape[i] - a.rest) / a.factor;
            c->dims.from[a.unknown] = f->name; /* of a gradient: the field that it belongs to */
            c->dims.known[a.unknown] = *learnt = true;
        }
    }
    return 0;
}

/* Until nothing new is learnt: the last pass compares every axis with every dim. */
static int learn_all_dims(call *c)
{
    for (bool learnt = true; learnt;) {
        learnt = false;
        for (int i = 0; i < 2 * c->op->count; i++)
            if (c->values[i] && bind_is_array(&c->op->fields[i % c->op->count]) &&
                learn_dims(c, i, &learnt) < 0)
                return -1;
    }
    return 0;
}

/* The shape of a field, every dim known. Refuses sizes that could overflow in any later product: 2^55
 * bytes, and the same with every zero counted as a one. */
static int whole_shape(const call *c, const bind_field *f, int64_t shape[BIND_MOST_AXES], int *axes)
{
    const char *text = f->text;
    int64_t bytes = type_bytes(f->type);
    bool overflow = false;
    for (*axes = 0; text; ++*axes) {
        const axis a = axis_read(&text, &c->dims);
        shape[*axes] = a.rest;
        overflow |= a.overflow || __builtin_mul_overflow(bytes, a.rest ? a.rest : 1, &bytes);
    }
    if (overflow || bytes > (int64_t)1 << 55) {
        char numbers[160];
        shape_values(f->text, &c->dims, numbers, sizeof numbers);
        PyErr_Format(PyExc_ValueError, "%s_%s: %s of shape %s is too large", CALL_FUNCTION(c),
                     f->name, numbers);
        return -1;
    }
    return 0;
}

/* ---------------------------------------------------------------- arrays */

static bool wants(const call *c, const char *args, const bind_field *f)
{
    const bind_facts *facts = c->op->facts;
    return f->kind != BIND_SAVED || !facts || !facts->wants || facts->wants(args, f->name);
}

static int missing(const call *c, int slot)
{
    char name[64], shape[96];
    const bind_field *f = &c->op->fields[slot % c->op->count];
    shape_text(f->text, shape, sizeof shape);
    PyErr_Format(PyExc_TypeError, "%s_%s: %s is missing: a %s array of shape %s%s",
                 CALL_FUNCTION(c), call_slot_name(c, slot, name),
                 bind_type_name(slot >= c->op->count ? BIND_f32 : f->type), shape,
                 c->none[slot] ? "; got None" : "");
    return -1;
}

/* Whether slot i is read, written, both or neither by this call. */
static void slot_access(const call *c, int slot, bool *reads, bool *writes)
{
    const bind_field *f = &c->op->fields[slot % c->op->count];
    if (slot >= c->op->count) {
        *reads = c->backward && bind_has_upstream(f);
        *writes = c->backward && bind_has_grad(f);
    } else {
        *reads = bind_is_input(f) || (c->backward && bind_is_output(f));
        *writes = f->kind == BIND_INOUT || f->kind == BIND_INOPT ||
                  (!c->backward && bind_is_output(f));
    }
}

/* The gradient of an activation is one; all others are f32. */
static bind_type slot_type(const call *c, int slot)
{
    const bind_type type = c->op->fields[slot % c->op->count].type;
    return slot < c->op->count || type == BIND_act ? type : BIND_f32;
}

static void look_at(call *c, int slot, PyObject *value)
{
    PyArrayObject *const array = (PyArrayObject *)value;
    array_view *const view = &c->views[slot];
    *view = (array_view){.data = PyArray_DATA(array),
                         .axes = PyArray_NDIM(array),
                         .item = (size_t)PyArray_ITEMSIZE(array)};
    for (int i = 0; i < view->axes && i < ARRAY_MOST_AXES; i++)
        view->shape[i] = PyArray_DIM(array, i);
}

/* All that can be said of an array before the dims are known. */
static int check_array(call *c, int slot, bool writes)
{
    const bind_field *f = &c->op->fields[slot % c->op->count];
    PyObject *value = c->values[slot];
    if (array_is_device(value)) {
        char who[192], name[64];
        snprintf(who, sizeof who, "%s_%s: %s", CALL_FUNCTION(c), call_slot_name(c, slot, name));
        c->on_device = true;
        return array_view_device(value, c->backend, who,
                                 device_type(c->backend, slot_type(c, slot)), shape_axes(f->text),
                                 writes, &c->views[slot]);
    }
    if (!PyArray_CheckExact(value)) /* a subclass may mean something else, such as a mask */
        return call_wrong_type(c, slot, "a numpy.ndarray");
    PyArrayObject *array = (PyArrayObject *)value;
    const int type = slot >= c->op->count ? NPY_FLOAT32 : type_num(f->type);
    if (!PyArray_EquivTypenums(PyArray_TYPE(array), type))
        return wrong_array(c, slot, PyExc_TypeError, "");
    if (PyArray_ISBYTESWAPPED(array))
        return wrong_array(c, slot, PyExc_TypeError, " of the other byte order");
    if (PyArray_NDIM(array) != shape_axes(f->text))
        return wrong_array(c, slot, PyExc_ValueError, "");
    if (!PyArray_IS_C_CONTIGUOUS(array))
        return wrong_array(c, slot, PyExc_ValueError, ", not C-contiguous");
    if (!PyArray_ISALIGNED(array))
        return wrong_array(c, slot, PyExc_ValueError, ", misaligned");
    if (writes && !PyArray_ISWRITEABLE(array))
        return wrong_array(c, slot, PyExc_ValueError, ", read-only");
    look_at(c, slot, value);
    return 0;
}

/* What the op takes on trust is checked on the host (bind_facts): indices on a device are brought here
 * for that. */
static int mirror_indices(call *c)
{
    pm_ctx ctx = {.backend = c->backend};
    pm_status status = PM_OK;
    core_section section;
    if (!c->on_device || !c->op->facts || !(c->op->facts->infer || c->op->facts->check))
        return 0;
    if (core_enter(&section, &ctx) < 0)
        return -1;
    for (int i = 0; i < c->op->count && status == PM_OK; i++) {
        const array_view *const view = &c->views[i];
        bool reads, writes;
        slot_access(c, i, &reads, &writes);
        if (!view->device || !reads || c->op->fields[i].type != BIND_i32 || !array_count(view))
            continue;
        c->mirrors[i] = malloc(array_bytes(view));
        status =
            c->mirrors[i]
                ? ctx.backend->read(&ctx, c->mirrors[i], view->data, array_bytes(view))
                : pm_fail(&ctx, PM_ENOMEM, "no memory for a copy of %s", c->op->fields[i].name);
    }
    core_leave(&section);
    if (status == PM_OK)
        return 0;
    core_raise(&ctx, status);
    return -1;
}

static int check_arrays(call *c, const char *args)
{
    for (int i = 0; i < 2 * c->op->count; i++) {
        const bind_field *f = &c->op->fields[i % c->op->count];
        bool reads, writes, required;
        slot_access(c, i, &reads, &writes);
        if (i < c->op->count)
            required = bind_required(c->op, f, c->backward) && wants(c, args, f);
        else
            required = reads && f->grad == BIND_GRAD;
        if (!c->values[i] && required)
            return missing(c, i);
        if (c->none[i] && !c->backward && f->kind == BIND_OUT &&
            !(c->op->facts && bind_listed(c->op->facts->nullable, f->name)))
            return missing(c, i);
        if (c->values[i] && bind_is_array(f) && check_array(c, i, writes) < 0)
            return -1;
    }
    return 0;
}

/* Writes the pointers that are known now into args and grads: to what the host can look at, or to where
 * the arrays are. */
static void point(const call *c, const place *places, char *args, char *grads)
{
    for (int i = 0; i < 2 * c->op->count; i++) {
        const bind_field *f = &c->op->fields[i % c->op->count];
        if (!c->values[i] || !bind_is_array(f))
            continue;
        void *data = places ? places[i].at : c->mirrors[i] ? c->mirrors[i] : c->views[i].data;
        if (i >= c->op->count)
            *(void **)(grads + f->grad_at) = data;
        else if (f->type == BIND_weight)
            ((pm_weight *)(args + f->at))->w = data;
        else
            *(void **)(args + f->at) = data;
    }
}

/* Every dim, or an error that says which one nothing determines. */
static int fix_dims(call *c, char *args)
{
    if (learn_all_dims(c) < 0)
        return -1;
    for (int pass = 0; pass < 2 && c->op->facts && c->op->facts->infer; pass++) {
        c->op->facts->infer(&c->dims, args); /* once more with what followed from it */
        if (learn_all_dims(c) < 0)
            return -1;
    }
    for (int i = 0; i < c->op->count; i++) {
        const bind_field *f = &c->op->fields[i];
        const char *letter = f->kind == BIND_LD ? f->text : f->name;
        if (f->kind != BIND_DIM && f->kind != BIND_LD)
            continue;
        if (!c->dims.known[*letter - 'A']) {
            PyErr_Format(PyExc_TypeError,
                         "%s_%s: no array determines %s: give it as a keyword, %s=...",
                         CALL_FUNCTION(c), letter, letter);
            return -1;
        }
        *(int64_t *)(args + f->at) = c->dims.value[*letter - 'A'];
    }
    for (int i = 0; i < c->op->count; i++) {
        int64_t shape[BIND_MOST_AXES];
        int axes;
        if (bind_is_array(&c->op->fields[i]) && whole_shape(c, &c->op->fields[i], shape, &axes) < 0)
            return -1;
    }
    return 0;
}

static PyObject *make_host(call *c, int slot, int axes, const int64_t *shape)
{
    const bind_field *f = &c->op->fields[slot % c->op->count];
    npy_intp lengths[BIND_MOST_AXES];
    for (int i = 0; i < axes; i++)
        lengths[i] = (npy_intp)shape[i];
    PyObject *array =
        PyArray_ZEROS(axes, lengths, slot < c->op->count ? type_num(f->type) : NPY_FLOAT32, 0);
    if (array && bind_poison && f->grad != BIND_ADD)
        memset(PyArray_DATA((PyArrayObject *)array), 0xff,
               (size_t)PyArray_NBYTES((PyArrayObject *)array));
    if (array)
        look_at(c, slot, array);
    return array;
}

static PyObject *make_device(call *c, PyObject *module, int slot, int axes, const int64_t *shape)
{
    const array_type type = device_type(c->backend, slot_type(c, slot));
    PyObject *array = array_new_device(module, c->backend, type, axes, shape);
    if (array) {
        c->views[slot] = *array_view_of(array);
        c->views[slot].keeps = NULL;
    }
    return array;
}

/* A new array for each output (or gradient) that was not given: on the device, when an argument is. */
static int make_arrays(call *c, PyObject *module, const char *args)
{
    for (int i = 0; i < 2 * c->op->count; i++) {
        const bind_field *f = &c->op->fields[i % c->op->count];
        bool reads, writes;
        slot_access(c, i, &reads, &writes);
        if (!writes || c->values[i] || c->none[i] || !wants(c, args, f))
            continue;
        if (f->kind == BIND_INOPT || (i >= c->op->count && !c->values[i - c->op->count]))
            continue; /* absent; or the gradient of an input that is */
        int64_t shape[BIND_MOST_AXES];
        int axes;
        if (whole_shape(c, f, shape, &axes) < 0)
            return -1;
        c->made[i] = c->on_device ? make_device(c, module, i, axes, shape)
                                  : make_host(c, i, axes, shape);
        if (!c->made[i])
            return -1;
        c->values[i] = c->made[i];
    }
    return 0;
}

static bool may_alias(const call *c, const char *written, const char *read)
{
    char pair[140];
    snprintf(pair, sizeof pair, "%s=%s", written, read);
    return c->op->facts && bind_listed(c->op->facts->aliases, pair);
}

/* No written array may share memory with another argument, but for the aliases of the contract. */
static int check_overlap(const call *c)
{
    for (int w = 0; w < 2 * c->op->count; w++) {
        bool reads, writes;
        slot_access(c, w, &reads, &writes);
        if (!writes || !c->values[w] || c->made[w])
            continue;
        const char *from = c->views[w].data, *to = from + array_bytes(&c->views[w]);
        for (int r = 0; r < 2 * c->op->count; r++) {
            char written[64], read[64];
            if (r == w || !c->values[r] || c->made[r] ||
                !bind_is_array(&c->op->fields[r % c->op->count]))
                continue;
            const char *begin = c->views[r].data, *end = begin + array_bytes(&c->views[r]);
            if (from == to || begin == end || end <= from || to <= begin)
                continue;
            call_slot_name(c, w, written), call_slot_name(c, r, read);
            if (begin == from && end == to &&
                (may_alias(c, written, read) || may_alias(c, read, written)))
                continue;
            PyErr_Format(PyExc_ValueError, "%s_%s: %s shares memory with %s", CALL_FUNCTION(c),
                         written, read);
            return -1;
        }
    }
    return 0;
}

/* ---------------------------------------------------------------- the call */

static PyObject *result(const call *c)
{
    PyObject *dict = PyDict_New();
    for (int i = 0; dict && i < 2 * c->op->count; i++) {
        char name[64];
        bool reads, writes;
        slot_access(c, i, &reads, &writes);
        if (writes && c->values[i] &&
            PyDict_SetItemString(dict, call_slot_name(c, i, name), c->values[i]) < 0)
            Py_CLEAR(dict);
    }
    return dict;
}

/* The backend of the keywords device and compute. */
static const char *const HERE[2] = {"cpu", "fp32"};

static const pm_backend *backend_of(const call *c, PyObject *module)
{
    const char *words[2];
    char who[80];
    for (int i = 0; i < 2; i++) {
        words[i] = c->where[i] ? NULL : HERE[i];
        if (c->where[i] && PyUnicode_Check(c->where[i]))
            words[i] = PyUnicode_AsUTF8(c->where[i]);
        else if (c->where[i])
            PyErr_Format(PyExc_TypeError, "%s_%s: %s must be a str; got %.80s %.80R",
                         CALL_FUNCTION(c), CALL_WHERE[i], Py_TYPE(c->where[i])->tp_name,
                         c->where[i]);
        if (!words[i])
            return NULL;
    }
    if (!c->where[0] && !c->where[1])
        return core_get_state(module)->ops_backend;
    snprintf(who, sizeof who, "%s_%s", CALL_FUNCTION(c));
    return core_find_backend(module, who, words[0], words[1]);
}

/* ---------------------------------------------------------------- running */

enum { GUARD = 256 }; /* bytes behind the scratch, when it is poisoned */

static pm_status poison(pm_ctx *ctx, char *memory, size_t bytes)
{
    char piece[4096];
    memset(piece, 0xff, sizeof piece);
    for (size_t at = 0; at < bytes; at += sizeof piece)
        PM_TRY(ctx->backend->write(ctx, memory + at, piece,
                                   bytes - at < sizeof piece ? bytes - at : sizeof piece));
    return PM_OK;
}

static pm_status check_guard(pm_ctx *ctx, const call *c, const char *guard)
{
    unsigned char piece[GUARD];
    PM_TRY(ctx->backend->read(ctx, piece, guard, GUARD));
    for (int i = 0; i < GUARD; i++)
        if (piece[i] != 0xff)
            return pm_fail(ctx, PM_EINTERNAL, "%s: wrote beyond its workspace", c->op->name);
    return PM_OK;
}

static pm_status run_op(pm_ctx *ctx, const call *c, const void *args, const void *grads)
{
    const size_t bytes = c->op->workspace(ctx, args, c->backward);
    const size_t all = bytes + (bind_poison ? GUARD : 0);
    char *scratch = all ? ctx->backend->alloc(ctx, all) : NULL;
    if (all && !scratch)
        return PM_ENOMEM;
    pm_status status = bind_poison ? poison(ctx, scratch, all) : PM_OK;
    if (status == PM_OK)
        status = c->backward ? c->op->backward(ctx, args, grads, scratch)
                             : c->op->forward(ctx, args, scratch);
    if (status == PM_OK)
        status = ctx->backend->sync(ctx);
    if (status == PM_OK && bind_poison)
        status = check_guard(ctx, c, scratch + bytes);
    if (scratch)
        ctx->backend->free(ctx, scratch, all);
    return status;
}

static void list_places(const call *c, place *places)
{
    for (int i = 0; i < 2 * c->op->count; i++) {
        const bind_field *f = &c->op->fields[i % c->op->count];
        bool reads, writes;
        places[i] = (place){0};
        if (!c->values[i] || !bind_is_array(f))
            continue;
        const array_view *const view = &c->views[i];
        slot_access(c, i, &reads, &writes);
        places[i] = (place){.data = view->data,
                            .count = array_count(view),
                            .item = (int64_t)view->item,
                            .act = f->type == BIND_act,
                            .writes = writes,
                            .device = view->device};
    }
}

static PyObject *run(call *c, void *args, void *grads)
{
    pm_ctx ctx = {.backend = c->backend};
    const bind_facts *facts = c->op->facts;
    if (facts && facts->check) {
        const pm_status status = facts->check(&ctx, args, c->backward);
        if (status != PM_OK) {
            PyErr_Format(PyExc_ValueError, "%s_%s: %s", CALL_FUNCTION(c), ctx.message);
            return NULL;
        }
    }
    core_section section;
    if (core_enter(&section, &ctx) < 0)
        return NULL;
    const int n = 2 * c->op->count;
    place places[2 * BIND_MOST_FIELDS];
    list_places(c, places);
    pm_status status = place_arrays(&ctx, places, n);
    if (status == PM_OK) {
        point(c, places, args, grads);
        status = run_op(&ctx, c, args, grads);
    }
    if (status == PM_OK)
        status = place_fetch(&ctx, places, n);
    place_free(&ctx, places, n);
    core_leave(&section);
    return status == PM_OK ? result(c) : core_raise(&ctx, status);
}

PyObject *bind_call(PyObject *module, const bind_op *op, bool backward, PyObject *const *arguments,
                    Py_ssize_t count, PyObject *keywords)
{
    call c = {.op = op, .backward = backward};
    _Alignas(16) char args[BIND_ARGS_BYTES] = {0}, grads[BIND_GRADS_BYTES] = {0};
    PyObject *dict = NULL;
    if (call_read_arguments(&c, arguments, count, keywords) < 0 ||
        call_read_scalars(&c, args) < 0 || !(c.backend = backend_of(&c, module)) ||
        check_arrays(&c, args) < 0 || mirror_indices(&c) < 0)
        goto done;
    point(&c, NULL, args, grads);
    if (fix_dims(&c, args) < 0 || check_overlap(&c) < 0 || make_arrays(&c, module, args) < 0)
        goto done;
    point(&c, NULL, args, grads);
    dict = run(&c, args, grads);
done:
    for (int i = 0; i < 2 * op->count; i++) {
        Py_XDECREF(c.made[i]);
        Py_XDECREF(c.views[i].keeps);
        free(c.mirrors[i]);
    }
    return dict;
}
