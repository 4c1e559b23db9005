/* threads.h: the pool. Tasks are handed out dynamically; what a task computes must not depend on
 * which thread runs it, so results are the same bits for any thread count. */
#ifndef PM_BASE_THREADS_H
#define PM_BASE_THREADS_H

#include <stdint.h>

#include "../promoe.h"

/* Runs fn(arg, task, worker) for every task in 0..tasks-1 and returns when all are done; worker is in
 * 0..pm_pool_threads(pool)-1 and no two running tasks share one (it selects per-worker scratch).
 * The calling thread is worker 0. Not reentrant: fn must not call pm_parallel. */
typedef void (*pm_task)(void *arg, int64_t task, int worker);
void pm_parallel(pm_pool *pool, int64_t tasks, pm_task fn, void *arg);

int pm_pool_threads(const pm_pool *pool);

/* threads = 0: as many as PROMOE_NUM_THREADS or OMP_NUM_THREADS says, at most the affinity mask and
 * the cgroup quota allow. NULL when out of memory. A pool survives fork: the child starts anew. */
pm_pool *pm_pool_create(int threads);
void pm_pool_destroy(pm_pool *pool);
int pm_default_threads(void);

#endif
