/* experts_tiles.h: what experts.c does with the finished tiles of its products. A part of it. */

/* out (=, or += when add) weight * (tile + bias): the end of a product that goes to rows, of D numbers
 * or (swiglu's gate, for experts_pair_tile) of F. */
typedef struct {
    float *out; /* (rows, D or F) */
    int64_t ld;
    const float *bias;   /* (D or F), or NULL */
    const float *weight; /* (rows), or NULL */
    bool add;
} experts_out;

static inline void experts_out_tile(void *arg, int64_t row0, int m, int64_t col0, int64_t n,
                                    float *tile)
{
    const experts_out *t = arg;
    for (int64_t j = 0; j < n; j += PM_WIDTH) {
        vf bias = t->bias ? v_get(t->bias + col0 + j, n - j) : v_zero();
        for (int i = 0; i < m; i++) {
            float *out = t->out + (row0 + i) * t->ld + col0 + j;
            vf y = v_load(tile + i * PM_NR + j) + bias;
            if (t->weight)
                y = y * v_set(t->weight[row0 + i]);
            if (t->add)
                y = y + v_get(out, n - j);
            v_put(out, y, n - j);
        }
    }
}

/* Stores PM_WIDTH numbers at the numbers at.. of a left operand. */
static inline void experts_put(product_kind kind, product_word *row, int64_t at, vf x)
{
    if (kind == PM_FP32)
        v_store(row + at, x);
    else
        product_put(kind, row, at, x);
}

/* h = gelu(tile + bias); the pre-activation is kept when there will be a backward. Nobody reads it
 * until then, so in bf16 it goes past the caches (far) where its rows are whole cache lines: those
 * products are so fast that fetching lines to be overwritten would hold them up. */
typedef struct {
    product_kind kind;
    const float *bias; /* (F), or NULL */
    float *pre;        /* (rows, F), or NULL */
    bool far;
    product_word *h; /* (rows) left operands of F numbers */
    int64_t ld_pre, ld;
    const float *gate; /* swiglu, (rows, F): tile + bias of the gate's product */
    int64_t ld_gate;
} experts_up;

static inline bool experts_is_far(product_kind kind, const float *pre, int64_t ld_pre)
{
    return kind != PM_FP32 && PM_WIDTH == 16 &&
           ((uintptr_t)pre | (uintptr_t)ld_pre * sizeof(float)) % 64 == 0;
}
static inline void experts_keep(const experts_up *t, int64_t row, int64_t col, int64_t left, vf x)
{
    float *to = t->pre + row * t->ld_pre + col;
    if (t->far && left >= PM_WIDTH)
        v_stream(to, x);
    else
        v_put(to, x, left);
}

static inline void experts_up_tile(void *arg, int64_t row0, int m, int64_t col0, int64_t n,
                                   float *tile)
{
    const experts_up *t = arg;
    for (int64_t j = 0; j < n; j += PM_WIDTH) {
        vf bias = t->bias ? v_get(t->bias + col0 + j, n - j) : v_zero();
        for (int i = 0; i < m; i++) {
            vf x = v_load(tile + i * PM_NR + j) + bias;
            if (t->pre)
                experts_keep(t, row0 + i, col0 + j, n - j, x);
            experts_put(t->kind, t->h + (row0 + i) * t->ld, col0 + j, v_gelu(x));
        }
    }
}

/* swiglu, up: h = silu(gate) * (tile + bias). */
static inline void experts_pair_tile(void *arg, int64_t row0, int m, int64_t col0, int64_t n,
                                     float *tile)
{
    const experts_up *t = arg;
    for (int64_t j = 0; j < n; j += PM_WIDTH) {
        vf bias = t->bias ? v_get(t->bias + col0 + j, n - j) : v_zero();
        for (int i = 0; i < m; i++) {
            vf x = v_load(tile + i * PM_NR + j) + bias;
            vf gate = v_get(t->gate + (row0 + i) * t->ld_gate + col0 + j, n - j);
            if (t->pre)
                experts_keep(t, row0 + i, col0 + j, n - j, x);
            experts_put(t->kind, t->h + (row0 + i) * t->ld, col0 + j, v_silu(gate) * x);
        }
    }
}

/* tile = dh: h from pre, dot += dh * h, dpre = weight * dh * dh/dpre. Halves: those of dpre. */
typedef struct {
    product_kind kind;
    const float *pre, *weight; /* (rows, halves * F); (rows) or NULL */
    int64_t ld_pre, F;
    product_word *dpre[2]; /* (rows) left operands of F numbers, at distance ld */
    int64_t ld;
    const product_side *dpre_side, *h_side; /* (halves); the rows begin at row0 */
    int64_t row0;
    float *sum;                /* (halves, F) += sum of dpre over the rows */
    vf dot[PRODUCT_MOST_ROWS]; /* lanes of <dh, h> of each row */
} experts_hidden;

/* One row's columns col ..; left of them are there. Returns h. */
static inline __attribute__((always_inline)) vf experts_hidden_row(experts_hidden *t, int halves,
                                                                   int64_t row, int64_t col,
                                                                   int64_t left, const float *tile,
                                                                   vf *dpre)
{
    const float *pre = t->pre + row * t->ld_pre + col;
    __builtin_prefetch(pre + PM_NR, 0, 2); /* of the next panel */
    vf slope, h, dh = v_load(tile), x = v_get(pre, left);
    if (halves == 1) {
        h = v_gelu_slope(x, &slope);
        dpre[0] = dh * slope;
    } else {
        __builtin_prefetch(pre + t->F + PM_NR, 0, 2);
        const vf gate = v_silu_slope(x, &slope), up = v_get(pre + t->F, left);
        h = gate * up;
        dpre[0] = dh * up * slope;
        dpre[1] = dh * gate;
    }
    t->dot[row] = v_fma(dh, h, t->dot[row]);
    for (int half = 0; half < halves && t->weight; half++)
        dpre[half] *= v_set(t->weight[row]);
    return h;
}

static inline __attribute__((always_inline)) void experts_hidden_rows(experts_hidden *t, int halves,
                                                                      int64_t row0, int m,
                                                                      int64_t col0, int64_t n,
                                                                      const float *tile)
{
    for (int64_t j = 0; j < PM_NR; j += PM_WIDTH) {
        const int64_t col = col0 + j, left = n - j;
        vf sum[2] = {0};
        for (int64_t i = 0; i < m; i += 2) {
            vf h[2] = {0}, dpre[2][2] = {0}; /* of two rows; dpre: [row][half] */
            for (int k = 0; k < 2; k++)
                if (left > 0 && i + k < m)
                    h[k] = experts_hidden_row(t, halves, row0 + i + k, col, left,
                                              tile + (i + k) * PM_NR + j, dpre[k]);
            for (int half = 0; half < halves; half++) {
                for (int64_t k = 0; k < 2 && i + k < m; k++)
                    experts_put(t->kind, t->dpre[half] + (row0 + i + k) * t->ld, col,
                                dpre[k][half]);
                product_side_put(t->kind, &t->dpre_side[half], t->row0 + row0 + i, col,
                                 dpre[0][half], dpre[1][half]);
                sum[half] += dpre[0][half] + dpre[1][half];
            }
            product_side_put(t->kind, t->h_side, t->row0 + row0 + i, col, h[0], h[1]);
        }
        for (int half = 0; half < halves; half++)
            product_side_close(t->kind, &t->dpre_side[half], t->row0 + row0, m, col);
        product_side_close(t->kind, t->h_side, t->row0 + row0, m, col);
        for (int half = 0; half < halves && left > 0; half++) {
            float *to = t->sum + half * t->F + col;
            v_put(to, v_get(to, left) + sum[half], left);
        }
    }
}
static inline void experts_hidden_tile(void *arg, int64_t row0, int m, int64_t col0, int64_t n,
                                       float *tile)
{
    experts_hidden_rows(arg, 1, row0, m, col0, n, tile);
}
static inline void experts_hidden_pair_tile(void *arg, int64_t row0, int m, int64_t col0, int64_t n,
                                            float *tile)
{
    experts_hidden_rows(arg, 2, row0, m, col0, n, tile);
}
