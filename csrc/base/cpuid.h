/* cpuid.h: what this CPU is and has. */
#ifndef PM_BASE_CPUID_H
#define PM_BASE_CPUID_H

#include <stdbool.h>
#include <stdint.h>

/* level is "generic", "avx2", "avx512", "avx512bf16" (avx512 and the instructions of AVX512_BF16), or
 * "amx" (that, AMX_BF16, and a system that lets us use it). */
bool pm_cpu_has(const char *level);
/* NULL when it has the level, else why not, in words that go on from "but ". */
const char *pm_cpu_lacks(const char *level);
/* The CPU's own words, such as "AMD EPYC 9654"; never NULL. */
const char *pm_cpu_model(void);

/* The calling thread's floating-point mode (rounding, flush-to-zero, traps; without the sticky
 * flags of what happened), and setting it. Stand-ins where we do not know the register. */
uint64_t pm_cpu_float_mode(void);
void pm_cpu_set_float_mode(uint64_t mode);
extern const uint64_t pm_cpu_default_float_mode; /* to nearest, denormals kept, no traps */

/* A breath inside a spinning loop. */
void pm_cpu_pause(void);

#endif
