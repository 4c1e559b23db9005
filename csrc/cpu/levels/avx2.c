/* x86-64-v3: AVX2 and FMA. */
#include "../cpu.h"

#if defined(__x86_64__)
#pragma GCC target("avx2,fma,f16c,bmi,bmi2")
#define PM_LEVEL avx2
#define PM_WIDTH 8
#include "../level.h"
#endif
