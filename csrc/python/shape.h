/* shape.h: the shapes of a field list ("B*T,3*D"), read with the dimensions that are known. */
#ifndef PM_PYTHON_SHAPE_H
#define PM_PYTHON_SHAPE_H

#include "bind.h"

/* One axis of a shape, seen with the dims known so far: rest + factor * (the one unknown letter). */
typedef struct {
    int64_t rest, factor;
    int unknown; /* letter, or -1 */
    bool many;   /* more than one unknown letter, or one that is squared */
    bool overflow;
} axis;

/* Reads one axis; *text is left behind its comma, or NULL at the end of the shape. */
axis axis_read(const char **text, const bind_dims *dims);
int shape_axes(const char *text);

/* "(N, 3*D)"; "(4, ?)": with the dims known so far; ", where D is 8 by x, N is 4 by y". */
void shape_text(const char *text, char *out, size_t bytes);
void shape_values(const char *text, const bind_dims *dims, char *out, size_t bytes);
void shape_origins(const char *text, const bind_dims *dims, char *out, size_t bytes);

#endif
