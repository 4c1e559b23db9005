// noise.cuh: draws on the device, the same bits as on a CPU (csrc/base/rng.h).
#pragma once
#include "common.cuh"

#include "../csrc/base/rng.h"

// The four words of a Philox block of the stream of one position.
PM_DEVICE void pm_philox_words(int64_t seed, uint32_t stream, int64_t position, uint32_t block,
                               uint32_t (&w)[4])
{
    w[0] = (uint32_t)(uint64_t)position;
    w[1] = (uint32_t)((uint64_t)position >> 32);
    w[2] = stream;
    w[3] = block;
    pm_philox_rounds((uint32_t)(uint64_t)seed, (uint32_t)((uint64_t)seed >> 32), &w[0], &w[1],
                     &w[2], &w[3]);
}

// Normal draws 4 block .. 4 block + 3.
PM_DEVICE void pm_normal_draws(int64_t seed, uint32_t stream, int64_t position, uint32_t block,
                               float (&x)[4])
{
    uint32_t w[4];
    pm_philox_words(seed, stream, position, block, w);
    pm_normal_pair(w[0], w[1], &x[0], &x[1]);
    pm_normal_pair(w[2], w[3], &x[2], &x[3]);
}

// The position of sample b; it wraps around. key = {seed, position of sample 0}.
PM_DEVICE int64_t pm_position(const int64_t *key, int64_t b)
{
    return (int64_t)((uint64_t)key[1] + (uint64_t)b);
}
