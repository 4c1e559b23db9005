/* backend.c: memory, and the choice of the level. */
#include <stdio.h>

#include "../base/cpuid.h"
#include "../base/os.h"
#include "cpu.h"

void *pm_cpu_alloc(pm_ctx *ctx, size_t bytes)
{
    (void)ctx;
    return pm_os_alloc(bytes);
}

void pm_cpu_free(pm_ctx *ctx, void *memory, size_t bytes)
{
    (void)ctx;
    if (memory)
        pm_os_free(memory, bytes);
}

/* Copies and zeroing in blocks of 1 MiB, so that large memory moves at the speed of all threads. */
#define MEMORY_BLOCK ((int64_t)1 << 20)

typedef struct {
    char *to;
    const char *from; /* NULL: zeros */
    int64_t bytes;
} memory_job;

static void memory_task(void *arg, int64_t task, int worker)
{
    (void)worker;
    const memory_job *const job = arg;
    const int64_t at = task * MEMORY_BLOCK;
    const size_t bytes = (size_t)pm_min(MEMORY_BLOCK, job->bytes - at);
    if (job->from)
        memcpy(job->to + at, job->from + at, bytes);
    else
        memset(job->to + at, 0, bytes);
}

static pm_status memory_run(pm_ctx *ctx, memory_job job)
{
    pm_parallel(ctx->pool, pm_blocks(job.bytes, MEMORY_BLOCK), memory_task, &job);
    return PM_OK;
}

pm_status pm_cpu_copy(pm_ctx *ctx, void *to, const void *from, size_t bytes)
{
    return memory_run(ctx, (memory_job){to, from, (int64_t)bytes});
}

pm_status pm_cpu_zero(pm_ctx *ctx, void *memory, size_t bytes)
{
    return memory_run(ctx, (memory_job){memory, NULL, (int64_t)bytes});
}

pm_status pm_cpu_sync(pm_ctx *ctx)
{
    (void)ctx;
    return PM_OK;
}

#define LEVEL(name) pm_cpu_##name, pm_cpu_emulated_##name
extern const pm_backend LEVEL(generic);
#if defined(__x86_64__)
extern const pm_backend LEVEL(avx2), LEVEL(avx512), pm_cpu_bf16_avx512, LEVEL(amx), pm_cpu_bf16_amx;
#endif

/* Best first; [compute], NULL where the level has no such products. */
static const pm_backend *const levels[][PM_COMPUTES] = {
#if defined(__x86_64__)
    {&pm_cpu_amx, &pm_cpu_bf16_amx, &pm_cpu_emulated_amx},
    {&pm_cpu_avx512, &pm_cpu_bf16_avx512, &pm_cpu_emulated_avx512},
    {&pm_cpu_avx2, NULL, &pm_cpu_emulated_avx2},
#endif
    {&pm_cpu_generic, NULL, &pm_cpu_emulated_generic},
};
enum { LEVELS = sizeof levels / sizeof *levels };

static const pm_backend *compute_at(int level, pm_compute compute, char *message,
                                    size_t message_bytes)
{
    const pm_backend *const backend = levels[level][compute];
    if (backend && (compute != PM_BF16 || pm_cpu_has("avx512bf16")))
        return backend;
    if (compute == PM_TF32) {
        snprintf(message, message_bytes, "compute = 'tf32' is a GPU's: a CPU has 'fp32'");
        return NULL;
    }
    snprintf(message, message_bytes,
             "compute = 'bf16' needs a CPU with AVX512_BF16 and the level amx or avx512; %s. Use "
             "'fp32', which is faster here, or 'bf16-emulated' for the same results, slowly",
             backend ? "this CPU does not have it" : "this is another level");
    return NULL;
}

const pm_backend *pm_cpu_backend(const char *level, pm_compute compute, char *message,
                                 size_t message_bytes)
{
    const char *asked_by = "level";
    if (!level) {
        level = getenv("PROMOE_CPU");
        asked_by = "PROMOE_CPU";
    }
    if (level && *level) {
        for (int i = 0; i < LEVELS; i++)
            if (!strcmp(levels[i][PM_FP32]->level, level)) {
                const char *const lacks = pm_cpu_lacks(level);
                if (!lacks)
                    return compute_at(i, compute, message, message_bytes);
                snprintf(message, message_bytes, "%s=%s, but %s", asked_by, level, lacks);
                return NULL;
            }
        snprintf(message, message_bytes, "%s=%s is not a level: one of generic, avx2, avx512, amx",
                 asked_by, level);
        return NULL;
    }
    int best = 0;
    while (!pm_cpu_has(levels[best][PM_FP32]->level))
        best++; /* every CPU has the last one */
    return compute_at(best, compute, message, message_bytes);
}
