/* cpuid.c: detection, and the two instructions that have no name in C. */
#include "cpuid.h"

#include "os.h"

#include <string.h>
#if defined(__x86_64__)
#include <cpuid.h>
#include <immintrin.h>
#endif

#if defined(__x86_64__)
/* AMX_TILE and AMX_BF16. That the system saves their registers is what it answers when it is asked. */
static bool has_amx(void)
{
    enum { AMX_BF16 = 1 << 22, AMX_TILE = 1 << 24 };
    unsigned a, b, c, d;
    return __get_cpuid_count(7, 0, &a, &b, &c, &d) && (d & AMX_BF16) && (d & AMX_TILE);
}
#endif

const char *pm_cpu_lacks(const char *level)
{
    if (pm_cpu_has(level))
        return NULL;
#if defined(__x86_64__)
    if (!strcmp(level, "amx") && pm_cpu_has("avx512bf16") && has_amx())
        return pm_os_refuses_tiles();
#endif
    return "this CPU does not have it";
}

bool pm_cpu_has(const char *level)
{
#if defined(__x86_64__)
    __builtin_cpu_init();
    if (!strcmp(level, "amx"))
        return pm_cpu_has("avx512bf16") && has_amx() && !pm_os_refuses_tiles();
    if (!strcmp(level, "avx512"))
        return __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
               __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vl") &&
               __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma");
    if (!strcmp(level, "avx512bf16"))
        return pm_cpu_has("avx512") && __builtin_cpu_supports("avx512bf16");
    if (!strcmp(level, "avx2"))
        return __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma");
#endif
    return !strcmp(level, "generic");
}

#if defined(__x86_64__)

const char *pm_cpu_model(void)
{
    static _Thread_local char name[49]; /* leaves 0x80000002..4: 48 characters and blanks */
    uint32_t words[12] = {0};
    if (__get_cpuid_max(0x80000000, NULL) < 0x80000004)
        return "unknown";
    for (uint32_t i = 0; i < 3; i++)
        __get_cpuid(0x80000002 + i, words + 4 * i, words + 4 * i + 1, words + 4 * i + 2,
                    words + 4 * i + 3);
    memcpy(name, words, 48);
    size_t end = strlen(name);
    while (end && name[end - 1] == ' ')
        name[--end] = 0;
    const char *const start = name + strspn(name, " ");
    return *start ? start : "unknown";
}

enum { MXCSR_FLAGS = 0x3f };
const uint64_t pm_cpu_default_float_mode = 0x1f80;
uint64_t pm_cpu_float_mode(void) { return _mm_getcsr() & ~(unsigned)MXCSR_FLAGS; }
void pm_cpu_set_float_mode(uint64_t mode) { _mm_setcsr((unsigned)mode); }
void pm_cpu_pause(void) { _mm_pause(); }

#else

const char *pm_cpu_model(void) { return "unknown"; }
const uint64_t pm_cpu_default_float_mode = 0;

#if defined(__aarch64__)
uint64_t pm_cpu_float_mode(void)
{
    uint64_t mode;
    __asm__ volatile("mrs %0, fpcr" : "=r"(mode));
    return mode;
}
void pm_cpu_set_float_mode(uint64_t mode) { __asm__ volatile("msr fpcr, %0" ::"r"(mode)); }
void pm_cpu_pause(void) { __asm__ volatile("yield"); }
#else
uint64_t pm_cpu_float_mode(void) { return 0; }
void pm_cpu_set_float_mode(uint64_t mode) { (void)mode; }
void pm_cpu_pause(void) {}
#endif

#endif
