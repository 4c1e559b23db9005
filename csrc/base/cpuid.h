/* cpuid.h: which instruction-set level this CPU has. */
#ifndef PM_BASE_CPUID_H
#define PM_BASE_CPUID_H

#include <stdbool.h>

/* level is "generic", "avx2" or "avx512". */
bool pm_cpu_has(const char *level);
/* The CPU's own words, such as "AMD EPYC 9654"; never NULL. */
const char *pm_cpu_model(void);

#endif
