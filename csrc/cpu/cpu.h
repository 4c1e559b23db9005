/* cpu.h: what every file of the CPU backend sees before the level's target is set: the standard
 * headers, the pool and the backend's memory. */
#ifndef PM_CPU_H
#define PM_CPU_H

#include <float.h>
#include <limits.h>
#include <math.h>
#include <stdint.h>
#include <stdlib.h>
#include <string.h>
#if defined(__x86_64__)
#include <immintrin.h>
#endif

#define PM_ACT float /* activations in memory, whatever products compute in */
#include "../base/rng.h"
#include "../base/threads.h"
#include "../promoe.h"

/* Rounds a size up to a multiple of 64 bytes. */
static inline size_t pm_round64(size_t bytes) { return (bytes + 63) & ~(size_t)63; }

/* scratch cut into aligned pieces: p = pm_take(&scratch, bytes). */
static inline void *pm_take(void **scratch, size_t bytes)
{
    void *piece = *scratch;
    *scratch = (char *)piece + pm_round64(bytes);
    return piece;
}

/* Work per task for elementwise passes: a function of the shape, never of the thread count. */
static inline int64_t pm_blocks(int64_t n, int64_t block) { return (n + block - 1) / block; }
static inline int64_t pm_min(int64_t a, int64_t b) { return a < b ? a : b; }
static inline int64_t pm_max(int64_t a, int64_t b) { return a > b ? a : b; }

void *pm_cpu_alloc(pm_ctx *ctx, size_t bytes);
void pm_cpu_free(pm_ctx *ctx, void *memory, size_t bytes);
pm_status pm_cpu_copy(pm_ctx *ctx, void *to, const void *from, size_t bytes);
pm_status pm_cpu_zero(pm_ctx *ctx, void *memory, size_t bytes);
pm_status pm_cpu_sync(pm_ctx *ctx);

#endif
