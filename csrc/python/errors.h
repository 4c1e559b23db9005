/* errors.h: from pm_status to Python exceptions, and the question "is this a near miss of that?". */
#ifndef PM_PYTHON_ERRORS_H
#define PM_PYTHON_ERRORS_H

#include "core.h"

/* Sets the exception of a status, with the message of ctx, and returns NULL. */
PyObject *core_raise(const pm_ctx *ctx, pm_status status);

/* The edit distance of two words (of at most 63 letters; longer ones are far from everything). */
int core_distance(const char *a, const char *b);

#endif
