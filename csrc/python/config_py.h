/* config_py.h: a model's configuration, from Python. Functions that return int return -1 with an
 * exception set. */
#ifndef PM_CONFIG_PY_H
#define PM_CONFIG_PY_H

#include "core.h"

#include "../model/model.h"

int config_integer(PyObject *object, int64_t *value);
int config_real(PyObject *object, double *value);
/* The place of a word in "a|b|c", or -1 (without an exception). */
int config_find_word(const char *words, const char *word);

/* dict has every field of pm_config by name; size and patch are tuples, enums are words. */
int config_read(PyObject *dict, pm_config *config);

/* [(name, shape, first element in a slab, elements, trained)], or NULL with an exception. */
PyObject *config_list_params(pm_ctx *ctx, const pm_config *config);

/* Adds the functions _index and _memory_estimate to the module. */
int config_py_register(PyObject *module);

#endif
