/* threads.c: the pool.
 *
 * A call opens a job: its description, a counter of tasks for each thread, and the `gate`. A worker
 * that sees a new `epoch` enters through the gate if it is still open, takes tasks until there are
 * none, and leaves. The caller takes tasks too; when none are left it closes the gate and waits for
 * those inside, and only for those: a worker that sleeps, or that the system does not run just now,
 * is never waited for. So a small job costs what the caller alone needs, at worst.
 *
 * A thread begins with a run of tasks of its own, the same part of every job, so that it finds in its
 * cache what it wrote in the job before; then it helps the others, from where they are.
 *
 * Workers watch `epoch` for a moment after a job (in a step the next one is near, and what happens
 * between two calls from Python is mostly shorter too), then sleep. With more threads than CPUs
 * they sleep at once. */
#include "threads.h"

#include <errno.h>
#include <pthread.h>
#include <signal.h>
#include <stdatomic.h>
#include <stdio.h>
#include <stdlib.h>

#include "cpuid.h"
#include "os.h"

#define SPIN_SECONDS 200e-6
enum { STACK_BYTES = 4 << 20 }; /* musl's 128 KiB are few */

/* gate: how many workers are inside, and two marks. */
#define GATE_OPEN 0x80000000u
#define GATE_AWAITED 0x40000000u /* the caller sleeps until the last worker has left */

typedef struct {
    pm_pool *pool;
    pthread_t thread;
    int worker;
} crew;

/* The tasks that a thread begins with: all threads may write `taken`, its owner mostly does. */
typedef struct {
    _Alignas(64) _Atomic int64_t taken; /* the next one */
    int64_t end;
} run;

struct pm_pool {
    pthread_mutex_t entry; /* one job at a time */
    pm_pool *next;         /* in the list of all pools */
    int threads;
    int started; /* threads that run in this process, the caller not counted: 0 after a fork */
    double spin; /* seconds */
    crew *crew;  /* threads - 1 */

    pm_task fn; /* the job: written before the gate opens, read inside it */
    void *arg;
    run *runs; /* threads */

    _Alignas(64) _Atomic uint32_t gate;
    _Alignas(64) _Atomic uint32_t epoch; /* a new value: a new job, or the end */
    _Atomic uint32_t sleepers;
    _Atomic bool stop;
};

/* ---------------------------------------------------------------- jobs */

static void run_tasks(pm_pool *pool, int worker)
{
    for (int i = 0; i < pool->threads; i++) {
        run *const run = &pool->runs[(worker + i) % pool->threads];
        while (atomic_load_explicit(&run->taken, memory_order_relaxed) < run->end) {
            const int64_t task = atomic_fetch_add_explicit(&run->taken, 1, memory_order_relaxed);
            if (task >= run->end)
                break;
            pool->fn(pool->arg, task, worker);
        }
    }
}

/* As many to each; the first threads have one more where it does not come out even. */
static void deal_tasks(pm_pool *pool, int64_t tasks)
{
    const int64_t each = tasks / pool->threads, more = tasks % pool->threads;
    for (int64_t t = 0, first = 0; t < pool->threads; t++) {
        atomic_store_explicit(&pool->runs[t].taken, first, memory_order_relaxed);
        pool->runs[t].end = first += each + (t < more);
    }
}

/* Watches *word until it is not `value`, at most `seconds`; returns what it is then. */
static uint32_t watch(_Atomic uint32_t *word, uint32_t value, double seconds)
{
    uint32_t now = atomic_load_explicit(word, memory_order_acquire);
    if (now != value || seconds <= 0)
        return now;
    const double until = pm_os_seconds() + seconds;
    do
        for (int i = 0; i < 16; i++) {
            pm_cpu_pause();
            now = atomic_load_explicit(word, memory_order_acquire);
            if (now != value)
                return now;
        }
    while (pm_os_seconds() < until);
    return now;
}

static bool enter(pm_pool *pool)
{
    uint32_t gate = atomic_load_explicit(&pool->gate, memory_order_relaxed);
    while (gate & GATE_OPEN)
        if (atomic_compare_exchange_weak_explicit(&pool->gate, &gate, gate + 1,
                                                  memory_order_acquire, memory_order_relaxed))
            return true;
    return false;
}

static void leave(pm_pool *pool)
{
    if (atomic_fetch_sub_explicit(&pool->gate, 1, memory_order_release) == (GATE_AWAITED | 1))
        pm_os_wake(&pool->gate);
}

static void *work(void *arg)
{
    const crew *const me = arg;
    pm_pool *const pool = me->pool;
    char name[16];
    snprintf(name, sizeof name, "promoe-%d", me->worker);
    pm_os_name_thread(name);
    pm_cpu_set_float_mode(pm_cpu_default_float_mode);

    for (uint32_t seen = 0;;) {
        uint32_t now = watch(&pool->epoch, seen, pool->spin);
        while (now == seen) {
            /* Either the caller sees the sleeper, or the sleeper sees the caller's new epoch. */
            atomic_fetch_add(&pool->sleepers, 1);
            pm_os_wait(&pool->epoch, seen);
            atomic_fetch_sub(&pool->sleepers, 1);
            now = atomic_load(&pool->epoch);
        }
        seen = now;
        if (atomic_load(&pool->stop))
            return NULL;
        if (enter(pool)) {
            run_tasks(pool, me->worker);
            leave(pool);
        }
    }
}

static void announce(pm_pool *pool)
{
    atomic_fetch_add(&pool->epoch, 1);
    if (atomic_load(&pool->sleepers))
        pm_os_wake(&pool->epoch);
}

/* Closes the gate and waits until nobody is inside. */
static void close_gate(pm_pool *pool)
{
    uint32_t inside = atomic_fetch_and_explicit(&pool->gate, ~GATE_OPEN, memory_order_acquire) &
                      ~GATE_OPEN;
    for (uint32_t before = 0; inside && inside != before;) { /* a change: watch for the next one */
        before = inside;
        inside = watch(&pool->gate, inside, pool->spin);
    }
    if (!inside)
        return;
    inside = atomic_fetch_or_explicit(&pool->gate, GATE_AWAITED, memory_order_acquire);
    while (inside & ~GATE_AWAITED) {
        pm_os_wait(&pool->gate, inside | GATE_AWAITED);
        inside = atomic_load_explicit(&pool->gate, memory_order_acquire);
    }
    atomic_store_explicit(&pool->gate, 0, memory_order_relaxed);
}

/* ---------------------------------------------------------------- threads */

/* Starts the threads that are missing; false when the system gives no more. */
static bool start(pm_pool *pool)
{
    pthread_attr_t attributes;
    if (pthread_attr_init(&attributes))
        return false;
    size_t stack = 0;
    if (!pthread_attr_getstacksize(&attributes, &stack) && stack < STACK_BYTES)
        pthread_attr_setstacksize(&attributes, STACK_BYTES);
    sigset_t all, before; /* signals are for the threads of the program, not for ours */
    sigfillset(&all);
    pthread_sigmask(SIG_SETMASK, &all, &before);
    bool ok = true;
    while (ok && pool->started < pool->threads - 1) {
        crew *const one = &pool->crew[pool->started];
        *one = (crew){.pool = pool, .worker = pool->started + 1};
        ok = !pthread_create(&one->thread, &attributes, work, one);
        pool->started += ok;
    }
    pthread_sigmask(SIG_SETMASK, &before, NULL);
    pthread_attr_destroy(&attributes);
    return ok;
}

static void dissolve(pm_pool *pool)
{
    atomic_store(&pool->stop, true);
    announce(pool);
    for (int i = 0; i < pool->started; i++)
        pthread_join(pool->crew[i].thread, NULL);
    pthread_mutex_destroy(&pool->entry);
    pm_os_free(pool->crew, (size_t)pool->threads * sizeof *pool->crew);
    pm_os_free(pool->runs, (size_t)pool->threads * sizeof *pool->runs);
    pm_os_free(pool, sizeof *pool);
}

/* A child process has the pools but not their threads, and perhaps a lock that another thread of
 * the parent held. It gets them as new. */
static pthread_mutex_t pools_lock = PTHREAD_MUTEX_INITIALIZER;
static pm_pool *pools;

static void before_fork(void) { pthread_mutex_lock(&pools_lock); }
static void after_fork(void) { pthread_mutex_unlock(&pools_lock); }
static void after_fork_in_child(void)
{
    for (pm_pool *pool = pools; pool; pool = pool->next) {
        pthread_mutex_init(&pool->entry, NULL);
        pool->started = 0;
        atomic_store(&pool->gate, 0);
        atomic_store(&pool->epoch, 0);
        atomic_store(&pool->sleepers, 0);
    }
    pthread_mutex_unlock(&pools_lock);
}
static void register_fork(void) { pthread_atfork(before_fork, after_fork, after_fork_in_child); }

/* ---------------------------------------------------------------- the interface */

int pm_pool_threads(const pm_pool *pool) { return pool->threads; }

pm_pool *pm_pool_create(int threads)
{
    static pthread_once_t once = PTHREAD_ONCE_INIT;
    pthread_once(&once, register_fork);
    if (threads < 1)
        threads = pm_default_threads();
    if (threads > PM_MAX_THREADS)
        threads = PM_MAX_THREADS;

    pm_pool *const pool = pm_os_alloc(sizeof *pool);
    if (!pool)
        return NULL;
    pool->threads = threads;
    pool->spin = threads <= pm_os_cpus() ? SPIN_SECONDS : 0;
    pthread_mutex_init(&pool->entry, NULL);
    pool->crew = pm_os_alloc((size_t)threads * sizeof *pool->crew);
    pool->runs = pm_os_alloc((size_t)threads * sizeof *pool->runs);
    if (!pool->crew || !pool->runs || !start(pool)) {
        dissolve(pool);
        return NULL;
    }
    pthread_mutex_lock(&pools_lock);
    pool->next = pools;
    pools = pool;
    pthread_mutex_unlock(&pools_lock);
    return pool;
}

void pm_pool_destroy(pm_pool *pool)
{
    if (!pool)
        return;
    pthread_mutex_lock(&pools_lock);
    pm_pool **place = &pools;
    while (*place != pool)
        place = &(*place)->next;
    *place = pool->next;
    pthread_mutex_unlock(&pools_lock);
    dissolve(pool);
}

void pm_parallel(pm_pool *pool, int64_t tasks, pm_task fn, void *arg)
{
    if (tasks <= 0)
        return;
    const uint64_t mode = pm_cpu_float_mode();
    if (mode != pm_cpu_default_float_mode)
        pm_cpu_set_float_mode(pm_cpu_default_float_mode);

    if (tasks == 1 || !pool || pool->threads == 1) {
        for (int64_t task = 0; task < tasks; task++)
            fn(arg, task, 0);
    } else {
        pthread_mutex_lock(&pool->entry);
        if (pool->started < pool->threads - 1)
            start(pool); /* after a fork; with fewer threads than asked: slower, not different */
        pool->fn = fn;
        pool->arg = arg;
        deal_tasks(pool, tasks);
        atomic_store_explicit(&pool->gate, GATE_OPEN, memory_order_release);
        announce(pool);
        run_tasks(pool, 0);
        close_gate(pool);
        pthread_mutex_unlock(&pool->entry);
    }

    if (mode != pm_cpu_default_float_mode)
        pm_cpu_set_float_mode(mode);
}

static int thread_count(const char *text, bool list)
{
    char *end;
    errno = 0;
    const long count = strtol(text, &end, 10);
    while (*end == ' ')
        end++;
    if (end == text || errno || count < 1 || count > PM_MAX_THREADS ||
        (*end && !(list && *end == ',')))
        return -1;
    return (int)count;
}

int pm_default_threads_checked(char *message, size_t message_bytes)
{
    const char *const ours = getenv("PROMOE_NUM_THREADS"), *const omp = getenv("OMP_NUM_THREADS");
    if (ours && *ours) {
        const int count = thread_count(ours, false);
        if (count < 0)
            snprintf(message, message_bytes,
                     "PROMOE_NUM_THREADS=%s is not a number of threads (1 to %d)", ours,
                     PM_MAX_THREADS);
        return count;
    }
    const int count = omp ? thread_count(omp, true) : -1;
    return count > 0 ? count : pm_os_cpus();
}

int pm_default_threads(void)
{
    char message[128];
    const int count = pm_default_threads_checked(message, sizeof message);
    return count > 0 ? count : 1;
}
