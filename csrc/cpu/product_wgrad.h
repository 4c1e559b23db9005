/* product_wgrad.h: the weight gradient. A part of product.h.
 *
 * dW += dy^T x is a product whose depth is the rows. Both of its sides are packed alike, in panels of
 * PM_NR columns, panel[row][PM_NR], with words along the rows. Whoever has the rows in cache packs
 * them; the tasks of the gradient then read only what they multiply, in the order in which it lies
 * in memory. Rows are put in pairs, whatever the kind, and a row of zeros stands behind an odd one.
 *
 * Where the time of a backward pass goes (AVX-512, 2048 rows, widths 384 and 768 or 1152, both threads; %):
 *
 *                             experts, fp32  linear, fp32  experts, bf16  linear, bf16
 *   products of dx: tiles             41            44             26            24
 *   their ends (dGELU, sides)          5             1             22             2
 *   packing, rounding, gather          3             6              9            22
 *   weight gradients: tiles           44            46             34            43
 *   between these tiles                4             3              4             4
 *
 * In fp32 tiles run at 90 to 100 % of the multiply-adds' peak, so little else is left. In bf16 those of
 * gradients take three times what the tile registers need: a routed expert adds some 150 rows to 1.2 MB
 * that are in no cache; 32 x 32 numbers of them are 4 KB to read and to write for 320 clocks of products.
 *
 * AMX multiplies 32 rows at a time, so zeros stand up to a multiple of 32; and its left tiles are
 * transposed: of a left side (dy), 16 columns of 32 rows are 16 rows of 16 words. */

typedef struct {
    product_word *at; /* [panel][words][PM_NR]; turned: [16 columns][16 words][column][word] */
    int64_t words;    /* of a panel */
    bool far;         /* other threads read it, when the caches have seen much else */
    bool turned;      /* the left side of AMX */
} product_side;

/* Rows of a side: so many, and the zeros behind them. The rows of a product begin at a multiple. */
static inline int64_t product_side_rows(product_kind kind, int64_t rows)
{
    const int64_t multiple = pm_max(2, product_multiple(kind));
    return pm_blocks(rows, multiple) * multiple;
}

/* A side of rows of n numbers. */
static inline size_t product_side_bytes(product_kind kind, int64_t rows, int64_t n)
{
    return product_panel_bytes(kind, n, product_side_rows(kind, rows));
}
static inline product_side product_side_take(product_kind kind, int64_t rows, int64_t n, bool far,
                                             void **scratch)
{
    void *at = pm_take(scratch, product_side_bytes(kind, rows, n));
    return (product_side){at, product_words(kind, product_side_rows(kind, rows)), far, false};
}
/* The same for the side whose columns become the rows of the gradient. */
static inline product_side product_side_take_left(product_kind kind, int64_t rows, int64_t n,
                                                  bool far, void **scratch)
{
    product_side side = product_side_take(kind, rows, n, far, scratch);
    side.turned = product_is_amx(kind);
    side.far = far && !side.turned; /* it is read again at once, to be turned */
    return side;
}

/* Where the columns col .. col+PM_WIDTH-1 of a word go. */
static inline product_word *product_side_at(const product_side *side, int64_t word, int64_t col)
{
    if (side->turned) /* a word is a row of the tile, until it is closed */
        return side->at + (col / PM_WIDTH * side->words + word) * PM_WIDTH;
    return side->at + (col / PM_NR * side->words + word) * PM_NR + col % PM_NR;
}

/* Puts the columns col .. col+PM_WIDTH-1 of rows row (an even one) and row + 1. What is far goes past the
 * caches: v_stream_end comes before anyone reads it. */
static inline void product_side_put(product_kind kind, const product_side *side, int64_t row,
                                    int64_t col, vf first, vf second)
{
    product_word *to = product_side_at(side, row / product_per_word(kind), col);
    if (kind == PM_FP32) {
        v_store_line(to, first, side->far);
        v_store_line(to + PM_NR, second, side->far);
    } else {
        v_store_line(to, v_pairs(product_native(kind), first, second), side->far);
    }
}

/* After the rows row0 .. row0+m-1 of the columns col .. col+PM_WIDTH-1 were put, where row0 and
 * row0+m are those of a slice: makes tiles of them. */
static inline void product_side_close(product_kind kind, const product_side *side, int64_t row0,
                                      int64_t m, int64_t col)
{
    if (!product_is_amx(kind))
        return;
    const int64_t words = (m + 1) / 2;
    for (int64_t w = 0; w < words; w += PM_WIDTH) {
        for (int64_t i = words; i < w + PM_WIDTH; i++)
            v_store(product_side_at(side, row0 / 2 + i, col), v_zero());
        if (!side->turned)
            continue;
        product_word *tile = product_side_at(side, row0 / 2 + w, col);
        vf t[PM_WIDTH];
        _Pragma("GCC unroll 16")
        for (int i = 0; i < PM_WIDTH; i++)
            t[i] = v_load(tile + i * PM_WIDTH);
        v_transpose(t);
        _Pragma("GCC unroll 16")
        for (int i = 0; i < PM_WIDTH; i++)
            v_store(tile + i * PM_WIDTH, t[i]);
    }
}

/* Rows read side by side: long reads and long writes; or a tile's. */
static inline int64_t product_side_step(product_kind kind)
{
    return product_is_amx(kind) ? PRODUCT_DEPTH_AMX : 8;
}

/* Packs m rows x[i] of n floats, times scale[i] when scale is given, as rows row0.. of a side: those
 * of whole slices. Their sum is added to sum[0..n), unless that is NULL. */
static inline void product_side_pack(product_kind kind, const product_side *side, int64_t row0,
                                     int64_t m, const float *const *x, int64_t n,
                                     const float *scale, float *sum)
{
    const int64_t step = product_side_step(kind);
    for (int64_t b = 0; b < m; b += step)
        for (int64_t col = 0; col < product_panels(n) * PM_NR; col += PM_WIDTH) {
            const int64_t left = n - col, end = pm_min(m, b + step);
            vf total = v_zero();
            for (int64_t i = b; i < end; i += 2) {
                vf first = left > 0 ? v_get(x[i] + col, left) : v_zero();
                vf second = left > 0 && i + 1 < m ? v_get(x[i + 1] + col, left) : v_zero();
                if (scale) {
                    first *= v_set(scale[i]);
                    second *= v_set(i + 1 < m ? scale[i + 1] : 0.0f);
                }
                product_side_put(kind, side, row0 + i, col, first, second);
                total += first + second;
            }
            product_side_close(kind, side, row0 + b, end - b, col);
            if (sum && left > 0)
                v_put(sum + col, v_get(sum + col, left) + total, left);
        }
}

/* db[f] += sum over the blocks b of sums[b*ld + f], f0 <= f < f1: what product_side_pack left. */
static void product_add_sums(int64_t blocks, const float *sums, int64_t ld, int64_t f0, int64_t f1,
                             float *db)
{
    for (int64_t f = f0; f < f1; f += PM_WIDTH) {
        const int64_t left = f1 - f;
        vf total = v_zero();
        for (int64_t b0 = 0; b0 < blocks; b0 += 64) { /* 64 at a time: smaller errors */
            vf part = v_zero();
            for (int64_t b = b0; b < pm_min(blocks, b0 + 64); b++)
                part += v_get(sums + b * ld + f, left);
            total += part;
        }
        v_put(db + f, v_get(db + f, left) + total, left);
    }
}

/* How the gradient (F, D) of a product of so many rows is cut into tasks: by ranges of whole panels
 * of both sides. */
typedef struct {
    int64_t F, D, left_tasks, right_tasks;
} product_wgrad_grid;
typedef struct {
    int64_t f0, f1, d0, d1;
} product_wgrad_share;

#define PRODUCT_WGRAD_WORK ((int64_t)1 << 24) /* multiply-adds of a task, at most: 0.15 ms */

/* n dealt to tasks of about size: how many tasks. */
static inline int64_t product_deal(int64_t n, int64_t size)
{
    return pm_max(1, (n + size / 2) / size);
}

/* work: the multiply-adds of the whole phase. There should be enough tasks; but a large one reads
 * less, F + D numbers a row for F * D multiply-adds, so they are near squares. */
static product_wgrad_grid product_wgrad_grid_of(product_kind kind, int64_t F, int64_t D,
                                                int64_t rows, double work)
{
    const int64_t left = product_panels(F), right = product_panels(D);
    const double share = work / (double)(product_tasks_wanted(kind) / 2);
    const int64_t most = PRODUCT_WGRAD_WORK / PRODUCT_WORK * product_work(kind);
    const int64_t size = share < (double)most ? pm_max(product_work(kind), (int64_t)share) : most;
    const int64_t area = pm_max(1, size / (pm_max(1, rows) * PM_NR * PM_NR));
    const int64_t right_tasks = product_deal(right, (int64_t)ceil(sqrt((double)area)));
    const int64_t wide = pm_max(1, pm_blocks(right, right_tasks));
    return (product_wgrad_grid){F, D, product_deal(left, pm_max(1, product_deal(area, wide))),
                                right_tasks};
}
static inline int64_t product_wgrad_tasks(const product_wgrad_grid *g)
{
    return g->left_tasks * g->right_tasks;
}
static product_wgrad_share product_wgrad_share_of(const product_wgrad_grid *g, int64_t task)
{
    const int64_t l = task / g->right_tasks, r = task % g->right_tasks;
    const int64_t left = product_panels(g->F), right = product_panels(g->D);
    return (product_wgrad_share){
        PM_NR * product_cut(left, g->left_tasks, l),
        pm_min(g->F, PM_NR * product_cut(left, g->left_tasks, l + 1)),
        PM_NR * product_cut(right, g->right_tasks, r),
        pm_min(g->D, PM_NR * product_cut(right, g->right_tasks, r + 1)),
    };
}

/* What a tile fetches into L2 meanwhile, from two places: so many bytes of each per word. (It goes by
 * pointer: a copy would be loaded as vectors from the numbers just stored, and such a load waits until
 * every store before it, those of the last tile, has reached the cache.) */
typedef struct {
    const char *left, *right;
    int64_t left_step, right_step;
} product_fetch;

/* c[i][0..PM_NR) += sum over w < n of left[w][i] * right[w][0..PM_NR), i < m <= PM_MR; left is within
 * a panel. next is where the next tile goes to. Every second word fetches: it is rarely
 * more than half a line a word, and a fetch takes the slot of a load. */
/* clang-format takes the macros of this body for types. */
/* clang-format off */
#define PRODUCT_WGRAD_TILE(kind, m)                                                                \
    static void product_wgrad_##kind##_##m(int64_t n, const product_word *left,                    \
                                           const product_word *right, float *c, int64_t ldc,       \
                                           const float *next, const product_fetch *fetch)          \
    {                                                                                              \
        vf t[m][2];                                                                                \
        const char *left_ahead = fetch->left, *right_ahead = fetch->right;                         \
        const int64_t left_step = 2 * fetch->left_step, right_step = 2 * fetch->right_step;        \
        _Pragma("GCC unroll 16") for (int i = 0; i < m; i++)                                       \
        {                                                                                          \
            t[i][0] = t[i][1] = v_zero();                                                          \
            __builtin_prefetch(next + i * ldc, 1);                                                 \
            __builtin_prefetch(next + i * ldc + PM_NR - 1, 1);                                     \
        }                                                                                          \
        _Pragma("GCC unroll 2") for (int64_t w = 0; w < n; w++, left += PM_NR, right += PM_NR)     \
        {                                                                                          \
            vf b0 = v_load(right), b1 = v_load(right + PM_WIDTH);                                  \
            if (w % 2 == 0) {                                                                      \
                __builtin_prefetch(left_ahead, 0, 2);                                              \
                __builtin_prefetch(right_ahead, 0, 2);                                             \
                left_ahead += left_step;                                                           \
                right_ahead += right_step;                                                         \
            }                                                                                      \
            _Pragma("GCC unroll 16") for (int i = 0; i < m; i++)                                   \
                PRODUCT_ROW_##kind(i, t[i], left + i, b0, b1);                                     \
        }                                                                                          \
        _Pragma("GCC unroll 16") for (int i = 0; i < m; i++)                                       \
        {                                                                                          \
            float *row = c + i * ldc;                                                              \
            v_store(row, v_load(row) + t[i][0]);                                                   \
            v_store(row + PM_WIDTH, v_load(row + PM_WIDTH) + t[i][1]);                             \
        }                                                                                          \
    }
/* clang-format on */
#define PRODUCT_WGRAD_fp32(kind, m) PRODUCT_WGRAD_TILE(fp32, m)
#define PRODUCT_WGRAD_bf16(kind, m) PRODUCT_WGRAD_TILE(bf16, m)
#define PRODUCT_WGRAD_emulated(kind, m) PRODUCT_WGRAD_TILE(emulated, m)
PRODUCT_HEIGHTS(PRODUCT_WGRAD_fp32, )
PRODUCT_HEIGHTS(PRODUCT_WGRAD_emulated, )
#if PM_HAS_BF16
PRODUCT_HEIGHTS(PRODUCT_WGRAD_bf16, )
#endif

typedef void (*product_wgrad_fn)(int64_t n, const product_word *left, const product_word *right,
                                 float *c, int64_t ldc, const float *next,
                                 const product_fetch *fetch);
static const product_wgrad_fn product_wgrad_tile[PM_COMPUTES][PM_MR + 1] = PRODUCT_TABLE(wgrad);

#define PRODUCT_PARTS ((PM_NR + PM_MR - 1) / PM_MR) /* tiles of a panel of the left side */
#define PRODUCT_DEPTH (6144 / PM_NR) /* words at a time: 24 KiB of a panel stay in L1 */

#if PM_HAS_AMX
static void product_amx_wgrad(product_kind kind, const product_side *left,
                              const product_side *right, int64_t row0, int64_t rows,
                              product_wgrad_share share, float *dw, int64_t ldw);
#endif

/* dw[f][d] += sum over the rows row0 .. row0+rows-1 (row0 as of product_side_rows) of left[row][f] * right[row][d] for
 * one task's share; dw row f is at dw + f*ldw. The rows are summed in order, in near-equal chunks of
 * at most PRODUCT_DEPTH words. */
static void product_wgrad(product_kind kind, const product_side *left, const product_side *right,
                          int64_t row0, int64_t rows, product_wgrad_share share, float *dw,
                          int64_t ldw)
{
#if PM_HAS_AMX
    if (product_is_amx(kind)) {
        product_amx_wgrad(kind, left, right, row0, rows, share, dw, ldw);
        return;
    }
#endif
    const int64_t line = PM_NR * (int64_t)sizeof(product_word);
    const int64_t left_panel = left->words * PM_NR, right_panel = right->words * PM_NR;
    const int64_t words = product_words(kind, rows), chunks = pm_blocks(words, PRODUCT_DEPTH);
    const int64_t first = row0 / product_per_word(kind);
    const int64_t highs = product_panels(share.f1 - share.f0),
                  wides = product_panels(share.d1 - share.d0);
    const product_word *l0 = left->at + (share.f0 / PM_NR * left->words + first) * PM_NR;
    const product_word *r0 = right->at + (share.d0 / PM_NR * right->words + first) * PM_NR;
    float edge[PM_MR * PM_NR] __attribute__((aligned(64))); /* the tile of a partial panel */
    for (int64_t chunk = 0; chunk < chunks; chunk++) {
        const int64_t w0 = product_cut(words, chunks, chunk),
                      n = product_cut(words, chunks, chunk + 1) - w0;
        const int64_t later = chunk + 1 < chunks ? w0 + n : w0; /* the next chunk, or this one */
        for (int64_t p = 0; p < wides; p++) {
            const product_word *panel = r0 + p * right_panel + w0 * PM_NR;
            const product_word *next_panel = p + 1 < wides ? panel + right_panel
                                                           : r0 + later * PM_NR;
            const int64_t d = share.d0 + p * PM_NR;
            const bool fresh = chunk == 0 && p == 0; /* nobody has fetched the left side */
            const int64_t tiles = PRODUCT_PARTS * (fresh ? 1 : pm_max(1, wides - (chunk == 0)));
            product_fetch fetch = {.right = (const char *)next_panel,
                                   .right_step = pm_blocks(line, PRODUCT_PARTS * pm_max(1, highs)),
                                   .left_step = pm_blocks(line, tiles)};
            for (int64_t s = 0; s < highs; s++) {
                const product_word *slice = l0 + s * left_panel + w0 * PM_NR;
                const int64_t f = share.f0 + s * PM_NR, high = pm_min(PM_NR, share.f1 - f);
                if (fresh) /* the next panel */
                    fetch.left = (const char *)(s + 1 < highs ? slice + left_panel : slice);
                else /* a part of the next chunk of this one */
                    fetch.left = (const char *)(slice + (later - w0) * PM_NR) +
                                 (p - (chunk == 0)) * PRODUCT_PARTS * fetch.left_step * n;
                int64_t parts = product_slices(high);
                for (int64_t i0 = 0, m; i0 < high; i0 += m, parts--) {
                    m = pm_blocks(high - i0, parts);
                    float *c = dw + (f + i0) * ldw + d;
                    const unsigned mode = product_begin(kind);
                    if (share.d1 - d >= PM_NR) {
                        const bool last = s + 1 == highs && parts == 1;
                        const float *next = last ? dw + share.f0 * ldw + d + PM_NR : c + m * ldw;
                        product_wgrad_tile[kind][m](n, slice + i0, panel, c, ldw, next, &fetch);
                        product_end(kind, mode);
                    } else {
                        memset(edge, 0, sizeof edge);
                        product_wgrad_tile[kind][m](n, slice + i0, panel, edge, PM_NR, edge,
                                                    &fetch);
                        product_end(kind, mode);
                        for (int64_t i = 0; i < m; i++)
                            for (int64_t j = 0; j < share.d1 - d; j++)
                                c[i * ldw + j] += edge[i * PM_NR + j];
                    }
                    fetch.left += fetch.left_step * n;
                    fetch.right += fetch.right_step * n;
                }
            }
        }
    }
}
