/* fmath.h: log, exp, sigmoid, sine and cosine whose bits are the same everywhere: on every
 * instruction set, with every compiler, and on a GPU. Draws are made of them (rng.h).
 *
 * How: IEEE additions, products, quotients and square roots, and fmaf, which rounds once, only; the
 * compiler may contract nothing (-ffp-contract=off), and to be safe with one that does, no product
 * is ever added to anything but in an explicit fmaf. No branches: loops over these become vector
 * code. The polynomials are Taylor's, long enough that what they leave out is below a tenth of an
 * ulp. */
#ifndef PM_BASE_FMATH_H
#define PM_BASE_FMATH_H

#include <math.h>
#include <stdint.h>
#include <string.h>

#if defined(__CUDACC__)
#define PM_FMATH static __host__ __device__ __forceinline__
#else
#define PM_FMATH static inline __attribute__((always_inline))
#endif

/* A product that leaves a function, so that its caller may add it to something. */
#if defined(__CUDA_ARCH__)
#define PM_PRODUCT(a, b) __fmul_rn(a, b)
#else
#define PM_PRODUCT(a, b) ((a) * (b))
#endif

PM_FMATH int32_t pm_float_bits(float x)
{
    int32_t bits;
    memcpy(&bits, &x, sizeof bits);
    return bits;
}

PM_FMATH float pm_bits_float(int32_t bits)
{
    float x;
    memcpy(&x, &bits, sizeof x);
    return x;
}

/* Adding and subtracting it rounds to an integer, ties to even, what is below 2^22: 1.5 * 2^23,
 * whose neighbours are one apart. */
#define PM_ROUNDER 12582912.0f

/* log(x) for normal positive x; error below 1 ulp.
 * x = 2^e (1 + f), sqrt(1/2) <= 1 + f < sqrt(2); with s = f / (2 + f), log(1 + f) = 2 s + s R and
 * R = 2/3 s^2 + 2/5 s^4 + ..., which is f - s (f - R). */
PM_FMATH float pm_log(float x)
{
    const int32_t half_root = 0x3f3504f3; /* the bits of sqrt(1/2) */
    const int32_t bits = pm_float_bits(x), shifted = bits - half_root;
    const float e = (float)(shifted >> 23);
    const float f = pm_bits_float((shifted & 0x007fffff) + half_root) - 1.0f;
    const float s = f / (2.0f + f), z = s * s;
    float r = fmaf(z, 2.0f / 9.0f, 2.0f / 7.0f);
    r = fmaf(z, r, 2.0f / 5.0f);
    r = fmaf(z, r, 2.0f / 3.0f);
    const float rest = fmaf(-z, r, f); /* f - R */
    const float log1p = fmaf(-s, rest, f);
    return fmaf(e, 0.693147182f, fmaf(e, -1.90465421e-9f, log1p)); /* ln 2 in two pieces */
}

/* exp(x); x is first clamped to -87..88, so the result is normal and finite; error below 1.1
 * ulp.
 * x = n ln 2 + r, |r| <= ln(2)/2. */
PM_FMATH float pm_exp(float x)
{
    x = x < 88.0f ? x : 88.0f; /* a NaN too: what follows converts to integers */
    x = x > -87.0f ? x : -87.0f;
    const float n = fmaf(x, 1.44269502f, PM_ROUNDER) - PM_ROUNDER;
    const float r = fmaf(n, 1.90465421e-9f, fmaf(n, -0.693147182f, x));
    float p = fmaf(r, 1.0f / 5040, 1.0f / 720);
    p = fmaf(r, p, 1.0f / 120);
    p = fmaf(r, p, 1.0f / 24);
    p = fmaf(r, p, 1.0f / 6);
    p = fmaf(r, p, 0.5f);
    const float q = fmaf(r * r, p, r); /* exp(r) - 1 */
    /* n is in -126..127: one factor is enough, and the product is exact */
    return (1.0f + q) * pm_bits_float(((int32_t)n + 127) << 23);
}

/* 1 / (1 + exp(-x)); 0 < result <= 1; error below 2.5 ulp. */
PM_FMATH float pm_sigmoid(float x) { return 1.0f / (1.0f + pm_exp(-x)); }

/* sin(2 pi v) and cos(2 pi v) for |v| <= 1; error below 1.1 ulp.
 * v = q/4 + r exactly, |r| <= 1/8; then the quadrant q. */
PM_FMATH void pm_sincos2pi(float v, float *sine, float *cosine)
{
    const float n = fmaf(v, 4.0f, PM_ROUNDER) - PM_ROUNDER;
    const float r = fmaf(n, -0.25f, v), z = r * r;
    float s = fmaf(z, 42.0586940f, -76.7058597f); /* (2 pi)^9/9!, -(2 pi)^7/7!, ... */
    s = fmaf(z, s, 81.6052493f);
    s = fmaf(z, s, -41.3417022f);
    s = fmaf(r * z, s, r * -1.74845553e-7f); /* 2 pi in two pieces */
    s = fmaf(r, 6.28318548f, s);
    float c = fmaf(z, -26.4262568f, 60.2446414f); /* -(2 pi)^10/10!, (2 pi)^8/8!, ... */
    c = fmaf(z, c, -85.4568172f);
    c = fmaf(z, c, 64.9393940f);
    c = fmaf(z, c, -19.7392088f);
    c = fmaf(z, c, 1.0f);
    const int32_t q = (int32_t)n;
    const float a = q & 1 ? c : s, b = q & 1 ? s : c;
    *sine = q & 2 ? -a : a;
    *cosine = (q + 1) & 2 ? -b : b;
}

#endif
