/* os.h: what the operating system gives. os.c is the only file that knows the system. */
#ifndef PM_BASE_OS_H
#define PM_BASE_OS_H

#include <stdbool.h>
#include <stddef.h>
#include <stdint.h>

/* Zeroed memory, aligned to 64 (to 2 MiB, on huge pages where the system has them, when large). */
void *pm_os_alloc(size_t bytes);
void pm_os_free(void *memory, size_t bytes);

int pm_os_cpus(void);       /* CPUs this process may use: affinity mask and cgroup quota */
double pm_os_seconds(void); /* monotonic */

/* A futex or its equivalent: sleep while *word == value; wake everyone. */
void pm_os_wait(const volatile uint32_t *word, uint32_t value);
void pm_os_wake(const volatile uint32_t *word);

#endif
