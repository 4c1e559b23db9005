/* x86-64-v4: AVX-512 F, BW, DQ, VL; and the level amx. The instructions of AVX512_BF16 and of AMX_BF16
 * come from intrinsics alone, in the products of PM_BF16, which are refused on a CPU that lacks them. */
#include "../cpu.h"

#if defined(__x86_64__)
#pragma GCC target(                                                                                \
    "avx512f,avx512bw,avx512dq,avx512vl,avx512bf16,amx-tile,amx-bf16,avx2,fma,bmi,bmi2,prefer-vector-width=512")
#define PM_LEVEL avx512
#define PM_WIDTH 16
#include "../level.h"
#endif
