/* attention_bf16.h: heads whose products have operands of bf16. A part of attention.c.
 *
 * The same steps in the same order as there, on operands of words (product.h): rows of words from the
 * left, panels of them from the right. Scores come transposed as before, s[t][i] for all keys t and a
 * panel of queries i. Rounded, rows of e and ds are left rows for dv and dk, and pairs of rows are
 * the panel for y^T and dq^T; so nothing of size [T, T] is transposed, only q^T, dy^T, k^T and v^T
 * are. What is not an operand stays float32: scores, softmax, its sums, and the sums of products.
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
                               bool add, attention_ahead *ahead)
{
#if PM_HAS_AMX
    if (product_is_amx(kind)) {
        const product_amx_fetch none = {{(const char *)panel, (const char *)panel}, 0};
        for (int64_t i = 0; i < m; i += PRODUCT_AMX_SIDE) {
            const product_word *x = a + i * lda;
            const product_amx_left left = {
                {x, m - i > PRODUCT_AMX_ROWS ? x + PRODUCT_AMX_ROWS * lda : NULL},
                lda * (int64_t)sizeof(product_word),
                PRODUCT_AMX_ROWS};
            attention_fetch_lines(ahead);
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
        attention_fetch_lines(ahead);
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

/* Left rows out[j][i] = x[i][j], i < n, j < K. */
static void attention_round_turned(product_kind kind, int64_t n, int64_t K, const float *x,
                                   int64_t ldx, product_word *out, int64_t ldo)
{
    const bool native = product_native(kind);
    for (int64_t i = 0; i < 2 * product_words(kind, n); i += 2 * PM_WIDTH)
        for (int64_t j = 0; j < K; j += PM_WIDTH) {
            const float *from = x + i * ldx + j;
            const int64_t rows = n - i, columns = pm_min(PM_WIDTH, K - j);
            vf row[PM_WIDTH];
            if (rows >= 2 * PM_WIDTH && columns == PM_WIDTH) {
                for (int l = 0; l < PM_WIDTH; l++, from += 2 * ldx)
                    row[l] = v_pairs(native, v_load(from), v_load(from + ldx));
            } else {
                for (int l = 0; l < PM_WIDTH; l++, from += 2 * ldx)
                    row[l] = v_pairs(native, 2 * l < rows ? v_get(from, columns) : v_zero(),
                                     2 * l + 1 < rows ? v_get(from + ldx, columns) : v_zero());
            }
            v_transpose(row);
            for (int l = 0; l < columns; l++)
                v_store(out + (j + l) * ldo + i / 2, row[l]);
        }
}

/* PM_WIDTH columns of T rows at distance PM_NR: x[t] as a panel, and as column `at` of left rows; each
 * unless it is NULL. */
static inline void attention_round_scores(product_kind kind, int64_t T, const float *x,
                                          product_word *panel, product_word *rows, int64_t ld,
                                          int64_t at)
{
    const bool native = product_native(kind);
    const int64_t words = product_words(kind, T);
    for (int64_t t = 0; t < T; t += 2, x += 2 * PM_NR) {
        const vf first = v_load(x), second = t + 1 < T ? v_load(x + PM_NR) : v_zero();
        if (panel)
            v_store(panel + t / 2 * PM_NR, v_pairs(native, first, second));
        if (rows) {
            product_put(kind, rows + t * ld, at, first);
            product_put(kind, rows + (t + 1) * ld, at, second); /* there is room for it */
        }
    }
    for (int64_t w = (T + 1) / 2; panel && w < words; w++)
        v_store(panel + w * PM_NR, v_zero());
}

/* Zeros behind n numbers of each of T left rows. */
static void attention_fill(product_kind kind, int64_t T, int64_t n, product_word *rows, int64_t ld)
{
    const int64_t bytes = 2 * (2 * product_words(kind, n) - n);
    for (int64_t t = 0; bytes && t < T; t++)
        memset((char *)(rows + t * ld) + 2 * n, 0, (size_t)bytes);
}

/* ---------------------------------------------------------------- forward */

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
        attention_expect(&ahead, j, item, j->panels * (pm_blocks(T, 32) + pm_blocks(K, 32)));
    }

    product_word *qt = attention_take(&scratch, words_k * PM_NR);
    product_word *e = attention_take(&scratch, words_t * PM_NR);
    float *s = attention_take(&scratch, attention_rows(T) * PM_NR);
    float *yt = attention_take(&scratch, attention_rows(K) * PM_NR);
    attention_begin(kind);
    const int64_t end = product_cut(j->panels, j->parts, part + 1);
    for (int64_t panel = product_cut(j->panels, j->parts, part); panel < end; panel++) {
        const int64_t t = panel * PM_NR, m = pm_min(PM_NR, T - t);
        float inverse[PM_NR];

        /* 2. q^T of the panel */
        int64_t ldq = 3 * ldy;
        const float *q = g->qkv + (b * T + t) * ldq + h * K;
        q = attention_input(&j->q_norm, m, K, q, &ldq, room, j->ldk, NULL);
        product_pack_pairs(kind, m, K, q, ldq, qt);

        /* 3. s = k q^T / sqrt(K); e = exp(s - max) and its sum */
        attention_multiply(kind, T, words_k, made.k, made.ldk, qt, s, PM_NR, false, &ahead);
        attention_softmax_panel(j, head, t, m, s, inverse);
        for (int64_t i = 0; i < m; i += PM_WIDTH)
            attention_round_scores(kind, T, s + i, e + i, NULL, 0, 0);

        /* 4. y^T = v^T e / sum */
        attention_multiply(kind, K, words_t, made.vt, made.ldt, e, yt, PM_NR, false, &ahead);
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
    float *s, *dp;            /* [T][PM_NR] */
    product_word *ds_panel;   /* ds, to be multiplied by k^T */
    product_word *e, *ds;     /* left rows: of the queries of a block */
    float *room;              /* [PM_NR][ldk]: q or k, normalised; dq, before it goes back */
    float *inverse, *scaled;  /* 1 / sum, and the same by 1 / sqrt(K): of a block */
    float *q_stats, *k_stats; /* [T, 2], mean and rstd */
    float *dqt, *dk, *dv;
    product_side q, dy; /* panels of a block's queries, times scaled and inverse */
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
    a.s = attention_take(&scratch, all * PM_NR), a.dp = attention_take(&scratch, all * PM_NR);
    a.ds_panel = attention_take(&scratch, product_words(kind, T) * PM_NR);
    a.e = attention_take(&scratch, all * product_row_words(rows));
    a.ds = attention_take(&scratch, all * product_row_words(rows));
    a.room = attention_take(&scratch, PM_NR * j->ldk);
    a.inverse = attention_take(&scratch, rows), a.scaled = attention_take(&scratch, rows);
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
    bytes += 2 * attention_floats(all * PM_NR);                          /* s, dp */
    bytes += attention_floats(product_words(kind, T) * PM_NR);           /* ds */
    bytes += 2 * attention_floats(all * product_row_words(rows));        /* e, ds */
    bytes += attention_floats(PM_NR * j->ldk);                           /* room */
    bytes += 2 * attention_floats(rows);                                 /* inverse, scaled */
    bytes += 2 * attention_floats(2 * T);                                /* mean, rstd */
    bytes += attention_floats(attention_rows(K) * PM_NR);                /* dq^T */
    bytes += 2 * attention_floats(all * j->ldk);                         /* dk, dv */
    return bytes + 2 * product_side_bytes(kind, rows, K);                /* q, dy */
}

/* m rows from `row` of a block on of q or dy, times factor, to the panels of the block. */
static void attention_round_side(product_kind kind, const product_side *side, int64_t row,
                                 int64_t m, int64_t K, const float *x, int64_t ldx,
                                 const float *factor)
{
    const float *rows[PM_NR];
    for (int64_t i = 0; i < m; i++)
        rows[i] = x + i * ldx;
    product_side_pack(kind, side, row, m, rows, K, factor + row, NULL);
}

/* The gradient of k or v of a head from the left rows of ds or e and the panels of q or dy. */
static void attention_accumulate(const attention_job *j, const product_word *left, int64_t ld,
                                 const product_side *right, float *c, bool add,
                                 attention_ahead *ahead)
{
    for (int64_t p = 0; p < j->g->K; p += PM_NR)
        attention_multiply(j->kind, j->g->T, right->words, left, ld, product_side_at(right, 0, p),
                           c + p, j->ldk, add, ahead);
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
    const float *dy = j->d->dy + b * T * ldy + h * K;
    float *dq_out = j->d->dqkv ? j->d->dqkv + at : NULL, *dk_out = dq_out ? dq_out + ldy : NULL;
    float *slot = j->slots ? j->slots + head * 4 * j->ldk : NULL;
    attention_back a = attention_back_take(j, scratch);
    attention_ahead ahead = {0};
    attention_expect(&ahead, j, head,
                     j->panels * (2 * pm_blocks(T, 32) + pm_blocks(K, 32)) +
                         2 * pm_blocks(T, 32) * pm_blocks(K, 32));

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

            /* 2. e = exp(s - max), dp = v dy^T, ds = e * (dp - delta) */
            product_pack_pairs(kind, m, K, q, ldq, a.qt);
            product_pack_pairs(kind, m, K, up, ldy, a.dyt);
            attention_multiply(kind, T, words_k, a.k, row_k, a.qt, a.s, PM_NR, false, &ahead);
            attention_multiply(kind, T, words_k, a.v, row_k, a.dyt, a.dp, PM_NR, false, &ahead);
            for (int64_t i = 0; i < m; i += PM_WIDTH) {
                const vf inverse = attention_softmax_backward(T, a.s + i, a.dp + i, PM_NR);
                v_store(a.inverse + row + i, inverse);
                v_store(a.scaled + row + i, inverse * v_set(j->scale));
                attention_round_scores(kind, T, a.s + i, NULL, a.e, row_block, row + i);
                attention_round_scores(kind, T, a.dp + i, a.ds_panel + i, a.ds, row_block, row + i);
            }
            attention_round_side(kind, &a.dy, row, m, K, up, ldy, a.inverse);
            attention_round_side(kind, &a.q, row, m, K, q, ldq, a.scaled);

            /* 3. dq^T = k^T ds */
            if (!dq_out && !slot)
                continue;
            attention_multiply(kind, K, words_t, a.kt, row_t, a.ds_panel, a.dqt, PM_NR, false,
                               &ahead);
            if (slot) {
                attention_transpose(K, m, a.dqt, PM_NR, a.scaled + row, a.room, j->ldk, true);
                attention_finish(j, m, a.room, q_in, dq_out, &j->q_norm, slot, a.q_stats, t);
            } else {
                attention_transpose(K, m, a.dqt, PM_NR, a.scaled + row, dq_out + t * ldx, ldx,
                                    false);
            }
        }

        /* 4. dv += p^T dy, dk += ds^T q, over the queries of the block */
        attention_fill(kind, T, rows, a.e, row_block);
        attention_fill(kind, T, rows, a.ds, row_block);
        attention_accumulate(j, a.e, row_block, &a.dy, a.dv, first > 0, &ahead);
        attention_accumulate(j, a.ds, row_block, &a.q, a.dk, first > 0, &ahead);
    }
    attention_end(kind);
    attention_write_back(j, a.dk, a.dv, k_in, dk_out, slot, a.k_stats);
}
