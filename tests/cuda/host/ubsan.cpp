// ubsan.cpp: what -fsanitize=alignment,bounds,... calls in kernels: the end of the kernel, with the place.
#include "internal.h"

namespace {

struct Location {
    const char *file;
    uint32_t line, column;
};
struct Type {
    uint16_t kind, info;
    char name[1];
};
struct Mismatch {
    Location at;
    const Type *type;
    unsigned char log_alignment, kind;
};
struct OutOfBounds {
    Location at;
    const Type *array, *index;
};
struct Arithmetic {
    Location at;
    const Type *left, *right;
};

const char *file(const Location &at)
{
    const char *name = at.file;
    for (const char *p = at.file; *p; p++)
        if (*p == '/')
            name = p + 1;
    return name;
}

} // namespace

// The compiler knows these functions with arguments of type void *.
#define HANDLER extern "C" [[noreturn]] void
using pm_host::fail;

HANDLER __ubsan_handle_type_mismatch_v1_abort(void *data, void *p)
{
    const Mismatch *m = (const Mismatch *)data;
    fail("misaligned access (%s:%u) to a %s at %s: it needs an address that is a multiple of %d",
         file(m->at), m->at.line, m->type->name, pm_host::describe(p).c_str(),
         1 << m->log_alignment);
}

HANDLER __ubsan_handle_out_of_bounds_abort(void *data, void *index)
{
    const OutOfBounds *o = (const OutOfBounds *)data;
    const bool narrow = o->index->info >> 1 < 6; // info: log2 of the width, and whether it is signed
    fail("out of bounds (%s:%u): index %lld of an array of type %s", file(o->at), o->at.line,
         narrow && o->index->info & 1 ? (long long)(int)(intptr_t)index : (long long)(intptr_t)index,
         o->array->name);
}

HANDLER __ubsan_handle_shift_out_of_bounds_abort(void *data, void *, void *by)
{
    const Arithmetic *a = (const Arithmetic *)data;
    fail("shift of a %s by %lld (%s:%u)", a->left->name, (long long)(int)(intptr_t)by, file(a->at),
         a->at.line);
}

HANDLER __ubsan_handle_divrem_overflow_abort(void *data, void *, void *)
{
    const Arithmetic *a = (const Arithmetic *)data;
    fail("division of a %s by zero, or one that overflows (%s:%u)", a->left->name, file(a->at),
         a->at.line);
}
