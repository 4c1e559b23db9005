/* rng.c: Philox's words, for callers outside a backend. */
#include "rng.h"

void pm_philox(int64_t seed, uint32_t stream, int64_t position, uint32_t block, uint32_t out[4])
{
    out[0] = (uint32_t)(uint64_t)position;
    out[1] = (uint32_t)((uint64_t)position >> 32);
    out[2] = stream;
    out[3] = block;
    pm_philox_rounds((uint32_t)(uint64_t)seed, (uint32_t)((uint64_t)seed >> 32), out, out + 1,
                     out + 2, out + 3);
}
