/* array.c: DeviceArray, and the arrays of others by DLPack and __cuda_array_interface__. */
#include "array.h"

#include <stdlib.h>
#include <string.h>

#include "errors.h"
#include "place.h"

/* ---------------------------------------------------------------- DLPack's structs */

/* Of DLPack before 1.0 (dlpack.h, Apache-2.0, by the DLPack contributors), which every producer gives
 * when it is asked for no newer version. */
typedef struct {
    int32_t device_type, device_id;
} dl_device;
typedef struct {
    uint8_t code, bits;
    uint16_t lanes;
} dl_type;
typedef struct {
    void *data;
    dl_device device;
    int32_t ndim;
    dl_type dtype;
    int64_t *shape, *strides; /* strides in numbers; NULL: C-contiguous */
    uint64_t byte_offset;
} dl_tensor;
typedef struct dl_managed {
    dl_tensor tensor;
    void *context;
    void (*deleter)(struct dl_managed *);
} dl_managed;
enum { DL_CPU = 1, DL_CUDA = 2, DL_CUDA_HOST = 3, DL_CUDA_MANAGED = 13 };
enum { DL_INT, DL_UINT, DL_FLOAT, DL_BFLOAT = 4 };

static const char DL_NAME[] = "dltensor";

/* ---------------------------------------------------------------- types */

static const struct {
    const char *name, *typestr; /* typestr NULL: __cuda_array_interface__ has no word for it */
    size_t bytes;
    uint8_t code;
} types[ARRAY_TYPES] = {
    {"float32", "<f4", 4, DL_FLOAT}, {"float64", "<f8", 8, DL_FLOAT},  {"int32", "<i4", 4, DL_INT},
    {"int64", "<i8", 8, DL_INT},     {"bfloat16", NULL, 2, DL_BFLOAT},
};

const char *array_type_name(array_type type) { return types[type].name; }
size_t array_type_bytes(array_type type) { return types[type].bytes; }

int64_t array_count(const array_view *view)
{
    int64_t count = 1;
    for (int i = 0; i < view->axes; i++)
        count *= view->shape[i];
    return count;
}

/* ---------------------------------------------------------------- DeviceArray */

typedef struct {
    PyObject_HEAD const pm_backend *backend;
    array_type type;
    array_view view;
    bool owned;
} DeviceArray;

static size_t at_least_one(size_t bytes) { return bytes ? bytes : 1; }

static void device_array_dealloc(DeviceArray *self)
{
    PyTypeObject *type = Py_TYPE(self);
    pm_ctx ctx = {.backend = self->backend};
    if (self->owned)
        self->backend->free(&ctx, self->view.data, at_least_one(array_bytes(&self->view)));
    Py_XDECREF(self->view.keeps);
    type->tp_free((PyObject *)self);
    Py_DECREF(type);
}

static DeviceArray *blank(PyObject *module, const pm_backend *backend, array_type type, int axes,
                          const int64_t *shape)
{
    PyTypeObject *const made = core_get_state(module)->array_type;
    DeviceArray *self = (DeviceArray *)made->tp_alloc(made, 0);
    if (!self)
        return NULL;
    self->backend = backend;
    self->type = type;
    self->view = (array_view){.axes = axes, .item = types[type].bytes, .device = true};
    memcpy(self->view.shape, shape, (size_t)axes * sizeof *shape);
    return self;
}

PyObject *array_wrap_device(PyObject *module, const pm_backend *backend, array_type type, int axes,
                            const int64_t *shape, void *memory, PyObject *owner)
{
    DeviceArray *self = blank(module, backend, type, axes, shape);
    if (!self)
        return NULL;
    self->view.data = memory;
    self->view.keeps = Py_NewRef(owner);
    return (PyObject *)self;
}

PyObject *array_new_device(PyObject *module, const pm_backend *backend, array_type type, int axes,
                           const int64_t *shape)
{
    DeviceArray *self = blank(module, backend, type, axes, shape);
    if (!self)
        return NULL;
    pm_ctx ctx = {.backend = backend};
    self->view.data = backend->alloc(&ctx, at_least_one(array_bytes(&self->view)));
    self->owned = self->view.data != NULL;
    if (self->owned)
        return (PyObject *)self;
    Py_DECREF(self);
    return core_raise(&ctx, PM_ENOMEM);
}

const array_view *array_view_of(PyObject *device_array)
{
    return &((DeviceArray *)device_array)->view;
}

/* Of NumPy's type numbers; ARRAY_TYPES: none of ours. */
static array_type type_of(PyArrayObject *array)
{
    static const int numbers[] = {NPY_FLOAT32, NPY_FLOAT64, NPY_INT32, NPY_INT64};
    int i = 0;
    while (i < ARRAY_BF16 && !PyArray_EquivTypenums(PyArray_TYPE(array), numbers[i]))
        i++;
    return i < ARRAY_BF16 && !PyArray_ISBYTESWAPPED(array) ? (array_type)i : ARRAY_TYPES;
}

/* Between a DeviceArray and host memory of the same shape: of floats, when it is bf16. */
static int transfer(DeviceArray *self, void *host, bool back)
{
    pm_ctx ctx = {.backend = self->backend};
    core_section section;
    if (core_enter(&section, &ctx) < 0)
        return -1;
    const pm_status status = place_move(&ctx, self->view.data, host, array_count(&self->view),
                                        self->view.item, self->type == ARRAY_BF16, back);
    core_leave(&section);
    if (status == PM_OK)
        return 0;
    core_raise(&ctx, status);
    return -1;
}

static PyObject *device_array_new(PyTypeObject *type, PyObject *args, PyObject *keywords)
{
    static char *names[] = {"array", "device", "dtype", NULL};
    PyObject *value;
    const char *device = "cuda", *dtype = NULL;
    if (!PyArg_ParseTupleAndKeywords(args, keywords, "O|sz:DeviceArray", names, &value, &device,
                                     &dtype))
        return NULL;
    if (!PyArray_Check(value)) {
        PyErr_Format(PyExc_TypeError, "DeviceArray: array must be a numpy.ndarray; got %.80s",
                     Py_TYPE(value)->tp_name);
        return NULL;
    }
    PyArrayObject *const array = (PyArrayObject *)value;
    array_type kind = type_of(array);
    if (kind == ARRAY_F32 && dtype && !strcmp(dtype, types[ARRAY_BF16].name))
        kind = ARRAY_BF16;
    else if (kind == ARRAY_TYPES || (dtype && strcmp(dtype, types[kind].name)) ||
             !PyArray_IS_C_CONTIGUOUS(array) || PyArray_NDIM(array) > ARRAY_MOST_AXES) {
        PyErr_Format(PyExc_TypeError,
                     "DeviceArray: array must be C-contiguous, of at most %d axes, and float32, "
                     "float64, int32 or int64, as dtype is when it is given (or 'bfloat16', for "
                     "float32); got %S",
                     ARRAY_MOST_AXES, (PyObject *)PyArray_DESCR(array));
        return NULL;
    }
    PyObject *const module = PyType_GetModule(type);
    const pm_backend *const backend = core_find_backend(module, "DeviceArray", device, "fp32");
    if (!backend)
        return NULL;
    if (backend->host) {
        PyErr_Format(PyExc_ValueError,
                     "DeviceArray: device '%s' computes in host memory: use a numpy.ndarray",
                     device);
        return NULL;
    }
    int64_t shape[ARRAY_MOST_AXES];
    for (int i = 0; i < PyArray_NDIM(array); i++)
        shape[i] = PyArray_DIM(array, i);
    PyObject *self = array_new_device(module, backend, kind, PyArray_NDIM(array), shape);
    if (self && transfer((DeviceArray *)self, PyArray_DATA(array), false) < 0)
        Py_CLEAR(self);
    return self;
}

PyDoc_STRVAR(numpy_doc, "numpy($self, /)\n--\n\nA copy in host memory; of bfloat16 as float32.");

static PyObject *device_array_numpy(DeviceArray *self, PyObject *Py_UNUSED(none))
{
    static const int numbers[ARRAY_TYPES] = {NPY_FLOAT32, NPY_FLOAT64, NPY_INT32, NPY_INT64,
                                             NPY_FLOAT32};
    npy_intp shape[ARRAY_MOST_AXES];
    for (int i = 0; i < self->view.axes; i++)
        shape[i] = (npy_intp)self->view.shape[i];
    PyObject *array = PyArray_SimpleNew(self->view.axes, shape, numbers[self->type]);
    if (array && transfer(self, PyArray_DATA((PyArrayObject *)array), true) < 0)
        Py_CLEAR(array);
    return array;
}

static PyObject *get_shape(DeviceArray *self, void *Py_UNUSED(closure))
{
    PyObject *shape = PyTuple_New(self->view.axes);
    for (int i = 0; shape && i < self->view.axes; i++) {
        PyObject *length = PyLong_FromLongLong(self->view.shape[i]);
        if (length)
            PyTuple_SET_ITEM(shape, i, length);
        else
            Py_CLEAR(shape);
    }
    return shape;
}
static PyObject *get_dtype(DeviceArray *self, void *Py_UNUSED(closure))
{
    return PyUnicode_FromString(types[self->type].name);
}
static PyObject *get_device(DeviceArray *self, void *Py_UNUSED(closure))
{
    return PyUnicode_FromString(self->backend->name);
}

/* What was computed so far is there when others look. */
static int settle(DeviceArray *self)
{
    pm_ctx ctx = {.backend = self->backend};
    core_section section;
    if (core_enter(&section, &ctx) < 0)
        return -1;
    const pm_status status = self->backend->sync(&ctx);
    core_leave(&section);
    if (status == PM_OK)
        return 0;
    core_raise(&ctx, status);
    return -1;
}

static PyObject *get_interface(DeviceArray *self, void *Py_UNUSED(closure))
{
    if (!types[self->type].typestr) {
        PyErr_SetString(PyExc_AttributeError,
                        "__cuda_array_interface__ has no bfloat16: use __dlpack__");
        return NULL;
    }
    if (settle(self) < 0)
        return NULL;
    return Py_BuildValue("{s:N, s:s, s:(KO), s:O, s:i}", "shape", get_shape(self, NULL), "typestr",
                         types[self->type].typestr, "data",
                         (unsigned long long)(uintptr_t)self->view.data, Py_False, "strides",
                         Py_None, "version", 3);
}

typedef struct {
    dl_managed managed;
    int64_t shape[ARRAY_MOST_AXES];
} exported;

static void delete_exported(dl_managed *managed)
{
    const PyGILState_STATE gil = PyGILState_Ensure();
    Py_DECREF((PyObject *)managed->context);
    PyGILState_Release(gil);
    free(managed); /* the first member of an `exported` */
}

/* A capsule that nobody took. */
static void delete_capsule(PyObject *capsule)
{
    if (!PyCapsule_IsValid(capsule, DL_NAME))
        return;
    dl_managed *managed = PyCapsule_GetPointer(capsule, DL_NAME);
    managed->deleter(managed);
}

PyDoc_STRVAR(dlpack_doc, "__dlpack__($self, /, *, stream=None, **other)\n--\n\n"
                         "A DLPack capsule; what was computed so far is there.");

static PyObject *device_array_dlpack(DeviceArray *self, PyObject *args, PyObject *keywords)
{
    PyObject *copy = keywords ? PyDict_GetItemString(keywords, "copy") : NULL;
    if (PyTuple_GET_SIZE(args) || (copy && copy == Py_True)) {
        PyErr_SetString(PyExc_BufferError, "DeviceArray: __dlpack__ gives the memory itself");
        return NULL;
    }
    if (settle(self) < 0)
        return NULL;
    exported *made = calloc(1, sizeof *made);
    if (!made)
        return PyErr_NoMemory();
    memcpy(made->shape, self->view.shape, sizeof made->shape);
    made->managed = (dl_managed){
        .tensor = {.data = self->view.data,
                   .device = {DL_CUDA, 0},
                   .ndim = self->view.axes,
                   .dtype = {types[self->type].code, (uint8_t)(8 * self->view.item), 1},
                   .shape = made->shape},
        .context = Py_NewRef((PyObject *)self),
        .deleter = delete_exported,
    };
    PyObject *capsule = PyCapsule_New(&made->managed, DL_NAME, delete_capsule);
    if (!capsule)
        delete_exported(&made->managed);
    return capsule;
}

PyDoc_STRVAR(dlpack_device_doc,
             "__dlpack_device__($self, /)\n--\n\n(2, 0): the first CUDA device.");

static PyObject *device_array_dlpack_device(DeviceArray *Py_UNUSED(self), PyObject *Py_UNUSED(none))
{
    return Py_BuildValue("ii", DL_CUDA, 0);
}

static PyObject *device_array_repr(DeviceArray *self)
{
    PyObject *shape = get_shape(self, NULL);
    PyObject *text = shape ? PyUnicode_FromFormat("DeviceArray(%R, %s, device='%s')", shape,
                                                  types[self->type].name, self->backend->name)
                           : NULL;
    Py_XDECREF(shape);
    return text;
}

static PyMethodDef methods[] = {
    {"numpy", (PyCFunction)device_array_numpy, METH_NOARGS, numpy_doc},
    {"__dlpack__", (PyCFunction)(void (*)(void))device_array_dlpack, METH_VARARGS | METH_KEYWORDS,
     dlpack_doc},
    {"__dlpack_device__", (PyCFunction)device_array_dlpack_device, METH_NOARGS, dlpack_device_doc},
    {NULL, NULL, 0, NULL},
};
static PyGetSetDef attributes[] = {
    {"shape", (getter)get_shape, NULL, "Lengths of the axes.", NULL},
    {"dtype", (getter)get_dtype, NULL, "'float32', 'float64', 'int32', 'int64' or 'bfloat16'.",
     NULL},
    {"device", (getter)get_device, NULL, "'cuda'.", NULL},
    {"__cuda_array_interface__", (getter)get_interface, NULL, "Version 3; C-contiguous.", NULL},
    {NULL, NULL, NULL, NULL, NULL},
};

PyDoc_STRVAR(device_array_doc,
             "DeviceArray(array, device='cuda', dtype=None)\n--\n\n"
             "An array in the memory of a GPU, that others take by DLPack or "
             "__cuda_array_interface__.\n\n"
             "Parameters\n----------\n"
             "array : numpy.ndarray\n    C-contiguous float32, float64, int32 or int64; copied.\n"
             "device : str\n    As of promoe.Model.\n"
             "dtype : str, optional\n    'bfloat16' rounds a float32 array.");

static PyType_Slot slots[] = {
    {Py_tp_doc, (void *)device_array_doc},
    {Py_tp_new, device_array_new},
    {Py_tp_dealloc, device_array_dealloc},
    {Py_tp_repr, device_array_repr},
    {Py_tp_methods, methods},
    {Py_tp_getset, attributes},
    {0, NULL},
};
static PyType_Spec spec = {
    .name = "promoe._core.DeviceArray",
    .basicsize = sizeof(DeviceArray),
    .flags = Py_TPFLAGS_DEFAULT | Py_TPFLAGS_IMMUTABLETYPE,
    .slots = slots,
};

int array_register(PyObject *module)
{
    core_state *state = core_get_state(module);
    state->array_type = (PyTypeObject *)PyType_FromModuleAndSpec(module, &spec, NULL);
    return state->array_type ? PyModule_AddType(module, state->array_type) : -1;
}

/* ---------------------------------------------------------------- the arrays of others */

/* The attribute, or NULL without an exception. */
static PyObject *attribute(PyObject *value, const char *name)
{
    PyObject *found = PyObject_GetAttrString(value, name);
    if (!found)
        PyErr_Clear();
    return found;
}

bool array_is_device(PyObject *value)
{
    if (PyArray_Check(value)) /* NumPy has __dlpack__, too */
        return false;
    PyObject *found = attribute(value, "__dlpack_device__");
    if (!found)
        found = attribute(value, "__cuda_array_interface__");
    Py_XDECREF(found);
    return found != NULL;
}

/* What an interface says of an array, before it is compared with what is wanted. */
typedef struct {
    void *data;
    int axes;
    int64_t shape[ARRAY_MOST_AXES];
    char type[32];
    array_type kind; /* ARRAY_TYPES: another one */
    bool contiguous, read_only;
    uintptr_t stream;
    PyObject *keeps; /* owned */
} found_array;

static int fail(PyObject *type, const char *who, const char *problem)
{
    if (!PyErr_Occurred())
        PyErr_Format(type, "%s %s", who, problem);
    return -1;
}

/* Whether strides, in units of `unit`, are those of C order; axes of length 1 may have any. */
static bool in_c_order(int axes, const int64_t *shape, const int64_t *strides, int64_t unit)
{
    int64_t expected = unit;
    for (int i = 0; i < axes; i++)
        if (shape[i] == 0)
            return true;
    for (int i = axes - 1; i >= 0; i--) {
        if (shape[i] != 1 && strides[i] != expected)
            return false;
        expected *= shape[i];
    }
    return true;
}

static int read_dlpack(PyObject *value, const char *who, found_array *found)
{
    int type, id;
    PyObject *device = PyObject_CallMethod(value, "__dlpack_device__", NULL);
    const bool known = device && PyArg_ParseTuple(device, "ii", &type, &id);
    Py_XDECREF(device);
    if (!known)
        return -1;
    if (type == DL_CPU || type == DL_CUDA_HOST)
        return fail(PyExc_TypeError, who,
                    "is in host memory, and no numpy.ndarray: numpy.from_dlpack makes one of it");
    if (type != DL_CUDA && type != DL_CUDA_MANAGED) {
        PyErr_Format(PyExc_ValueError, "%s is on another kind of device (DLPack's %d)", who, type);
        return -1;
    }
    PyObject *export = PyObject_GetAttrString(value, "__dlpack__");
    PyObject *none = export ? PyTuple_New(0) : NULL;
    PyObject *stream = none ? Py_BuildValue("{s:i}", "stream", 1) : NULL; /* the default stream */
    PyObject *capsule = stream ? PyObject_Call(export, none, stream) : NULL;
    Py_XDECREF(stream);
    Py_XDECREF(none);
    Py_XDECREF(export);
    if (!capsule)
        return -1;
    found->keeps = capsule; /* not taken out of it: it is deleted with the capsule */
    const dl_managed *managed = PyCapsule_GetPointer(capsule, DL_NAME);
    if (!managed)
        return -1;
    const dl_tensor *t = &managed->tensor;
    if (t->ndim < 0 || t->ndim > ARRAY_MOST_AXES)
        return fail(PyExc_ValueError, who, "has too many axes");
    found->data = (char *)t->data + t->byte_offset;
    found->axes = t->ndim;
    memcpy(found->shape, t->shape, (size_t)t->ndim * sizeof *t->shape);
    found->contiguous = !t->strides || in_c_order(t->ndim, t->shape, t->strides, 1);
    found->stream = 1;
    found->kind = ARRAY_TYPES;
    for (int i = 0; i < ARRAY_TYPES; i++)
        if (types[i].code == t->dtype.code && 8 * types[i].bytes == t->dtype.bits &&
            t->dtype.lanes == 1)
            found->kind = (array_type)i;
    snprintf(found->type, sizeof found->type, "DLPack's type (%d, %d bits)", t->dtype.code,
             t->dtype.bits);
    return 0;
}

/* A tuple of up to ARRAY_MOST_AXES integers. */
static int read_lengths(PyObject *tuple, int *count, int64_t *out)
{
    if (!tuple || !PyTuple_Check(tuple) || PyTuple_GET_SIZE(tuple) > ARRAY_MOST_AXES)
        return -1;
    *count = (int)PyTuple_GET_SIZE(tuple);
    for (int i = 0; i < *count; i++) {
        out[i] = PyLong_AsLongLong(PyTuple_GET_ITEM(tuple, i));
        if (out[i] == -1 && PyErr_Occurred())
            return -1;
    }
    return 0;
}

static int read_interface(PyObject *value, const char *who, found_array *found)
{
    PyObject *dict = PyObject_GetAttrString(value, "__cuda_array_interface__");
    if (!dict)
        return -1;
    found->keeps = Py_NewRef(value);
    int result = -1, read_only = 0, stride_count = 0;
    unsigned long long pointer = 0;
    int64_t strides[ARRAY_MOST_AXES];
    PyObject *shape = NULL, *type = NULL, *data = NULL, *stride = NULL, *mask = NULL,
             *stream = NULL;
    if (PyDict_Check(dict)) {
        shape = PyDict_GetItemString(dict, "shape");
        type = PyDict_GetItemString(dict, "typestr");
        data = PyDict_GetItemString(dict, "data");
        stride = PyDict_GetItemString(dict, "strides");
        mask = PyDict_GetItemString(dict, "mask");
        stream = PyDict_GetItemString(dict, "stream");
    }
    const char *word = type && PyUnicode_Check(type) ? PyUnicode_AsUTF8(type) : NULL;
    if (!word || read_lengths(shape, &found->axes, found->shape) < 0 || !data ||
        !PyTuple_Check(data) || !PyArg_ParseTuple(data, "Kp", &pointer, &read_only) ||
        (stride && stride != Py_None &&
         (read_lengths(stride, &stride_count, strides) < 0 || stride_count != found->axes))) {
        PyErr_Clear();
        fail(PyExc_ValueError, who, "has a __cuda_array_interface__ that is not as documented");
        goto done;
    }
    if (mask && mask != Py_None) {
        fail(PyExc_ValueError, who, "has a mask");
        goto done;
    }
    found->stream = 1; /* none is said: what is under way in the default stream is waited for */
    if (stream && stream != Py_None) {
        found->stream = (uintptr_t)PyLong_AsUnsignedLongLong(stream);
        if (PyErr_Occurred() || found->stream == 0) {
            PyErr_Clear();
            fail(PyExc_ValueError, who, "has a __cuda_array_interface__ with a wrong stream");
            goto done;
        }
    }
    found->data = (void *)(uintptr_t)pointer;
    found->read_only = read_only;
    found->kind = ARRAY_TYPES;
    for (int i = 0; i < ARRAY_TYPES; i++)
        if (types[i].typestr && !strcmp(types[i].typestr, word))
            found->kind = (array_type)i;
    const int64_t item = found->kind < ARRAY_TYPES ? (int64_t)types[found->kind].bytes : 1;
    found->contiguous = !stride || stride == Py_None ||
                        in_c_order(found->axes, found->shape, strides, item);
    snprintf(found->type, sizeof found->type, "%.28s", word);
    result = 0;
done:
    Py_DECREF(dict);
    return result;
}

static int compare(const found_array *found, const char *who, array_type type, int axes,
                   bool writes)
{
    const char *problem = NULL;
    if (found->kind != type) {
        PyErr_Format(PyExc_TypeError, "%s must be %s; got %s", who, types[type].name,
                     found->kind < ARRAY_TYPES ? types[found->kind].name : found->type);
        return -1;
    }
    for (int i = 0; i < found->axes; i++)
        if (found->shape[i] < 0)
            problem = "has an axis of a negative length";
    if (found->axes != axes) {
        PyErr_Format(PyExc_ValueError, "%s must have %d axes; got %d", who, axes, found->axes);
        return -1;
    }
    if (!found->contiguous)
        problem = "must be C-contiguous";
    else if ((uintptr_t)found->data % types[type].bytes)
        problem = "is misaligned";
    else if (writes && found->read_only)
        problem = "is read-only";
    return problem ? fail(PyExc_ValueError, who, problem) : 0;
}

int array_view_device(PyObject *value, const pm_backend *backend, const char *who, array_type type,
                      int axes, bool writes, array_view *view)
{
    found_array found = {0};
    if (!backend->adopt) {
        PyErr_Format(PyExc_TypeError,
                     "%s is in the memory of a GPU, and device is '%s': say device='cuda', or pass "
                     "a numpy.ndarray",
                     who, backend->name);
        return -1;
    }
    PyObject *dlpack = attribute(value, "__dlpack_device__");
    Py_XDECREF(dlpack);
    const int read = dlpack ? read_dlpack(value, who, &found) : read_interface(value, who, &found);
    if (read < 0 || compare(&found, who, type, axes, writes) < 0)
        goto fail;
    *view = (array_view){.data = found.data,
                         .axes = found.axes,
                         .item = types[type].bytes,
                         .device = true,
                         .keeps = found.keeps};
    memcpy(view->shape, found.shape, sizeof view->shape);
    if (!view->data) /* of an empty array: not "absent" */
        view->data = (void *)(uintptr_t)256;

    pm_ctx ctx = {.backend = backend};
    core_section section;
    if (core_enter(&section, &ctx) < 0)
        goto fail;
    const pm_status status = backend->adopt(&ctx, view->data, array_bytes(view), found.stream);
    core_leave(&section);
    if (status == PM_OK)
        return 0;
    PyErr_Format(status == PM_EINVAL ? PyExc_ValueError : PyExc_RuntimeError, "%s: %s", who,
                 ctx.message);
fail:
    *view = (array_view){0};
    Py_XDECREF(found.keeps);
    return -1;
}
