/* model_py.c: promoe._core._Model, the model behind promoe.Model (promoe/model.py). It takes and
 * gives arrays of exactly the types of model/model.h; promoe.Model converts and explains. */
#include "core.h"

#include <stddef.h>
#include <structmember.h>
#include <string.h>

#include "array.h"
#include "config_py.h"
#include "errors.h"

typedef struct {
    PyObject_HEAD const pm_backend *backend;
    PyObject *owner; /* capsule of the pm_model, shared with views of its gradients; NULL: closed */
    bool busy;       /* in a call; guarded by the GIL */
} Model;

static const char OWNER[] = "promoe._core.model";

static void owner_free(PyObject *capsule)
{
    pm_ctx ctx = {.backend = PyCapsule_GetContext(capsule)};
    pm_model_free(&ctx, PyCapsule_GetPointer(capsule, OWNER));
}

static pm_model *model_of(const Model *self) { return PyCapsule_GetPointer(self->owner, OWNER); }

/* ---------------------------------------------------------------- a call */

static int check_idle(const Model *self)
{
    if (!self->owner)
        PyErr_SetString(PyExc_ValueError, "this Model is closed");
    else if (self->busy)
        PyErr_SetString(PyExc_RuntimeError, "this Model is busy with another call");
    else
        return 0;
    return -1;
}

/* Between begin and end the GIL is released and the model is this call's. */
static int begin(Model *self, core_section *section, pm_ctx *ctx)
{
    if (check_idle(self) < 0)
        return -1;
    *ctx = (pm_ctx){.backend = self->backend};
    self->busy = true;
    if (core_enter(section, ctx) < 0) {
        self->busy = false;
        return -1;
    }
    return 0;
}

static void end(Model *self, core_section *section)
{
    core_leave(section);
    self->busy = false;
}

/* ---------------------------------------------------------------- arguments */

static int count_args(const char *name, Py_ssize_t given, Py_ssize_t wanted)
{
    if (given == wanted)
        return 0;
    PyErr_Format(PyExc_TypeError, "_Model.%s takes %zd arguments, not %zd", name, wanted, given);
    return -1;
}

/* The data of an array of `type` with `count` elements, dense and in native order; NULL and an
 * exception otherwise. None is NULL without one when it may be absent. */
static void *array_data(PyObject *object, const char *name, int type, int64_t count, bool optional)
{
    if (optional && object == Py_None)
        return NULL;
    if (!PyArray_Check(object)) {
        PyErr_Format(PyExc_TypeError, "%s: an array is expected, not %.80s", name,
                     Py_TYPE(object)->tp_name);
        return NULL;
    }
    PyArrayObject *array = (PyArrayObject *)object;
    if (PyArray_TYPE(array) != type || !PyArray_ISCARRAY_RO(array)) {
        PyErr_Format(PyExc_TypeError, "%s: a dense array of another type is expected, not %S", name,
                     (PyObject *)PyArray_DESCR(array));
        return NULL;
    }
    if ((int64_t)PyArray_SIZE(array) != count) {
        PyErr_Format(PyExc_ValueError, "%s: %lld elements are expected, not %lld", name,
                     (long long)count, (long long)PyArray_SIZE(array));
        return NULL;
    }
    return PyArray_DATA(array);
}

/* Rows of a batch: the length of the first axis. */
static int batch_of(PyObject *object, const char *name, int64_t *B)
{
    if (!PyArray_Check(object) || PyArray_NDIM((PyArrayObject *)object) < 1 ||
        PyArray_DIM((PyArrayObject *)object, 0) < 1) {
        PyErr_Format(PyExc_ValueError, "%s: a batch of at least one sample is expected", name);
        return -1;
    }
    *B = PyArray_DIM((PyArrayObject *)object, 0);
    return 0;
}

static PyArrayObject *new_array(int type, int ndim, const int64_t *shape)
{
    npy_intp dims[5];
    for (int i = 0; i < ndim; i++)
        dims[i] = (npy_intp)shape[i];
    return (PyArrayObject *)PyArray_SimpleNew(ndim, dims, type);
}

/* (B, channels, the axes of the data) */
static PyArrayObject *new_images(const pm_config *c, int64_t B, int64_t channels)
{
    int64_t shape[5] = {B, channels};
    for (int64_t i = 0; i < c->axes; i++)
        shape[2 + i] = c->size[3 - c->axes + i];
    return new_array(NPY_FLOAT32, 2 + (int)c->axes, shape);
}

/* ---------------------------------------------------------------- making and closing */

static PyObject *model_new(PyTypeObject *type, PyObject *args, PyObject *keywords)
{
    PyObject *dict;
    long long seed;
    const char *device, *compute;
    if (keywords && PyDict_GET_SIZE(keywords)) {
        PyErr_SetString(PyExc_TypeError, "_Model takes no keywords");
        return NULL;
    }
    if (!PyArg_ParseTuple(args, "OLss:_Model", &dict, &seed, &device, &compute))
        return NULL;
    pm_config config;
    const pm_backend *backend = core_find_backend(PyType_GetModule(type), "Model", device, compute);
    if (!backend || config_read(dict, &config) < 0)
        return NULL;
    Model *self = (Model *)type->tp_alloc(type, 0);
    if (!self)
        return NULL;
    self->backend = backend;

    pm_ctx ctx = {.backend = backend};
    core_section section;
    pm_model *model = NULL;
    if (core_enter(&section, &ctx) < 0)
        goto fail;
    const pm_status status = pm_model_create(&ctx, &config, seed, &model);
    core_leave(&section);
    if (status != PM_OK) {
        core_raise(&ctx, status);
        goto fail;
    }
    self->owner = PyCapsule_New(model, OWNER, NULL);
    if (!self->owner) {
        pm_model_free(&ctx, model);
        goto fail;
    }
    PyCapsule_SetContext(self->owner, (void *)backend);
    PyCapsule_SetDestructor(self->owner, owner_free);
    return (PyObject *)self;
fail:
    Py_DECREF(self);
    return NULL;
}

static void model_dealloc(Model *self)
{
    PyTypeObject *type = Py_TYPE(self);
    if (self->owner) {
        pm_ctx ctx = {.backend = self->backend};
        pm_model_close(&ctx, model_of(self)); /* a view of the gradients keeps those alone */
    }
    Py_CLEAR(self->owner);
    type->tp_free((PyObject *)self);
    Py_DECREF(type);
}

PyDoc_STRVAR(close_doc,
             "close($self, /)\n--\n\nFree everything; views of the gradients stay valid.");

static PyObject *model_close(Model *self, PyObject *Py_UNUSED(none))
{
    if (!self->owner)
        Py_RETURN_NONE;
    if (check_idle(self) < 0)
        return NULL;
    pm_ctx ctx = {.backend = self->backend};
    pm_model_close(&ctx, model_of(self));
    Py_CLEAR(self->owner);
    Py_RETURN_NONE;
}

/* ---------------------------------------------------------------- what it is */

PyDoc_STRVAR(index_doc,
             "index($self, /)\n--\n\n"
             "Every official tensor: (name, shape, first element in a slab, elements, trained).");

static PyObject *model_index(Model *self, PyObject *Py_UNUSED(none))
{
    if (check_idle(self) < 0)
        return NULL;
    pm_ctx ctx = {.backend = self->backend};
    return config_list_params(&ctx, pm_model_config(model_of(self)));
}

static PyObject *get_step(Model *self, void *Py_UNUSED(closure))
{
    return check_idle(self) < 0 ? NULL : PyLong_FromLongLong(pm_model_step(model_of(self)));
}
static PyObject *get_skipped(Model *self, void *Py_UNUSED(closure))
{
    return check_idle(self) < 0 ? NULL : PyLong_FromLongLong(pm_model_skipped(model_of(self)));
}
static PyObject *get_has_ema(Model *self, void *Py_UNUSED(closure))
{
    return check_idle(self) < 0 ? NULL : PyBool_FromLong(pm_model_has_ema(model_of(self)));
}
static PyObject *get_closed(Model *self, void *Py_UNUSED(closure))
{
    return PyBool_FromLong(!self->owner);
}
static PyObject *get_level(Model *self, void *Py_UNUSED(closure))
{
    return PyUnicode_FromString(self->backend->level);
}

/* ---------------------------------------------------------------- state */

PyDoc_STRVAR(read_doc, "read($self, slab, /)\n--\n\n"
                       "A copy of 'param', 'ema', 'grad', 'exp_avg' or 'exp_avg_sq', flat.");

static PyObject *model_read(Model *self, PyObject *name)
{
    const char *word = PyUnicode_AsUTF8(name);
    const int slab = word ? config_find_word("param|ema|grad|exp_avg|exp_avg_sq", word) : -1;
    if (slab < 0) {
        if (word)
            PyErr_Format(PyExc_ValueError, "_Model.read: no slab %s", word);
        return NULL;
    }
    if (check_idle(self) < 0)
        return NULL;
    pm_model *m = model_of(self);
    const int64_t count = pm_slab_count(m, (pm_slab)slab);
    PyArrayObject *out = new_array(NPY_FLOAT32, 1, &count);
    if (!out)
        return NULL;
    core_section section;
    pm_ctx ctx;
    if (begin(self, &section, &ctx) < 0) {
        Py_DECREF(out);
        return NULL;
    }
    const pm_status status = pm_model_read(&ctx, m, (pm_slab)slab, PyArray_DATA(out));
    end(self, &section);
    if (status == PM_OK)
        return (PyObject *)out;
    Py_DECREF(out);
    return core_raise(&ctx, status);
}

PyDoc_STRVAR(load_doc, "load($self, param, ema, exp_avg, exp_avg_sq, step, /)\n--\n\n"
                       "Flat slabs; ema, or both moments, may be None. All of it or nothing.");

static PyObject *model_load(Model *self, PyObject *const *args, Py_ssize_t n)
{
    if (count_args("load", n, 5) < 0 || check_idle(self) < 0)
        return NULL;
    pm_model *m = model_of(self);
    const int64_t total = pm_slab_count(m, PM_SLAB_PARAM), train = pm_slab_count(m, PM_SLAB_GRAD);
    const float *param = array_data(args[0], "param", NPY_FLOAT32, total, false);
    const float *ema = param ? array_data(args[1], "ema", NPY_FLOAT32, total, true) : NULL;
    const float *m1 = array_data(args[2], "exp_avg", NPY_FLOAT32, train, true);
    const float *v = array_data(args[3], "exp_avg_sq", NPY_FLOAT32, train, true);
    int64_t step;
    if (PyErr_Occurred() || config_integer(args[4], &step) < 0)
        return NULL;
    core_section section;
    pm_ctx ctx;
    if (begin(self, &section, &ctx) < 0)
        return NULL;
    const pm_status status = pm_model_load(&ctx, m, param, ema, m1, v, step);
    end(self, &section);
    if (status != PM_OK)
        return core_raise(&ctx, status);
    Py_RETURN_NONE;
}

PyDoc_STRVAR(gradients_doc, "gradients($self, /)\n--\n\nThe gradient slab itself, flat.");

static PyObject *model_gradients(Model *self, PyObject *Py_UNUSED(none))
{
    if (check_idle(self) < 0)
        return NULL;
    if (!self->backend->host && !self->backend->adopt) {
        PyErr_Format(PyExc_RuntimeError, "gradients: the memory of device '%s' cannot be viewed",
                     self->backend->name);
        return NULL;
    }
    pm_model *m = model_of(self);
    float *grad;
    core_section section;
    pm_ctx ctx;
    if (begin(self, &section, &ctx) < 0)
        return NULL;
    const pm_status status = pm_model_gradients(&ctx, m, &grad);
    end(self, &section);
    if (status != PM_OK)
        return core_raise(&ctx, status);
    const int64_t slab = pm_slab_count(m, PM_SLAB_GRAD);
    if (!self->backend->host)
        return array_wrap_device(PyType_GetModule(Py_TYPE(self)), self->backend, ARRAY_F32, 1,
                                 &slab, grad, self->owner);
    npy_intp count = (npy_intp)slab;
    PyObject *view = PyArray_SimpleNewFromData(1, &count, NPY_FLOAT32, grad);
    if (view && PyArray_SetBaseObject((PyArrayObject *)view, Py_NewRef(self->owner)) < 0)
        Py_CLEAR(view);
    return view;
}

/* ---------------------------------------------------------------- forward */

/* x, t and y of a batch. */
typedef struct {
    int64_t B;
    const float *x, *t;
    const int64_t *y;
} batch;

static int read_batch(const pm_config *c, PyObject *x, PyObject *t, PyObject *y, batch *b)
{
    if (batch_of(x, "x", &b->B) < 0)
        return -1;
    b->x = array_data(x, "x", NPY_FLOAT32, b->B * c->channels * pm_voxels(c), false);
    b->t = b->x ? array_data(t, "t", NPY_FLOAT32, b->B, false) : NULL;
    b->y = b->t ? array_data(y, "y", NPY_INT64, b->B, false) : NULL;
    return b->y ? 0 : -1;
}

PyDoc_STRVAR(forward_doc,
             "forward($self, x, t, y, choice, weight, /)\n--\n\n"
             "The output; choice and weight, (layers, B, T, A) or None, force the routing.");

static PyObject *model_forward(Model *self, PyObject *const *args, Py_ssize_t n)
{
    if (count_args("forward", n, 5) < 0 || check_idle(self) < 0)
        return NULL;
    pm_model *m = model_of(self);
    const pm_config *c = pm_model_config(m);
    batch b;
    if (read_batch(c, args[0], args[1], args[2], &b) < 0)
        return NULL;
    const int64_t slots = pm_model_expert_layers(m) * b.B * pm_tokens(c) * c->top_k;
    const int32_t *choice = array_data(args[3], "choice", NPY_INT32, slots, true);
    const float *weight = array_data(args[4], "weight", NPY_FLOAT32, slots, !choice);
    PyArrayObject *out = PyErr_Occurred() ? NULL : new_images(c, b.B, c->out_channels);
    if (!out)
        return NULL;
    core_section section;
    pm_ctx ctx;
    if (begin(self, &section, &ctx) < 0) {
        Py_DECREF(out);
        return NULL;
    }
    const pm_status status =
        pm_model_forward(&ctx, m, b.B, b.x, b.t, b.y, choice, weight, PyArray_DATA(out));
    end(self, &section);
    if (status == PM_OK)
        return (PyObject *)out;
    Py_DECREF(out);
    return core_raise(&ctx, status);
}

PyDoc_STRVAR(routing_doc, "routing($self, x, t, y, /)\n--\n\n"
                          "(choice, weight, load): (layers, B, T, A), the same, (layers, groups).");

static PyObject *model_routing(Model *self, PyObject *const *args, Py_ssize_t n)
{
    if (count_args("routing", n, 3) < 0 || check_idle(self) < 0)
        return NULL;
    pm_model *m = model_of(self);
    const pm_config *c = pm_model_config(m);
    batch b;
    if (read_batch(c, args[0], args[1], args[2], &b) < 0)
        return NULL;
    const int64_t shape[] = {pm_model_expert_layers(m), b.B, pm_tokens(c), c->top_k};
    const int64_t load_shape[] = {shape[0], pm_plan_groups(c)};
    PyArrayObject *out = new_images(c, b.B, c->out_channels);
    PyArrayObject *choice = new_array(NPY_INT32, 4, shape),
                  *weight = new_array(NPY_FLOAT32, 4, shape);
    PyArrayObject *load = new_array(NPY_INT32, 2, load_shape);
    PyObject *result = NULL;
    core_section section;
    pm_ctx ctx;
    if (out && choice && weight && load && begin(self, &section, &ctx) == 0) {
        pm_status status =
            pm_model_forward(&ctx, m, b.B, b.x, b.t, b.y, NULL, NULL, PyArray_DATA(out));
        if (status == PM_OK)
            status = pm_model_routing(&ctx, m, PyArray_DATA(choice), PyArray_DATA(weight),
                                      PyArray_DATA(load));
        end(self, &section);
        result = status == PM_OK ? PyTuple_Pack(3, choice, weight, load) : core_raise(&ctx, status);
    }
    Py_XDECREF(out);
    Py_XDECREF(choice);
    Py_XDECREF(weight);
    Py_XDECREF(load);
    return result;
}

/* ---------------------------------------------------------------- training */

PyDoc_STRVAR(loss_and_grad_doc, "loss_and_grad($self, x, t, y, target, accumulate, /)\n--\n\n"
                                "(mse, aux, flat gradient)");

static PyObject *model_loss_and_grad(Model *self, PyObject *const *args, Py_ssize_t n)
{
    if (count_args("loss_and_grad", n, 5) < 0 || check_idle(self) < 0)
        return NULL;
    pm_model *m = model_of(self);
    const pm_config *c = pm_model_config(m);
    batch b;
    if (read_batch(c, args[0], args[1], args[2], &b) < 0)
        return NULL;
    const float *target =
        array_data(args[3], "target", NPY_FLOAT32, b.B * c->channels * pm_voxels(c), false);
    const int accumulate = PyObject_IsTrue(args[4]);
    const int64_t count = pm_slab_count(m, PM_SLAB_GRAD);
    PyArrayObject *grad = target && accumulate >= 0 ? new_array(NPY_FLOAT32, 1, &count) : NULL;
    if (!grad)
        return NULL;
    double losses[2];
    core_section section;
    pm_ctx ctx;
    if (begin(self, &section, &ctx) < 0) {
        Py_DECREF(grad);
        return NULL;
    }
    const pm_status status = pm_model_loss_and_grad(&ctx, m, b.B, b.x, b.t, b.y, target,
                                                    accumulate > 0, losses, PyArray_DATA(grad));
    end(self, &section);
    if (status == PM_OK)
        return Py_BuildValue("ddN", losses[0], losses[1], grad);
    Py_DECREF(grad);
    return core_raise(&ctx, status);
}

PyDoc_STRVAR(accumulate_doc, "accumulate($self, x0, y, position, scale, /)\n--\n\n"
                             "One micro-batch into the gradient slab.");

static PyObject *model_accumulate(Model *self, PyObject *const *args, Py_ssize_t n)
{
    if (count_args("accumulate", n, 4) < 0 || check_idle(self) < 0)
        return NULL;
    pm_model *m = model_of(self);
    const pm_config *c = pm_model_config(m);
    int64_t B, position;
    double scale;
    if (batch_of(args[0], "x0", &B) < 0)
        return NULL;
    const float *x0 = array_data(args[0], "x0", NPY_FLOAT32, B * c->channels * pm_voxels(c), false);
    const int64_t *y = x0 ? array_data(args[1], "y", NPY_INT64, B, false) : NULL;
    if (!y || config_integer(args[2], &position) < 0 || config_real(args[3], &scale) < 0)
        return NULL;
    core_section section;
    pm_ctx ctx;
    if (begin(self, &section, &ctx) < 0)
        return NULL;
    const pm_status status = pm_model_accumulate(&ctx, m, B, x0, y, position, scale);
    end(self, &section);
    if (status != PM_OK)
        return core_raise(&ctx, status);
    Py_RETURN_NONE;
}

PyDoc_STRVAR(update_doc, "update($self, lr, beta1, beta2, eps, weight_decay, clip, ema, /)\n--\n\n"
                         "(mse, aux, grad_norm, step, skipped); ema None leaves the EMA alone.");

static PyObject *model_update(Model *self, PyObject *const *args, Py_ssize_t n)
{
    if (count_args("update", n, 7) < 0)
        return NULL;
    pm_update_options o = {.has_ema = args[6] != Py_None};
    if (config_real(args[0], &o.lr) < 0 || config_real(args[1], &o.beta1) < 0 ||
        config_real(args[2], &o.beta2) < 0 || config_real(args[3], &o.eps) < 0 ||
        config_real(args[4], &o.weight_decay) < 0 || config_real(args[5], &o.clip) < 0 ||
        (o.has_ema && config_real(args[6], &o.ema) < 0))
        return NULL;
    pm_step_info info;
    core_section section;
    pm_ctx ctx;
    if (begin(self, &section, &ctx) < 0)
        return NULL;
    const pm_status status = pm_model_update(&ctx, model_of(self), &o, &info);
    end(self, &section);
    if (status != PM_OK)
        return core_raise(&ctx, status);
    return Py_BuildValue("dddLO", info.mse, info.aux, info.grad_norm, (long long)info.step,
                         info.skipped ? Py_True : Py_False);
}

PyDoc_STRVAR(zero_gradients_doc, "zero_gradients($self, /)\n--\n\nEmpty the gradient slab.");

static PyObject *model_zero_gradients(Model *self, PyObject *Py_UNUSED(none))
{
    core_section section;
    pm_ctx ctx;
    if (begin(self, &section, &ctx) < 0)
        return NULL;
    const pm_status status = pm_model_zero_gradients(&ctx, model_of(self));
    end(self, &section);
    if (status != PM_OK)
        return core_raise(&ctx, status);
    Py_RETURN_NONE;
}

/* ---------------------------------------------------------------- sampling */

typedef struct {
    PyObject *callback;
    core_section *section;
    pm_ctx *ctx;
    const pm_config *config;
    int64_t n;
} step_caller;

/* Calls callback(step, latents) with the GIL; the core stays this call's. */
static int call_step(void *arg, int64_t step, const float *latents)
{
    step_caller *call = arg;
    PyEval_RestoreThread(call->section->thread);
    PyObject *result = NULL;
    PyArrayObject *copy = new_images(call->config, call->n, call->config->channels);
    if (copy) {
        const pm_status status = call->ctx->backend->read(call->ctx, PyArray_DATA(copy), latents,
                                                          (size_t)PyArray_NBYTES(copy));
        result = status == PM_OK ? PyObject_CallFunction(call->callback, "LO", (long long)step,
                                                         (PyObject *)copy)
                                 : core_raise(call->ctx, status);
    }
    Py_XDECREF(copy);
    Py_XDECREF(result);
    call->section->thread = PyEval_SaveThread();
    return !result;
}

PyDoc_STRVAR(
    sample_doc,
    "sample($self, labels, steps, cfg, shift, seed, first, ema, one_batch, noise, callback, /)\n"
    "--\n\nImages; one_batch is 1, 0 or -1 (as is best), noise and callback may be None.");

static PyObject *model_sample(Model *self, PyObject *const *args, Py_ssize_t n)
{
    if (count_args("sample", n, 10) < 0 || check_idle(self) < 0)
        return NULL;
    pm_model *m = model_of(self);
    const pm_config *c = pm_model_config(m);
    pm_sample_options o = {0};
    int64_t one_batch;
    if (batch_of(args[0], "labels", &o.n) < 0)
        return NULL;
    o.labels = array_data(args[0], "labels", NPY_INT64, o.n, false);
    const int ema = PyObject_IsTrue(args[6]);
    if (!o.labels || config_integer(args[1], &o.steps) < 0 || config_real(args[2], &o.cfg) < 0 ||
        config_real(args[3], &o.shift) < 0 || config_integer(args[4], &o.seed) < 0 ||
        config_integer(args[5], &o.first) < 0 || ema < 0 || config_integer(args[7], &one_batch) < 0)
        return NULL;
    o.ema = ema > 0;
    o.one_batch = (int)one_batch;
    o.noise = array_data(args[8], "noise", NPY_FLOAT32, o.n * c->channels * pm_voxels(c), true);
    PyArrayObject *out = PyErr_Occurred() ? NULL : new_images(c, o.n, c->channels);
    if (!out)
        return NULL;
    core_section section;
    pm_ctx ctx;
    if (begin(self, &section, &ctx) < 0) {
        Py_DECREF(out);
        return NULL;
    }
    step_caller call = {args[9], &section, &ctx, c, o.n};
    if (args[9] != Py_None) {
        o.on_step = call_step;
        o.arg = &call;
    }
    const pm_status status = pm_model_sample(&ctx, m, &o, PyArray_DATA(out));
    end(self, &section);
    if (status == PM_OK)
        return (PyObject *)out;
    Py_DECREF(out);
    return core_raise(&ctx, status);
}

/* ---------------------------------------------------------------- where the time goes */

PyDoc_STRVAR(profile_doc,
             "profile($self, on, /)\n--\n\n"
             "[(op, backward, seconds, calls)] so far; then on (True, False) empties the "
             "counters and starts or stops; None does not.");

static PyObject *model_profile(Model *self, PyObject *on)
{
    const int turn = PyObject_IsTrue(on); /* None: false */
    if (turn < 0 || check_idle(self) < 0)
        return NULL;
    PyObject *list = PyList_New(0);
    pm_profile_entry e;
    for (int64_t i = 0; list && pm_model_profile_entry(model_of(self), i, &e); i++) {
        if (!e.calls)
            continue;
        PyObject *item = Py_BuildValue("sOdL", e.op, e.backward ? Py_True : Py_False, e.seconds,
                                       (long long)e.calls);
        if (!item || PyList_Append(list, item) < 0)
            Py_CLEAR(list);
        Py_XDECREF(item);
    }
    if (list && on != Py_None)
        pm_model_profile(model_of(self), turn > 0);
    return list;
}

/* ---------------------------------------------------------------- the type */

#define METHOD(name, flags) {#name, (PyCFunction)(void (*)(void))model_##name, flags, name##_doc}
static PyMethodDef methods[] = {
    METHOD(index, METH_NOARGS),           METHOD(read, METH_O),
    METHOD(load, METH_FASTCALL),          METHOD(gradients, METH_NOARGS),
    METHOD(forward, METH_FASTCALL),       METHOD(routing, METH_FASTCALL),
    METHOD(loss_and_grad, METH_FASTCALL), METHOD(accumulate, METH_FASTCALL),
    METHOD(update, METH_FASTCALL),        METHOD(zero_gradients, METH_NOARGS),
    METHOD(sample, METH_FASTCALL),        METHOD(profile, METH_O),
    METHOD(close, METH_NOARGS),           {NULL, NULL, 0, NULL},
};

static PyGetSetDef attributes[] = {
    {"step", (getter)get_step, NULL, "Updates done.", NULL},
    {"skipped", (getter)get_skipped, NULL, "Updates left out: a gradient was not finite.", NULL},
    {"has_ema", (getter)get_has_ema, NULL, "Whether there is an EMA beside the parameters.", NULL},
    {"closed", (getter)get_closed, NULL, "Whether close() was called.", NULL},
    {"level", (getter)get_level, NULL, "The instruction set.", NULL},
    {NULL, NULL, NULL, NULL, NULL},
};

PyDoc_STRVAR(model_doc,
             "_Model(config, seed, device, compute, /)\n--\n\nThe model behind promoe.Model.");

static PyType_Slot type_slots[] = {
    {Py_tp_doc, (void *)model_doc}, {Py_tp_new, model_new},     {Py_tp_dealloc, model_dealloc},
    {Py_tp_methods, methods},       {Py_tp_getset, attributes}, {0, NULL},
};

static PyType_Spec type_spec = {
    .name = "promoe._core._Model",
    .basicsize = sizeof(Model),
    .flags = Py_TPFLAGS_DEFAULT | Py_TPFLAGS_IMMUTABLETYPE,
    .slots = type_slots,
};

int model_py_register(PyObject *module)
{
    core_state *state = core_get_state(module);
    state->model_type = (PyTypeObject *)PyType_FromModuleAndSpec(module, &type_spec, NULL);
    if (!state->model_type || config_py_register(module) < 0)
        return -1;
    return PyModule_AddType(module, state->model_type);
}
