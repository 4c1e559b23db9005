/* peak.c: what this machine can do at most, for benchmarks/peak.py: multiply-adds per second from
 * registers, and bytes per second from memory. Compiled per instruction-set level with -DWIDTH=floats of
 * a vector; no intrinsics, so the same source serves every CPU that the compiler knows. Those of bf16 are
 * the exception: -DDOT is vdpbf16ps of AVX512_BF16, -DTILES is tdpbf16ps of AMX. */
#define _GNU_SOURCE
#include <pthread.h>
#include <stdint.h>
#include <stdlib.h>
#include <sys/mman.h>
#include <time.h>
#if defined(__x86_64__)
#include <immintrin.h>
#endif
#if defined(DOT) || defined(TILES)
#include <sys/syscall.h>
#include <unistd.h>
#endif

typedef float vf __attribute__((vector_size(4 * WIDTH)));

#if defined(__x86_64__)
#define IN_REGISTER(v) __asm__ volatile("" : "+v"(v))
#elif defined(__aarch64__)
#define IN_REGISTER(v) __asm__ volatile("" : "+w"(v))
#else
#define IN_REGISTER(v) __asm__ volatile("" : "+m"(v))
#endif

enum {
    CHAINS = 12
}; /* two units, latency 4, and some to spare; with the operands it fits 16 registers */
enum { PAGE = 1 << 21 };

enum { FMA, READ, COPY, UPDATE };
/* Arrays of an update in place: weights, gradients, two moments and an average are read and written; two
 * packed twins are written past the caches (fp32: as many floats as weights). AHEAD: floats fetched ahead,
 * as in csrc/cpu/adamw.c; a core of its own accord waits a little at every page. */
enum { IN_PLACE = 5, STREAMED = 2, ARRAYS = IN_PLACE + STREAMED, AHEAD = 256 };

typedef struct {
    int what;
    int64_t count; /* FMA: rounds; else: floats of an array */
    float *memory; /* ARRAYS of them */
    pthread_barrier_t *start;
    double wall, cpu, sum; /* seconds of this thread */
} job;

static double now(clockid_t clock)
{
    struct timespec t;
    clock_gettime(clock, &t);
    return (double)t.tv_sec + 1e-9 * (double)t.tv_nsec;
}

static double first(vf v) { return (double)v[0]; }

#if defined(TILES)

/* Each round: the products of four tiles of sums, as in csrc/cpu/product_amx.h; the sums grow slowly. */
#define OPERATIONS (4 * 2 * 16 * 16 * 32)

static double fma_rounds(int64_t rounds)
{
    static const struct {
        uint8_t palette, start, reserved[14];
        uint16_t row_bytes[16];
        uint8_t rows[16];
    } registers = {1, 0, {0}, {64, 64, 64, 64, 64, 64, 64, 64}, {16, 16, 16, 16, 16, 16, 16, 16}};
    uint16_t operand[16][32] __attribute__((aligned(64)));
    float sum[16][16] __attribute__((aligned(64)));
    for (int i = 0; i < 16; i++)
        for (int j = 0; j < 32; j++)
            operand[i][j] = (uint16_t)(0x3c00 + 37 * i + 11 * j); /* bf16, 0.008 .. 0.2 */
    _tile_loadconfig(&registers);
    __asm__ volatile("" ::: "memory");
    _tile_loadd(4, operand, 64);
    _tile_loadd(5, operand, 64);
    _tile_loadd(6, operand, 64);
    _tile_loadd(7, operand, 64);
    for (int64_t n = 0; n < rounds; n++) {
        _tile_dpbf16ps(0, 4, 6);
        _tile_dpbf16ps(1, 4, 7);
        _tile_dpbf16ps(2, 5, 6);
        _tile_dpbf16ps(3, 5, 7);
    }
    _tile_stored(0, sum, 64);
    _tile_release();
    return (double)sum[0][0];
}

/* Linux grants tile registers to a process that asks for them: ARCH_REQ_XCOMP_PERM, XFEATURE_XTILEDATA. */
static int ready(void) { return !syscall(SYS_arch_prctl, 0x1023, 18); }

#elif defined(DOT)

/* Each round: one dot product of pairs per chain. */
#define OPERATIONS (4 * 16 * CHAINS)

static double fma_rounds(int64_t rounds)
{
    __m512 a[CHAINS];
    const __m512bh x = (__m512bh)_mm512_set1_epi32(0x3c003c11),
                   y = (__m512bh)_mm512_set1_epi32(0x3c223c33);
#pragma GCC unroll 12
    for (int i = 0; i < CHAINS; i++)
        a[i] = _mm512_set1_ps(1.0f + 0.01f * (float)i);
    for (int64_t n = 0; n < rounds; n++) {
#pragma GCC unroll 12
        for (int i = 0; i < CHAINS; i++) {
            a[i] = _mm512_dpbf16_ps(a[i], x, y);
            IN_REGISTER(a[i]);
        }
    }
    double sum = 0;
#pragma GCC unroll 12
    for (int i = 0; i < CHAINS; i++)
        sum += (double)a[i][0];
    return sum;
}

static int ready(void) { return 1; }

#else

#define OPERATIONS (2 * WIDTH * CHAINS)

/* Each round: one a = a * x + y per chain. Values stay normal numbers near 1. */
static double fma_rounds(int64_t rounds)
{
    vf a[CHAINS], x = {0}, y = {0};
    x = x + 0.9999f;
    y = y + 1e-4f;
#pragma GCC unroll 12
    for (int i = 0; i < CHAINS; i++)
        a[i] = x + 0.01f * (float)i;
    for (int64_t n = 0; n < rounds; n++) {
#pragma GCC unroll 12
        for (int i = 0; i < CHAINS; i++) {
            a[i] = a[i] * x + y; /* contracted where the level has FMA */
            IN_REGISTER(a[i]);
        }
    }
    double sum = 0;
#pragma GCC unroll 12
    for (int i = 0; i < CHAINS;
         i++) /* unrolled as well: an index would keep the chains in memory */
        sum += first(a[i]);
    return sum;
}

static int ready(void) { return 1; }

#endif

/* A store past the caches, where the level has one. */
static void stream(float *to, vf x)
{
#if WIDTH == 16 && defined(__AVX512F__)
    _mm512_stream_ps(to, (__m512)x);
#elif WIDTH == 8 && defined(__AVX2__)
    _mm256_stream_ps(to, (__m256)x);
#else
    *(vf *)to = x;
#endif
}

static double read_memory(const float *memory, int64_t count)
{
    const vf *v = (const vf *)memory;
    vf sum[8] = {0};
    for (int64_t i = 0; i < ARRAYS * count / WIDTH; i += 8) {
#pragma GCC unroll 8
        for (int k = 0; k < 8; k++)
            sum[k] += v[i + k];
    }
    double total = 0;
#pragma GCC unroll 8
    for (int k = 0; k < 8; k++)
        total += first(sum[k]);
    return total;
}

static double copy_memory(float *memory, int64_t count)
{
    float *const to = memory + ARRAYS / 2 * count;
    for (int64_t i = 0; i < ARRAYS / 2 * count; i += WIDTH)
        stream(to + i, *(const vf *)(memory + i));
    return (double)to[0];
}

static double update_memory(float *memory, int64_t count)
{
    for (int64_t i = 0; i < count; i += WIDTH) {
        vf x = {0};
#pragma GCC unroll 5
        for (int k = IN_PLACE - 1; k >= 0; k--) {
            vf *const v = (vf *)(memory + k * count + i);
            __builtin_prefetch((const float *)v + AHEAD, 1);
            *v = x = *v * 0.9999f + 1e-4f;
        }
#pragma GCC unroll 2
        for (int k = IN_PLACE; k < ARRAYS; k++)
            stream(memory + k * count + i, x);
    }
    return (double)memory[0];
}

static void *run(void *arg)
{
    job *j = arg;
    pthread_barrier_wait(j->start);
    const double wall = now(CLOCK_MONOTONIC), cpu = now(CLOCK_THREAD_CPUTIME_ID);
    if (j->what == FMA)
        j->sum = fma_rounds(j->count);
    else if (j->what == READ)
        j->sum = read_memory(j->memory, j->count);
    else if (j->what == COPY)
        j->sum = copy_memory(j->memory, j->count);
    else
        j->sum = update_memory(j->memory, j->count);
    j->wall = now(CLOCK_MONOTONIC) - wall;
    j->cpu = now(CLOCK_THREAD_CPUTIME_ID) - cpu;
    return NULL;
}

/* Runs `work` in each thread, and the sum over the threads of work per second: by the clock on the wall, and
 * by the thread's own CPU time, which neighbours do not take from. Negative: no memory. */
static double measure(int what, int threads, int64_t count, float *memory, double work, double *cpu)
{
    job *jobs = calloc((size_t)threads, sizeof *jobs);
    pthread_t *ids = calloc((size_t)threads, sizeof *ids);
    pthread_barrier_t start;
    if (!jobs || !ids || pthread_barrier_init(&start, NULL, (unsigned)threads))
        return free(jobs), free(ids), -1;
    for (int t = 0; t < threads; t++)
        jobs[t] = (job){what, count, memory ? memory + t * ARRAYS * count : NULL, &start, 0, 0, 0};
    for (int t = 1; t < threads; t++)
        if (pthread_create(&ids[t], NULL, run, &jobs[t]))
            abort(); /* those that wait at the barrier would wait for ever */
    run(&jobs[0]);
    double rate = 0;
    *cpu = 0;
    for (int t = 0; t < threads; t++) {
        if (t > 0)
            pthread_join(ids[t], NULL);
        rate += work / jobs[t].wall;
        *cpu += work / jobs[t].cpu;
    }
    pthread_barrier_destroy(&start);
    free(jobs);
    free(ids);
    return rate;
}

/* Operations per second (a multiply-add is two) of one measurement of so many rounds; *cpu: the same by CPU
 * time. Negative: no memory, or no tile registers. */
double peak_fma(int threads, int64_t rounds, double *cpu)
{
    return ready() ? measure(FMA, threads, rounds, NULL, (double)OPERATIONS * (double)rounds, cpu)
                   : -1;
}
/* Operations of a round. */
double peak_operations(void) { return OPERATIONS; }

/* Memory for the three below: ARRAYS of count floats per thread, count a multiple of 128, on huge pages where
 * there are some, touched. NULL: none. */
float *peak_memory(int threads, int64_t count)
{
    const size_t floats = (size_t)threads * ARRAYS * (size_t)count, bytes = floats * sizeof(float);
    float *memory = aligned_alloc(PAGE, (bytes + PAGE - 1) / PAGE * PAGE);
    if (!memory)
        return NULL;
#ifdef MADV_HUGEPAGE
    madvise(memory, bytes, MADV_HUGEPAGE);
#endif
    for (size_t i = 0; i < floats; i++)
        memory[i] = 1.0f + (float)(i % 7);
    return memory;
}

void peak_free(float *memory) { free(memory); }

int peak_arrays(void) { return ARRAYS; }

/* Bytes per second, each read and each write counted: all of it read once; copied, past the caches; and an
 * update, as AdamW's. */
double peak_read(int threads, int64_t count, float *memory, double *cpu)
{
    return measure(READ, threads, count, memory, 4.0 * ARRAYS * (double)count, cpu);
}
double peak_copy(int threads, int64_t count, float *memory, double *cpu)
{
    return measure(COPY, threads, count, memory, 8.0 * (ARRAYS / 2) * (double)count, cpu);
}
double peak_update(int threads, int64_t count, float *memory, double *cpu)
{
    return measure(UPDATE, threads, count, memory, 4.0 * (2 * IN_PLACE + STREAMED) * (double)count,
                   cpu);
}
