/* attention_bf16.h: heads whose products have operands of bf16. A part of attention.c.
 *
 * The same steps in the same order as there, on operands of words (product.h): rows of words from the
 * left, panels of them from the right. Scores come transposed as before, s[t][i] for all keys t and a
 * panel of queries i. Rounded, rows of p and ds are left rows for dv and dk, and pairs of rows are
 * the panel for y^T and dq^T; so nothing of size [T, T] is transposed, only q^T, dy^T, k^T and v^T
 * are. What is not an operand stays float32: scores, softmax, its sums, and the sums of products.
 *
 * Backward takes the probabilities from lse, p = exp(s - lse), and delta, the sum over keys of p * dp, from
 * dy . y, as a GPU does: so it goes through the scores once, a block at a time, and while one block's are
 * worked on the tiles make the next.
 *
 * What a contraction is filled up with (product_words) is zeros on both sides; rows and columns that
 * nobody asked for are computed in vain. */

#define ATTENTION_ROWS                                                                             \
    32 /* left operands and sums have room for a multiple: the height of AMX tiles */

static inline int64_t attention_rows(int64_t n)
{
    return pm_blocks(n, ATTENTION_ROWS) * ATTENTION_ROWS;
}

/* c[m][PM_NR] = or += m left rows of so many words by a panel. */
static void attention_multiply(product_kind kind, int64_t m, int64_t words, const product_word *a,
                               int64_t lda, const product_word *panel, float *c, int64_t ldc,
                               bool add)
{
#if PM_HAS_AMX
    if (product_is_amx(kind)) {
        const product_amx_fetch none = {.at = {(const char *)panel, (const char *)panel}};
        for (int64_t i = 0; i < m; i += PRODUCT_AMX_SIDE) {
            const product_word *x = a + i * lda;
            const product_amx_left left = {
                {x, m - i > PRODUCT_AMX_ROWS ? x + PRODUCT_AMX_ROWS * lda : NULL},
                lda * (int64_t)sizeof(product_word),
                PRODUCT_AMX_ROWS};
            product_amx_tile(kind)(words / PRODUCT_AMX_ROWS, &left, panel, c + i * ldc, ldc, add,
                                   &none);
        }
        return;
    }
#endif
    const int64_t slices = product_slices(m);
    for (int64_t s = 0; s < slices; s++) {
        const int64_t i = product_cut(m, slices, s), rows = product_cut(m, slices, s + 1) - i;
        const product_word *row[PM_MR];
        for (int64_t l = 0; l < rows; l++)
            row[l] = a + (i + l) * lda;
        const unsigned mode = product_begin(kind);
        product_tile[kind][rows](words, row, panel, c + i * ldc, ldc, add);
        product_end(kind, mode);
    }
}

/* Around the products of a head. */
static inline void attention_begin(product_kind kind)
{
#if PM_HAS_AMX
    product_amx_begin(kind);
#endif
    (void)kind;
}
static inline void attention_end(product_kind kind)
{
#if PM_HAS_AMX
    product_amx_end(kind);
#endif
    (void)kind;
}

/* ---------------------------------------------------------------- operands */

static inline vf attention_get(const float *x, int64_t left)
{
    return left > 0 ? v_get(x, left) : v_zero();
}

/* Left rows out[i] = scale * x[i] of K numbers. */
static void attention_round_rows(product_kind kind, int64_t rows, int64_t K, const float *x,
                                 int64_t ldx, float scale, product_word *out, int64_t ldo)
{
    const bool native = product_native(kind);
    const vf f = v_set(scale);
    for (int64_t i = 0; i < rows; i++, x += ldx, out += ldo)
        for (int64_t c = 0; c < 2 * product_words(kind, K); c += 2 * PM_WIDTH)
            v_store(out + c / 2, v_words(native, attention_get(x + c, K - c) * f,
                                         attention_get(x + c + PM_WIDTH, K - c - PM_WIDTH) * f));
}

/* t[l] = pairs of rows 2l and 2l + 1 of x. */
static inline __attribute__((always_inline)) void attention_pairs(bool native, const float *x,
                                                                  int64_t ldx, vf t[PM_WIDTH])
{
    _Pragma("GCC unroll 16")
    for (int l = 0; l < PM_WIDTH; l++, x += 2 * ldx)
        t[l] = v_pairs(native, v_load(x), v_load(x + ldx));
}

/* Left rows out[j][i] = x[i][j], i < n, j < K. */
static void attention_round_turned(product_kind kind, int64_t n, int64_t K, const float *x,
                                   int64_t ldx, product_word *out, int64_t ldo)
{
    const bool native = product_native(kind);
    for (int64_t i = 0; i < 2 * product_words(kind, n); i += 2 * PM_WIDTH)
        for (int64_t j = 0; j < K; j += PM_WIDTH) {
            const float *from = x + i * ldx + j;
            const int64_t rows = n - i, columns = pm_min(PM_WIDTH, K - j);
            product_word *to = out + j * ldo + i / 2;
            vf t[PM_WIDTH];
            if (rows >= 2 * PM_WIDTH && columns == PM_WIDTH) {
                if (native)
                    attention_pairs(true, from, ldx, t);
                else
                    attention_pairs(false, from, ldx, t);
                v_transpose(t);
                _Pragma("GCC unroll 16")
                for (int l = 0; l < PM_WIDTH; l++)
                    v_store(to + l * ldo, t[l]);
                continue;
            }
            for (int l = 0; l < PM_WIDTH; l++, from += 2 * ldx)
                t[l] = v_pairs(native, 2 * l < rows ? v_get(from, columns) : v_zero(),
                               2 * l + 1 < rows ? v_get(from + ldx, columns) : v_zero());
            v_transpose(t);
            for (int l = 0; l < columns; l++)
                v_store(to + l * ldo, t[l]);
        }
}

/* Zeros behind n numbers of each of T left rows. */
static void attention_fill(product_kind kind, int64_t T, int64_t n, product_word *rows, int64_t ld)
{
    const int64_t bytes = 2 * (2 * product_words(kind, n) - n);
    for (int64_t t = 0; bytes && t < T; t++)
        memset((char *)(rows + t * ld) + 2 * n, 0, (size_t)bytes);
}

/* Zeros behind the T rows of a panel. */
static void attention_fill_panel(product_kind kind, int64_t T, product_word *panel)
{
    for (int64_t w = (T + 1) / 2; w < product_words(kind, T); w++)
        for (int64_t i = 0; i < PM_NR; i += PM_WIDTH)
            v_store(panel + w * PM_NR + i, v_zero());
}

/* ---------------------------------------------------------------- forward */

/* PM_WIDTH columns of T scores to e = exp(s - max), pairs of a panel. Returns their sums. */
static inline vf attention_softmax_rounded(product_kind kind, int64_t T, const float *s, vf max,
                                           product_word *panel, attention_ahead *ahead)
{
    const bool native = product_native(kind);
    vf sum[ATTENTION_SUMS] = {v_zero()};
    const int64_t lines = ahead->lines;
    int64_t step, t = 0;
    const char *from = attention_fetch(ahead, T / ATTENTION_SUMS * lines, &step);
    for (; t + ATTENTION_SUMS <= T; t += ATTENTION_SUMS, s += ATTENTION_SUMS * PM_NR) {
        for (int64_t l = 0; l < lines; l++, from += step)
            __builtin_prefetch(from, 0, 2);
        _Pragma("GCC unroll 2")
        for (int l = 0; l < ATTENTION_SUMS; l += 2, panel += PM_NR) {
            const vf first = attention_exp(v_load(s + l * PM_NR) - max);
            const vf second = attention_exp(v_load(s + (l + 1) * PM_NR) - max);
            v_store(panel, v_pairs(native, first, second));
            sum[l] += first;
            sum[l + 1] += second;
        }
    }
    for (; t < T; t += 2, s += 2 * PM_NR, panel += PM_NR) {
        const vf first = attention_exp(v_load(s) - max);
        const vf second = t + 1 < T ? attention_exp(v_load(s + PM_NR) - max) : v_zero();
        v_store(panel, v_pairs(native, first, second));
        sum[0] += first;
        sum[1] += second;
    }
    return attention_total(sum);
}

/* What a head's panels share: k in left rows, scaled, and v^T in left rows. */
typedef struct {
    product_word *k, *vt;
    int64_t ldk, ldt; /* words between rows of K, of T */
} attention_head;

static attention_head attention_head_take(const attention_job *j, void **scratch)
{
    const int64_t T = j->g->T, K = j->g->K;
    attention_head head = {.ldk = product_row_words(K), .ldt = product_row_words(T)};
    head.k = attention_take(scratch, attention_rows(T) * head.ldk);
    head.vt = attention_take(scratch, attention_rows(K) * head.ldt);
    return head;
}

static void attention_prepare_rounded(const attention_job *j, int64_t head, attention_head to,
                                      float *room)
{
    const pm_attention_args *g = j->g;
    const int64_t T = g->T, K = g->K, D = g->H * K;
    const float *k_in = g->qkv + head / g->H * T * 3 * D + D + head % g->H * K, *v_in = k_in + D;
    for (int64_t t = 0; t < T; t += PM_NR) {
        const int64_t m = pm_min(PM_NR, T - t);
        int64_t ld = 3 * D;
        const float *k = attention_input(&j->k_norm, m, K, k_in + t * ld, &ld, room, j->ldk, NULL);
        attention_round_rows(j->kind, m, K, k, ld, j->scale, to.k + t * to.ldk, to.ldk);
    }
    attention_round_turned(j->kind, T, K, v_in, 3 * D, to.vt, to.ldt);
}

static void attention_forward_rounded(const attention_job *j, int64_t item, void *scratch)
{
    const pm_attention_args *g = j->g;
    const product_kind kind = j->kind;
    const int64_t T = g->T, K = g->K, head = item / j->parts, part = item % j->parts;
    const int64_t b = head / g->H, h = head % g->H, ldy = g->H * K;
    const int64_t words_k = product_words(kind, K), words_t = product_words(kind, T);
    float *room = attention_take(&scratch, PM_NR * j->ldk);
    attention_ahead ahead = {0};

    /* 1. k and v^T, unless they were made for all parts */
    void *own = j->parts == 1 ? scratch : j->heads + (size_t)head * j->head_bytes;
    const attention_head made = attention_head_take(j, &own);
    if (j->parts == 1) {
        scratch = own;
        attention_prepare_rounded(j, head, made, room);
        attention_expect(&ahead, j, item, T * T / (ATTENTION_SUMS * PM_WIDTH));
    }

    product_word *qt = attention_take(&scratch, words_k * PM_NR);
    product_word *e = attention_take(&scratch, words_t * PM_NR);
    float *s = attention_take(&scratch, attention_rows(T) * PM_NR);
    float *yt = attention_take(&scratch, attention_rows(K) * PM_NR);
    attention_begin(kind);
    const int64_t end = product_cut(j->panels, j->parts, part + 1);
    for (int64_t panel = product_cut(j->panels, j->parts, part); panel < end; panel++) {
        const int64_t t = panel * PM_NR, m = pm_min(PM_NR, T - t);
        float inverse[PM_NR], max[PM_NR], sum[PM_NR];

        /* 2. q^T of the panel */
        int64_t ldq = 3 * ldy;
        const float *q = g->qkv + (b * T + t) * ldq + h * K;
        q = attention_input(&j->q_norm, m, K, q, &ldq, room, j->ldk, NULL);
        product_pack_pairs(kind, m, K, q, ldq, qt);

        /* 3. s = k q^T / sqrt(K) and the maxima, block by block; e = exp(s - max) and its sum */
        vf top[PM_NR / PM_WIDTH];
        for (int64_t l = 0; l < T; l += ATTENTION_ROWS) {
            const int64_t rows = pm_min(ATTENTION_ROWS, T - l);
            float *block = s + l * PM_NR;
            attention_multiply(kind, rows, words_k, made.k + l * made.ldk, made.ldk, qt, block,
                               PM_NR, false);
            for (int i = 0; i < PM_NR / PM_WIDTH; i++) {
                const vf max = attention_max(rows, block + i * PM_WIDTH, PM_NR);
                top[i] = l ? v_max(top[i], max) : max;
            }
        }
        for (int i = 0; i * PM_WIDTH < m; i++) {
            const int64_t column = i * PM_WIDTH;
            v_store(max + column, top[i]);
            v_store(sum + column,
                    attention_softmax_rounded(kind, T, s + column, top[i], e + column, &ahead));
        }
        attention_fill_panel(kind, T, e);
        attention_sums(j, head, t, m, max, sum, inverse);

        /* 4. y^T = v^T e / sum */
        attention_multiply(kind, K, words_t, made.vt, made.ldt, e, yt, PM_NR, false);
        attention_transpose(K, m, yt, PM_NR, inverse, g->y + (b * T + t) * ldy + h * K, ldy, false);
    }
    attention_end(kind);
}

/* Scratch of a worker, without what attention_head_take takes. */
static size_t attention_rounded_forward_bytes(const attention_job *j)
{
    const int64_t T = j->g->T, K = j->g->K;
    size_t bytes = attention_floats(PM_NR * j->ldk);              /* room */
    bytes += attention_floats(product_words(j->kind, K) * PM_NR); /* q^T */
    bytes += attention_floats(product_words(j->kind, T) * PM_NR); /* e */
    bytes += attention_floats(attention_rows(T) * PM_NR);         /* s */
    return bytes + attention_floats(attention_rows(K) * PM_NR);   /* y^T */
}
static size_t attention_rounded_head_bytes(const attention_job *j)
{
    const int64_t T = j->g->T, K = j->g->K;
    return attention_floats(attention_rows(T) * product_row_words(K)) +
           attention_floats(attention_rows(K) * product_row_words(T));
}

/* ---------------------------------------------------------------- backward */

/* Everything that a head needs. */
typedef struct {
    product_word *k, *v, *kt; /* left rows: k, scaled, and v; k^T, as it is */
    product_word *qt, *dyt;   /* panels of the queries of a panel */
    product_word *ds_panel;   /* ds, to be multiplied by k^T */
    product_word *p, *ds;     /* left rows: of the queries of a block */
    float *room;              /* [PM_NR][ldk]: q or k, normalised; dq, before it goes back */
    float *q_stats, *k_stats; /* [T, 2], mean and rstd */
    float *dqt, *dk, *dv;
    product_side q, dy; /* panels of a block's queries */
} attention_back;

static attention_back attention_back_take(const attention_job *j, void *scratch)
{
    const product_kind kind = j->kind;
    const int64_t T = j->g->T, K = j->g->K, rows = j->block * PM_NR;
    const int64_t row_k = product_row_words(K), row_t = product_row_words(T);
    const int64_t word_k = product_words(kind, K) * PM_NR, all = attention_rows(T);
    attention_back a;
    a.k = attention_take(&scratch, all * row_k), a.v = attention_take(&scratch, all * row_k);
    a.kt = attention_take(&scratch, attention_rows(K) * row_t);
    a.qt = attention_take(&scratch, word_k), a.dyt = attention_take(&scratch, word_k);
    a.ds_panel = attention_take(&scratch, product_words(kind, T) * PM_NR);
    a.p = attention_take(&scratch, all * product_row_words(rows));
    a.ds = attention_take(&scratch, all * product_row_words(rows));
    a.room = attention_take(&scratch, PM_NR * j->ldk);
    a.q_stats = attention_take(&scratch, 2 * T), a.k_stats = attention_take(&scratch, 2 * T);
    a.dqt = attention_take(&scratch, attention_rows(K) * PM_NR);
    a.dk = attention_take(&scratch, all * j->ldk), a.dv = attention_take(&scratch, all * j->ldk);
    a.q = product_side_take(kind, rows, K, false, &scratch);
    a.dy = product_side_take(kind, rows, K, false, &scratch);
    return a;
}
static size_t attention_rounded_backward_bytes(const attention_job *j)
{
    const product_kind kind = j->kind;
    const int64_t T = j->g->T, K = j->g->K, rows = j->block * PM_NR, all = attention_rows(T);
    size_t bytes = 2 * attention_floats(all * product_row_words(K));     /* k, v */
    bytes += attention_floats(attention_rows(K) * product_row_words(T)); /* k^T */
    bytes += 2 * attention_floats(product_words(kind, K) * PM_NR);       /* q^T, dy^T */
    bytes += attention_floats(product_words(kind, T) * PM_NR);           /* ds */
    bytes += 2 * attention_floats(all * product_row_words(rows));        /* p, ds */
    bytes += attention_floats(PM_NR * j->ldk);                           /* room */
    bytes += 2 * attention_floats(2 * T);                                /* mean, rstd */
    bytes += attention_floats(attention_rows(K) * PM_NR);                /* dq^T */
    bytes += 2 * attention_floats(all * j->ldk);                         /* dk, dv */
    return bytes + 2 * product_side_bytes(kind, rows, K);                /* q, dy */
}

/* m rows from `row` of a block on of q or dy, to the panels of the block. */
static void attention_round_side(product_kind kind, const product_side *side, int64_t row,
                                 int64_t m, int64_t K, const float *x, int64_t ldx)
{
    const float *rows[PM_NR];
    for (int64_t i = 0; i < m; i++)
        rows[i] = x + i * ldx;
    product_side_pack(kind, side, row, m, rows, K, NULL, NULL);
}

/* delta = scale * dy . y of m queries, which is the sum of p * dp over the keys: dy as dp has it, so that
 * a query that gives one key all its weight has ds = 0. */
static void attention_delta(product_kind kind, int64_t m, int64_t K, const float *dy,
                            const float *y, int64_t ld, float scale, float *delta)
{
    const bool native = product_native(kind);
    for (int64_t i = 0; i < m; i++, dy += ld, y += ld) {
        vf sum = v_zero();
        for (int64_t c = 0; c < K; c += PM_WIDTH)
            sum = v_fma(v_rounded(native, v_get(dy + c, K - c)), v_get(y + c, K - c), sum);
        delta[i] = scale * v_sum(sum);
    }
}

/* Scores and dp of some keys and PM_WIDTH queries, at distance PM_NR, to p = exp(s - lse) and
 * ds = p * (scale * dp - delta): both into left rows, at column `at`, and ds into pairs of a panel. */
static inline void attention_softmax_backward_rounded(product_kind kind, int64_t rows,
                                                      const float *s, const float *dp, vf lse,
                                                      vf delta, float scale, product_word *p_row,
                                                      product_word *ds_row, int64_t ld, int64_t at,
                                                      product_word *panel, attention_ahead *ahead)
{
    const bool native = product_native(kind);
    const vf by = v_set(scale);
    char *p_to = (char *)p_row + 2 * at, *ds_to = (char *)ds_row + 2 * at;
    const int64_t step = ld * (int64_t)sizeof(product_word);
    const int64_t lines = ahead->lines;
    int64_t fetch_step;
    const char *from = attention_fetch(ahead, (rows + 1) / 2 * lines, &fetch_step);
    for (int64_t t = 0; t < rows; t += 2, s += 2 * PM_NR, dp += 2 * PM_NR, panel += PM_NR) {
        vf p[2] = {v_zero(), v_zero()}, ds[2] = {v_zero(), v_zero()};
        for (int64_t l = 0; l < lines; l++, from += fetch_step)
            __builtin_prefetch(from, 0, 2);
        _Pragma("GCC unroll 2")
        for (int l = 0; l < 2; l++) {
            if (t + l == rows)
                break;
            p[l] = attention_exp(v_load(s + l * PM_NR) - lse);
            ds[l] = p[l] * v_fma(by, v_load(dp + l * PM_NR), -delta);
        }
        v_store_bf16_two(native, p_to, p_to + step, p[0], p[1]); /* there is room for a last one */
        v_store_bf16_two(native, ds_to, ds_to + step, ds[0], ds[1]);
        v_store(panel, v_pairs(native, ds[0], ds[1]));
        p_to += 2 * step, ds_to += 2 * step;
    }
}

/* The gradient of k or v of a head from the left rows of ds or e and the panels of q or dy. */
static void attention_accumulate(const attention_job *j, const product_word *left, int64_t ld,
                                 const product_side *right, float *c, bool add)
{
    for (int64_t t = 0; t < j->g->T; t += ATTENTION_ROWS)
        for (int64_t p = 0; p < j->g->K; p += PM_NR)
            attention_multiply(j->kind, pm_min(ATTENTION_ROWS, j->g->T - t), right->words,
                               left + t * ld, ld, product_side_at(right, 0, p), c + t * j->ldk + p,
                               j->ldk, add);
}

static void attention_backward_rounded(const attention_job *j, int64_t head, void *scratch)
{
    const pm_attention_args *g = j->g;
    const product_kind kind = j->kind;
    const int64_t T = g->T, K = g->K, b = head / g->H, h = head % g->H;
    const int64_t ldy = g->H * K, ldx = 3 * ldy, at = b * T * ldx + h * K;
    const int64_t words_k = product_words(kind, K), words_t = product_words(kind, T);
    const int64_t row_k = product_row_words(K), row_t = product_row_words(T);
    const int64_t row_block = product_row_words(j->block * PM_NR);
    const float *q_in = g->qkv + at, *k_in = q_in + ldy, *v_in = k_in + ldy;
    const float *dy = j->d->dy + b * T * ldy + h * K, *y = g->y + b * T * ldy + h * K;
    const float *lse = g->lse + head * T;
    float s[ATTENTION_ROWS * PM_NR], dp[ATTENTION_ROWS * PM_NR + 16], delta[PM_NR] = {0};
    float *dq_out = j->d->dqkv ? j->d->dqkv + at : NULL, *dk_out = dq_out ? dq_out + ldy : NULL;
    float *slot = j->slots ? j->slots + head * 4 * j->ldk : NULL;
    attention_back a = attention_back_take(j, scratch);
    attention_ahead ahead = {0};
    attention_expect(&ahead, j, head, T * T / (2 * PM_WIDTH));

    /* 1. k, scaled, and v in rows for the scores and dp, k^T for dq */
    if (slot)
        memset(slot, 0, (size_t)(4 * j->ldk) * sizeof(float));
    for (int64_t t = 0; t < T; t += PM_NR) {
        const int64_t m = pm_min(PM_NR, T - t);
        int64_t ld = ldx;
        const float *k = attention_input(&j->k_norm, m, K, k_in + t * ldx, &ld, a.room, j->ldk,
                                         a.k_stats + 2 * t);
        attention_round_rows(kind, m, K, k, ld, j->scale, a.k + t * row_k, row_k);
        attention_round_turned(kind, m, K, k, ld, a.kt + t / 2, row_t);
    }
    attention_round_rows(kind, T, K, v_in, ldx, 1.0f, a.v, row_k);

    attention_begin(kind);
    for (int64_t first = 0; first < T; first += j->block * PM_NR) {
        const int64_t rows = pm_min(j->block * PM_NR, T - first);
        a.q.words = a.dy.words = product_words(kind, product_side_rows(kind, rows));
        for (int64_t row = 0; row < rows; row += PM_NR) {
            const int64_t m = pm_min(PM_NR, rows - row), t = first + row;
            const float *up = dy + t * ldy;
            int64_t ldq = ldx;
            const float *q = attention_input(&j->q_norm, m, K, q_in + t * ldx, &ldq, a.room, j->ldk,
                                             a.q_stats + 2 * t);

            /* 2. p = exp(s - lse), dp = v dy^T, ds = p * (dp - delta) / sqrt(K) */
            product_pack_pairs(kind, m, K, q, ldq, a.qt);
            product_pack_pairs(kind, m, K, up, ldy, a.dyt);
            attention_round_side(kind, &a.dy, row, m, K, up, ldy);
            attention_round_side(kind, &a.q, row, m, K, q, ldq);
            attention_delta(kind, m, K, up, y + t * ldy, ldy, j->scale, delta);
            for (int64_t l = 0; l < T; l += ATTENTION_ROWS) {
                const int64_t high = pm_min(ATTENTION_ROWS, T - l);
                attention_multiply(kind, high, words_k, a.k + l * row_k, row_k, a.qt, s, PM_NR,
                                   false);
                attention_multiply(kind, high, words_k, a.v + l * row_k, row_k, a.dyt, dp, PM_NR,
                                   false);
                for (int64_t i = 0; i < m; i += PM_WIDTH)
                    attention_softmax_backward_rounded(
                        kind, high, s + i, dp + i, v_get(lse + t + i, m - i), v_load(delta + i),
                        j->scale, a.p + l * row_block, a.ds + l * row_block, row_block, row + i,
                        a.ds_panel + l / 2 * PM_NR + i, &ahead);
            }

            /* 3. dq^T = k^T ds */
            if (!dq_out && !slot)
                continue;
            attention_fill_panel(kind, T, a.ds_panel);
            attention_multiply(kind, K, words_t, a.kt, row_t, a.ds_panel, a.dqt, PM_NR, false);
            if (slot) {
                attention_transpose(K, m, a.dqt, PM_NR, NULL, a.room, j->ldk, true);
                attention_finish(j, m, a.room, q_in, dq_out, &j->q_norm, slot, a.q_stats, t);
            } else {
                attention_transpose(K, m, a.dqt, PM_NR, NULL, dq_out + t * ldx, ldx, false);
            }
        }

        /* 4. dv += p^T dy, dk += ds^T q, over the queries of the block */
        attention_fill(kind, T, rows, a.p, row_block);
        attention_fill(kind, T, rows, a.ds, row_block);
        attention_accumulate(j, a.p, row_block, &a.dy, a.dv, first > 0);
        attention_accumulate(j, a.ds, row_block, &a.q, a.dk, first > 0);
    }
    attention_end(kind);
    attention_write_back(j, a.dk, a.dv, k_in, dk_out, slot, a.k_stats);
}
