/* promoe.h: the one header that every part of the core shares.
 *
 * promoe computes a ProMoE diffusion transformer (arXiv 2510.24711): the training step and the
 * sampler. This header has the status codes, the context, the argument structs of every op (made
 * from the field lists in ops/) and the backend: ops + memory. Read ops.def next.
 */
#ifndef PROMOE_H
#define PROMOE_H

#include <stdbool.h>
#include <stddef.h>
#include <stdint.h>

/* ---------------------------------------------------------------- status */

typedef enum {
    PM_OK = 0,
    PM_EINVAL,    /* a wrong argument: ValueError */
    PM_EDATA,     /* data that must be finite is not: ValueError, and nothing changed */
    PM_ENOMEM,    /* out of memory: MemoryError */
    PM_EINTR,     /* the caller's poll asked to stop: KeyboardInterrupt */
    PM_EINTERNAL, /* a fault of promoe: RuntimeError */
} pm_status;

typedef struct pm_pool pm_pool;       /* base/threads.h */
typedef struct pm_backend pm_backend; /* below */

/* One per caller. An op writes its message here and nowhere else. */
typedef struct pm_ctx {
    const pm_backend *backend;
    pm_pool *pool;
    int (*poll)(void *); /* non-zero: stop as soon as nothing is half done; NULL: never */
    void *poll_arg;
    char message[512]; /* why the last call failed */
} pm_ctx;

/* Formats the message and returns status. */
pm_status pm_fail(pm_ctx *ctx, pm_status status, const char *format, ...)
    __attribute__((format(printf, 3, 4)));

#define PM_TRY(...)                                                                                \
    do {                                                                                           \
        pm_status pm_try_status = (__VA_ARGS__);                                                   \
        if (pm_try_status != PM_OK)                                                                \
            return pm_try_status;                                                                  \
    } while (0)

/* ---------------------------------------------------------------- ops */

/* A weight matrix (rows F = outputs, columns D = inputs, row-major) and, when the backend has one,
 * its derived twin (packed panels on a CPU, a bf16 shadow on a GPU). derived may be NULL: then the
 * op derives what it needs into its scratch. */
typedef struct {
    const float *w;
    const void *derived;
} pm_weight;

/* A weight matrix (F, D) that starts at element `at` of a slab, and its derived twin at byte `derived`
 * of the derived slab. */
typedef struct {
    int64_t F, D, at, derived;
} pm_twin;

/* The matrices of a slab, for an op that rewrites their twins while it has the rows at hand: `list`
 * (count of them, in the order of the slab, none sharing an element) and the derived slab lie in
 * backend memory, so that a recorded step stays valid. count 0: there are none. */
typedef struct {
    int64_t count;
    const pm_twin *list;
    void *derived;
} pm_twins;

/* A number of an activation in memory is what the backend says: a float on a CPU, a float or a bf16
 * on a GPU (act_bytes below). So only a backend knows the type, and defines PM_ACT before it includes
 * this header; to everyone else it is incomplete, and arithmetic on a pointer to it does not compile.
 * The streams, statistics, scores, losses, parameters and their gradients are f32 everywhere. */
#ifndef PM_ACT
typedef struct pm_act pm_act;
#define PM_ACT pm_act
#endif

/* What the type classes of a field list are in C. */
#define PM_CTYPE_act PM_ACT
#define PM_CTYPE_f32 float
#define PM_CTYPE_f64 double
#define PM_CTYPE_i32 int32_t
#define PM_CTYPE_i64 int64_t

#define PM_IN_act const PM_ACT *
#define PM_IN_f32 const float *
#define PM_IN_f64 const double *
#define PM_IN_i32 const int32_t *
#define PM_IN_i64 const int64_t *
#define PM_IN_weight pm_weight

/* A field list is a macro that takes one macro X and calls it once per field, in order:
 *
 *   X(DIM,   N)                         a 64-bit dimension; deduced from shapes or given by the caller
 *   X(LD,    ld, D)                     distance between rows of a strided matrix; D when dense
 *   X(IN,    name, type, "shape", grad) an input. grad: SET (gradient written, =), ADD (gradient
 *                                       accumulated, +=) or NONE (has no gradient)
 *   X(OPT,   name, type, "shape", grad) an input that may be NULL
 *   X(OUT,   name, type, "shape", grad) an output. grad: GRAD (backward reads its gradient), MAYBE
 *                                       (the same, and it may be NULL = zero) or NONE
 *   X(SAVED, name, type, "shape")       an output that only backward needs (NULL when there will be
 *                                       no backward)
 *   X(INOUT, name, type, "shape")       updated in place;  X(INOPT, ...) the same, and may be NULL
 *   X(TWINS, name)                      matrices whose twins the op rewrites; a model has them, a caller
 *                                       of promoe.ops has not
 *   X(INT,   name, default)  X(REAL, name, default)  X(ENUM, name, "a|b|c", default)
 *
 * A shape is a comma-separated list of sums of products of dims and integers: "B*T,3*D", "G+1".
 * From one list come the struct below, the array checks of promoe.ops and its docstrings. */
#define PM_ARGS_FIELD(kind, ...) PM_ARGS_##kind(__VA_ARGS__)
#define PM_ARGS_DIM(name) int64_t name;
#define PM_ARGS_LD(name, dense) int64_t name;
#define PM_ARGS_IN(name, type, shape, grad) PM_IN_##type name;
#define PM_ARGS_OPT(name, type, shape, grad) PM_IN_##type name;
#define PM_ARGS_OUT(name, type, shape, grad) PM_CTYPE_##type *name;
#define PM_ARGS_SAVED(name, type, shape) PM_CTYPE_##type *name;
#define PM_ARGS_INOUT(name, type, shape) PM_CTYPE_##type *name;
#define PM_ARGS_INOPT(name, type, shape) PM_CTYPE_##type *name;
#define PM_ARGS_TWINS(name) pm_twins name;
#define PM_ARGS_INT(name, value) int64_t name;
#define PM_ARGS_REAL(name, value) double name;
#define PM_ARGS_ENUM(name, words, value) int name;

/* What their gradients are: those of activations are activations, all others f32. */
#define PM_DTYPE_act PM_ACT
#define PM_DTYPE_f32 float
#define PM_DTYPE_weight float

/* The gradients: dx for each input x with SET or ADD (NULL: not wanted), and dy for each output y
 * with GRAD or MAYBE (read). */
#define PM_GRADS_FIELD(kind, ...) PM_GRADS_##kind(__VA_ARGS__)
#define PM_GRADS_DIM(name)
#define PM_GRADS_LD(name, dense)
#define PM_GRADS_IN(name, type, shape, grad) PM_GRADS_IN_##grad(name, type)
#define PM_GRADS_OPT(name, type, shape, grad) PM_GRADS_IN_##grad(name, type)
#define PM_GRADS_OUT(name, type, shape, grad) PM_GRADS_OUT_##grad(name, type)
#define PM_GRADS_SAVED(name, type, shape)
#define PM_GRADS_INOUT(name, type, shape)
#define PM_GRADS_INOPT(name, type, shape)
#define PM_GRADS_TWINS(name)
#define PM_GRADS_INT(name, value)
#define PM_GRADS_REAL(name, value)
#define PM_GRADS_ENUM(name, words, value)
#define PM_GRADS_IN_SET(name, type) PM_DTYPE_##type *d##name;
#define PM_GRADS_IN_ADD(name, type) PM_DTYPE_##type *d##name;
#define PM_GRADS_IN_NONE(name, type)
#define PM_GRADS_OUT_GRAD(name, type) const PM_DTYPE_##type *d##name;
#define PM_GRADS_OUT_MAYBE(name, type) const PM_DTYPE_##type *d##name;
#define PM_GRADS_OUT_NONE(name, type)

#include "ops/all.h" /* every ops/<op>.h: the contracts and field lists */

/* pm_<op>_args and pm_<op>_grads. Forward and backward take the same args: what forward saved is
 * visible to backward. */
/* clang-format takes the macros of this body for types. */
/* clang-format off */
#define PM_OP(op, OP, direction)                                                                   \
    typedef struct {                                                                               \
        PM_##OP(PM_ARGS_FIELD)                                                                     \
    } pm_##op##_args;                                                                              \
    typedef struct {                                                                               \
        PM_##OP(PM_GRADS_FIELD)                                                                    \
        void *reserved; /* so that an op without gradients has one, too */                         \
    } pm_##op##_grads;
/* clang-format on */
#include "ops.def"
#undef PM_OP

/* ---------------------------------------------------------------- backend */

/* What products multiply. Sums, and everything outside products, are fp32; so are the router's
 * products. PM_BF16_EMULATED has the results of PM_BF16 on a CPU without its instructions, slowly;
 * PM_TF32 is a GPU's: operands of 11 bits in products that would be fp32. */
typedef enum { PM_FP32, PM_BF16, PM_BF16_EMULATED, PM_TF32, PM_COMPUTES } pm_compute;
#define PM_COMPUTE_NAMES "fp32", "bf16", "bf16-emulated", "tf32"

/* A backend is ops + memory. model/ and python/ know nothing else of it, and no code outside a
 * backend dereferences backend memory.
 *
 * forward and backward need `scratch`: workspace() bytes, aligned to 64, contents undefined.
 * An op never allocates, prints or keeps state; it polls nothing and always finishes.
 *
 * A backend that is not the host's may return from an op before the work is done; calls take effect
 * in their order. Then what is wrong with the contents of an array (an index out of range, data that
 * are not finite) is reported by the next read or sync, and what was written since means nothing.
 * write has taken the host's bytes when it returns; read waits. */
struct pm_backend {
    const char *name;  /* "cpu" */
    const char *level; /* instruction set: "generic", "avx2", "avx512", "amx"; of a GPU "sm_90" */
    const char *model; /* of a GPU: its name, memory and driver; NULL on a CPU */
    pm_compute compute;
    int products;     /* its own affair: by which instructions (cpu/product.h) */
    bool host;        /* its memory is host memory that callers may look at between calls */
    size_t act_bytes; /* of a number of an activation: 4 (float), or 2 (bf16; not a host's) */

    /* Zeroed, aligned to 64; NULL when out of memory, and perhaps a message that says what is free. */
    void *(*alloc)(pm_ctx *ctx, size_t bytes);
    void (*free)(pm_ctx *ctx, void *memory, size_t bytes);
    pm_status (*write)(pm_ctx *ctx, void *to, const void *host, size_t bytes);
    pm_status (*read)(pm_ctx *ctx, void *host, const void *from, size_t bytes);
    pm_status (*copy)(pm_ctx *ctx, void *to, const void *from, size_t bytes);
    pm_status (*zero)(pm_ctx *ctx, void *memory, size_t bytes);
    pm_status (*sync)(pm_ctx *ctx);

    /* Graphs; all four are NULL where a backend has none. Between begin_capture and end_capture ops,
     * copy, zero and derive are recorded with their arguments and do not run, and any other call is an
     * error. end_capture comes after a failure, too: then, and when it fails itself, *graph is NULL and
     * what was recorded is forgotten. launch runs the recording on what the memory holds then. */
    pm_status (*begin_capture)(pm_ctx *ctx);
    pm_status (*end_capture)(pm_ctx *ctx, void **graph);
    pm_status (*launch)(pm_ctx *ctx, void *graph);
    void (*free_graph)(pm_ctx *ctx, void *graph);

    /* Memory of this device that somebody else allocated, `bytes` from `memory` on: says what is wrong
     * with it, or makes what follows wait for what is under way in `stream` (a cudaStream_t: 0 or 1 is
     * the default stream, 2 that of the thread). NULL where memory is the host's. */
    pm_status (*adopt)(pm_ctx *ctx, const void *memory, size_t bytes, uintptr_t stream);

    /* Derived weights: bytes for an (F, D) weight, a multiple of 64, and making them from w. */
    size_t (*derived_bytes)(const pm_ctx *ctx, int64_t F, int64_t D);
    pm_status (*derive)(pm_ctx *ctx, int64_t F, int64_t D, const float *w, void *derived);

    /* clang-format takes the macros of this body for types. */
    /* clang-format off */
#define PM_OP(op, OP, direction)                                                                   \
    struct {                                                                                       \
        pm_status (*forward)(pm_ctx *ctx, const pm_##op##_args *args, void *scratch);              \
        pm_status (*backward)(pm_ctx *ctx, const pm_##op##_args *args,                             \
                              const pm_##op##_grads *grads, void *scratch);                        \
        size_t (*workspace)(const pm_ctx *ctx, const pm_##op##_args *args, bool backward);         \
    } op;
/* clang-format on */
#include "ops.def"
#undef PM_OP
};

/* The CPU backend at a level ("generic", "avx2", "avx512", "amx"), or at the best one that this CPU
 * has and PROMOE_CPU allows when level is NULL. NULL, with a message, when the level is unknown or
 * absent, or cannot compute so. */
const pm_backend *pm_cpu_backend(const char *level, pm_compute compute, char *message,
                                 size_t message_bytes);

/* The backend of a device ("cpu", "cuda"); cpu_level as above. NULL, with a message that says why
 * there is none and what to do (backends.c). */
const pm_backend *pm_find_backend(const char *device, pm_compute compute, const char *cpu_level,
                                  char *message, size_t message_bytes);

/* The same in memory that cannot be touched outside ops: for tests (cpu/guard.c). */
const pm_backend *pm_guard_backend(const pm_backend *cpu);

#endif
