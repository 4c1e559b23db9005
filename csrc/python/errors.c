/* errors.c: statuses to exceptions. */
#include "errors.h"

#include <string.h>

PyObject *core_raise(const pm_ctx *ctx, pm_status status)
{
    const char *message = ctx->message[0] ? ctx->message : "promoe: no message";
    switch (status) {
    case PM_EINVAL:
    case PM_EDATA:
        PyErr_SetString(PyExc_ValueError, message);
        break;
    case PM_ENOMEM:
        if (ctx->message[0])
            PyErr_SetString(PyExc_MemoryError, message);
        else
            PyErr_NoMemory();
        break;
    case PM_EINTR: /* the poll left the exception of the signal handler */
        if (!PyErr_Occurred())
            PyErr_SetNone(PyExc_KeyboardInterrupt);
        break;
    case PM_OK:
    case PM_EINTERNAL:
        PyErr_SetString(PyExc_RuntimeError, message);
        break;
    }
    return NULL;
}

int core_distance(const char *a, const char *b)
{
    enum { LONGEST = 63 };
    int row[LONGEST + 1];
    const size_t m = strlen(a), n = strlen(b);
    if (m > LONGEST || n > LONGEST)
        return LONGEST;
    for (size_t j = 0; j <= n; j++)
        row[j] = (int)j;
    for (size_t i = 1; i <= m; i++) {
        int diagonal = row[0];
        row[0] = (int)i;
        for (size_t j = 1; j <= n; j++) {
            int best = diagonal + (a[i - 1] != b[j - 1]);
            diagonal = row[j];
            best = best < row[j] + 1 ? best : row[j] + 1;
            row[j] = best < row[j - 1] + 1 ? best : row[j - 1] + 1;
        }
    }
    return row[n];
}
