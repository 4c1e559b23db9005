/* os.c: Linux (and, without huge pages and affinity, any POSIX system). */
#define _GNU_SOURCE
#include "os.h"

#include <stdlib.h>
#include <time.h>
#include <unistd.h>

void *pm_os_alloc(size_t bytes)
{
    void *p = NULL;
    return posix_memalign(&p, 64, bytes ? bytes : 64) ? NULL : __builtin_memset(p, 0, bytes);
}
void pm_os_free(void *memory, size_t bytes)
{
    (void)bytes;
    free(memory);
}
int pm_os_cpus(void) { return (int)sysconf(_SC_NPROCESSORS_ONLN); }
double pm_os_seconds(void)
{
    struct timespec t;
    clock_gettime(CLOCK_MONOTONIC, &t);
    return (double)t.tv_sec + 1e-9 * (double)t.tv_nsec;
}
