/* rng.h: counter-based randomness (Philox4x32-10: Salmon, Moraes, Dror, Shaw, "Parallel random
 * numbers: as easy as 1, 2, 3", SC 2011).
 *
 * A draw is a pure function of (seed, stream, position, index): position is the global index of a
 * sample, index counts the draws of that sample. No state, so nothing to save and nothing to race.
 *
 * The functions are in the header so that each instruction-set level of a backend compiles its own;
 * the bits are the same on all (fmath.h). rng.c has Philox's words for everyone else. */
#ifndef PM_BASE_RNG_H
#define PM_BASE_RNG_H

#include <stdint.h>

#include "fmath.h"

enum {
    PM_STREAM_NOISE = 1, /* noise of a training sample */
    PM_STREAM_TIME,      /* its t */
    PM_STREAM_DROP,      /* its label drop */
    PM_STREAM_SAMPLER,   /* initial noise of a generated sample */
    PM_STREAM_INIT,      /* initial weights: position is the parameter's place in the walk */
};

/* Four 32-bit words: key = seed, counter = (position, stream, block). Word i of block b is draw
 * 4 b + i of the stream. */
void pm_philox(int64_t seed, uint32_t stream, int64_t position, uint32_t block, uint32_t out[4]);

/* ---------------------------------------------------------------- the functions themselves */

/* Philox's ten rounds on one block, in place. */
PM_FMATH void pm_philox_rounds(uint32_t k0, uint32_t k1, uint32_t *c0, uint32_t *c1, uint32_t *c2,
                               uint32_t *c3)
{
    uint32_t a = *c0, b = *c1, c = *c2, d = *c3;
    for (int round = 0; round < 10; round++) {
        const uint64_t p = (uint64_t)0xd2511f53u * a, q = (uint64_t)0xcd9e8d57u * c;
        a = (uint32_t)(q >> 32) ^ b ^ k0;
        b = (uint32_t)q;
        c = (uint32_t)(p >> 32) ^ d ^ k1;
        d = (uint32_t)p;
        k0 += 0x9e3779b9u;
        k1 += 0xbb67ae85u;
    }
    *c0 = a, *c1 = b, *c2 = c, *c3 = d;
}

/* A uniform draw: 23 bits and a half, so never 0, never 1, and 1 - u is one too. */
PM_FMATH float pm_unit(uint32_t word)
{
    return fmaf((float)(int32_t)(word >> 9), 0x1p-23f, 0x1p-24f);
}

/* Two normal draws from two words (Box & Muller 1958): radius sqrt(-2 log u), angle 2 pi v. u has
 * all 32 bits, for the tail: up to sqrt(2 * 33 log 2) = 6.76; rounded to 1, a radius of 0. */
PM_FMATH void pm_normal_pair(uint32_t word0, uint32_t word1, float *x0, float *x1)
{
    /* (float)word0, rounded once, from two halves: an unsigned conversion is slow on some levels */
    const float high = (float)(int32_t)(word0 >> 16), low = (float)(int32_t)(word0 & 0xffff);
    const float u = fmaf(fmaf(high, 65536.0f, low), 0x1p-32f, 0x1p-33f);
    const float radius = sqrtf(-2.0f * pm_log(u));
    float sine, cosine;
    pm_sincos2pi((float)(int32_t)(word1 >> 8) * 0x1p-24f, &sine, &cosine);
    *x0 = PM_PRODUCT(radius, cosine);
    *x1 = PM_PRODUCT(radius, sine);
}

#if !defined(__CUDACC__)
/* Draws first .. first + n - 1 of a stream (up to 2^34): uniform in the open interval (0, 1), odd
 * multiples of 2^-24, or standard normal, |x| < 6.8; first is a multiple of 4. Sixteen blocks at a
 * time, in arrays, so that the compiler computes them side by side. */
PM_FMATH void pm_draws(int64_t seed, uint32_t stream, int64_t position, int64_t first, int64_t n,
                       float *out, int normal)
{
    enum { BLOCKS = 16 };
    const uint32_t k0 = (uint32_t)(uint64_t)seed, k1 = (uint32_t)((uint64_t)seed >> 32);
    for (int64_t i = 0; i < n; i += 4 * BLOCKS) {
        uint32_t w[4][BLOCKS];
        float x[4][BLOCKS];
        for (uint32_t j = 0; j < BLOCKS; j++) {
            w[0][j] = (uint32_t)(uint64_t)position;
            w[1][j] = (uint32_t)((uint64_t)position >> 32);
            w[2][j] = stream;
            w[3][j] = (uint32_t)((first + i) / 4) + j;
        }
        for (int j = 0; j < BLOCKS; j++)
            pm_philox_rounds(k0, k1, &w[0][j], &w[1][j], &w[2][j], &w[3][j]);
        if (normal)
            for (int j = 0; j < BLOCKS; j++) {
                pm_normal_pair(w[0][j], w[1][j], &x[0][j], &x[1][j]);
                pm_normal_pair(w[2][j], w[3][j], &x[2][j], &x[3][j]);
            }
        else
            for (int k = 0; k < 4; k++)
                for (int j = 0; j < BLOCKS; j++)
                    x[k][j] = pm_unit(w[k][j]);
        const int here = n - i < 4 * BLOCKS ? (int)(n - i) : 4 * BLOCKS;
        for (int j = 0; j < here; j++)
            out[i + j] = x[j % 4][j / 4];
    }
}
#endif

#endif
