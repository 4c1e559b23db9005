/* shape.c: shapes as text, to numbers and to messages. */
#include "shape.h"

#include <stdio.h>

/* Reads one axis; *text is left behind its comma, or NULL at the end of the shape. */
axis axis_read(const char **text, const bind_dims *dims)
{
    axis a = {.unknown = -1};
    const char *p = *text;
    for (bool more = true; more;) { /* a product of the sum */
        int64_t product = 1;
        int letter = -1;
        for (;;) {
            int64_t factor = 1;
            if (*p >= 'A' && *p <= 'Z') {
                const int l = *p++ - 'A';
                if (dims->known[l])
                    factor = dims->value[l];
                else if (letter >= 0)
                    a.many = true;
                else
                    letter = l;
            } else {
                for (factor = 0; *p >= '0' && *p <= '9'; p++)
                    factor = 10 * factor + (*p - '0');
            }
            a.overflow |= __builtin_mul_overflow(product, factor, &product);
            if (*p != '*')
                break;
            p++;
        }
        int64_t *sum = letter < 0 ? &a.rest : &a.factor;
        a.overflow |= __builtin_add_overflow(*sum, product, sum);
        if (letter >= 0) {
            a.many |= a.unknown >= 0 && a.unknown != letter;
            a.unknown = letter;
        }
        more = *p == '+';
        p += more;
    }
    *text = *p == ',' ? p + 1 : NULL;
    return a;
}

int shape_axes(const char *text)
{
    int axes = 1;
    for (; *text; text++)
        axes += *text == ',';
    return axes;
}

/* "(N, 3*D)" */
void shape_text(const char *text, char *out, size_t bytes)
{
    size_t n = 0;
    const bool one = shape_axes(text) == 1;
    out[n++] = '(';
    for (; *text && n + 4 < bytes; text++) {
        out[n++] = *text;
        if (*text == ',')
            out[n++] = ' ';
    }
    snprintf(out + n, bytes - n, one ? ",)" : ")");
}

/* "(4, ?)": the shape with the dims known so far. */
void shape_values(const char *text, const bind_dims *dims, char *out, size_t bytes)
{
    size_t n = 1;
    int axes = 0;
    snprintf(out, bytes, "(");
    while (text && n < bytes) {
        const axis a = axis_read(&text, dims);
        if (a.unknown >= 0 || a.overflow)
            n += (size_t)snprintf(out + n, bytes - n, "%s?", axes ? ", " : "");
        else
            n +=
                (size_t)snprintf(out + n, bytes - n, "%s%lld", axes ? ", " : "", (long long)a.rest);
        axes++;
    }
    if (n < bytes)
        snprintf(out + n, bytes - n, axes == 1 ? ",)" : ")");
}

/* ", where D is 8 by x, N is 4 by y" for the known letters of a shape. */
void shape_origins(const char *text, const bind_dims *dims, char *out, size_t bytes)
{
    size_t n = 0;
    bool said[BIND_LETTERS] = {false};
    *out = 0;
    for (; *text && n < bytes; text++) {
        const int l = *text - 'A';
        if (l < 0 || l >= BIND_LETTERS || said[l] || !dims->known[l])
            continue;
        said[l] = true;
        n += (size_t)snprintf(out + n, bytes - n, "%s%c is %lld by %s", n ? ", " : ", where ",
                              *text, (long long)dims->value[l], dims->from[l]);
    }
}
