/* x86-64-v4: AVX-512 F, BW, DQ, VL. */
#include "../cpu.h"

#if defined(__x86_64__)
#pragma GCC target("avx512f,avx512bw,avx512dq,avx512vl,avx2,fma,bmi,bmi2,prefer-vector-width=512")
#define PM_LEVEL avx512
#define PM_WIDTH 16
#include "../level.h"
#endif
