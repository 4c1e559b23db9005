/* guard.c: the backend "cpu-guard", for tests: the CPU backend in memory that nobody can touch
 * outside an op or a memory call. Code that reads a backend pointer by itself, which would work
 * on a CPU and crash on a GPU, crashes here too. And an op that is handed host memory is an
 * error that names the argument. Each buffer ends at an unmapped page, so that running past it
 * is seen as well. */
#define _GNU_SOURCE
#include <pthread.h>
#include <sys/mman.h>
#include <unistd.h>

#include "../promoe.h"

enum { MOST_REGIONS = 4096 };
typedef struct {
    char *map, *begin, *end; /* the mapping; the buffer inside it */
    size_t bytes;            /* of the mapping that is memory; the page behind it never is */
} region;

static const pm_backend *inner; /* the backend that computes */
static pthread_mutex_t lock = PTHREAD_MUTEX_INITIALIZER;
static region regions[MOST_REGIONS];
static int region_count;
static int open_count; /* calls in progress */

static void protect(int protection)
{
    for (int i = 0; i < region_count; i++)
        mprotect(regions[i].map, regions[i].bytes, protection);
}

static void open_memory(void)
{
    pthread_mutex_lock(&lock);
    if (open_count++ == 0)
        protect(PROT_READ | PROT_WRITE);
    pthread_mutex_unlock(&lock);
}

static void close_memory(void)
{
    pthread_mutex_lock(&lock);
    if (--open_count == 0)
        protect(PROT_NONE);
    pthread_mutex_unlock(&lock);
}

/* ---------------------------------------------------------------- memory */

static void *guard_alloc(pm_ctx *ctx, size_t bytes)
{
    (void)ctx;
    const size_t page = (size_t)sysconf(_SC_PAGESIZE), used = (bytes + 63) & ~(size_t)63;
    region r = {.bytes = (used + page - 1) / page * page};
    if (r.bytes == 0)
        r.bytes = page;
    void *buffer = NULL;
    pthread_mutex_lock(&lock);
    if (region_count < MOST_REGIONS) {
        r.map = mmap(NULL, r.bytes + page, PROT_NONE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
        if (r.map != MAP_FAILED) {
            r.begin = r.map + r.bytes - used;
            r.end = r.begin + bytes;
            if (open_count > 0)
                mprotect(r.map, r.bytes, PROT_READ | PROT_WRITE);
            regions[region_count++] = r;
            buffer = r.begin;
        }
    }
    pthread_mutex_unlock(&lock);
    return buffer;
}

static void guard_free(pm_ctx *ctx, void *memory, size_t bytes)
{
    (void)ctx, (void)bytes;
    pthread_mutex_lock(&lock);
    for (int i = 0; i < region_count; i++)
        if (regions[i].begin == memory) {
            munmap(regions[i].map, regions[i].bytes + (size_t)sysconf(_SC_PAGESIZE));
            regions[i] = regions[--region_count];
            break;
        }
    pthread_mutex_unlock(&lock);
}

/* bytes from memory on lie in one buffer. */
static bool guarded(const void *memory, size_t bytes)
{
    const char *at = memory;
    bool found = false;
    pthread_mutex_lock(&lock);
    for (int i = 0; i < region_count && !found; i++)
        found = at >= regions[i].begin && at + bytes <= regions[i].end;
    pthread_mutex_unlock(&lock);
    return found;
}

static pm_status check(pm_ctx *ctx, const char *call, const char *argument, const void *memory,
                       size_t bytes)
{
    if (!memory || guarded(memory, bytes))
        return PM_OK;
    return pm_fail(ctx, PM_EINTERNAL, "%s: %s is not memory of the backend", call, argument);
}

#define GUARDED_CALL(call)                                                                         \
    open_memory();                                                                                 \
    const pm_status status = (call);                                                               \
    close_memory();                                                                                \
    return status

static pm_status guard_write(pm_ctx *ctx, void *to, const void *host, size_t bytes)
{
    PM_TRY(check(ctx, "write", "to", to, bytes));
    GUARDED_CALL(inner->write(ctx, to, host, bytes));
}
static pm_status guard_read(pm_ctx *ctx, void *host, const void *from, size_t bytes)
{
    PM_TRY(check(ctx, "read", "from", from, bytes));
    GUARDED_CALL(inner->read(ctx, host, from, bytes));
}
static pm_status guard_copy(pm_ctx *ctx, void *to, const void *from, size_t bytes)
{
    PM_TRY(check(ctx, "copy", "to", to, bytes));
    PM_TRY(check(ctx, "copy", "from", from, bytes));
    GUARDED_CALL(inner->copy(ctx, to, from, bytes));
}
static pm_status guard_zero(pm_ctx *ctx, void *memory, size_t bytes)
{
    PM_TRY(check(ctx, "zero", "memory", memory, bytes));
    GUARDED_CALL(inner->zero(ctx, memory, bytes));
}
static pm_status guard_sync(pm_ctx *ctx) { return inner->sync(ctx); }

static size_t guard_derived_bytes(const pm_ctx *ctx, int64_t F, int64_t D)
{
    return inner->derived_bytes(ctx, F, D);
}
static pm_status guard_derive(pm_ctx *ctx, int64_t F, int64_t D, const float *w, void *derived)
{
    PM_TRY(check(ctx, "derive", "w", w, (size_t)(F * D) * sizeof *w));
    PM_TRY(check(ctx, "derive", "derived", derived, inner->derived_bytes(ctx, F, D)));
    GUARDED_CALL(inner->derive(ctx, F, D, w, derived));
}

/* ---------------------------------------------------------------- ops */

/* Every pointer of an op's arguments and gradients points into a buffer (where it ends there,
 * only the unmapped page tells). */
#define GUARD_POINTER(struct_, name) PM_TRY(check(ctx, op, #name, struct_->name, 1));
#define GUARD_act(name) GUARD_POINTER(args, name)
#define GUARD_f32(name) GUARD_POINTER(args, name)
#define GUARD_f64(name) GUARD_POINTER(args, name)
#define GUARD_i32(name) GUARD_POINTER(args, name)
#define GUARD_i64(name) GUARD_POINTER(args, name)
#define GUARD_weight(name) GUARD_POINTER(args, name.w) GUARD_POINTER(args, name.derived)

#define GUARD_FIELD(kind, ...) GUARD_##kind(__VA_ARGS__)
#define GUARD_DIM(name)
#define GUARD_LD(name, dense)
#define GUARD_IN(name, type, shape, grad) GUARD_##type(name)
#define GUARD_OPT(name, type, shape, grad) GUARD_##type(name)
#define GUARD_OUT(name, type, shape, grad) GUARD_##type(name)
#define GUARD_SAVED(name, type, shape) GUARD_##type(name)
#define GUARD_INOUT(name, type, shape) GUARD_##type(name)
#define GUARD_INOPT(name, type, shape) GUARD_##type(name)
#define GUARD_TWINS(name) GUARD_POINTER(args, name.list) GUARD_POINTER(args, name.derived)
#define GUARD_INT(name, value)
#define GUARD_REAL(name, value)
#define GUARD_ENUM(name, words, value)

#define GUARD_GRAD_FIELD(kind, ...) GUARD_GRAD_##kind(__VA_ARGS__)
#define GUARD_GRAD_DIM(name)
#define GUARD_GRAD_LD(name, dense)
#define GUARD_GRAD_IN(name, type, shape, grad) GUARD_D_##grad(d##name)
#define GUARD_GRAD_OPT(name, type, shape, grad) GUARD_D_##grad(d##name)
#define GUARD_GRAD_OUT(name, type, shape, grad) GUARD_D_##grad(d##name)
#define GUARD_GRAD_SAVED(name, type, shape)
#define GUARD_GRAD_INOUT(name, type, shape)
#define GUARD_GRAD_INOPT(name, type, shape)
#define GUARD_GRAD_TWINS(name)
#define GUARD_GRAD_INT(name, value)
#define GUARD_GRAD_REAL(name, value)
#define GUARD_GRAD_ENUM(name, words, value)
#define GUARD_D_SET(name) GUARD_POINTER(grads, name)
#define GUARD_D_ADD(name) GUARD_POINTER(grads, name)
#define GUARD_D_GRAD(name) GUARD_POINTER(grads, name)
#define GUARD_D_MAYBE(name) GUARD_POINTER(grads, name)
#define GUARD_D_NONE(name)

#define PM_OP(stem, OP, direction)                                                                 \
    static pm_status check_##stem(pm_ctx *ctx, const pm_##stem##_args *args, const void *scratch)  \
    {                                                                                              \
        const char *const op = #stem;                                                              \
        PM_##OP(GUARD_FIELD) return inner->stem.workspace(ctx, args, false)                        \
            ? check(ctx, op, "scratch", scratch, inner->stem.workspace(ctx, args, false))          \
            : PM_OK;                                                                               \
    }                                                                                              \
    static pm_status guard_##stem##_forward(pm_ctx *ctx, const pm_##stem##_args *args,             \
                                            void *scratch)                                         \
    {                                                                                              \
        PM_TRY(check_##stem(ctx, args, scratch));                                                  \
        GUARDED_CALL(inner->stem.forward(ctx, args, scratch));                                     \
    }                                                                                              \
    static size_t guard_##stem##_workspace(const pm_ctx *ctx, const pm_##stem##_args *args,        \
                                           bool backward)                                          \
    {                                                                                              \
        return inner->stem.workspace(ctx, args, backward); /* may not look at memory either */     \
    }                                                                                              \
    GUARD_BACKWARD_##direction(stem, OP)
#define GUARD_BACKWARD_FORWARD(stem, OP)
#define GUARD_BACKWARD_BOTH(stem, OP)                                                              \
    static pm_status guard_##stem##_backward(pm_ctx *ctx, const pm_##stem##_args *args,            \
                                             const pm_##stem##_grads *grads, void *scratch)        \
    {                                                                                              \
        const char *const op = #stem " backward";                                                  \
        const size_t bytes = inner->stem.workspace(ctx, args, true);                               \
        PM_##OP(GUARD_FIELD) PM_##OP(GUARD_GRAD_FIELD) if (bytes)                                  \
            PM_TRY(check(ctx, op, "scratch", scratch, bytes));                                     \
        GUARDED_CALL(inner->stem.backward(ctx, args, grads, scratch));                             \
    }
#include "../ops.def"
#undef PM_OP

#define GUARD_TABLE_FORWARD(stem) NULL
#define GUARD_TABLE_BOTH(stem) guard_##stem##_backward

const pm_backend *pm_guard_backend(const pm_backend *backend)
{
    static pm_backend guard = {
        .name = "cpu-guard",
        .alloc = guard_alloc,
        .free = guard_free,
        .write = guard_write,
        .read = guard_read,
        .copy = guard_copy,
        .zero = guard_zero,
        .sync = guard_sync,
        .derived_bytes = guard_derived_bytes,
        .derive = guard_derive,
#define PM_OP(op, OP, direction)                                                                   \
    .op = {guard_##op##_forward, GUARD_TABLE_##direction(op), guard_##op##_workspace},
#include "../ops.def"
#undef PM_OP
    };
    guard.level = backend->level;
    guard.compute = backend->compute;
    guard.products = backend->products;
    guard.act_bytes = backend->act_bytes;
    inner = backend;
    return &guard;
}
