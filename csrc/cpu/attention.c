/* attention: contract in ops/attention.h.
 *
 * A task is one head of one image. It works on scores transposed: s[t][i] = k_t . q_i for all T keys
 * and a panel of queries, PM_NR of them side by side, so the [T, T] matrix never exists and nothing
 * is ever summed across lanes. Whole columns of scores fit (32 KiB at T = 256), so softmax needs no
 * online rescaling: maximum, then exponentials and their sum. And they are already the operands
 * that the next products need: every product here is
 *
 *   c[i] (+)= sum over kk of a[i][kk] * b[kk]     rows of a are broadcast, rows of b are vectors
 *
 * Floating-point operations: 4 T T K a head forward, 10 T T K backward; bytes: 4 T K numbers
 * forward, 8 T K backward, fetched into L2 while the head before is worked on. */

/* ---------------------------------------------------------------- fetching ahead
 *
 * Rows of qkv lie pages apart, where the hardware does not prefetch, and a head is as many bytes as
 * a tenth of its products take to come from memory. So the tiles below fetch what the worker's next
 * head reads and writes: one line per 4 steps, a column of lines of a piece at a time. */

typedef struct {
    const float *at; /* [rows], at distance ld */
    int64_t ld;
} attention_piece;

#define ATTENTION_PIECES 8 /* q, k, v, y, dy; dq, dk, dv */

typedef struct {
    attention_piece piece[ATTENTION_PIECES];
    int64_t pieces, rows, bytes; /* of pieces; each; of a row */
    int64_t now, row, offset;    /* where it is */
    int64_t lines;               /* a product by tiles of bf16 fetches at a time */
} attention_ahead;

/* Where to fetch so many lines from, at distance *step. */
static inline const char *attention_fetch(attention_ahead *f, int64_t lines, int64_t *step)
{
    if (f->now == f->pieces) { /* done: what is there already */
        *step = 0;
        return (const char *)f;
    }
    const attention_piece *piece = &f->piece[f->now];
    *step = piece->ld * (int64_t)sizeof(float);
    const char *at = (const char *)piece->at + f->offset + f->row * *step;
    f->row += lines;
    if (f->row >= f->rows) {
        f->row = 0;
        f->offset += 64;
        if (f->offset >= f->bytes)
            f->offset = 0, f->now++;
    }
    return at;
}

/* ---------------------------------------------------------------- products */

/* A tile: m rows of 1 or 2 vectors, accumulators in registers over the whole of k. */
#define ATTENTION_TILE(m, n)                                                                       \
    static void attention_tile_##m##x##n(int64_t k, const float *a, int64_t lda, const float *b,   \
                                         int64_t ldb, float *c, int64_t ldc, bool add,             \
                                         const char *ahead, int64_t step)                          \
    {                                                                                              \
        vf t[m][2];                                                                                \
        const float *r[m];                                                                         \
        _Pragma("GCC unroll 16")                                                                   \
        for (int i = 0; i < m; i++) {                                                              \
            r[i] = a + i * lda;                                                                    \
            for (int j = 0; j < n; j++)                                                            \
                t[i][j] = v_zero();                                                                \
        }                                                                                          \
        int64_t kk = 0;                                                                            \
        for (; kk + 4 <= k; kk += 4) {                                                             \
            __builtin_prefetch(ahead, 0, 2);                                                       \
            ahead += step;                                                                         \
            _Pragma("GCC unroll 4")                                                                \
            for (int l = 0; l < 4; l++, b += ldb)                                                  \
                ATTENTION_STEP(m, n, kk + l)                                                       \
        }                                                                                          \
        for (; kk < k; kk++, b += ldb)                                                             \
            ATTENTION_STEP(m, n, kk)                                                               \
        _Pragma("GCC unroll 16")                                                                   \
        for (int i = 0; i < m; i++, c += ldc)                                                      \
            for (int j = 0; j < n; j++)                                                            \
                v_store(c + j * PM_WIDTH, add ? v_load(c + j * PM_WIDTH) + t[i][j] : t[i][j]);     \
    }
#define ATTENTION_STEP(m, n, at)                                                                   \
    {                                                                                              \
        const vf b0 = v_load(b), b1 = v_load(b + (n - 1) * PM_WIDTH);                              \
        _Pragma("GCC unroll 16")                                                                   \
        for (int i = 0; i < m; i++) {                                                              \
            if (n == 2)                                                                            \
                PRODUCT_ROW_fp32(i, t[i], r[i] + (at), b0, b1);                                    \
            else                                                                                   \
                t[i][0] = v_fma(v_set(r[i][at]), b0, t[i][0]);                                     \
        }                                                                                          \
    }
#define ATTENTION_TILE_1(n, m) ATTENTION_TILE(m, n)
PRODUCT_HEIGHTS(ATTENTION_TILE_1, 1)
PRODUCT_HEIGHTS(ATTENTION_TILE_1, 2)

typedef void (*attention_tile_fn)(int64_t k, const float *a, int64_t lda, const float *b,
                                  int64_t ldb, float *c, int64_t ldc, bool add, const char *ahead,
                                  int64_t step);
#define ATTENTION_NAME(n, m) attention_tile_##m##x##n,
static const attention_tile_fn attention_tile[3][PM_MR + 1] = {
    {NULL}, {NULL, PRODUCT_HEIGHTS(ATTENTION_NAME, 1)}, {NULL, PRODUCT_HEIGHTS(ATTENTION_NAME, 2)}};

/* How many vectors a panel of n has. */
static inline int64_t attention_vectors(int64_t n) { return n > PM_WIDTH ? 2 : 1; }

/* The distance between rows of n: an odd number of cache lines, which spreads them over the sets of
 * L1. */
static inline int64_t attention_pitch(int64_t n) { return pm_blocks(n, 32) * 32 + 16; }

/* c = a b, or c += a b: c is [m, padded n], the depth is k. */
static void attention_product(int64_t m, int64_t n, int64_t k, const float *a, int64_t lda,
                              const float *b, int64_t ldb, float *c, int64_t ldc, bool add,
                              attention_ahead *ahead)
{
    const int64_t slices = product_slices(m);
    for (int64_t s = 0; s < slices; s++) {
        const int64_t i = product_cut(m, slices, s), rows = product_cut(m, slices, s + 1) - i;
        for (int64_t p = 0; p < n; p += PM_NR) {
            int64_t step;
            const char *from = attention_fetch(ahead, k / 4, &step);
            attention_tile[attention_vectors(n - p)][rows](k, a + i * lda, lda, b + p, ldb,
                                                           c + i * ldc + p, ldc, add, from, step);
        }
    }
}

/* ---------------------------------------------------------------- operands */

/* out[i] = scale * factor[i] * x[i] for rows of K, padded with zeros; no factor is 1. */
static void attention_copy(int64_t rows, int64_t K, const float *x, int64_t ldx, float scale,
                           const float *factor, float *out, int64_t ldo)
{
    for (int64_t i = 0; i < rows; i++) {
        const vf f = v_set(factor ? scale * factor[i] : scale);
        for (int64_t c = 0; c < K; c += PM_WIDTH)
            v_store(out + i * ldo + c, v_get(x + i * ldx + c, K - c) * f);
    }
}

/* out[j][i] = factor[j] * x[i][j], i < n, j < k; no factor is 1. padded: whole vectors are stored,
 * zeros behind n; or else nothing behind it is touched. */
static void attention_transpose(int64_t n, int64_t k, const float *x, int64_t ldx,
                                const float *factor, float *out, int64_t ldo, bool padded)
{
    for (int64_t i = 0; i < n; i += PM_WIDTH)
        for (int64_t j = 0; j < k; j += PM_WIDTH) {
            const float *from = x + i * ldx + j;
            const int64_t rows = pm_min(PM_WIDTH, n - i), columns = pm_min(PM_WIDTH, k - j);
            vf row[PM_WIDTH];
            if (rows == PM_WIDTH && columns == PM_WIDTH) {
                _Pragma("GCC unroll 16")
                for (int l = 0; l < PM_WIDTH; l++)
                    row[l] = v_load(from + l * ldx);
            } else {
                for (int l = 0; l < PM_WIDTH; l++)
                    row[l] = l < rows ? v_get(from + l * ldx, columns) : v_zero();
            }
            if (factor)
                for (int l = 0; l < PM_WIDTH; l++)
                    row[l] *= v_get(factor + j, columns);
            v_transpose(row);
            if (columns == PM_WIDTH && (padded || rows == PM_WIDTH)) {
                _Pragma("GCC unroll 16")
                for (int l = 0; l < PM_WIDTH; l++)
                    v_store(out + (j + l) * ldo + i, row[l]);
            } else {
                for (int l = 0; l < PM_WIDTH; l++)
                    if (l < columns)
                        v_put(out + (j + l) * ldo + i, row[l], padded ? PM_WIDTH : rows);
            }
        }
}

/* ---------------------------------------------------------------- softmax */

/* exp for x <= 0, relative error 2e-7 (1 + |x| / 8); below -87.3 it is 2^-126, about 1e-38; NaN
 * stays NaN. exp(x) = 2^n 2^r; 2^r on [-1/2, 1/2] is the minimax polynomial that is 1 at 0. */
static inline vf attention_exp(vf x)
{
    /* 1.5 * 2^23: adding it rounds to an integer. And 127: the low bits are the exponent of 2^n. */
    const vf magic = v_set(12582912.0f + 127.0f), log2e = v_set(1.44269504f);
    x = v_max(v_set(-87.3365402f), x); /* the second one when either is NaN */
    const vf shifted = v_fma(x, log2e, magic), r = v_fma(x, log2e, magic - shifted);
    vf p = v_set(1.32647273e-3f);
    p = v_fma(p, r, v_set(9.67151299e-3f));
    p = v_fma(p, r, v_set(5.55073358e-2f));
    p = v_fma(p, r, v_set(2.40222424e-1f));
    p = v_fma(p, r, v_set(6.93147004e-1f));
    p = v_fma(p, r, v_set(1.0f));
    return p * (vf)((vi)shifted << 23);
}

/* The maxima of PM_WIDTH columns of T scores. */
static inline vf attention_max(int64_t T, const float *s, int64_t ld)
{
    enum { CHAINS = 8 };
    vf m[CHAINS];
    for (int l = 0; l < CHAINS; l++)
        m[l] = v_load(s);
    int64_t t = 0;
    for (; t + CHAINS <= T; t += CHAINS) {
        _Pragma("GCC unroll 8")
        for (int l = 0; l < CHAINS; l++)
            m[l] = v_max(m[l], v_load(s + (t + l) * ld));
    }
    for (; t < T; t++)
        m[0] = v_max(m[0], v_load(s + t * ld));
    for (int l = 1; l < CHAINS; l++)
        m[0] = v_max(m[0], m[l]);
    return m[0];
}

/* Sums over keys are kept in so many parts, key by key in turn: smaller errors. */
#define ATTENTION_SUMS 4

static inline vf attention_total(const vf *parts)
{
    return parts[0] + parts[1] + (parts[2] + parts[3]);
}

/* PM_WIDTH columns of scores to e = exp(s - max), in place. Returns their sums. */
static inline vf attention_softmax(int64_t T, float *s, int64_t ld, vf *max_out)
{
    const vf max = attention_max(T, s, ld);
    vf sum[ATTENTION_SUMS] = {v_zero()};
    for (int64_t t = 0; t < T; t += ATTENTION_SUMS) {
        _Pragma("GCC unroll 4")
        for (int l = 0; l < ATTENTION_SUMS; l++, s += ld) {
            if (t + l == T)
                break;
            const vf e = attention_exp(v_load(s) - max);
            v_store(s, e);
            sum[l] += e;
        }
    }
    *max_out = max;
    return attention_total(sum);
}

/* PM_WIDTH columns of scores to e and of dp to e * (dp - delta), in place; with p = e / sum, the
 * latter is ds * sum. Returns 1 / sum. delta = sum of p * dp is taken from p and dp themselves, so
 * that ds sums to 0 as well as float32 can. */
static inline vf attention_softmax_backward(int64_t T, float *s, float *dp, int64_t ld)
{
    const vf max = attention_max(T, s, ld);
    vf sum[ATTENTION_SUMS] = {v_zero()}, dot[ATTENTION_SUMS] = {v_zero()};
    for (int64_t t = 0; t < T; t += ATTENTION_SUMS) {
        _Pragma("GCC unroll 4")
        for (int l = 0; l < ATTENTION_SUMS; l++) {
            if (t + l == T)
                break;
            const vf e = attention_exp(v_load(s + (t + l) * ld) - max);
            v_store(s + (t + l) * ld, e);
            sum[l] += e;
            dot[l] = v_fma(e, v_load(dp + (t + l) * ld), dot[l]);
        }
    }
    const vf inverse = v_set(1.0f) / attention_total(sum), delta = attention_total(dot) * inverse;
    for (int64_t t = 0; t < T; t++, s += ld, dp += ld)
        v_store(dp, v_load(s) * (v_load(dp) - delta));
    return inverse;
}

/* ---------------------------------------------------------------- qk-norm */

typedef struct {
    const float *weight, *bias; /* K */
    float eps;
} attention_norm;

/* rows x[t] of K to out[t] = scale * (xhat * weight + bias), padded with zeros. stats, unless NULL:
 * [rows, 2], mean and rstd. */
static void attention_normalise(const attention_norm *norm, int64_t rows, int64_t K, const float *x,
                                int64_t ldx, float scale, float *out, int64_t ldo, float *stats)
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
            v_store(out + i, v_set(scale) * v_fma(xhat, v_get(norm->weight + i, K - i),
                                                  v_get(norm->bias + i, K - i)));
        }
        if (stats) {
            stats[2 * t] = mean;
            stats[2 * t + 1] = rstd;
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

/* m rows of q or k: as they are, or at room, through the LayerNorm, unless it has no weight. */
static const float *attention_input(const attention_norm *norm, int64_t m, int64_t K,
                                    const float *x, int64_t *ld, float *room, int64_t ld_room,
                                    float *stats)
{
    if (!norm->weight)
        return x;
    attention_normalise(norm, m, K, x, *ld, 1.0f, room, ld_room, stats);
    *ld = ld_room;
    return room;
}

/* ---------------------------------------------------------------- heads */

#define ATTENTION_FLOPS 1048576 /* of a task, at least: small heads are grouped */
#define ATTENTION_TASKS 32      /* wanted: few heads are split by panels of queries (forward) */
#define ATTENTION_SCORES 32768  /* of a block of queries: 128 KiB, in L2 (backward) */
#define ATTENTION_SCORES_BF16 131072 /* the same of bf16: 256 KiB; deep blocks suit its tiles */

typedef struct {
    const pm_attention_args *g;
    const pm_attention_grads *d;
    product_kind kind;
    int64_t items, group; /* (image, head, part of the panels); items per task */
    int64_t panels;       /* of PM_NR queries, in a head */
    int64_t parts;        /* of the panels of a head */
    int64_t block;        /* panels of a backward block */
    int64_t ldk, ldt;     /* between rows of K; of T */
    float scale;          /* 1 / sqrt(K) */
    attention_norm q_norm, k_norm;
    int threads;
    char *scratch, *heads; /* per worker; of all heads, where they have parts */
    size_t bytes;          /* of scratch, per worker */
    size_t head_bytes;     /* what attention_prepare makes of a head */
    float *slots; /* [B*H, 4, ldk]: gradients of q_weight, q_bias, k_weight, k_bias; or NULL */
} attention_job;

static inline size_t attention_floats(int64_t n) { return pm_round64((size_t)n * sizeof(float)); }
static inline float *attention_take(void **scratch, int64_t n)
{
    return pm_take(scratch, (size_t)n * sizeof(float));
}

/* Adds rows of `pieces` matrices, side by side from x on (q, k, v: H*K apart), of head to a fetch. */
static void attention_fetch_rows(attention_ahead *f, const attention_job *j, const float *x,
                                 int64_t pieces, int64_t head)
{
    const pm_attention_args *g = j->g;
    const int64_t D = g->H * g->K, ld = pieces * D;
    const float *at = x + head / g->H * g->T * ld + head % g->H * g->K;
    for (int64_t i = 0; i < pieces; i++, at += D) {
        const uintptr_t within = (uintptr_t)at % 64;
        f->piece[f->pieces++] = (attention_piece){at - within / sizeof(float), ld};
        f->bytes = pm_max(f->bytes, (int64_t)within + g->K * (int64_t)sizeof(float));
    }
}

/* The head that the worker of this item takes next, most likely; tasks are handed out in order. */
static int64_t attention_next(const attention_job *j, int64_t item)
{
    const int64_t next = item + 1;
    return next % j->group ? next : next + (j->threads - 1) * j->group;
}

/* Fetch for the head that comes next, while this one takes so many products of a tile's height. */
static void attention_expect(attention_ahead *f, const attention_job *j, int64_t item,
                             int64_t products)
{
    const int64_t next = attention_next(j, item);
    f->rows = j->g->T;
    if (next >= j->items)
        return;
    attention_fetch_rows(f, j, j->g->qkv, 3, next);
    if (!j->d || j->kind != PM_FP32)
        attention_fetch_rows(f, j, j->g->y, 1, next);
    if (j->d)
        attention_fetch_rows(f, j, j->d->dy, 1, next);
    if (j->d && j->d->dqkv)
        attention_fetch_rows(f, j, j->d->dqkv, 3, next);
    f->lines = pm_blocks(f->pieces * f->rows * pm_blocks(f->bytes, 64), pm_max(1, products));
}

/* ---------------------------------------------------------------- forward */

/* What softmax of the queries t .. t+m-1 of a head leaves behind: 1 / sum, and lse = max + log sum. */
static void attention_sums(const attention_job *j, int64_t head, int64_t t, int64_t m,
                           const float *max, const float *sum, float *inverse)
{
    const pm_attention_args *g = j->g;
    for (int64_t i = 0; i < m; i += PM_WIDTH)
        v_store(inverse + i, v_set(1.0f) / v_load(sum + i));
    if (g->lse)
        for (int64_t i = 0; i < m; i++)
            g->lse[head * g->T + t + i] = max[i] + pm_log(sum[i]);
}

/* k in rows, scaled, and v^T of a head. */
static void attention_prepare(const attention_job *j, int64_t head, float *k, float *vt)
{
    const pm_attention_args *g = j->g;
    const int64_t T = g->T, K = g->K, D = g->H * K;
    const float *k_in = g->qkv + head / g->H * T * 3 * D + D + head % g->H * K, *v_in = k_in + D;
    if (g->q_weight)
        attention_normalise(&j->k_norm, T, K, k_in, 3 * D, j->scale, k, j->ldk, NULL);
    else
        attention_copy(T, K, k_in, 3 * D, j->scale, NULL, k, j->ldk);
    attention_transpose(T, K, v_in, 3 * D, NULL, vt, j->ldt, true);
}

static void attention_forward_item(const attention_job *j, int64_t item, void *scratch)
{
    const pm_attention_args *g = j->g;
    const int64_t T = g->T, K = g->K, head = item / j->parts, part = item % j->parts;
    const int64_t b = head / g->H, h = head % g->H, ldy = g->H * K;
    const float *q_in = g->qkv + b * T * 3 * ldy + h * K;
    attention_ahead ahead = {0};

    /* 1. k and v^T, unless they were made for all parts */
    void *own = j->parts == 1 ? scratch : j->heads + (size_t)head * j->head_bytes;
    float *k = attention_take(&own, T * j->ldk), *vt = attention_take(&own, K * j->ldt);
    if (j->parts == 1) {
        scratch = own;
        attention_prepare(j, head, k, vt);
        attention_expect(&ahead, j, item, 1);
    }

    float *qt = attention_take(&scratch, K * PM_NR), *yt = attention_take(&scratch, K * PM_NR);
    float *s = attention_take(&scratch, T * PM_NR);
    const int64_t end = product_cut(j->panels, j->parts, part + 1);
    for (int64_t panel = product_cut(j->panels, j->parts, part); panel < end; panel++) {
        const int64_t t = panel * PM_NR, m = pm_min(PM_NR, T - t);
        float inverse[PM_NR], max[PM_NR], sum[PM_NR];

        /* 2. q^T of the panel */
        int64_t ldq = 3 * ldy;
        const float *q =
            attention_input(&j->q_norm, m, K, q_in + t * ldq, &ldq, scratch, j->ldk, NULL);
        attention_transpose(m, K, q, ldq, NULL, qt, PM_NR, true);

        /* 3. s = k q^T / sqrt(K); e = exp(s - max) and its sum; lse = max + log sum */
        attention_product(T, m, K, k, j->ldk, qt, PM_NR, s, PM_NR, false, &ahead);
        for (int64_t i = 0; i < m; i += PM_WIDTH) {
            vf top, total = attention_softmax(T, s + i, PM_NR, &top);
            v_store(max + i, top);
            v_store(sum + i, total);
        }
        attention_sums(j, head, t, m, max, sum, inverse);

        /* 4. y^T = v^T e / sum */
        attention_product(K, m, T, vt, j->ldt, s, PM_NR, yt, PM_NR, false, &ahead);
        attention_transpose(K, m, yt, PM_NR, inverse, g->y + (b * T + t) * ldy + h * K, ldy, false);
    }
}

/* ---------------------------------------------------------------- backward
 *
 * With p = softmax and delta = sum over keys of p * dp:
 *   dv = p^T dy;  dp = dy v^T;  ds = p * (dp - delta) / sqrt(K);  dq = ds k;  dk = ds^T q
 * In blocks of queries; dk and dv of the head sum over the blocks in order. e and ds are kept as
 * softmax left them, times the sum of e: the other operand of dv and dk, and dq, are divided by it. */

/* m rows, from row on, of dq or dk to where they belong: through the LayerNorm. x: q or k in qkv;
 * slot: dweight, dbias; stats: [T, 2], mean and rstd. */
static void attention_finish(const attention_job *j, int64_t m, const float *up, const float *x,
                             float *dx, const attention_norm *norm, float *slot, const float *stats,
                             int64_t row)
{
    const int64_t K = j->g->K, ld = 3 * j->g->H * K;
    for (int64_t i = row; i < row + m; i++, up += j->ldk)
        attention_normalise_backward(norm, K, x + i * ld, stats[2 * i], stats[2 * i + 1], up,
                                     dx ? dx + i * ld : NULL, slot, slot + j->ldk);
}

/* m rows of K numbers. */
static void attention_write(int64_t m, int64_t K, const float *x, int64_t ldx, float *out,
                            int64_t ldo)
{
    for (int64_t i = 0; i < m; i++)
        for (int64_t c = 0; c < K; c += PM_WIDTH)
            v_put(out + i * ldo + c, v_load(x + i * ldx + c), K - c);
}

/* dk and dv of a head, [T][ldk]: to where they belong. */
static void attention_write_back(const attention_job *j, const float *dk, const float *dv,
                                 const float *k_in, float *dk_out, float *slot,
                                 const float *k_stats)
{
    const int64_t T = j->g->T, K = j->g->K, ldy = j->g->H * K;
    if (slot)
        attention_finish(j, T, dk, k_in, dk_out, &j->k_norm, slot + 2 * j->ldk, k_stats, 0);
    else if (dk_out)
        attention_write(T, K, dk, j->ldk, dk_out, 3 * ldy);
    if (dk_out)
        attention_write(T, K, dv, j->ldk, dk_out + ldy, 3 * ldy);
}

static void attention_backward_item(const attention_job *j, int64_t head, void *scratch)
{
    const pm_attention_args *g = j->g;
    const int64_t T = g->T, K = g->K, ldk = j->ldk, b = head / g->H, h = head % g->H;
    const int64_t ldy = g->H * K, ldx = 3 * ldy, at = b * T * ldx + h * K;
    const float *q_in = g->qkv + at, *k_in = q_in + ldy, *v_in = k_in + ldy;
    const float *dy = j->d->dy + b * T * ldy + h * K;
    float *dq_out = j->d->dqkv ? j->d->dqkv + at : NULL, *dk_out = dq_out ? dq_out + ldy : NULL;
    float *slot = j->slots ? j->slots + head * 4 * ldk : NULL, *q_stats = NULL, *k_stats = NULL;
    float *q_rows = NULL;

    attention_ahead ahead = {0};
    attention_expect(&ahead, j, head, 1);

    /* 1. k, scaled, and v in rows for the scores and dp, k^T for dq */
    float *k = attention_take(&scratch, T * ldk), *v = attention_take(&scratch, T * ldk);
    float *kt = attention_take(&scratch, K * j->ldt);
    if (g->q_weight) {
        q_stats = attention_take(&scratch, 2 * T);
        k_stats = attention_take(&scratch, 2 * T);
        q_rows = attention_take(&scratch, j->block * PM_NR * ldk);
        attention_normalise(&j->k_norm, T, K, k_in, ldx, j->scale, k, ldk, k_stats);
        memset(slot, 0, (size_t)(4 * ldk) * sizeof(float));
    } else {
        attention_copy(T, K, k_in, ldx, j->scale, NULL, k, ldk);
    }
    attention_copy(T, K, v_in, ldx, 1.0f, NULL, v, ldk);
    attention_transpose(T, K, k, ldk, NULL, kt, j->ldt, true);

    const int64_t ld = attention_pitch(j->block * PM_NR); /* of e and ds */
    float *e = attention_take(&scratch, T * ld), *ds = attention_take(&scratch, T * ld);
    float *qt = attention_take(&scratch, K * PM_NR), *dyt = attention_take(&scratch, K * PM_NR);
    float *dqt = attention_take(&scratch, K * PM_NR), *dq = attention_take(&scratch, PM_NR * ldk);
    float *q_block = attention_take(&scratch, j->block * PM_NR * ldk);
    float *dy_block = attention_take(&scratch, j->block * PM_NR * ldk);
    float *inverse = attention_take(&scratch, j->block * PM_NR);
    float *dk = attention_take(&scratch, T * ldk), *dv = attention_take(&scratch, T * ldk);
    for (int64_t first = 0; first < T; first += j->block * PM_NR) {
        const int64_t rows = pm_min(j->block * PM_NR, T - first);
        int64_t ldq = ldx;
        const float *q = attention_input(&j->q_norm, rows, K, q_in + first * ldx, &ldq, q_rows, ldk,
                                         q_stats + 2 * first);
        for (int64_t row = 0; row < rows; row += PM_NR) {
            const int64_t m = pm_min(PM_NR, rows - row), t = first + row;
            float *es = e + row, *dss = ds + row;

            /* 2. e = exp(s - max), dp = v dy^T, ds = e * (dp - delta) */
            attention_transpose(m, K, q + row * ldq, ldq, NULL, qt, PM_NR, true);
            attention_transpose(m, K, dy + t * ldy, ldy, NULL, dyt, PM_NR, true);
            attention_product(T, m, K, k, ldk, qt, PM_NR, es, ld, false, &ahead);
            attention_product(T, m, K, v, ldk, dyt, PM_NR, dss, ld, false, &ahead);
            for (int64_t i = 0; i < m; i += PM_WIDTH)
                v_store(inverse + row + i, attention_softmax_backward(T, es + i, dss + i, ld));

            /* 3. dq^T = k^T ds */
            if (!dq_out && !slot)
                continue;
            attention_product(K, m, T, kt, j->ldt, dss, ld, dqt, PM_NR, false, &ahead);
            if (slot) {
                attention_transpose(K, m, dqt, PM_NR, inverse + row, dq, ldk, true);
                attention_finish(j, m, dq, q_in, dq_out, &j->q_norm, slot, q_stats, t);
            } else {
                attention_transpose(K, m, dqt, PM_NR, inverse + row, dq_out + t * ldx, ldx, false);
            }
        }

        /* 4. dv += p^T dy, dk += ds^T q, over the queries of the block */
        attention_copy(rows, K, dy + first * ldy, ldy, 1.0f, inverse, dy_block, ldk);
        attention_copy(rows, K, q, ldq, j->scale, inverse, q_block, ldk);
        attention_product(T, K, rows, e, ld, dy_block, ldk, dv, ldk, first > 0, &ahead);
        attention_product(T, K, rows, ds, ld, q_block, ldk, dk, ldk, first > 0, &ahead);
    }
    attention_write_back(j, dk, dv, k_in, dk_out, slot, k_stats);
}

#include "attention_bf16.h"

/* ---------------------------------------------------------------- tasks */

static attention_job attention_plan(const pm_ctx *ctx, const pm_attention_args *g, bool backward)
{
    const int64_t T = g->T, K = g->K, heads = g->B * g->H, flops = 4 * T * T * K;
    attention_job j = {.g = g, .panels = pm_blocks(T, PM_NR), .parts = 1};
    j.kind = product_kind_of(ctx);
    j.threads = pm_pool_threads(ctx->pool);
    j.ldk = attention_pitch(K), j.ldt = attention_pitch(T);
    j.scale = (float)(1.0 / sqrt((double)K));
    j.q_norm = (attention_norm){g->q_weight, g->q_bias, (float)g->eps};
    j.k_norm = (attention_norm){g->k_weight, g->k_bias, (float)g->eps};
    if (!backward && heads && heads < ATTENTION_TASKS)
        j.parts = pm_max(1, pm_min(pm_blocks(ATTENTION_TASKS, heads), j.panels));
    j.items = heads * j.parts;
    j.group = pm_max(1, ATTENTION_FLOPS / pm_max(1, flops / j.parts));
    const int64_t scores = j.kind == PM_FP32 ? ATTENTION_SCORES : ATTENTION_SCORES_BF16;
    const int64_t most = pm_max(2, scores / pm_max(1, T * PM_NR));
    j.block = pm_blocks(j.panels, pm_max(1, pm_blocks(j.panels, most)));
    const bool norm = g->q_weight;
    if (j.kind != PM_FP32) {
        j.head_bytes = backward ? 0 : attention_rounded_head_bytes(&j);
        j.bytes = backward ? attention_rounded_backward_bytes(&j)
                           : attention_rounded_forward_bytes(&j);
        j.bytes += j.parts == 1 ? j.head_bytes : 0;
    } else if (!backward) {
        j.head_bytes = attention_floats(T * j.ldk) + attention_floats(K * j.ldt); /* k, v^T */
        j.bytes = attention_floats(PM_NR * j.ldk) * norm;                         /* q */
        j.bytes += 2 * attention_floats(K * PM_NR) + attention_floats(T * PM_NR); /* q^T, y^T; s */
        j.bytes += j.parts == 1 ? j.head_bytes : 0;
    } else {
        const int64_t rows = j.block * PM_NR;
        j.bytes = 2 * attention_floats(T * j.ldk) + attention_floats(K * j.ldt); /* k, v; k^T */
        j.bytes += attention_floats(rows * j.ldk) * norm;                        /* q */
        j.bytes += attention_floats(2 * T) * 2 * norm;                           /* mean, rstd */
        j.bytes += 3 * attention_floats(K * PM_NR);                 /* q^T, dy^T, dq^T */
        j.bytes += 2 * attention_floats(T * attention_pitch(rows)); /* e, ds */
        j.bytes += 2 * attention_floats(rows * j.ldk);              /* q, dy */
        j.bytes += attention_floats(rows);                          /* 1 / sum */
        j.bytes += 2 * attention_floats(T * j.ldk);                 /* dk, dv */
        j.bytes += attention_floats(PM_NR * j.ldk);                 /* dq */
    }
    return j;
}

static size_t attention_workspace(const pm_ctx *ctx, const pm_attention_args *g, bool backward)
{
    attention_job j = attention_plan(ctx, g, backward);
    size_t bytes = j.bytes * (size_t)j.threads;
    if (j.parts > 1)
        bytes += j.head_bytes * (size_t)(g->B * g->H);
    if (backward && g->q_weight)
        bytes += attention_floats(g->B * g->H * 4 * j.ldk);
    return bytes;
}

static void attention_forward_task(void *arg, int64_t task, int worker)
{
    const attention_job *j = arg;
    const int64_t end = pm_min(j->items, (task + 1) * j->group);
    for (int64_t item = task * j->group; item < end; item++)
        (j->kind == PM_FP32 ? attention_forward_item : attention_forward_rounded)(
            j, item, j->scratch + (size_t)worker * j->bytes);
}

static void attention_prepare_task(void *arg, int64_t head, int worker)
{
    const attention_job *j = arg;
    void *own = j->heads + (size_t)head * j->head_bytes;
    if (j->kind != PM_FP32) {
        const attention_head to = attention_head_take(j, &own);
        attention_prepare_rounded(j, head, to, (float *)(j->scratch + (size_t)worker * j->bytes));
        return;
    }
    float *k = attention_take(&own, j->g->T * j->ldk);
    attention_prepare(j, head, k, own);
}

static pm_status attention_forward(pm_ctx *ctx, const pm_attention_args *g, void *scratch)
{
    attention_job job = attention_plan(ctx, g, false);
    const int64_t heads = g->B * g->H;
    if (!g->T || !g->K)
        return PM_OK;
    if (job.parts > 1) {
        job.heads = pm_take(&scratch, job.head_bytes * (size_t)heads);
        job.scratch = scratch;
        pm_parallel(ctx->pool, heads, attention_prepare_task, &job);
    }
    job.scratch = scratch;
    pm_parallel(ctx->pool, pm_blocks(job.items, job.group), attention_forward_task, &job);
    return PM_OK;
}

static void attention_backward_task(void *arg, int64_t task, int worker)
{
    const attention_job *j = arg;
    const int64_t end = pm_min(j->items, (task + 1) * j->group);
    for (int64_t item = task * j->group; item < end; item++)
        (j->kind == PM_FP32 ? attention_backward_item : attention_backward_rounded)(
            j, item, j->scratch + (size_t)worker * j->bytes);
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
            sum += v_load(j->slots + (head * 4 + task) * j->ldk + c);
        v_put(grads[task] + c, v_get(grads[task] + c, K - c) + sum, K - c);
    }
}

static pm_status attention_backward(pm_ctx *ctx, const pm_attention_args *g,
                                    const pm_attention_grads *d, void *scratch)
{
    attention_job job = attention_plan(ctx, g, true);
    job.d = d;
    if (g->q_weight)
        job.slots = pm_take(&scratch, attention_floats(g->B * g->H * 4 * job.ldk));
    job.scratch = scratch;
    if (!g->T || !g->K)
        return PM_OK;
    pm_parallel(ctx->pool, pm_blocks(job.items, job.group), attention_backward_task, &job);
    if (job.slots)
        pm_parallel(ctx->pool, 4, attention_norm_task, &job);
    return PM_OK;
}
