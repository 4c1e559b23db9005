/* config_py.c: the dict that promoe.Model makes of its ModelConfig and RectifiedFlow, and what
 * can be said of a model from that alone: its parameters and its memory. */
#include "config_py.h"

#include <stddef.h>
#include <string.h>

#include "errors.h"

int config_integer(PyObject *object, int64_t *value)
{
    *value = PyLong_AsLongLong(object);
    return *value == -1 && PyErr_Occurred() ? -1 : 0;
}
int config_real(PyObject *object, double *value)
{
    *value = PyFloat_AsDouble(object);
    return *value == -1 && PyErr_Occurred() ? -1 : 0;
}

typedef struct {
    const char *name;
    size_t at;
    enum { INTEGER, REAL, FLAG, WORD } kind;
    const char *words; /* of WORD: "a|b|c" */
} config_field;

#define FIELD(name, kind) {#name, offsetof(pm_config, name), kind, NULL}
static const config_field config_fields[] = {
    FIELD(channels, INTEGER),
    FIELD(out_channels, INTEGER),
    FIELD(hidden, INTEGER),
    FIELD(depth, INTEGER),
    FIELD(heads, INTEGER),
    FIELD(head, INTEGER),
    FIELD(mlp_hidden, INTEGER),
    FIELD(classes, INTEGER),
    FIELD(null_label, FLAG),
    FIELD(qk_norm, FLAG),
    FIELD(experts, INTEGER),
    FIELD(unconditional, FLAG),
    FIELD(shared, FLAG),
    FIELD(interleave, FLAG),
    FIELD(expert_width, INTEGER),
    FIELD(shared_width, INTEGER),
    FIELD(top_k, INTEGER),
    {"gate", offsetof(pm_config, gate), WORD, "identity|sigmoid|softmax"},
    FIELD(contrastive_weight, REAL),
    FIELD(contrastive_temperature, REAL),
    {"contrastive_assign", offsetof(pm_config, contrastive_assign), WORD, "top1|topk"},
    FIELD(balance_weight, REAL),
    {"balance_per", offsetof(pm_config, balance_per), WORD, "batch|sequence"},
    {"density", offsetof(pm_config, density), WORD, "logit_normal|uniform|mode"},
    FIELD(logit_mean, REAL),
    FIELD(logit_std, REAL),
    FIELD(sigmoid_scale, REAL),
    FIELD(shift, REAL),
    FIELD(drop_prob, REAL),
};

/* The place of a word in "a|b|c", or -1. */
int config_find_word(const char *words, const char *word)
{
    const size_t length = strlen(word);
    for (int i = 0;; i++) {
        const char *bar = strchr(words, '|');
        const size_t here = bar ? (size_t)(bar - words) : strlen(words);
        if (here == length && !memcmp(words, word, length))
            return i;
        if (!bar)
            return -1;
        words = bar + 1;
    }
}

static int read_field(PyObject *value, const config_field *f, pm_config *c)
{
    char *const to = (char *)c + f->at;
    switch (f->kind) {
    case INTEGER:
        return config_integer(value, (int64_t *)to);
    case REAL:
        return config_real(value, (double *)to);
    case FLAG: {
        const int truth = PyObject_IsTrue(value);
        *(bool *)to = truth == 1;
        return truth < 0 ? -1 : 0;
    }
    case WORD: {
        const char *word = PyUnicode_AsUTF8(value);
        const int place = word ? config_find_word(f->words, word) : -1;
        *(int *)to = place;
        if (place < 0 && word)
            PyErr_Format(PyExc_ValueError, "config: %s is one of %s, not %s", f->name, f->words,
                         word);
        return place < 0 ? -1 : 0;
    }
    }
    return -1;
}

/* size and patch: tuples of one to three lengths. */
static int read_axes(PyObject *dict, const char *name, int64_t *axes, int64_t to[3])
{
    PyObject *tuple = PyDict_GetItemString(dict, name);
    if (!tuple || !PyTuple_Check(tuple) || PyTuple_GET_SIZE(tuple) < 1 ||
        PyTuple_GET_SIZE(tuple) > 3) {
        PyErr_Format(PyExc_TypeError, "config: %s must be a tuple of 1 to 3 lengths", name);
        return -1;
    }
    *axes = PyTuple_GET_SIZE(tuple);
    to[0] = to[1] = to[2] = 1;
    for (int64_t i = 0; i < *axes; i++)
        if (config_integer(PyTuple_GET_ITEM(tuple, i), &to[3 - *axes + i]) < 0)
            return -1;
    return 0;
}

int config_read(PyObject *dict, pm_config *c)
{
    *c = (pm_config){0};
    if (!PyDict_Check(dict)) {
        PyErr_SetString(PyExc_TypeError, "config: a dict is expected");
        return -1;
    }
    for (size_t i = 0; i < sizeof config_fields / sizeof *config_fields; i++) {
        PyObject *value = PyDict_GetItemString(dict, config_fields[i].name);
        if (!value) {
            PyErr_Format(PyExc_TypeError, "config: %s is missing", config_fields[i].name);
            return -1;
        }
        if (read_field(value, &config_fields[i], c) < 0)
            return -1;
    }
    int64_t patch_axes;
    if (read_axes(dict, "size", &c->axes, c->size) < 0 ||
        read_axes(dict, "patch", &patch_axes, c->patch) < 0)
        return -1;
    if (patch_axes != c->axes) {
        PyErr_SetString(PyExc_ValueError, "config: size and patch have different lengths");
        return -1;
    }
    return 0;
}

static pm_status list_param(void *arg, const pm_param *p)
{
    PyObject *shape = PyTuple_New(p->ndim);
    for (int i = 0; shape && i < p->ndim; i++) {
        PyObject *length = PyLong_FromLongLong(p->shape[i]);
        if (!length)
            Py_CLEAR(shape);
        else
            PyTuple_SET_ITEM(shape, i, length);
    }
    PyObject *row = shape ? Py_BuildValue("sNLLO", p->name, shape, (long long)p->at,
                                          (long long)p->count,
                                          p->kind == PM_TRAIN ? Py_True : Py_False)
                          : NULL;
    const int failed = !row || PyList_Append(arg, row) < 0;
    Py_XDECREF(row);
    return failed ? PM_ENOMEM : PM_OK;
}

PyObject *config_list_params(pm_ctx *ctx, const pm_config *config)
{
    PyObject *list = PyList_New(0);
    if (list && pm_visit_params(ctx, config, list_param, list) != PM_OK)
        Py_CLEAR(list);
    return list;
}

static PyObject *config_index(PyObject *module, PyObject *dict)
{
    pm_config config;
    pm_ctx ctx = {.backend = core_get_state(module)->backend};
    if (config_read(dict, &config) < 0)
        return NULL;
    const pm_status status = pm_config_check(&ctx, &config);
    return status == PM_OK ? config_list_params(&ctx, &config) : core_raise(&ctx, status);
}

/* ---------------------------------------------------------------- memory */

PyDoc_STRVAR(memory_doc,
             "_memory_estimate($module, config, batch, training, device, compute, /)\n--\n\n"
             "Bytes per part, before anything is allocated.");

static PyObject *memory_estimate(PyObject *module, PyObject *args)
{
    pm_config config;
    long long B;
    const char *device, *compute;
    PyObject *dict, *flag;
    if (!PyArg_ParseTuple(args, "OLOss:_memory_estimate", &dict, &B, &flag, &device, &compute) ||
        config_read(dict, &config) < 0)
        return NULL;
    const pm_backend *backend = core_find_backend(module, "memory_estimate", device, compute);
    if (!backend)
        return NULL;
    const int training = PyObject_IsTrue(flag);
    if (training < 0)
        return NULL;
    pm_ctx ctx = {.backend = backend};
    pm_memory memory = {0};
    core_section section;
    if (core_enter(&section, &ctx) < 0)
        return NULL;
    const pm_status status = pm_memory_estimate(&ctx, &config, B, training > 0, &memory);
    core_leave(&section);
    if (status != PM_OK)
        return core_raise(&ctx, status);
    return Py_BuildValue("{sLsLsLsLsLsLsL}", "parameters", (long long)memory.parameters, "derived",
                         (long long)memory.derived, "gradients", (long long)memory.gradients,
                         "moments", (long long)memory.moments, "ema", (long long)memory.ema,
                         "activations", (long long)memory.activations, "scratch",
                         (long long)memory.scratch);
}

static PyMethodDef functions[] = {
    {"_index", config_index, METH_O,
     "_index($module, config, /)\n--\n\n_Model.index without a model."},
    {"_memory_estimate", memory_estimate, METH_VARARGS, memory_doc},
    {NULL, NULL, 0, NULL},
};

int config_py_register(PyObject *module) { return PyModule_AddFunctions(module, functions); }
