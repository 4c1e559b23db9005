/* threads.h: the pool. Tasks are handed out dynamically; what a task computes must not depend on
 * which thread runs it, so results are the same bits for any thread count. */
#ifndef PM_BASE_THREADS_H
#define PM_BASE_THREADS_H

#include <stddef.h>
#include <stdint.h>

#include "../promoe.h"

/* Runs fn(arg, task, worker) for every task in 0..tasks-1 and returns when all are done; worker is
 * in 0..pm_pool_threads(pool)-1 and no two running tasks of the call share one (it selects
 * per-worker scratch). The calling thread is worker 0; without a pool (NULL) it works alone. Every
 * task runs in the default floating-point mode, whatever the caller's. A second caller of the same
 * pool waits for the first. Not reentrant: fn must not call pm_parallel. */
typedef void (*pm_task)(void *arg, int64_t task, int worker);
void pm_parallel(pm_pool *pool, int64_t tasks, pm_task fn, void *arg);

int pm_pool_threads(const pm_pool *pool);

enum { PM_MAX_THREADS = 1024 };

/* A pool of so many threads, the caller's own included; more than PM_MAX_THREADS are
 * PM_MAX_THREADS, and 0 is pm_default_threads(). NULL when the system has no memory or no threads
 * left. A pool survives fork: the child starts its own threads at its first pm_parallel. */
pm_pool *pm_pool_create(int threads);
void pm_pool_destroy(pm_pool *pool);

/* PROMOE_NUM_THREADS, or else the first number of OMP_NUM_THREADS, or else the CPUs that the
 * affinity mask and the cgroup quota allow. A PROMOE_NUM_THREADS that is not a number
 * in 1..PM_MAX_THREADS is an error: -1 and a message. (An OMP_NUM_THREADS that means nothing is not
 * ours to judge.) */
int pm_default_threads_checked(char *message, size_t message_bytes);
/* The same for callers who have checked: 1 instead of the error. */
int pm_default_threads(void);

#endif
