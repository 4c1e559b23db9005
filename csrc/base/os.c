/* os.c: Linux; other POSIX systems go without huge pages, affinity and futex. */
#if defined(__linux__)
#define _GNU_SOURCE
#endif
#include "os.h"

#include <errno.h>
#include <limits.h>
#include <pthread.h>
#include <sched.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <time.h>
#include <unistd.h>
#if defined(__linux__)
#include <linux/futex.h>
#include <sys/syscall.h>
#include <sys/sysinfo.h>
#endif

/* ---------------------------------------------------------------- memory */

#define HUGE_PAGE ((size_t)2 << 20)

/* From this size on memory is mapped. Under AddressSanitizer never: it watches malloc only. */
#if defined(__SANITIZE_ADDRESS__)
#define MAP_FROM SIZE_MAX
#else
#define MAP_FROM HUGE_PAGE
#endif

static _Atomic int64_t allocations, fail_at;

void pm_os_fail_allocation(int64_t nth)
{
    atomic_store(&fail_at, nth > 0 ? atomic_load(&allocations) + nth : 0);
}

int64_t pm_os_allocations(void) { return atomic_load(&allocations); }

/* Whether the machine could ever hold so much. A system that overcommits would say yes to anything,
 * and kill the process later. */
static bool plausible(size_t bytes)
{
    if (bytes > PTRDIFF_MAX - 2 * HUGE_PAGE)
        return false;
#if defined(__linux__)
    struct sysinfo info;
    if (bytes >= HUGE_PAGE && !sysinfo(&info))
        return (double)bytes <= ((double)info.totalram + (double)info.totalswap) * info.mem_unit;
#endif
    return true;
}

static size_t mapped_bytes(size_t bytes)
{
    const size_t page = (size_t)sysconf(_SC_PAGESIZE);
    return (bytes + page - 1) / page * page;
}

/* Maps a huge page too much, and gives back what lies before and after the aligned part. */
static void *map_aligned(size_t bytes)
{
    const size_t size = mapped_bytes(bytes), extra = size + HUGE_PAGE;
    char *const whole =
        mmap(NULL, extra, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
    if (whole == MAP_FAILED)
        return NULL;
    const size_t before = (HUGE_PAGE - (uintptr_t)whole % HUGE_PAGE) % HUGE_PAGE;
    char *const memory = whole + before;
    const size_t after = HUGE_PAGE - before;
    if (before)
        munmap(whole, before);
    if (after)
        munmap(memory + size, after);
#if defined(MADV_HUGEPAGE)
    madvise(memory, size, MADV_HUGEPAGE); /* a wish: without it, it is only slower */
#endif
    return memory;
}

void *pm_os_alloc(size_t bytes)
{
    if (atomic_fetch_add(&allocations, 1) + 1 == atomic_load(&fail_at) || !plausible(bytes))
        return NULL;
    if (bytes >= MAP_FROM)
        return map_aligned(bytes);
    void *memory;
    if (posix_memalign(&memory, 64, bytes ? bytes : 64))
        return NULL;
    return memset(memory, 0, bytes);
}

void pm_os_free(void *memory, size_t bytes)
{
    if (memory && bytes >= MAP_FROM)
        munmap(memory, mapped_bytes(bytes));
    else
        free(memory);
}

/* ---------------------------------------------------------------- processors */

#if defined(__linux__)
static int affinity_cpus(void)
{
    for (int most = 1024; most <= 1 << 20; most *= 2) { /* the kernel refuses too small a mask */
        cpu_set_t *const set = CPU_ALLOC((size_t)most);
        if (!set)
            break;
        const size_t size = CPU_ALLOC_SIZE((size_t)most);
        const int failed = sched_getaffinity(0, size, set);
        const int error = errno, count = failed ? 0 : CPU_COUNT_S(size, set);
        CPU_FREE(set);
        if (!failed)
            return count;
        if (error != EINVAL)
            break;
    }
    return 0;
}

/* The first line of the file folder/name; false when there is none. */
static bool read_line(const char *folder, const char *name, char *line, int bytes)
{
    char path[PATH_MAX + 64];
    if (snprintf(path, sizeof path, "%s/%s", folder, name) >= (int)sizeof path)
        return false;
    FILE *const file = fopen(path, "re");
    if (!file)
        return false;
    const bool ok = fgets(line, bytes, file) != NULL;
    fclose(file);
    return ok;
}

/* CPUs that the quota of one cgroup folder (version 2, then 1) allows, rounded up; INT_MAX: no
 * quota. */
static int folder_quota(const char *folder)
{
    char line[128];
    long long quota = 0, period = 0;
    if (read_line(folder, "cpu.max", line, sizeof line)) {
        if (sscanf(line, "%lld %lld", &quota, &period) != 2) /* "max 100000" */
            return INT_MAX;
    } else {
        if (read_line(folder, "cpu.cfs_quota_us", line, sizeof line))
            quota = atoll(line); /* -1: none */
        if (read_line(folder, "cpu.cfs_period_us", line, sizeof line))
            period = atoll(line);
    }
    if (quota <= 0 || period <= 0)
        return INT_MAX;
    const long long cpus = (quota + period - 1) / period;
    return cpus < INT_MAX ? (int)cpus : INT_MAX;
}

/* The smallest quota of the process's cgroup and the groups above it. In a container the path that
 * the kernel names may not be mounted; its parents, up to the mount itself, then count. */
static int quota_cpus(void)
{
    FILE *const file = fopen("/proc/self/cgroup", "re");
    if (!file)
        return INT_MAX;
    int least = INT_MAX;
    char line[PATH_MAX];
    while (fgets(line, sizeof line, file)) { /* hierarchy:controllers:path */
        line[strcspn(line, "\n")] = 0;
        char *const controllers = strchr(line, ':');
        char *const path = controllers ? strchr(controllers + 1, ':') : NULL;
        if (!path)
            continue;
        *path = 0;
        const char *mount = NULL;
        if (!controllers[1])
            mount = "/sys/fs/cgroup";
        else
            for (char *save, *word = strtok_r(controllers + 1, ",", &save); word;
                 word = strtok_r(NULL, ",", &save))
                if (!strcmp(word, "cpu"))
                    mount = "/sys/fs/cgroup/cpu";
        if (!mount)
            continue;
        char folder[PATH_MAX + 32];
        snprintf(folder, sizeof folder, "%s%s", mount, path + 1);
        for (;;) {
            const int here = folder_quota(folder);
            least = here < least ? here : least;
            char *const slash = strrchr(folder, '/');
            if (strlen(folder) <= strlen(mount) || !slash)
                break;
            *slash = 0;
        }
    }
    fclose(file);
    return least;
}
#endif

#if defined(__linux__) && defined(__x86_64__)
static pthread_once_t tiles_once = PTHREAD_ONCE_INIT;
static char tiles_refused[128];

static void ask_for_tiles(void)
{
    enum { REQUEST = 0x1023 /* ARCH_REQ_XCOMP_PERM, Linux 5.16 */, TILE_DATA = 18 };
    if (syscall(SYS_arch_prctl, REQUEST, TILE_DATA))
        snprintf(tiles_refused, sizeof tiles_refused,
                 "the system does not grant its tile registers: %s",
                 errno == ENOSPC ? "the signal stack of a thread is too small" : strerror(errno));
}
const char *pm_os_refuses_tiles(void)
{
    pthread_once(&tiles_once, ask_for_tiles);
    return tiles_refused[0] ? tiles_refused : NULL;
}
#else
const char *pm_os_refuses_tiles(void) { return "this system is not known to have tile registers"; }
#endif

int pm_os_cpus(void)
{
#if defined(__linux__)
    int cpus = affinity_cpus();
    const int quota = quota_cpus();
#else
    int cpus = 0;
    const int quota = INT_MAX;
#endif
    if (cpus < 1)
        cpus = (int)sysconf(_SC_NPROCESSORS_ONLN);
    if (cpus > quota)
        cpus = quota;
    return cpus < 1 ? 1 : cpus;
}

/* ---------------------------------------------------------------- time and sleep */

double pm_os_seconds(void)
{
    struct timespec t;
    clock_gettime(CLOCK_MONOTONIC, &t);
    return (double)t.tv_sec + 1e-9 * (double)t.tv_nsec;
}

#if defined(__linux__)
void pm_os_wait(_Atomic uint32_t *word, uint32_t value)
{
    syscall(SYS_futex, word, FUTEX_WAIT_PRIVATE, value, NULL, NULL, 0);
}

void pm_os_wake(_Atomic uint32_t *word)
{
    syscall(SYS_futex, word, FUTEX_WAKE_PRIVATE, INT_MAX, NULL, NULL, 0);
}

void pm_os_name_thread(const char *name) { pthread_setname_np(pthread_self(), name); }
#else
/* One lock for all words: the waker, who changed *word, cannot slip between test and sleep. */
static pthread_mutex_t sleep_lock = PTHREAD_MUTEX_INITIALIZER;
static pthread_cond_t sleep_cond = PTHREAD_COND_INITIALIZER;

void pm_os_wait(_Atomic uint32_t *word, uint32_t value)
{
    pthread_mutex_lock(&sleep_lock);
    if (atomic_load(word) == value)
        pthread_cond_wait(&sleep_cond, &sleep_lock);
    pthread_mutex_unlock(&sleep_lock);
}

void pm_os_wake(_Atomic uint32_t *word)
{
    (void)word;
    pthread_mutex_lock(&sleep_lock);
    pthread_cond_broadcast(&sleep_cond);
    pthread_mutex_unlock(&sleep_lock);
}

void pm_os_name_thread(const char *name) { (void)name; }
#endif
