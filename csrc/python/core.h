/* core.h: what the files of promoe._core share. Include it first. */
#ifndef PM_CORE_H
#define PM_CORE_H

#define PY_SSIZE_T_CLEAN
#include <Python.h>

#define PY_ARRAY_UNIQUE_SYMBOL promoe_ARRAY_API
#ifndef CORE_IMPORTS_NUMPY /* module.c does, once */
#define NO_IMPORT_ARRAY
#endif
#include <numpy/arrayobject.h>

#include "../promoe.h"

/* The state of one import of the module. The thread pool is not here: there is one per process. */
typedef struct {
    const pm_backend *backend;     /* chosen at import */
    const pm_backend *ops_backend; /* where ops run when nobody says; another one in tests */
    PyTypeObject *model_type;      /* promoe._core._Model */
    PyTypeObject *array_type;      /* promoe._core.DeviceArray */
} core_state;

core_state *core_get_state(PyObject *module);

/* The backend of a device and a compute type; NULL, with a ValueError of `who`, when there is none. */
const pm_backend *core_find_backend(PyObject *module, const char *who, const char *device,
                                    const char *compute);

/* A stretch of C without the GIL. One runs at a time in the process, because all share the pool:
 *
 *     core_section section;
 *     if (core_enter(&section, &ctx) < 0)   // sets ctx.pool and ctx.poll; takes the pool, drops the GIL
 *         return NULL;                      // an exception is set
 *     status = ...;
 *     core_leave(&section);                 // the GIL is held again
 *
 * ctx->poll runs Python's signal handlers, at most every 20 ms, and is non-zero when one raised. */
typedef struct {
    PyThreadState *thread;
    double polled; /* when, by pm_os_seconds */
} core_section;

int core_enter(core_section *section, pm_ctx *ctx);
void core_leave(core_section *section);

/* Adds the functions <op>_forward and <op>_backward, with their docstrings (ops_py.c). */
int ops_py_register(PyObject *module);

/* Adds the type _Model (model_py.c). */
int model_py_register(PyObject *module);

#endif
