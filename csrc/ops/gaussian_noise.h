/* gaussian_noise: standard normal draws that depend only on (seed, stream, position).
 *
 *   x[b, i] = normal(seed, stream = PM_STREAM_SAMPLER, position + b, i)
 *
 * key = {seed, position of row 0}. The same bits on every instruction set and device and for any
 * split of the rows over calls (base/rng.h, base/fmath.h). */
#ifndef PM_OPS_GAUSSIAN_NOISE_H
#define PM_OPS_GAUSSIAN_NOISE_H
#define PM_GAUSSIAN_NOISE(X)                                                                       \
    X(DIM, B)                                                                                      \
    X(DIM, M)                                                                                      \
    X(IN, key, i64, "2", NONE)                                                                     \
    X(OUT, x, f32, "B,M", NONE)
#endif
