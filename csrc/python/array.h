/* array.h: the arrays that ops take and give: NumPy's, in host memory, and those of a device: a
 * DeviceArray of our own, or anything that shows its memory by DLPack or __cuda_array_interface__
 * (PyTorch, CuPy, Numba, JAX). Nothing is converted and nothing is copied. */
#ifndef PM_PYTHON_ARRAY_H
#define PM_PYTHON_ARRAY_H

#include "core.h"

enum { ARRAY_MOST_AXES = 6 };

typedef enum { ARRAY_F32, ARRAY_F64, ARRAY_I32, ARRAY_I64, ARRAY_BF16, ARRAY_TYPES } array_type;
const char *array_type_name(array_type type); /* "float32" */
size_t array_type_bytes(array_type type);

/* An array, looked at. */
typedef struct {
    void *data;
    int axes;
    int64_t shape[ARRAY_MOST_AXES];
    size_t item; /* bytes of a number */
    bool device;
    PyObject *keeps; /* what holds a device's memory while it is in use; owned */
} array_view;

int64_t array_count(const array_view *view);
static inline size_t array_bytes(const array_view *view)
{
    return (size_t)array_count(view) * view->item;
}

/* Whether value says that it is in the memory of a device. */
bool array_is_device(PyObject *value);

/* Looks at an array of the backend's device: `type`, C-contiguous, of so many axes, and writable when
 * it is to be written. What backend computes from now on waits for what is under way on it. Raises
 * "<who> ..." and returns -1 when something is wrong. */
int array_view_device(PyObject *value, const pm_backend *backend, const char *who, array_type type,
                      int axes, bool writes, array_view *view);

/* A new DeviceArray of zeros; NULL and an exception. */
PyObject *array_new_device(PyObject *module, const pm_backend *backend, array_type type, int axes,
                           const int64_t *shape);
/* What is in it; its keeps is not the viewer's. */
const array_view *array_view_of(PyObject *device_array);
/* One over memory that owner holds. */
PyObject *array_wrap_device(PyObject *module, const pm_backend *backend, array_type type, int axes,
                            const int64_t *shape, void *memory, PyObject *owner);

/* Adds the type DeviceArray. */
int array_register(PyObject *module);

#endif
