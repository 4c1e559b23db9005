/* threads.c: the pool. */
#include "threads.h"

#include <stdlib.h>

struct pm_pool {
    int threads;
};
void pm_parallel(pm_pool *pool, int64_t tasks, pm_task fn, void *arg)
{
    (void)pool;
    for (int64_t i = 0; i < tasks; i++)
        fn(arg, i, 0);
}
int pm_pool_threads(const pm_pool *pool) { return pool->threads; }
pm_pool *pm_pool_create(int threads)
{
    (void)threads;
    pm_pool *p = calloc(1, sizeof *p);
    if (p)
        p->threads = 1;
    return p;
}
void pm_pool_destroy(pm_pool *pool) { free(pool); }
int pm_default_threads(void) { return 1; }
