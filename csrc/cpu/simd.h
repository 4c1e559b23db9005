/* simd.h: one vector type of PM_WIDTH floats and the few operations that the ops need.
 *
 * Written with the compiler's vector extensions, so every width compiles for every target; where
 * the level's own instructions do better, they are used. Included once per level, by cpu/level.h.
 * Contraction is off in the whole project: a fused multiply-add is written fma. */
#ifndef PM_WIDTH
#error "include cpu/level.h"
#endif

/* The level has the instructions of AVX512_BF16 (a CPU of the level may still lack them). */
#if PM_WIDTH == 16 && defined(__AVX512BF16__)
#define PM_HAS_BF16 1
#else
#define PM_HAS_BF16 0
#endif

/* The same of AMX_BF16. */
#if PM_WIDTH == 16 && defined(__AMX_TILE__) && defined(__AMX_BF16__)
#define PM_HAS_AMX 1
#else
#define PM_HAS_AMX 0
#endif

typedef float vf __attribute__((vector_size(4 * PM_WIDTH)));
typedef int32_t vi __attribute__((vector_size(4 * PM_WIDTH)));
typedef float vf_loose __attribute__((vector_size(4 * PM_WIDTH), aligned(4), may_alias));

/* v_stream: a store past the caches, to an address aligned as a vector is. */
static inline vf v_load(const float *p) { return *(const vf_loose *)p; }
static inline void v_store(float *p, vf x) { *(vf_loose *)p = x; }
static inline vf v_set(float x) { return x - (vf){0}; }
static inline vf v_zero(void) { return (vf){0}; }

#if PM_WIDTH == 16 && defined(__AVX512F__)
static inline vf v_fma(vf a, vf b, vf c)
{
    return (vf)_mm512_fmadd_ps((__m512)a, (__m512)b, (__m512)c);
}
static inline vf v_max(vf a, vf b) { return (vf)_mm512_max_ps((__m512)a, (__m512)b); }
static inline vf v_min(vf a, vf b) { return (vf)_mm512_min_ps((__m512)a, (__m512)b); }
static inline vf v_sqrt(vf a) { return (vf)_mm512_sqrt_ps((__m512)a); }
static inline vf v_round(vf a) { return (vf)_mm512_roundscale_ps((__m512)a, 8); }
static inline void v_stream(float *p, vf x) { _mm512_stream_ps(p, (__m512)x); }
#elif PM_WIDTH == 8 && defined(__AVX2__) && defined(__FMA__)
static inline vf v_fma(vf a, vf b, vf c)
{
    return (vf)_mm256_fmadd_ps((__m256)a, (__m256)b, (__m256)c);
}
static inline vf v_max(vf a, vf b) { return (vf)_mm256_max_ps((__m256)a, (__m256)b); }
static inline vf v_min(vf a, vf b) { return (vf)_mm256_min_ps((__m256)a, (__m256)b); }
static inline vf v_sqrt(vf a) { return (vf)_mm256_sqrt_ps((__m256)a); }
static inline vf v_round(vf a) { return (vf)_mm256_round_ps((__m256)a, 8); }
static inline void v_stream(float *p, vf x) { _mm256_stream_ps(p, (__m256)x); }
#else
static inline vf v_fma(vf a, vf b, vf c) { return a * b + c; }
static inline vf v_max(vf a, vf b)
{
    vi m = a > b; /* like maxps: b when either is NaN */
    return (vf)((m & (vi)a) | (~m & (vi)b));
}
static inline vf v_min(vf a, vf b)
{
    vi m = a < b;
    return (vf)((m & (vi)a) | (~m & (vi)b));
}
static inline vf v_sqrt(vf a)
{
    for (int i = 0; i < PM_WIDTH; i++)
        a[i] = sqrtf(a[i]);
    return a;
}
static inline vf v_round(vf a) /* to nearest even, |a| < 2^22 */
{
    const vf big = v_set(12582912.0f);
    return (a + big) - big;
}
static inline void v_stream(float *p, vf x) { v_store(p, x); }
#endif

/* A store; past the caches when it is far, unless the vector is only a part of a cache line. What was
 * streamed can be read by others after v_stream_end. */
static inline void v_store_line(float *p, vf x, bool far)
{
    if (far && PM_WIDTH == 16)
        v_stream(p, x);
    else
        v_store(p, x);
}
static inline void v_stream_end(void)
{
#if defined(__x86_64__)
    _mm_sfence();
#endif
}

/* The first n of PM_WIDTH floats (0 < n <= PM_WIDTH); the rest reads as 0 and is not touched. */
#if PM_WIDTH == 16 && defined(__AVX512F__)
static inline vf v_load_n(const float *p, int64_t n)
{
    return (vf)_mm512_maskz_loadu_ps((__mmask16)(0xffffu >> (16 - n)), p);
}
static inline void v_store_n(float *p, vf x, int64_t n)
{
    _mm512_mask_storeu_ps(p, (__mmask16)(0xffffu >> (16 - n)), (__m512)x);
}
#elif PM_WIDTH == 8 && defined(__AVX2__)
static inline __m256i v_mask_n(int64_t n) /* lanes below n */
{
    return _mm256_cmpgt_epi32(_mm256_set1_epi32((int)n), _mm256_setr_epi32(0, 1, 2, 3, 4, 5, 6, 7));
}
static inline vf v_load_n(const float *p, int64_t n)
{
    return (vf)_mm256_maskload_ps(p, v_mask_n(n));
}
static inline void v_store_n(float *p, vf x, int64_t n)
{
    _mm256_maskstore_ps(p, v_mask_n(n), (__m256)x);
}
#else
static inline vf v_load_n(const float *p, int64_t n)
{
    float t[PM_WIDTH] = {0};
    memcpy(t, p, (size_t)n * sizeof(float));
    return v_load(t);
}
static inline void v_store_n(float *p, vf x, int64_t n)
{
    float t[PM_WIDTH];
    v_store(t, x);
    memcpy(p, t, (size_t)n * sizeof(float));
}
#endif

/* For loops `for (i = 0; i < n; i += PM_WIDTH)`: whole vectors while left = n - i allows it, then the
 * rest. */
static inline vf v_get(const float *p, int64_t left)
{
    return left >= PM_WIDTH ? v_load(p) : v_load_n(p, left);
}
static inline void v_put(float *p, vf x, int64_t left)
{
    if (left >= PM_WIDTH)
        v_store(p, x);
    else
        v_store_n(p, x, left);
}

/* x where a lane is below left, else 0: for sums over a row whose last vector is not whole. */
static inline vf v_keep(vf x, int64_t left)
{
    if (left >= PM_WIDTH)
        return x;
    float t[PM_WIDTH];
    v_store(t, x);
    return v_load_n(t, left);
}

/* ---------------------------------------------------------------- bf16
 *
 * Rounded to nearest even; denormals become zero and a NaN stays one, as the instructions of
 * AVX512_BF16 do it. Where a function takes `native`, it may only be true on a CPU that has them
 * (PM_BF16); both ways give the same bits. */

typedef int16_t vs __attribute__((vector_size(2 * PM_WIDTH)));
typedef int16_t vs_loose __attribute__((vector_size(2 * PM_WIDTH), aligned(1), may_alias));

/* bf16 in the low half of each lane; the high half is zero. */
static inline vi v_round_bf16(vf x)
{
    const vi bits = (vi)x, size = bits & 0x7fffffff;
    const vi odd = (bits >> 16) & 1, rounded = ((bits + 0x7fff + odd) >> 16) & 0xffff;
    const vi sign = (bits >> 16) & 0x8000, quiet = ((bits >> 16) & 0xffff) | 0x40;
    const vi nan = size > 0x7f800000, tiny = size < 0x00800000;
    return (nan & quiet) | (~nan & ((tiny & sign) | (~tiny & rounded)));
}

/* Pairs: low in the low half, high in the high half of each lane. As a float, to be moved. */
static inline vf v_pairs(bool native, vf low, vf high)
{
#if PM_HAS_BF16
    if (native) {
        const __m512i order = _mm512_set_epi16(31, 15, 30, 14, 29, 13, 28, 12, 27, 11, 26, 10, 25,
                                               9, 24, 8, 23, 7, 22, 6, 21, 5, 20, 4, 19, 3, 18, 2,
                                               17, 1, 16, 0);
        const __m512i both = (__m512i)_mm512_cvtne2ps_pbh((__m512)high, (__m512)low);
        return (vf)_mm512_permutexvar_epi16(order, both);
    }
#endif
    (void)native;
    return (vf)(v_round_bf16(low) | (v_round_bf16(high) << 16));
}

/* The same of neighbours: first and second are 2 PM_WIDTH numbers in a row. */
#if PM_WIDTH == 16
#define V_EVEN ((vi){0, 2, 4, 6, 8, 10, 12, 14, 16, 18, 20, 22, 24, 26, 28, 30})
#elif PM_WIDTH == 8
#define V_EVEN ((vi){0, 2, 4, 6, 8, 10, 12, 14})
#else
#define V_EVEN ((vi){0, 2, 4, 6})
#endif
static inline vf v_words(bool native, vf first, vf second)
{
#if PM_HAS_BF16
    if (native)
        return (vf)_mm512_cvtne2ps_pbh((__m512)second, (__m512)first);
#endif
    return v_pairs(native, __builtin_shuffle(first, second, V_EVEN),
                   __builtin_shuffle(first, second, V_EVEN + 1));
}
#undef V_EVEN

/* Stores PM_WIDTH bf16 at to. */
static inline void v_store_bf16(bool native, void *to, vf x)
{
#if PM_HAS_BF16
    if (native) {
        _mm256_storeu_si256(to, (__m256i)_mm512_cvtneps_pbh((__m512)x));
        return;
    }
#endif
    (void)native;
    *(vs_loose *)to = __builtin_convertvector(v_round_bf16(x), vs);
}

/* The same of two vectors, to two places. */
static inline void v_store_bf16_two(bool native, void *to, void *to_second, vf x, vf second)
{
#if PM_HAS_BF16
    if (native) {
        const __m512i both = (__m512i)_mm512_cvtne2ps_pbh((__m512)second, (__m512)x);
        _mm256_storeu_si256(to, _mm512_castsi512_si256(both));
        _mm256_storeu_si256(to_second, _mm512_extracti64x4_epi64(both, 1));
        return;
    }
#endif
    v_store_bf16(native, to, x);
    v_store_bf16(native, to_second, second);
}

/* x rounded to bf16. */
static inline vf v_rounded(bool native, vf x)
{
#if PM_HAS_BF16
    if (native)
        return (vf)((vi)_mm512_cvtepu16_epi32((__m256i)_mm512_cvtneps_pbh((__m512)x)) << 16);
#endif
    (void)native;
    return (vf)(v_round_bf16(x) << 16);
}

/* The instructions take denormals for zero and make none. An emulation runs between these two. */
#if defined(__x86_64__)
static inline unsigned v_flush_denormals(void)
{
    enum { DENORMALS_ARE_ZERO = 0x0040, FLUSH_TO_ZERO = 0x8000 };
    const unsigned mode = _mm_getcsr();
    _mm_setcsr(mode | DENORMALS_ARE_ZERO | FLUSH_TO_ZERO);
    return mode;
}
static inline void v_keep_denormals(unsigned mode) { _mm_setcsr(mode); }
#else
static inline unsigned v_flush_denormals(void) { return 0; }
static inline void v_keep_denormals(unsigned mode) { (void)mode; }
#endif

/* c + the high products + the low ones, of pairs: the odd ones first, each added by itself. */
#if PM_HAS_BF16
static inline vf v_dot(vf a, vf b, vf c)
{
    return (vf)_mm512_dpbf16_ps((__m512)c, (__m512bh)a, (__m512bh)b);
}
#endif
static inline vf v_dot_emulated(vf a, vf b, vf c)
{
    const vi high = (vi){0} - 0x10000; /* 0xffff0000 */
    c = v_fma((vf)((vi)a & high), (vf)((vi)b & high), c);
    return v_fma((vf)((vi)a << 16), (vf)((vi)b << 16), c);
}

/* ---------------------------------------------------------------- across lanes */

/* Transposes PM_WIDTH x PM_WIDTH in registers: log2(PM_WIDTH) perfect shuffles. */
#if PM_WIDTH == 16
#define V_LOW ((vi){0, 16, 1, 17, 2, 18, 3, 19, 4, 20, 5, 21, 6, 22, 7, 23})
#elif PM_WIDTH == 8
#define V_LOW ((vi){0, 8, 1, 9, 2, 10, 3, 11})
#else
#define V_LOW ((vi){0, 4, 1, 5})
#endif
static inline __attribute__((always_inline)) void v_transpose(vf row[PM_WIDTH])
{
    _Pragma("GCC unroll 4")
    for (int stage = 1; stage < PM_WIDTH; stage *= 2) {
        vf next[PM_WIDTH];
        _Pragma("GCC unroll 8")
        for (int i = 0; i < PM_WIDTH / 2; i++) {
            next[2 * i] = __builtin_shuffle(row[i], row[i + PM_WIDTH / 2], V_LOW);
            next[2 * i + 1] =
                __builtin_shuffle(row[i], row[i + PM_WIDTH / 2], V_LOW + PM_WIDTH / 2);
        }
        _Pragma("GCC unroll 16")
        for (int i = 0; i < PM_WIDTH; i++)
            row[i] = next[i];
    }
}
#undef V_LOW

/* Lanes are folded in halves: lane i with lane i + n, n = PM_WIDTH / 2, ..., 1; the same order and so
 * the same bits in every form below. */
#if defined(__AVX2__) && PM_WIDTH >= 8
#define V_FOLD(name, fold128)                                                                      \
    static inline float name##_256(__m256 x)                                                       \
    {                                                                                              \
        __m128 h = fold128(_mm256_castps256_ps128(x), _mm256_extractf128_ps(x, 1));                \
        h = fold128(h, _mm_movehl_ps(h, h));                                                       \
        return _mm_cvtss_f32(fold128(h, _mm_shuffle_ps(h, h, 1)));                                 \
    }
V_FOLD(v_sum, _mm_add_ps)
V_FOLD(v_max_lane, _mm_max_ps)
#undef V_FOLD
#if PM_WIDTH == 16
static inline __m256 v_high(vf x)
{
    return _mm256_castpd_ps(_mm512_extractf64x4_pd(_mm512_castps_pd((__m512)x), 1));
}
static inline float v_sum(vf x)
{
    return v_sum_256(_mm256_add_ps(_mm512_castps512_ps256((__m512)x), v_high(x)));
}
static inline float v_max_lane(vf x)
{
    return v_max_lane_256(_mm256_max_ps(_mm512_castps512_ps256((__m512)x), v_high(x)));
}
#else
static inline float v_sum(vf x) { return v_sum_256((__m256)x); }
static inline float v_max_lane(vf x) { return v_max_lane_256((__m256)x); }
#endif
#else
static inline float v_sum(vf x)
{
    float t[PM_WIDTH];
    v_store(t, x);
    for (int n = PM_WIDTH / 2; n >= 1; n /= 2)
        for (int i = 0; i < n; i++)
            t[i] += t[i + n];
    return t[0];
}
static inline float v_max_lane(vf x)
{
    float t[PM_WIDTH];
    v_store(t, x);
    for (int n = PM_WIDTH / 2; n >= 1; n /= 2)
        for (int i = 0; i < n; i++)
            t[i] = t[i] > t[i + n] ? t[i] : t[i + n];
    return t[0];
}
#endif

/* exp with relative error about 1e-7; clamped to [-87.3, 88.7], so never denormal nor infinite; NaN
 * stays NaN. Cody-Waite reduction, then a polynomial on [-ln2/2, ln2/2]. */
static inline vf v_exp(vf x)
{
    vi nan = x != x;
    vf y = v_max(v_min(x, v_set(88.7f)), v_set(-87.3f));
    vf n = v_round(y * v_set(1.44269504f));
    vf r = v_fma(n, v_set(-0.693359375f), y);
    r = v_fma(n, v_set(2.12194440e-4f), r);
    vf p = v_set(1.9875691500e-4f);
    p = v_fma(p, r, v_set(1.3981999507e-3f));
    p = v_fma(p, r, v_set(8.3334519073e-3f));
    p = v_fma(p, r, v_set(4.1665795894e-2f));
    p = v_fma(p, r, v_set(1.6666665459e-1f));
    p = v_fma(p, r, v_set(5.0000001201e-1f));
    p = v_fma(p, r * r, r) + v_set(1.0f);
    vi half = __builtin_convertvector(n, vi) >> 1; /* two factors: n may be 128 */
    vi rest = __builtin_convertvector(n, vi) - half;
    vf e = p * (vf)((half + 127) << 23) * (vf)((rest + 127) << 23);
    return (vf)((nan & (vi)x) | (~nan & (vi)e));
}

static inline vf v_sigmoid(vf x) { return v_set(1.0f) / (v_set(1.0f) + v_exp(-x)); }

/* exp with relative error 1e-7 (1 + |x| / 4), clamped to 2^-126 .. 2^126; NaN stays NaN. For where
 * an exponential is a part of something of order 1. exp(x) = 2^n 2^r; 2^r on [-1/2, 1/2] is the
 * minimax polynomial that is 1 at 0. */
static inline vf v_exp_quick(vf x)
{
    const vf magic = v_set(12582912.0f); /* 1.5 * 2^23: adding it rounds to an integer */
    x *= v_set(1.44269504f);
    x = v_max(v_set(-126.0f), v_min(v_set(126.0f), x)); /* the second one when either is NaN */
    vf shifted = x + magic, r = x - (shifted - magic);
    vf p = v_set(1.53533605e-4f);
    p = v_fma(p, r, v_set(1.3398875e-3f));
    p = v_fma(p, r, v_set(9.61843692e-3f));
    p = v_fma(p, r, v_set(5.55033237e-2f));
    p = v_fma(p, r, v_set(2.40226477e-1f));
    p = v_fma(p, r, v_set(6.93147182e-1f));
    p = v_fma(p, r, v_set(1.0f));
    return p * (vf)(((vi)shifted << 23) + (127 << 23));
}

/* GELU, tanh form: x * sigmoid(2 sqrt(2/pi) (x + 0.044715 x^3)). *slope: its derivative. */
static inline vf v_gelu_slope(vf x, vf *slope)
{
    const vf one = v_set(1.0f), x2 = x * x;
    const vf u = x * v_fma(x2, v_set(-0.0713548162726f), v_set(-1.59576912161f));
    const vf s = one / (one + v_exp_quick(u)), y = x * s;
    const vf du = v_fma(x2, v_set(0.2140644488178f), v_set(1.59576912161f));
    *slope = v_fma(y * (one - s), du, s);
    return y;
}
static inline vf v_gelu(vf x)
{
    vf slope;
    return v_gelu_slope(x, &slope);
}
static inline vf v_dgelu(vf x)
{
    vf slope;
    v_gelu_slope(x, &slope);
    return slope;
}

/* SiLU: x * sigmoid(x). *slope: its derivative. */
static inline vf v_silu_slope(vf x, vf *slope)
{
    const vf one = v_set(1.0f), s = one / (one + v_exp_quick(-x)), y = x * s;
    *slope = v_fma(y, one - s, s);
    return y;
}
static inline vf v_silu(vf x)
{
    vf slope;
    return v_silu_slope(x, &slope);
}
