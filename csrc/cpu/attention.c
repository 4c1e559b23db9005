/* attention: contract in ops/attention.h.
 *
 * A task is one head of one image: its K and V, packed, stay in L2 and the scores of a few query
 * rows in L1, so the [T, T] matrix never exists. Whole rows of scores fit, so softmax needs no
 * online rescaling: maximum, then exponentials and their sum. Every product runs on register tiles
 * like those of product.h, over panels of 2 vectors; the last panel has 1 where that is enough, as
 * for K = 72. */

/* ---------------------------------------------------------------- tiles
 *
 * As product_tile, for what attention needs beside it:
 *   attention_tile_rows    panels of 1 vector, left rows by pointer
 *   attention_tile_cols    panels of 1 or 2 vectors, the left operand transposed: c[i] += sum over
 *                          kk of a[kk*lda + i] * panel[kk]; dk and dv contract over query rows */

#define ATTENTION_TILE(m)                                                                          \
    static void attention_tile_rows_##m(int64_t k, const float *const *a, const float *panel,      \
                                        float *c, int64_t ldc)                                     \
    {                                                                                              \
        vf t[m];                                                                                   \
        const float *r[m];                                                                         \
        _Pragma("GCC unroll 16")                                                                   \
        for (int i = 0; i < m; i++)                                                                \
            r[i] = a[i], t[i] = v_zero();                                                          \
        for (int64_t kk = 0; kk < k; kk++) {                                                       \
            vf b = v_load(panel + kk * PM_WIDTH);                                                  \
            _Pragma("GCC unroll 16")                                                               \
            for (int i = 0; i < m; i++)                                                            \
                t[i] = v_fma(v_set(r[i][kk]), b, t[i]);                                            \
        }                                                                                          \
        _Pragma("GCC unroll 16")                                                                   \
        for (int i = 0; i < m; i++)                                                                \
            v_store(c + i * ldc, t[i]);                                                            \
    }                                                                                              \
    static void attention_tile_cols1_##m(int64_t k, const float *a, int64_t lda,                   \
                                         const float *panel, float *c, int64_t ldc)                \
    {                                                                                              \
        vf t[m];                                                                                   \
        _Pragma("GCC unroll 16")                                                                   \
        for (int i = 0; i < m; i++)                                                                \
            t[i] = v_load(c + i * ldc);                                                            \
        for (int64_t kk = 0; kk < k; kk++, a += lda) {                                             \
            vf b = v_load(panel + kk * PM_WIDTH);                                                  \
            _Pragma("GCC unroll 16")                                                               \
            for (int i = 0; i < m; i++)                                                            \
                t[i] = v_fma(v_set(a[i]), b, t[i]);                                                \
        }                                                                                          \
        _Pragma("GCC unroll 16")                                                                   \
        for (int i = 0; i < m; i++)                                                                \
            v_store(c + i * ldc, t[i]);                                                            \
    }                                                                                              \
    static void attention_tile_cols2_##m(int64_t k, const float *a, int64_t lda,                   \
                                         const float *panel, float *c, int64_t ldc)                \
    {                                                                                              \
        vf t[m][2];                                                                                \
        _Pragma("GCC unroll 16")                                                                   \
        for (int i = 0; i < m; i++) {                                                              \
            t[i][0] = v_load(c + i * ldc);                                                         \
            t[i][1] = v_load(c + i * ldc + PM_WIDTH);                                              \
        }                                                                                          \
        for (int64_t kk = 0; kk < k; kk++, a += lda) {                                             \
            vf b0 = v_load(panel + kk * PM_NR), b1 = v_load(panel + kk * PM_NR + PM_WIDTH);        \
            _Pragma("GCC unroll 16")                                                               \
            for (int i = 0; i < m; i++) {                                                          \
                vf x = v_set(a[i]);                                                                \
                t[i][0] = v_fma(x, b0, t[i][0]);                                                   \
                t[i][1] = v_fma(x, b1, t[i][1]);                                                   \
            }                                                                                      \
        }                                                                                          \
        _Pragma("GCC unroll 16")                                                                   \
        for (int i = 0; i < m; i++) {                                                              \
            v_store(c + i * ldc, t[i][0]);                                                         \
            v_store(c + i * ldc + PM_WIDTH, t[i][1]);                                              \
        }                                                                                          \
    }
#if PM_MR == 14
#define ATTENTION_ALL(X) X(1) X(2) X(3) X(4) X(5) X(6) X(7) X(8) X(9) X(10) X(11) X(12) X(13) X(14)
#else
#define ATTENTION_ALL(X) X(1) X(2) X(3) X(4) X(5) X(6)
#endif
ATTENTION_ALL(ATTENTION_TILE)

/* Query rows that go through products and softmax together: at T = 256 their scores are in L1. */
#define ATTENTION_ROWS (PM_MR == 14 ? 28 : 24)

typedef void (*attention_rows_fn)(int64_t k, const float *const *a, const float *panel, float *c,
                                  int64_t ldc);
typedef void (*attention_cols_fn)(int64_t k, const float *a, int64_t lda, const float *panel,
                                  float *c, int64_t ldc);
#define ATTENTION_ENTRY(m) [m] = attention_tile_rows_##m,
#define ATTENTION_ENTRY1(m) [m] = attention_tile_cols1_##m,
#define ATTENTION_ENTRY2(m) [m] = attention_tile_cols2_##m,
static const attention_rows_fn attention_tile_rows[PM_MR + 1] = {ATTENTION_ALL(ATTENTION_ENTRY)};
static const attention_cols_fn attention_tile_cols1[PM_MR + 1] = {ATTENTION_ALL(ATTENTION_ENTRY1)};
static const attention_cols_fn attention_tile_cols2[PM_MR + 1] = {ATTENTION_ALL(ATTENTION_ENTRY2)};

/* ---------------------------------------------------------------- panels
 *
 * The panels of n columns and k rows: panel p, of columns p*PM_NR on, is at p*PM_NR*k and has 2
 * vectors, or 1 if its columns fit. Columns past n are zero. */

static inline int64_t attention_pad(int64_t n) { return pm_blocks(n, PM_WIDTH) * PM_WIDTH; }
static inline int64_t attention_vectors(int64_t n, int64_t p) { return n - p > PM_WIDTH ? 2 : 1; }

/* Rows of qkv lie pages apart, where the hardware does not prefetch. */
#define ATTENTION_AHEAD 16

/* Columns from rows: B[i][j] = scale * x[j][i], j < n, i < k. */
static void attention_pack_transposed(int64_t n, int64_t k, const float *x, int64_t ld, float scale,
                                      float *panels)
{
    for (int64_t j = 0; j < n; j += PM_WIDTH) {
        const int64_t p = j / PM_NR * PM_NR, width = attention_vectors(n, p) * PM_WIDTH;
        float *out = panels + p * k + (j - p);
        const int64_t rows = pm_min(PM_WIDTH, n - j);
        for (int64_t i = 0; i < k; i += PM_WIDTH) {
            const float *from = x + j * ld + i;
            vf row[PM_WIDTH];
            if (rows == PM_WIDTH && k - i >= PM_WIDTH) {
                _Pragma("GCC unroll 16")
                for (int l = 0; l < PM_WIDTH; l++) {
                    __builtin_prefetch(from + (l + ATTENTION_AHEAD) * ld);
                    row[l] = v_load(from + l * ld) * v_set(scale);
                }
                v_transpose(row);
                _Pragma("GCC unroll 16")
                for (int l = 0; l < PM_WIDTH; l++)
                    v_store(out + (i + l) * width, row[l]);
            } else {
                for (int l = 0; l < PM_WIDTH; l++)
                    row[l] = l < rows ? v_get(from + l * ld, k - i) * v_set(scale) : v_zero();
                v_transpose(row);
                for (int l = 0; l < PM_WIDTH && i + l < k; l++)
                    v_store(out + (i + l) * width, row[l]);
            }
        }
    }
}

/* Columns as they are: B[i][j] = x[i][j], j < n, i < k. */
static void attention_pack(int64_t n, int64_t k, const float *x, int64_t ld, float *panels)
{
    const int64_t whole = n / PM_NR * PM_NR;
    for (int64_t i = 0; i < k; i++, x += ld) {
        float *out = panels + i * PM_NR;
        for (int64_t p = 0; p < whole; p += PM_NR, out += k * PM_NR) {
            __builtin_prefetch(x + ATTENTION_AHEAD * ld + p);
            __builtin_prefetch(x + ATTENTION_AHEAD * ld + p + PM_WIDTH);
            v_store(out, v_load(x + p));
            v_store(out + PM_WIDTH, v_load(x + p + PM_WIDTH));
        }
        if (n > whole) {
            const int64_t width = attention_vectors(n, whole) * PM_WIDTH;
            out = panels + whole * k + i * width;
            for (int64_t p = whole; p < whole + width; p += PM_WIDTH, out += PM_WIDTH)
                v_store(out, v_get(x + p, n - p));
        }
    }
}

/* c = a . B for m rows: c[i][0 .. padded n). A panel stays in L1 while the rows pass by. */
static inline void attention_product(int64_t m, const float *x, int64_t ldx, int64_t k,
                                     const float *panels, int64_t n, float *c, int64_t ldc)
{
    const float *a[ATTENTION_ROWS];
    for (int64_t i = 0; i < m; i++)
        a[i] = x + i * ldx;
    const int64_t slices = product_slices(m);
    for (int64_t p = 0; p < n; p += PM_NR)
        for (int64_t s = 0; s < slices; s++) {
            const int64_t i = product_cut(m, slices, s), rows = product_cut(m, slices, s + 1) - i;
            if (attention_vectors(n, p) == 2)
                product_tile[PM_FP32][rows](k, a + i, panels + p * k, c + i * ldc + p, ldc, false);
            else
                attention_tile_rows[rows](k, a + i, panels + p * k, c + i * ldc + p, ldc);
        }
}

/* c += a^T . B for m columns of a [k, lda]: c[i][0 .. padded n), i < m. */
static void attention_product_transposed(int64_t m, const float *a, int64_t lda, int64_t k,
                                         const float *panels, int64_t n, float *c, int64_t ldc)
{
    const int64_t slices = product_slices(m);
    for (int64_t s = 0; s < slices; s++) {
        const int64_t i = product_cut(m, slices, s), rows = product_cut(m, slices, s + 1) - i;
        for (int64_t p = 0; p < n; p += PM_NR)
            (attention_vectors(n, p) == 2 ? attention_tile_cols2 : attention_tile_cols1)[rows](
                k, a + i, lda, panels + p * k, c + i * ldc + p, ldc);
    }
}

/* ---------------------------------------------------------------- softmax pieces */

/* exp for x <= 0, relative error 1e-7 (1 + |x| / 4); below -87.3 it is 2^-126, about 1e-38; NaN
 * stays NaN. exp(x) = 2^n 2^r; 2^r on [-1/2, 1/2] is the minimax polynomial that is 1 at 0. */
static inline vf attention_exp(vf x)
{
    const vf magic = v_set(12582912.0f); /* 1.5 * 2^23: adding it rounds to an integer */
    x = v_max(v_set(-126.0f), x * v_set(1.44269504f)); /* the second one when either is NaN */
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

/* Scores to exponentials, in place: s[t] = exp(s[t] - max). Returns their sum. s is padded to whole
 * vectors. */
static inline float attention_softmax(int64_t T, float *s, float *max_out)
{
    const int64_t padded = attention_pad(T);
    for (int64_t t = T; t < padded; t++)
        s[t] = -INFINITY;
    vf m0 = v_set(-INFINITY), m1 = m0;
    int64_t t = 0;
    for (; t + PM_NR <= padded; t += PM_NR) {
        m0 = v_max(m0, v_load(s + t));
        m1 = v_max(m1, v_load(s + t + PM_WIDTH));
    }
    if (t < padded)
        m0 = v_max(m0, v_load(s + t));
    const float max = v_max_lane(v_max(m0, m1));
    vf sum = v_zero();
    for (t = 0; t < padded; t += PM_WIDTH) {
        vf e = attention_exp(v_load(s + t) - v_set(max));
        v_store(s + t, e);
        sum += e;
    }
    *max_out = max;
    return v_sum(sum);
}

/* ---------------------------------------------------------------- qk-norm */

typedef struct {
    const float *weight, *bias; /* K */
    float eps;
} attention_norm;

/* rows x[t] of K to out[t] = xhat * weight + bias. stats, unless NULL: [2, rows], mean and rstd. */
static void attention_normalise(const attention_norm *norm, int64_t rows, int64_t K, const float *x,
                                int64_t ldx, float *out, int64_t ldo, float *stats)
{
    for (int64_t t = 0; t < rows; t++, x += ldx, out += ldo) {
        vf sum = v_zero(), squares = v_zero();
        for (int64_t i = 0; i < K; i += PM_WIDTH)
            sum += v_get(x + i, K - i);
        const float mean = v_sum(sum) / (float)K;
        for (int64_t i = 0; i < K; i += PM_WIDTH) {
            vf v = v_keep(v_get(x + i, K - i) - v_set(mean), K - i);
            squares = v_fma(v, v, squares);
        }
        const float rstd = 1.0f / sqrtf(v_sum(squares) / (float)K + norm->eps);
        for (int64_t i = 0; i < K; i += PM_WIDTH) {
            vf xhat = (v_get(x + i, K - i) - v_set(mean)) * v_set(rstd);
            v_put(out + i,
                  v_fma(xhat, v_get(norm->weight + i, K - i), v_get(norm->bias + i, K - i)), K - i);
        }
        if (stats) {
            stats[t] = mean;
            stats[rows + t] = rstd;
        }
    }
}

/* The gradient of one such row: up (padded K floats, 0 past K) to dx, and to the slots dweight and
 * dbias (+=, padded K). dx = rstd * (g - mean(g) - xhat * mean(g * xhat)), g = up * weight. */
static inline void attention_normalise_backward(const attention_norm *norm, int64_t K,
                                                const float *x, float mean, float rstd,
                                                const float *up, float *dx, float *dweight,
                                                float *dbias)
{
    vf sum = v_zero(), dot = v_zero();
    for (int64_t i = 0; i < K; i += PM_WIDTH) {
        vf u = v_load(up + i), xhat = (v_get(x + i, K - i) - v_set(mean)) * v_set(rstd);
        v_store(dweight + i, v_fma(u, xhat, v_load(dweight + i)));
        v_store(dbias + i, v_load(dbias + i) + u);
        vf g = u * v_get(norm->weight + i, K - i);
        sum += g;
        dot = v_fma(g, xhat, dot);
    }
    if (!dx)
        return;
    const vf a = v_set(v_sum(sum) / (float)K), c = v_set(-v_sum(dot) / (float)K);
    for (int64_t i = 0; i < K; i += PM_WIDTH) {
        vf xhat = (v_get(x + i, K - i) - v_set(mean)) * v_set(rstd);
        vf g = v_load(up + i) * v_get(norm->weight + i, K - i);
        v_put(dx + i, v_set(rstd) * v_fma(xhat, c, g - a), K - i);
    }
}

/* ---------------------------------------------------------------- tasks */

#define ATTENTION_FLOPS 1048576 /* of a task, at least: small heads are grouped */
#define ATTENTION_TASKS 32      /* wanted: few heads are split by query rows (forward) */
#define ATTENTION_SCORES 24576  /* of a block of query rows: 96 KiB, in L2 */

typedef struct {
    const pm_attention_args *g;
    const pm_attention_grads *d;
    int64_t items, group; /* (image, head, part of the query rows); items per task */
    int64_t parts;        /* of the query rows of a head */
    int64_t block;        /* query rows of a backward block */
    int64_t Kp, Tp;       /* K and T in whole vectors */
    int64_t ld;           /* between rows of scores */
    float scale;          /* 1 / sqrt(K) */
    attention_norm q_norm, k_norm;
    char *scratch;
    size_t bytes; /* of scratch, per worker */
    float *slots; /* [B*H, 4, Kp]: gradients of q_weight, q_bias, k_weight, k_bias; or NULL */
} attention_job;

static inline size_t attention_floats(int64_t n) { return pm_round64((size_t)n * sizeof(float)); }

static attention_job attention_plan(const pm_attention_args *g, bool backward)
{
    attention_job j = {.g = g, .parts = 1, .Kp = attention_pad(g->K), .Tp = attention_pad(g->T)};
    const int64_t T = g->T, K = g->K, heads = g->B * g->H, flops = 4 * T * T * K;
    j.scale = (float)(1.0 / sqrt((double)K));
    j.q_norm = (attention_norm){g->q_weight, g->q_bias, (float)g->eps};
    j.k_norm = (attention_norm){g->k_weight, g->k_bias, (float)g->eps};
    /* an odd number of cache lines: rows of scores do not fall into the same sets of L1 */
    j.ld = pm_blocks(j.Tp, 16) * 16;
    j.ld += j.ld / 16 % 2 ? 0 : 16;
    if (!backward && heads && heads < ATTENTION_TASKS) /* each part packs again: 64 rows or more */
        j.parts = pm_max(1, pm_min(pm_blocks(ATTENTION_TASKS, heads), T / 64));
    j.items = heads * j.parts;
    j.group = pm_max(1, ATTENTION_FLOPS / pm_max(1, flops / j.parts));
    int64_t blocks = pm_blocks(T, pm_max(ATTENTION_ROWS, ATTENTION_SCORES / j.ld));
    j.block = pm_blocks(T, pm_max(1, blocks));
    const bool norm = g->q_weight;
    if (!backward) {
        j.bytes = 2 * attention_floats(T * j.Kp) * norm;                    /* q, k */
        j.bytes += attention_floats(j.Tp * K) + attention_floats(T * j.Kp); /* panels: k^T, v */
        j.bytes += attention_floats(ATTENTION_ROWS * j.ld);                 /* scores */
        j.bytes += attention_floats(ATTENTION_ROWS * j.Kp);                 /* y */
    } else {
        j.bytes = 2 * attention_floats(T * j.Kp) * norm;                        /* q, k */
        j.bytes += 2 * attention_floats(2 * T) * norm;                          /* mean, rstd */
        j.bytes += 2 * attention_floats(j.Tp * K) + attention_floats(T * j.Kp); /* k^T, v^T; k */
        j.bytes += 2 * attention_floats(j.block * j.ld);                        /* p, ds */
        j.bytes += 2 * attention_floats(j.block * j.Kp);                        /* q, dy */
        j.bytes += 2 * attention_floats(T * j.Kp);                              /* dk, dv */
        j.bytes += attention_floats(ATTENTION_ROWS * j.Kp);                     /* dq */
    }
    return j;
}

static size_t attention_workspace(const pm_ctx *ctx, const pm_attention_args *g, bool backward)
{
    attention_job j = attention_plan(g, backward);
    size_t bytes = j.bytes * (size_t)pm_pool_threads(ctx->pool);
    if (backward && g->q_weight)
        bytes += attention_floats(g->B * g->H * 4 * j.Kp);
    return bytes;
}

/* ---------------------------------------------------------------- forward */

static void attention_forward_item(const attention_job *j, int64_t item, void *scratch)
{
    const pm_attention_args *g = j->g;
    const int64_t T = g->T, K = g->K, Kp = j->Kp, head = item / j->parts, part = item % j->parts;
    const int64_t b = head / g->H, h = head % g->H, ldy = g->H * K;
    const int64_t first = product_cut(T, j->parts, part), end = product_cut(T, j->parts, part + 1);
    int64_t ldq = 3 * ldy, ldk = ldq;
    const float *q = g->qkv + b * T * ldq + h * K, *k = q + ldy, *v = k + ldy;
    q += first * ldq;

    /* 1. q and k through their LayerNorms */
    if (g->q_weight) {
        float *qn = pm_take(&scratch, (size_t)(T * Kp) * sizeof(float));
        float *kn = pm_take(&scratch, (size_t)(T * Kp) * sizeof(float));
        attention_normalise(&j->q_norm, end - first, K, q, ldq, qn, Kp, NULL);
        attention_normalise(&j->k_norm, T, K, k, ldk, kn, Kp, NULL);
        q = qn, k = kn, ldq = ldk = Kp;
    }

    /* 2. k^T (with the scale) and v in panels */
    float *k_panels = pm_take(&scratch, (size_t)(j->Tp * K) * sizeof(float));
    float *v_panels = pm_take(&scratch, (size_t)(T * Kp) * sizeof(float));
    attention_pack_transposed(T, K, k, ldk, j->scale, k_panels);
    attention_pack(K, T, v, 3 * ldy, v_panels);

    float *s = pm_take(&scratch, (size_t)(ATTENTION_ROWS * j->ld) * sizeof(float));
    float *o = pm_take(&scratch, (size_t)(ATTENTION_ROWS * Kp) * sizeof(float));
    const int64_t slices = pm_blocks(end - first, ATTENTION_ROWS);
    for (int64_t slice = 0; slice < slices; slice++) {
        const int64_t row = product_cut(end - first, slices, slice);
        const int64_t m = product_cut(end - first, slices, slice + 1) - row, t = first + row;
        float inverse[ATTENTION_ROWS];

        /* 3. s = q k^T / sqrt(K); exp(s - max) and its sum; lse = max + log sum */
        attention_product(m, q + row * ldq, ldq, K, k_panels, T, s, j->ld);
        for (int64_t i = 0; i < m; i++) {
            float max, sum = attention_softmax(T, s + i * j->ld, &max);
            inverse[i] = 1.0f / sum;
            if (g->lse)
                g->lse[head * T + t + i] = max + logf(sum); /* >= max */
        }

        /* 4. y = exp(s - max) v / sum */
        for (int64_t i = 0; i < m; i++)
            for (int64_t c = 0; c < K; c += 16)
                __builtin_prefetch(g->y + (b * T + t + i) * ldy + h * K + c, 1);
        attention_product(m, s, j->ld, T, v_panels, K, o, Kp);
        for (int64_t i = 0; i < m; i++) {
            float *y = g->y + (b * T + t + i) * ldy + h * K;
            for (int64_t c = 0; c < K; c += PM_WIDTH)
                v_put(y + c, v_load(o + i * Kp + c) * v_set(inverse[i]), K - c);
        }
    }
}

static void attention_forward_task(void *arg, int64_t task, int worker)
{
    const attention_job *j = arg;
    const int64_t end = pm_min(j->items, (task + 1) * j->group);
    for (int64_t item = task * j->group; item < end; item++)
        attention_forward_item(j, item, j->scratch + (size_t)worker * j->bytes);
}

static pm_status attention_forward(pm_ctx *ctx, const pm_attention_args *g, void *scratch)
{
    attention_job job = attention_plan(g, false);
    job.scratch = scratch;
    if (g->T && g->K)
        pm_parallel(ctx->pool, pm_blocks(job.items, job.group), attention_forward_task, &job);
    return PM_OK;
}

/* ---------------------------------------------------------------- backward
 *
 * With p = exp(s - lse) and delta = sum over keys of p * dp:
 *   dv = p^T dy;  dp = dy v^T;  ds = p * (dp - delta) / sqrt(K);  dq = ds k;  dk = ds^T q
 * In blocks of query rows; dk and dv of the head sum over the blocks in order. */

/* p and ds of one row, in place: s to p, dp to ds (without the factor 1 / sqrt(K)). p is divided by
 * its sum, which is 1 but for the rounding of lse (not small where scores are large), and delta is
 * taken from p and dp themselves, so that ds sums to 0 as well as float32 can. */
static inline void attention_softmax_backward(int64_t T, float *s, float *dp, float lse)
{
    const int64_t padded = attention_pad(T);
    for (int64_t t = T; t < padded; t++)
        s[t] = -INFINITY;
    vf sum = v_zero(), dot = v_zero();
    for (int64_t t = 0; t < T; t += PM_WIDTH) {
        vf p = attention_exp(v_load(s + t) - v_set(lse));
        v_store(s + t, p);
        sum += p;
        dot = v_fma(p, v_load(dp + t), dot);
    }
    const float inverse = 1.0f / v_sum(sum);
    const vf r = v_set(inverse), delta = v_set(v_sum(dot) * inverse);
    for (int64_t t = 0; t < T; t += PM_WIDTH) {
        vf p = v_load(s + t) * r;
        v_store(s + t, p);
        v_store(dp + t, p * (v_load(dp + t) - delta));
    }
}

/* m rows of dq or dk, from row on, out of the products: times 1 / sqrt(K), and back through the
 * LayerNorm if any. x: q or k in qkv; slot: dweight, dbias; stats: [2, T], mean and rstd. */
static void attention_finish(const attention_job *j, int64_t m, float *product, const float *x,
                             float *dx, const attention_norm *norm, float *slot, const float *stats,
                             int64_t row)
{
    const int64_t K = j->g->K, T = j->g->T, Kp = j->Kp, ld = 3 * j->g->H * K;
    for (int64_t i = 0; i < m; i++, product += Kp) {
        float *out = dx ? dx + (row + i) * ld : NULL;
        if (!norm->weight) {
            for (int64_t c = 0; c < K; c += PM_WIDTH)
                v_put(out + c, v_load(product + c) * v_set(j->scale), K - c);
            continue;
        }
        for (int64_t c = 0; c < K; c += PM_WIDTH)
            v_store(product + c, v_load(product + c) * v_set(j->scale));
        attention_normalise_backward(norm, K, x + (row + i) * ld, stats[row + i],
                                     stats[T + row + i], product, out, slot, slot + Kp);
    }
}

static void attention_backward_item(const attention_job *j, int64_t head, void *scratch)
{
    const pm_attention_args *g = j->g;
    const int64_t T = g->T, K = g->K, Kp = j->Kp, b = head / g->H, h = head % g->H, ldy = g->H * K;
    const int64_t ldx = 3 * ldy, at = b * T * ldx + h * K;
    int64_t ldq = ldx, ldk = ldx;
    const float *q_in = g->qkv + at, *k_in = q_in + ldy, *v = k_in + ldy, *q = q_in, *k = k_in;
    const float *dy = j->d->dy + b * T * ldy + h * K, *lse = g->lse + head * T;
    float *dq_out = j->d->dqkv ? j->d->dqkv + at : NULL, *dk_out = dq_out ? dq_out + ldy : NULL;
    float *slot = j->slots ? j->slots + head * 4 * Kp : NULL, *q_stats = NULL, *k_stats = NULL;

    /* 1. q and k through their LayerNorms, again */
    if (g->q_weight) {
        float *qn = pm_take(&scratch, (size_t)(T * Kp) * sizeof(float));
        float *kn = pm_take(&scratch, (size_t)(T * Kp) * sizeof(float));
        q_stats = pm_take(&scratch, (size_t)(2 * T) * sizeof(float));
        k_stats = pm_take(&scratch, (size_t)(2 * T) * sizeof(float));
        attention_normalise(&j->q_norm, T, K, q, ldq, qn, Kp, q_stats);
        attention_normalise(&j->k_norm, T, K, k, ldk, kn, Kp, k_stats);
        q = qn, k = kn, ldq = ldk = Kp;
        memset(slot, 0, (size_t)(4 * Kp) * sizeof(float));
    }

    /* 2. panels: k^T (with the scale) and v^T for the scores and dp, k for dq */
    float *kt_panels = pm_take(&scratch, (size_t)(j->Tp * K) * sizeof(float));
    float *vt_panels = pm_take(&scratch, (size_t)(j->Tp * K) * sizeof(float));
    float *k_panels = pm_take(&scratch, (size_t)(T * Kp) * sizeof(float));
    attention_pack_transposed(T, K, k, ldk, j->scale, kt_panels);
    attention_pack_transposed(T, K, v, ldx, 1.0f, vt_panels);
    attention_pack(K, T, k, ldk, k_panels);

    float *p = pm_take(&scratch, (size_t)(j->block * j->ld) * sizeof(float));
    float *ds = pm_take(&scratch, (size_t)(j->block * j->ld) * sizeof(float));
    float *q_panels = pm_take(&scratch, (size_t)(j->block * Kp) * sizeof(float));
    float *dy_panels = pm_take(&scratch, (size_t)(j->block * Kp) * sizeof(float));
    float *dk = pm_take(&scratch, (size_t)(T * Kp) * sizeof(float));
    float *dv = pm_take(&scratch, (size_t)(T * Kp) * sizeof(float));
    float *dq = pm_take(&scratch, (size_t)(ATTENTION_ROWS * Kp) * sizeof(float));
    memset(dk, 0, (size_t)(T * Kp) * sizeof(float));
    memset(dv, 0, (size_t)(T * Kp) * sizeof(float));
    for (int64_t first = 0; first < T; first += j->block) {
        const int64_t rows = pm_min(j->block, T - first), slices = pm_blocks(rows, ATTENTION_ROWS);
        for (int64_t slice = 0; slice < slices; slice++) {
            const int64_t row = product_cut(rows, slices, slice), t = first + row;
            const int64_t m = product_cut(rows, slices, slice + 1) - row;
            float *ps = p + row * j->ld, *dss = ds + row * j->ld;

            /* 3. p = exp(q k^T / sqrt(K) - lse), dp = dy v^T, ds = p * (dp - delta) */
            attention_product(m, q + t * ldq, ldq, K, kt_panels, T, ps, j->ld);
            attention_product(m, dy + t * ldy, ldy, K, vt_panels, T, dss, j->ld);
            for (int64_t i = 0; i < m; i++)
                attention_softmax_backward(T, ps + i * j->ld, dss + i * j->ld, lse[t + i]);

            /* 4. dq = ds k */
            attention_product(m, dss, j->ld, T, k_panels, K, dq, Kp);
            if (dq_out || slot)
                attention_finish(j, m, dq, q_in, dq_out, &j->q_norm, slot, q_stats, t);
        }

        /* 5. dv += p^T dy, dk += ds^T q, over the rows of the block */
        attention_pack(K, rows, dy + first * ldy, ldy, dy_panels);
        attention_pack(K, rows, q + first * ldq, ldq, q_panels);
        attention_product_transposed(T, p, j->ld, rows, dy_panels, K, dv, Kp);
        attention_product_transposed(T, ds, j->ld, rows, q_panels, K, dk, Kp);
    }
    if (dq_out || slot)
        attention_finish(j, T, dk, k_in, dk_out, &j->k_norm, slot ? slot + 2 * Kp : NULL, k_stats,
                         0);
    if (dq_out)
        for (int64_t t = 0; t < T; t++)
            for (int64_t c = 0; c < K; c += PM_WIDTH)
                v_put(dq_out + 2 * ldy + t * ldx + c, v_load(dv + t * Kp + c), K - c);
}

static void attention_backward_task(void *arg, int64_t task, int worker)
{
    const attention_job *j = arg;
    const int64_t end = pm_min(j->items, (task + 1) * j->group);
    for (int64_t item = task * j->group; item < end; item++)
        attention_backward_item(j, item, j->scratch + (size_t)worker * j->bytes);
}

/* One parameter of the LayerNorms: the slots of all heads, in order. */
static void attention_norm_task(void *arg, int64_t task, int worker)
{
    (void)worker;
    const attention_job *j = arg;
    float *const grads[4] = {j->d->dq_weight, j->d->dq_bias, j->d->dk_weight, j->d->dk_bias};
    const int64_t K = j->g->K;
    for (int64_t c = 0; grads[task] && c < K; c += PM_WIDTH) {
        vf sum = v_zero();
        for (int64_t head = 0; head < j->items; head++)
            sum += v_load(j->slots + (head * 4 + task) * j->Kp + c);
        v_put(grads[task] + c, v_get(grads[task] + c, K - c) + sum, K - c);
    }
}

static pm_status attention_backward(pm_ctx *ctx, const pm_attention_args *g,
                                    const pm_attention_grads *d, void *scratch)
{
    attention_job job = attention_plan(g, true);
    job.d = d;
    if (g->q_weight)
        job.slots = pm_take(&scratch, attention_floats(g->B * g->H * 4 * job.Kp));
    job.scratch = scratch;
    if (!g->T || !g->K)
        return PM_OK;
    pm_parallel(ctx->pool, pm_blocks(job.items, job.group), attention_backward_task, &job);
    if (job.slots)
        pm_parallel(ctx->pool, 4, attention_norm_task, &job);
    return PM_OK;
}
