/* rng.h: counter-based randomness (Philox4x32-10, Salmon et al., SC 2011).
 *
 * A draw is a pure function of (seed, stream, position, index): position is the global index of a
 * sample, index counts the draws of that sample. No state, so nothing to save and nothing to race. */
#ifndef PM_BASE_RNG_H
#define PM_BASE_RNG_H

#include <stdint.h>

enum {
    PM_STREAM_NOISE = 1, /* noise of a training sample */
    PM_STREAM_TIME,      /* its t */
    PM_STREAM_DROP,      /* its label drop */
    PM_STREAM_SAMPLER,   /* initial noise of a generated sample */
    PM_STREAM_INIT,      /* initial weights: position is the parameter's place in the walk */
    PM_STREAM_DATA,      /* data order (Python asks for it) and flips */
};

/* Four 32-bit words of counter block (position, stream, index / 4). */
void pm_philox(int64_t seed, uint32_t stream, int64_t position, uint32_t block, uint32_t out[4]);

/* n uniform draws in the open interval (0, 1), multiples of 2^-24 plus 2^-25. */
void pm_uniform(int64_t seed, uint32_t stream, int64_t position, int64_t n, float *out);

/* n standard normal draws (Box-Muller on fmath.h). */
void pm_normal(int64_t seed, uint32_t stream, int64_t position, int64_t n, float *out);

#endif
