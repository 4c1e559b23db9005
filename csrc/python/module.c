/* module.c: promoe._core. Multi-phase initialisation; the process-wide thread pool. */
#define CORE_IMPORTS_NUMPY
#include "core.h"

#include <errno.h>
#include <pthread.h>

#include "../base/cpuid.h"
#include "../base/os.h"
#include "../base/threads.h"
#include "array.h"
#include "bind.h"
#include "errors.h"

/* ---------------------------------------------------------------- the pool */

/* One pool per process: two would fight for the same cores. Made at the first use. */
static pthread_once_t pool_once = PTHREAD_ONCE_INIT;
static pthread_mutex_t pool_mutex;
static pm_pool *pool;
static _Atomic int pool_threads; /* of the pool, or asked of the next one; 0: the default */

static void pool_init_mutex(void)
{
    pthread_mutexattr_t kind;
    pthread_mutexattr_init(&kind);
    /* A signal handler that computes while its own thread does gets an error, not a deadlock. */
    pthread_mutexattr_settype(&kind, PTHREAD_MUTEX_ERRORCHECK);
    pthread_mutex_init(&pool_mutex, &kind);
    pthread_mutexattr_destroy(&kind);
}

static void pool_init(void)
{
    pool_init_mutex();
    /* A fork while another thread computes must not leave the child waiting for that thread. */
    pthread_atfork(NULL, NULL, pool_init_mutex);
}

static int section_poll(void *arg)
{
    core_section *section = arg;
    const double now = pm_os_seconds();
    if (now - section->polled < 0.020)
        return 0;
    section->polled = now;
    PyEval_RestoreThread(section->thread);
    const int raised = PyErr_CheckSignals();
    section->thread = PyEval_SaveThread();
    return raised;
}

int core_enter(core_section *section, pm_ctx *ctx)
{
    pthread_once(&pool_once, pool_init);
    /* The GIL goes before the lock comes: the lock's holder may want the GIL, to poll. */
    section->thread = PyEval_SaveThread();
    section->polled = pm_os_seconds();
    const int busy = pthread_mutex_lock(&pool_mutex);
    if (!busy && !pool) {
        pool = pm_pool_create(pool_threads);
        pool_threads = pool ? pm_pool_threads(pool) : 0;
    }
    if (busy || !pool) {
        if (!busy)
            pthread_mutex_unlock(&pool_mutex);
        PyEval_RestoreThread(section->thread);
        if (busy)
            PyErr_SetString(
                PyExc_RuntimeError,
                "promoe already computes in this thread (is this a callback, or a signal "
                "handler?)");
        else
            PyErr_NoMemory();
        return -1;
    }
    ctx->pool = pool;
    ctx->poll = section_poll;
    ctx->poll_arg = section;
    return 0;
}

void core_leave(core_section *section)
{
    pthread_mutex_unlock(&pool_mutex);
    PyEval_RestoreThread(section->thread);
}

PyDoc_STRVAR(set_num_threads_doc,
             "set_num_threads($module, threads, /)\n--\n\n"
             "Set how many threads promoe computes with, in the whole process.\n\n"
             "Parameters\n----------\n"
             "threads : int\n    1 to 1024.\n\n"
             "Notes\n-----\n"
             "The default is PROMOE_NUM_THREADS, or OMP_NUM_THREADS, or the CPUs that this process "
             "may use.\n"
             "Results are the same bits for any number. Waits for a computation that runs in "
             "another thread.");

static PyObject *set_num_threads(PyObject *Py_UNUSED(module), PyObject *value)
{
    if (!bind_is_int(value)) {
        PyErr_Format(PyExc_TypeError, "set_num_threads: threads must be an int; got %.80s",
                     Py_TYPE(value)->tp_name);
        return NULL;
    }
    const Py_ssize_t threads = PyNumber_AsSsize_t(value, NULL); /* clips */
    if (threads == -1 && PyErr_Occurred())
        return NULL;
    if (threads < 1 || threads > 1024) {
        PyErr_Format(PyExc_ValueError, "set_num_threads: threads must be 1 to 1024; got %S", value);
        return NULL;
    }
    pm_ctx ctx = {0};
    core_section section;
    if (core_enter(&section, &ctx) < 0)
        return NULL;
    pm_pool *other = pool_threads == threads ? pool : pm_pool_create((int)threads);
    if (other && other != pool) {
        pm_pool *old = pool;
        pool = other; /* first: whatever the moment of a fork, the child has a whole pool */
        pool_threads = (int)threads;
        pm_pool_destroy(old);
    }
    core_leave(&section);
    if (!other)
        return PyErr_NoMemory();
    Py_RETURN_NONE;
}

static int current_threads(void)
{
    const int threads = pool_threads;
    return threads ? threads : pm_default_threads();
}

PyDoc_STRVAR(get_num_threads_doc, "get_num_threads($module, /)\n--\n\n"
                                  "How many threads promoe computes with.");

static PyObject *get_num_threads(PyObject *Py_UNUSED(module), PyObject *Py_UNUSED(none))
{
    return PyLong_FromLong(current_threads());
}

/* ---------------------------------------------------------------- the backend */

static int compute_of(const char *name)
{
    static const char *const names[PM_COMPUTES] = {PM_COMPUTE_NAMES};
    int i = 0;
    while (i < PM_COMPUTES && strcmp(names[i], name))
        i++;
    return i < PM_COMPUTES ? i : -1;
}

const pm_backend *core_find_backend(PyObject *module, const char *who, const char *device,
                                    const char *compute)
{
    char message[1024];
    const int kind = compute_of(compute);
    if (kind < 0) {
        PyErr_Format(
            PyExc_ValueError,
            "%s: compute = '%s' is not there: one of 'fp32', 'bf16', 'bf16-emulated', 'tf32'", who,
            compute);
        return NULL;
    }
    const char *const level = core_get_state(module)->backend->level;
    const pm_backend *const backend =
        pm_find_backend(device, (pm_compute)kind, level, message, sizeof message);
    if (!backend)
        PyErr_Format(PyExc_ValueError, "%s: %s", who, message);
    return backend;
}

PyDoc_STRVAR(backend_info_doc, "backend_info($module, /)\n--\n\n"
                               "What promoe computes on.\n\n"
                               "Returns\n-------\n"
                               "dict\n    device ('cpu'), level (the instruction set: 'generic', "
                               "'avx2', 'avx512' or 'amx'), computes (what products\n"
                               "    can multiply here: 'fp32', 'bf16', 'bf16-emulated'), threads, "
                               "and cpu (the model's name).");

static PyObject *backend_info(PyObject *module, PyObject *Py_UNUSED(none))
{
    static const char *const names[PM_COMPUTES] = {PM_COMPUTE_NAMES};
    const pm_backend *backend = core_get_state(module)->backend;
    const bool bf16 = pm_cpu_backend(backend->level, PM_BF16, (char[512]){0}, 512);
    PyObject *computes = bf16 ? Py_BuildValue("[sss]", names[0], names[1], names[2])
                              : Py_BuildValue("[ss]", names[0], names[2]);
    return Py_BuildValue("{s:s, s:s, s:N, s:i, s:s}", "device", backend->name, "level",
                         backend->level, "computes", computes, "threads", current_threads(), "cpu",
                         pm_cpu_model());
}

PyDoc_STRVAR(levels_doc,
             "levels($module, /)\n--\n\n"
             "The instruction-set levels that this CPU has, best first. PROMOE_CPU, read at\n"
             "import, chooses one of them.");

static PyObject *levels(PyObject *Py_UNUSED(module), PyObject *Py_UNUSED(none))
{
    static const char *const names[] = {"amx", "avx512", "avx2", "generic"};
    char message[256];
    PyObject *list = PyList_New(0);
    for (size_t i = 0; list && i < sizeof names / sizeof *names; i++) {
        if (!pm_cpu_backend(names[i], PM_FP32, message, sizeof message))
            continue;
        PyObject *name = PyUnicode_FromString(names[i]);
        if (!name || PyList_Append(list, name) < 0)
            Py_CLEAR(list);
        Py_XDECREF(name);
    }
    PyObject *tuple = list ? PyList_AsTuple(list) : NULL;
    Py_XDECREF(list);
    return tuple;
}

PyDoc_STRVAR(device_doc, "_device($module, device, compute, /)\n--\n\n"
                         "(level, model) of a device; a ValueError says why there is none.");

static PyObject *device(PyObject *module, PyObject *args)
{
    const char *name, *compute;
    if (!PyArg_ParseTuple(args, "ss:_device", &name, &compute))
        return NULL;
    const pm_backend *backend = core_find_backend(module, "Model", name, compute);
    return backend ? Py_BuildValue("ss", backend->level,
                                   backend->model ? backend->model : pm_cpu_model())
                   : NULL;
}

static PyObject *lacks(PyObject *Py_UNUSED(module), PyObject *level)
{
    const char *const name = PyUnicode_AsUTF8(level);
    const char *const why = name ? pm_cpu_lacks(name) : NULL;
    if (why)
        return PyUnicode_FromString(why);
    if (!name)
        return NULL;
    Py_RETURN_NONE;
}

/* ---------------------------------------------------------------- for tests */

static PyObject *fail_allocation(PyObject *Py_UNUSED(module), PyObject *value)
{
    const Py_ssize_t nth = PyNumber_AsSsize_t(value, PyExc_OverflowError);
    if (nth == -1 && PyErr_Occurred())
        return NULL;
    pm_os_fail_allocation(nth);
    Py_RETURN_NONE;
}

static PyObject *allocations(PyObject *Py_UNUSED(module), PyObject *Py_UNUSED(none))
{
    return PyLong_FromLongLong(pm_os_allocations());
}

static PyObject *poison(PyObject *Py_UNUSED(module), PyObject *on)
{
    const int truth = PyObject_IsTrue(on);
    if (truth < 0)
        return NULL;
    bind_poison = truth;
    Py_RETURN_NONE;
}

static PyObject *ops_device(PyObject *module, PyObject *args)
{
    const char *device, *compute;
    if (!PyArg_ParseTuple(args, "ss:_ops_device", &device, &compute))
        return NULL;
    const pm_backend *backend = core_find_backend(module, "_ops_device", device, compute);
    if (!backend)
        return NULL;
    core_get_state(module)->ops_backend = backend;
    Py_RETURN_NONE;
}

/* ---------------------------------------------------------------- the module */

static PyMethodDef functions[] = {
    {"set_num_threads", set_num_threads, METH_O, set_num_threads_doc},
    {"get_num_threads", get_num_threads, METH_NOARGS, get_num_threads_doc},
    {"backend_info", backend_info, METH_NOARGS, backend_info_doc},
    {"_device", device, METH_VARARGS, device_doc},
    {"levels", levels, METH_NOARGS, levels_doc},
    {"_lacks", lacks, METH_O,
     "_lacks($module, level, /)\n--\n\nWhy this machine does not have an instruction-set level, or "
     "None."},
    {"_fail_allocation", fail_allocation, METH_O,
     "_fail_allocation($module, nth, /)\n--\n\nFor tests: the nth allocation from now fails; 0 "
     "calls it off."},
    {"_allocations", allocations, METH_NOARGS,
     "_allocations($module, /)\n--\n\nFor tests: how many allocations there were."},
    {"_ops_device", ops_device, METH_VARARGS,
     "_ops_device($module, device, compute, /)\n--\n\nFor tests: where ops run when a call does "
     "not "
     "say."},
    {"_poison", poison, METH_O,
     "_poison($module, on, /)\n--\n\nFor tests: scratch and new outputs begin as 0xff bytes (NaN, "
     "-1)."},
    {NULL, NULL, 0, NULL},
};

static int core_exec(PyObject *module)
{
    import_array1(-1);
    core_state *state = PyModule_GetState(module);
    char message[256] = "";
    state->backend = pm_cpu_backend(NULL, PM_FP32, message, sizeof message);
    if (!state->backend || pm_default_threads_checked(message, sizeof message) < 0) {
        PyErr_SetString(PyExc_ImportError, message);
        return -1;
    }
    state->ops_backend = state->backend;
    if (array_register(module) < 0 || ops_py_register(module) < 0)
        return -1;
    return model_py_register(module);
}

static int core_traverse(PyObject *module, visitproc visit, void *arg)
{
    core_state *state = PyModule_GetState(module);
    Py_VISIT(state->model_type);
    Py_VISIT(state->array_type);
    return 0;
}

static int core_clear(PyObject *module)
{
    core_state *state = PyModule_GetState(module);
    Py_CLEAR(state->model_type);
    Py_CLEAR(state->array_type);
    return 0;
}

static void core_free(void *module) { core_clear(module); }

static PyModuleDef_Slot slots[] = {
    {Py_mod_exec, core_exec},
#ifdef Py_mod_multiple_interpreters /* the pool and the docstrings are of the process, NumPy too */
    {Py_mod_multiple_interpreters, Py_MOD_MULTIPLE_INTERPRETERS_SUPPORTED},
#endif
    {0, NULL},
};

static PyModuleDef definition = {
    PyModuleDef_HEAD_INIT,
    .m_name = "promoe._core",
    .m_doc = "The C core of promoe. Use promoe.ops and promoe.Model.",
    .m_size = sizeof(core_state),
    .m_methods = functions,
    .m_slots = slots,
    .m_traverse = core_traverse,
    .m_clear = core_clear,
    .m_free = core_free,
};

core_state *core_get_state(PyObject *module) { return PyModule_GetState(module); }

PyMODINIT_FUNC PyInit__core(void) { return PyModuleDef_Init(&definition); }
