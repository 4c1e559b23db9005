/* os.h: what the operating system gives. os.c is the only file that knows the system. */
#ifndef PM_BASE_OS_H
#define PM_BASE_OS_H

#include <stdatomic.h>
#include <stdbool.h>
#include <stddef.h>
#include <stdint.h>

/* Zeroed memory, aligned to 64 (to 2 MiB, on huge pages where the system has them, when it is that
 * large). NULL when there is not that much. Free it with the size it was asked with. */
void *pm_os_alloc(size_t bytes);
void pm_os_free(void *memory, size_t bytes);

/* For the tests: the nth pm_os_alloc from now (1: the next one) fails, once; 0 calls it off. And
 * how many calls there were since the program began. */
void pm_os_fail_allocation(int64_t nth);
int64_t pm_os_allocations(void);

int pm_os_cpus(void); /* CPUs this process may use: affinity mask and cgroup quota; at least 1 */
double pm_os_seconds(void); /* monotonic */

/* Sleeps while *word == value, or wakes for no reason; wakes everyone who sleeps on word. The
 * caller changes *word before it wakes. */
void pm_os_wait(_Atomic uint32_t *word, uint32_t value);
void pm_os_wake(_Atomic uint32_t *word);

/* Asks, once per process, that its threads may use the tile registers of AMX; NULL, or why not. From
 * then on a thread's signal stack must have room for them. */
const char *pm_os_refuses_tiles(void);

void pm_os_name_thread(const char *name); /* what top and gdb show; at most 15 characters */

#endif
