/* product.h: the one product family. Everything that multiplies matrices goes through here.
 *
 * The right operand is packed in panels of PM_NR columns, panel[k][PM_NR], zero padded; the left
 * operand is read in place, each row through its own pointer (that is the gather). A tile is at
 * most PM_MR rows of one panel: its accumulators live in registers over the whole of k, so a row's
 * result does not depend on which rows share its tile. Included once per level.
 *
 * There are three kinds of products, those of pm_compute; sums are fp32 in all of them. Operands
 * are made of words of 4 bytes: one float, or two bf16 that are neighbours along k, the first in
 * the low half, and a zero behind an odd k. So panels, tiles and their loops are the same for
 * every kind: only packing and the multiply-add know the difference.
 *
 * Sizes: AVX-512 14x32 = 28 of 32 registers, AVX2 6x16 = 12 of 16, generic 6x8 = 12 of 16. */

#if PM_WIDTH == 16
#define PM_MR 14
#elif PM_WIDTH == 8
#define PM_MR 6
#else
#define PM_MR 6
#endif
#define PM_NR (2 * PM_WIDTH)
#define PM_ROWS (PM_MR == 14 ? 84 : 48) /* rows of a block that stays in L2 under a panel in L1 */

/* A word, whatever is in it: it is moved as a float, which changes no bit. */
typedef float product_word;

/* Words of k numbers. */
static inline int64_t product_words(pm_compute kind, int64_t k)
{
    return kind == PM_FP32 ? k : (k + 1) / 2;
}
/* How many numbers a word has. */
static inline int64_t product_per_word(pm_compute kind) { return kind == PM_FP32 ? 1 : 2; }

/* ---------------------------------------------------------------- left operand
 *
 * Rows of floats are fp32 operands as they are. For the other kinds a task rounds its rows into a
 * room of its own. */

/* Words between two rows of a room; not a power of two, so that rows do not share cache sets. */
static inline int64_t product_row_words(int64_t k) { return pm_blocks(k, 32) * 16 + 16; }

/* Bytes of a room for m rows of k. */
static inline size_t product_room(pm_compute kind, int64_t m, int64_t k)
{
    return kind == PM_FP32 ? 0 : (size_t)(m * product_row_words(k)) * sizeof(product_word);
}

/* Stores PM_WIDTH bf16 at the numbers at.. of a row of words. */
static inline void product_put(pm_compute kind, product_word *row, int64_t at, vf x)
{
    v_store_bf16(kind == PM_BF16, (char *)row + 2 * at, x);
}

/* A row x of k floats as a left operand; *room moves on by a row where it is needed. */
static inline const product_word *product_row(pm_compute kind, const float *x, int64_t k,
                                              product_word **room)
{
    if (kind == PM_FP32)
        return x;
    product_word *row = *room;
    *room += product_row_words(k);
    for (int64_t i = 0; i < k; i += PM_WIDTH)
        product_put(kind, row, i, v_get(x + i, k - i));
    return row;
}

/* ---------------------------------------------------------------- packing */

static inline int64_t product_panels(int64_t n) { return (n + PM_NR - 1) / PM_NR; }
/* Words of the panels of n columns. */
static inline int64_t product_packed(pm_compute kind, int64_t n, int64_t k)
{
    return product_panels(n) * PM_NR * product_words(kind, k);
}

/* Pairs of the rows i.. of a panel from the columns j of W: the last one alone when k is odd. */
static void product_pack_pairs(pm_compute kind, int64_t n, int64_t k, const float *w, int64_t ld,
                               product_word *panel)
{
    int64_t i = 0;
    if (n == PM_NR)
        for (; i + PM_WIDTH <= k; i += PM_WIDTH)
            for (int half = 0; half < PM_NR; half += PM_WIDTH) {
                vf t[PM_WIDTH];
                for (int j = 0; j < PM_WIDTH; j++) {
                    const float *from = w + (half + j) * ld + i;
                    __builtin_prefetch(from + 8 * 16);
                    t[j] = v_load(from);
                }
                v_transpose(t);
                for (int j = 0; j < PM_WIDTH; j += 2)
                    v_store(panel + (i + j) / 2 * PM_NR + half,
                            v_pairs(kind == PM_BF16, t[j], t[j + 1]));
            }
    for (; i < k; i += 2)
        for (int64_t j0 = 0; j0 < PM_NR; j0 += PM_WIDTH) {
            float low[PM_WIDTH] = {0}, high[PM_WIDTH] = {0};
            for (int64_t j = 0; j < pm_min(PM_WIDTH, n - j0); j++) {
                low[j] = w[(j0 + j) * ld + i];
                high[j] = i + 1 < k ? w[(j0 + j) * ld + i + 1] : 0.0f;
            }
            v_store(panel + i / 2 * PM_NR + j0,
                    v_pairs(kind == PM_BF16, v_load(low), v_load(high)));
        }
}

/* Panels of the columns of B = W^T, for y = x W^T: W has n rows (outputs) of k, at distance ld. */
static void product_pack_rows(pm_compute kind, int64_t n, int64_t k, const float *w, int64_t ld,
                              product_word *panels)
{
    for (int64_t p = 0; p < n; p += PM_NR, panels += product_words(kind, k) * PM_NR) {
        if (kind != PM_FP32) {
            product_pack_pairs(kind, pm_min(PM_NR, n - p), k, w + p * ld, ld, panels);
            continue;
        }
        int64_t i = 0;
        if (n - p >= PM_NR)
            for (; i + PM_WIDTH <= k; i += PM_WIDTH)
                for (int half = 0; half < PM_NR; half += PM_WIDTH) {
                    vf t[PM_WIDTH];
                    for (int j = 0; j < PM_WIDTH; j++) {
                        const float *from = w + (p + half + j) * ld + i;
                        __builtin_prefetch(from + 8 * 16);
                        t[j] = v_load(from);
                    }
                    v_transpose(t);
                    for (int j = 0; j < PM_WIDTH; j++)
                        v_store(panels + (i + j) * PM_NR + half, t[j]);
                }
        for (; i < k; i++)
            for (int64_t j = 0; j < PM_NR; j++)
                panels[i * PM_NR + j] = j < n - p ? w[(p + j) * ld + i] : 0.0f;
    }
}

#define PRODUCT_PACK_ROWS 16 /* rows of W read side by side: long reads and long writes */

/* Rows k0..k1-1 of the panels of the columns of B = W, for dx = dy W: W has k rows of n, at
 * distance ld. k0 is even, and k1 is even or k. */
static void product_pack_cols_range(pm_compute kind, int64_t n, int64_t k, int64_t k0, int64_t k1,
                                    const float *w, int64_t ld, product_word *panels)
{
    const int64_t words = product_words(kind, k), per = product_per_word(kind);
    for (int64_t b = k0; b < k1; b += PRODUCT_PACK_ROWS)
        for (int64_t p = 0; p < n; p += PM_NR)
            for (int64_t i = b; i < pm_min(k1, b + PRODUCT_PACK_ROWS); i += per)
                for (int64_t j = 0; j < PM_NR; j += PM_WIDTH) {
                    const int64_t left = n - p - j;
                    const float *from = w + i * ld + p + j;
                    vf x = left > 0 ? v_get(from, left) : v_zero();
                    if (per == 2)
                        x = v_pairs(kind == PM_BF16, x,
                                    left > 0 && i + 1 < k ? v_get(from + ld, left) : v_zero());
                    v_store(panels + p * words + i / per * PM_NR + j, x);
                }
}
static void product_pack_cols(pm_compute kind, int64_t n, int64_t k, const float *w, int64_t ld,
                              product_word *panels)
{
    product_pack_cols_range(kind, n, k, 0, k, w, ld, panels);
}

/* The derived twin of a weight (F, D): panels for y = x W^T, then panels for dx = dy W. */
static size_t product_panel_bytes(pm_compute kind, int64_t n, int64_t k)
{
    return pm_round64((size_t)product_packed(kind, n, k) * sizeof(product_word));
}
static size_t product_derived_bytes(const pm_ctx *ctx, int64_t F, int64_t D)
{
    const pm_compute kind = ctx->backend->compute;
    return product_panel_bytes(kind, F, D) + product_panel_bytes(kind, D, F);
}
static inline product_word *product_backward_panels(pm_compute kind, const void *derived, int64_t F,
                                                    int64_t D)
{
    return (product_word *)((const char *)derived + product_panel_bytes(kind, F, D));
}

/* Making panels of a weight (F, D), forward or backward or both, in parallel. */
typedef struct {
    pm_compute kind;
    int64_t F, D;
    const float *w;
    product_word *forward, *backward;
} product_pack_job;

static void product_pack_forward_task(void *arg, int64_t task, int worker)
{
    (void)worker;
    const product_pack_job *j = arg;
    int64_t p = task * PM_NR;
    product_pack_rows(j->kind, pm_min(PM_NR, j->F - p), j->D, j->w + p * j->D, j->D,
                      j->forward + p * product_words(j->kind, j->D));
}
static void product_pack_backward_task(void *arg, int64_t task, int worker)
{
    (void)worker;
    const product_pack_job *j = arg;
    int64_t f = task * PM_NR;
    product_pack_cols_range(j->kind, j->D, j->F, f, pm_min(j->F, f + PM_NR), j->w, j->D,
                            j->backward);
}
/* The panels of a weight (F, D): its derived twin's, or packed into scratch, which has
 * product_panel_bytes(F, D) forward and product_panel_bytes(D, F) backward. */
static const product_word *product_forward_of(pm_ctx *ctx, pm_weight weight, int64_t F, int64_t D,
                                              void *scratch)
{
    if (weight.derived)
        return weight.derived;
    product_pack_job job = {ctx->backend->compute, F, D, weight.w, scratch, NULL};
    pm_parallel(ctx->pool, product_panels(F), product_pack_forward_task, &job);
    return scratch;
}
static const product_word *product_backward_of(pm_ctx *ctx, pm_weight weight, int64_t F, int64_t D,
                                               void *scratch)
{
    const pm_compute kind = ctx->backend->compute;
    if (weight.derived)
        return product_backward_panels(kind, weight.derived, F, D);
    product_pack_job job = {kind, F, D, weight.w, NULL, scratch};
    pm_parallel(ctx->pool, product_panels(F), product_pack_backward_task, &job);
    return scratch;
}

/* ---------------------------------------------------------------- tile */

/* X(kind, m) for every height of a tile. */
#define PRODUCT_HEIGHTS_6(X, kind) X(kind, 1) X(kind, 2) X(kind, 3) X(kind, 4) X(kind, 5) X(kind, 6)
#if PM_MR == 14
#define PRODUCT_HEIGHTS(X, kind)                                                                   \
    PRODUCT_HEIGHTS_6(X, kind)                                                                     \
    X(kind, 7) X(kind, 8) X(kind, 9) X(kind, 10) X(kind, 11) X(kind, 12) X(kind, 13) X(kind, 14)
#else
#define PRODUCT_HEIGHTS PRODUCT_HEIGHTS_6
#endif
#define PRODUCT_NAME(kind, m) product_##kind##_##m,

/* t += a * b in a kind: a is one word in all lanes, b a vector of words. */
#define PRODUCT_ADD_fp32(t, a, b) v_fma(a, b, t)
#define PRODUCT_ADD_bf16(t, a, b) v_dot(a, b, t)
#define PRODUCT_ADD_emulated(t, a, b) v_dot_emulated(a, b, t)

/* The row i of a tile: t[0..1] += its word *a times b0 and b1. A product is bound by the multiply-adds,
 * two a cycle, if the core can issue everything else besides: where two threads share a core, or the
 * machine has a neighbour, it hardly can. So the depth is unrolled, and with AVX-512 every third row's
 * word is not loaded into a register first but broadcast by the multiply-adds themselves, which takes
 * less instructions and more loads. */
#define PRODUCT_ROW(kind, t, a, b0, b1)                                                            \
    do {                                                                                           \
        const vf x = v_set(*(a));                                                                  \
        (t)[0] = PRODUCT_ADD_##kind((t)[0], x, b0);                                                \
        (t)[1] = PRODUCT_ADD_##kind((t)[1], x, b1);                                                \
    } while (0)
#define PRODUCT_ROW_bf16(i, t, a, b0, b1) PRODUCT_ROW(bf16, t, a, b0, b1)
#define PRODUCT_ROW_emulated(i, t, a, b0, b1) PRODUCT_ROW(emulated, t, a, b0, b1)
#if PM_WIDTH == 16 && defined(__AVX512F__)
#define PRODUCT_ROW_fp32(i, t, a, b0, b1)                                                          \
    do {                                                                                           \
        if ((i) % 3 != 1) {                                                                        \
            PRODUCT_ROW(fp32, t, a, b0, b1);                                                       \
        } else {                                                                                   \
            __asm__("vfmadd231ps %2%{1to16%}, %1, %0" : "+v"((t)[0]) : "v"(b0), "m"(*(a)));        \
            __asm__("vfmadd231ps %2%{1to16%}, %1, %0" : "+v"((t)[1]) : "v"(b1), "m"(*(a)));        \
        }                                                                                          \
    } while (0)
#else
#define PRODUCT_ROW_fp32(i, t, a, b0, b1) PRODUCT_ROW(fp32, t, a, b0, b1)
#endif

/* c[i][0..PM_NR) = or += sum over kk < k words of a[i][kk] * panel[kk][0..PM_NR), i < m <= PM_MR.
 * tile: row i of c is at c + i*ldc. ahead: c is a tile, and meanwhile the bytes from ahead on are
 * fetched into L2, step per kk: the caller's next panel. */
#define PRODUCT_tile_ARGS int64_t ldc, bool add
#define PRODUCT_tile_BEGIN
#define PRODUCT_tile_FETCH
#define PRODUCT_ahead_ARGS const char *ahead, int64_t step
#define PRODUCT_ahead_BEGIN                                                                        \
    const int64_t ldc = PM_NR;                                                                     \
    const bool add = false;
#define PRODUCT_ahead_FETCH                                                                        \
    __builtin_prefetch(ahead, 0, 2);                                                               \
    if (PM_NR == 32) /* two lines a row */                                                         \
        __builtin_prefetch(ahead + 64, 0, 2);                                                      \
    ahead += step;
/* clang-format takes the macros of this body for types. */
/* clang-format off */
#define PRODUCT_TILE(form, kind, m)                                                                \
    static void product_##form##_##kind##_##m(int64_t k, const product_word *const *a,             \
                                              const product_word *panel, float *c,                 \
                                              PRODUCT_##form##_ARGS)                               \
    {                                                                                              \
        PRODUCT_##form##_BEGIN                                                                     \
        vf t[m][2];                                                                                \
        const product_word *r[m];                                                                  \
        _Pragma("GCC unroll 16") for (int i = 0; i < m; i++)                                       \
        {                                                                                          \
            r[i] = a[i];                                                                           \
            t[i][0] = add ? v_load(c + i * ldc) : v_zero();                                        \
            t[i][1] = add ? v_load(c + i * ldc + PM_WIDTH) : v_zero();                             \
        }                                                                                          \
        _Pragma("GCC unroll 4") for (int64_t kk = 0; kk < k; kk++)                                 \
        {                                                                                          \
            vf b0 = v_load(panel + kk * PM_NR), b1 = v_load(panel + kk * PM_NR + PM_WIDTH);        \
            PRODUCT_##form##_FETCH                                                                 \
            _Pragma("GCC unroll 16") for (int i = 0; i < m; i++)                                   \
                PRODUCT_ROW_##kind(i, t[i], r[i] + kk, b0, b1);                                    \
        }                                                                                          \
        _Pragma("GCC unroll 16") for (int i = 0; i < m; i++)                                       \
        {                                                                                          \
            v_store(c + i * ldc, t[i][0]);                                                         \
            v_store(c + i * ldc + PM_WIDTH, t[i][1]);                                              \
        }                                                                                          \
    }
/* clang-format on */
#define PRODUCT_TILE_fp32(form, m) PRODUCT_TILE(form, fp32, m)
#define PRODUCT_TILE_bf16(form, m) PRODUCT_TILE(form, bf16, m)
#define PRODUCT_TILE_emulated(form, m) PRODUCT_TILE(form, emulated, m)
PRODUCT_HEIGHTS(PRODUCT_TILE_fp32, tile)
PRODUCT_HEIGHTS(PRODUCT_TILE_fp32, ahead)
PRODUCT_HEIGHTS(PRODUCT_TILE_emulated, tile)
PRODUCT_HEIGHTS(PRODUCT_TILE_emulated, ahead)
#if PM_HAS_BF16
PRODUCT_HEIGHTS(PRODUCT_TILE_bf16, tile)
PRODUCT_HEIGHTS(PRODUCT_TILE_bf16, ahead)
#endif

/* A table of tiles, [kind][height]. */
#if PM_HAS_BF16
#define PRODUCT_TABLE(form)                                                                        \
    {                                                                                              \
        [PM_FP32] = {NULL, PRODUCT_HEIGHTS(PRODUCT_NAME, form##_fp32)},                            \
        [PM_BF16] = {NULL, PRODUCT_HEIGHTS(PRODUCT_NAME, form##_bf16)},                            \
        [PM_BF16_EMULATED] = {NULL, PRODUCT_HEIGHTS(PRODUCT_NAME, form##_emulated)},               \
    }
#else
#define PRODUCT_TABLE(form)                                                                        \
    {                                                                                              \
        [PM_FP32] = {NULL, PRODUCT_HEIGHTS(PRODUCT_NAME, form##_fp32)},                            \
        [PM_BF16_EMULATED] = {NULL, PRODUCT_HEIGHTS(PRODUCT_NAME, form##_emulated)},               \
    }
#endif
typedef void (*product_tile_fn)(int64_t k, const product_word *const *a, const product_word *panel,
                                float *c, PRODUCT_tile_ARGS);
typedef void (*product_ahead_fn)(int64_t k, const product_word *const *a, const product_word *panel,
                                 float *c, PRODUCT_ahead_ARGS);
static const product_tile_fn product_tile[PM_COMPUTES][PM_MR + 1] = PRODUCT_TABLE(tile);
static const product_ahead_fn product_ahead[PM_COMPUTES][PM_MR + 1] = PRODUCT_TABLE(ahead);

/* m rows in near-equal slices of at most PM_MR, so that no slice is a thin remainder. */
static inline int64_t product_slices(int64_t m) { return (m + PM_MR - 1) / PM_MR; }
static inline int64_t product_cut(int64_t m, int64_t slices, int64_t i) { return m * i / slices; }
/* The first row of slice i, an even one: pairs of rows stay together (PM_MR is even). */
static inline int64_t product_slice(int64_t m, int64_t slices, int64_t i)
{
    return pm_min(m, 2 * product_cut((m + 1) / 2, slices, i));
}

/* ---------------------------------------------------------------- block */

/* Called on every finished tile while it is in L1: rows row0..row0+m-1 of the block (row0 is even),
 * columns col0..col0+n-1 (n <= PM_NR), tile[i*PM_NR + j]; the tile may be overwritten. */
typedef void (*product_finish)(void *arg, int64_t row0, int m, int64_t col0, int64_t n,
                               float *tile);

/* Where finish will store a tile: its lines are fetched for writing while the tile is computed, since
 * a burst of stores to memory that is in no cache would hold up the next one. NULL: nowhere. */
typedef struct {
    float *at;  /* row 0, column 0 */
    int64_t ld; /* floats between rows */
} product_target;

static inline void product_fetch_target(product_target to, int64_t row, int64_t rows, int64_t col)
{
    if (to.at)
        for (int64_t i = row; i < row + rows; i++)
            for (int j = 0; j < PM_NR; j += 16)
                __builtin_prefetch(to.at + i * to.ld + col + j, 1);
}

/* One task's share of A.B: m rows (m <= a few PM_ROWS; a[i] is a left operand of k numbers), panels
 * p0..p1-1 of the n-column packed operand. */
static inline void product_block(pm_compute kind, int64_t m, const product_word *const *a,
                                 int64_t k, int64_t n, const product_word *panels, int64_t p0,
                                 int64_t p1, product_finish finish, void *arg, product_target to)
{
    float tile[PM_MR * PM_NR] __attribute__((aligned(64)));
    const int64_t words = product_words(kind, k), slices = product_slices(m);
    const int64_t line = PM_NR * (int64_t)sizeof(product_word), bytes = words * line;
    const int64_t step = pm_max(1, pm_blocks(line, pm_max(1, slices)));
    for (int64_t p = p0; p < p1; p++) {
        const product_word *panel = panels + p * PM_NR * words;
        const char *next = (const char *)panel + (p + 1 < p1 ? bytes : 0);
        for (int64_t s = 0; s < slices; s++) {
            int64_t row = product_slice(m, slices, s), rows = product_slice(m, slices, s + 1) - row;
            product_fetch_target(to, row, rows, p * PM_NR);
            product_ahead[kind][rows](words, a + row, panel, tile, next + s * step * words, step);
            finish(arg, row, (int)rows, p * PM_NR, pm_min(PM_NR, n - p * PM_NR), tile);
        }
    }
}

/* How m rows by the panels of n columns, of depth k, are cut into tasks: blocks of row slices times
 * ranges of panels. Enough tasks for many threads, none too small to be worth handing out. */
typedef struct {
    int64_t rows, row_tasks;     /* slices of PM_MR rows are dealt to row_tasks blocks */
    int64_t panels, panel_tasks; /* panels to panel_tasks ranges */
} product_grid;
typedef struct {
    int64_t row0, rows, panel0, panel1;
} product_share;

#define PRODUCT_TASKS 64                /* tasks that keep 16 threads busy to the end */
#define PRODUCT_WORK ((int64_t)1 << 18) /* multiply-adds of the smallest task: 2 microseconds */
#define PRODUCT_THIN 16                 /* rows below which reading the panels sets the pace */

static product_grid product_grid_of(int64_t m, int64_t n, int64_t k)
{
    product_grid g = {.rows = m, .panels = product_panels(n)};
    int64_t most = pm_max(m, PRODUCT_THIN) * n * k / PRODUCT_WORK;
    g.row_tasks = pm_blocks(m, PM_ROWS);
    g.panel_tasks = pm_blocks(PRODUCT_TASKS, pm_max(1, g.row_tasks));
    g.panel_tasks = pm_min(g.panel_tasks, most / pm_max(1, g.row_tasks));
    g.panel_tasks = pm_max(1, pm_min(g.panel_tasks, g.panels));
    return g;
}
static inline int64_t product_tasks(const product_grid *g) { return g->row_tasks * g->panel_tasks; }

/* Tasks that share a range of panels are neighbours. */
static product_share product_share_of(const product_grid *g, int64_t task)
{
    int64_t p = task / g->row_tasks, b = task % g->row_tasks, slices = product_slices(g->rows);
    int64_t row0 = product_slice(g->rows, slices, product_cut(slices, g->row_tasks, b));
    int64_t row1 = product_slice(g->rows, slices, product_cut(slices, g->row_tasks, b + 1));
    return (product_share){row0, row1 - row0, product_cut(g->panels, g->panel_tasks, p),
                           product_cut(g->panels, g->panel_tasks, p + 1)};
}

/* ---------------------------------------------------------------- weight gradient
 *
 * dW += dy^T x is a product whose depth is the rows. Both of its sides are packed alike, in panels of
 * PM_NR columns, panel[row][PM_NR], with words along the rows. Whoever has the rows in cache packs
 * them; the tasks of the gradient then read only what they multiply, in the order in which it lies
 * in memory. Rows are put in pairs, whatever the kind, and a row of zeros stands behind an odd one. */

typedef struct {
    product_word *at; /* [panel][words][PM_NR] */
    int64_t words;    /* of a panel */
    bool far;         /* other threads read it, when the caches have seen much else */
} product_side;

static inline int64_t product_even(int64_t rows) { return rows + rows % 2; }

/* A side of rows of n numbers. */
static inline size_t product_side_bytes(pm_compute kind, int64_t rows, int64_t n)
{
    return product_panel_bytes(kind, n, product_even(rows));
}
static inline product_side product_side_take(pm_compute kind, int64_t rows, int64_t n, bool far,
                                             void **scratch)
{
    void *at = pm_take(scratch, product_side_bytes(kind, rows, n));
    return (product_side){at, product_words(kind, product_even(rows)), far};
}

/* Puts the columns col .. col+PM_WIDTH-1 of rows row (an even one) and row + 1. What is far goes past the
 * caches: v_stream_end comes before anyone reads it. */
static inline void product_side_put(pm_compute kind, const product_side *side, int64_t row,
                                    int64_t col, vf first, vf second)
{
    const int64_t word = row / product_per_word(kind);
    product_word *to = side->at + (col / PM_NR * side->words + word) * PM_NR + col % PM_NR;
    if (kind == PM_FP32) {
        v_store_line(to, first, side->far);
        v_store_line(to + PM_NR, second, side->far);
    } else {
        v_store_line(to, v_pairs(kind == PM_BF16, first, second), side->far);
    }
}

#define PRODUCT_SIDE_ROWS 8 /* rows read side by side: long reads and long writes */

/* Packs m rows x[i] of n floats, times scale[i] when scale is given, as rows row0.. of a side (row0 is
 * even). Their sum is added to sum[0..n), unless that is NULL. */
static inline void product_side_pack(pm_compute kind, const product_side *side, int64_t row0,
                                     int64_t m, const float *const *x, int64_t n,
                                     const float *scale, float *sum)
{
    for (int64_t b = 0; b < m; b += PRODUCT_SIDE_ROWS)
        for (int64_t col = 0; col < product_panels(n) * PM_NR; col += PM_WIDTH) {
            const int64_t left = n - col;
            vf total = v_zero();
            for (int64_t i = b; i < pm_min(m, b + PRODUCT_SIDE_ROWS); i += 2) {
                vf first = left > 0 ? v_get(x[i] + col, left) : v_zero();
                vf second = left > 0 && i + 1 < m ? v_get(x[i + 1] + col, left) : v_zero();
                if (scale) {
                    first *= v_set(scale[i]);
                    second *= v_set(i + 1 < m ? scale[i + 1] : 0.0f);
                }
                product_side_put(kind, side, row0 + i, col, first, second);
                total += first + second;
            }
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
static product_wgrad_grid product_wgrad_grid_of(int64_t F, int64_t D, int64_t rows, double work)
{
    const int64_t left = product_panels(F), right = product_panels(D);
    const double share = work / (PRODUCT_TASKS / 2);
    const int64_t size = share < (double)PRODUCT_WGRAD_WORK ? pm_max(PRODUCT_WORK, (int64_t)share)
                                                            : PRODUCT_WGRAD_WORK;
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

/* What a tile fetches into L2 meanwhile, a step for each word. */
typedef struct {
    const char *left, *right;
    int64_t left_step, right_step;
} product_fetch;

/* c[i][0..PM_NR) += sum over w < n of left[w][i] * right[w][0..PM_NR), i < m <= PM_MR; left is within
 * a panel. next is where the next tile goes to. */
/* clang-format takes the macros of this body for types. */
/* clang-format off */
#define PRODUCT_WGRAD_TILE(kind, m)                                                                \
    static void product_wgrad_##kind##_##m(int64_t n, const product_word *left,                    \
                                           const product_word *right, float *c, int64_t ldc,       \
                                           const float *next, product_fetch fetch)                 \
    {                                                                                              \
        vf t[m][2];                                                                                \
        _Pragma("GCC unroll 16") for (int i = 0; i < m; i++)                                       \
        {                                                                                          \
            t[i][0] = t[i][1] = v_zero();                                                          \
            __builtin_prefetch(next + i * ldc, 1);                                                 \
            __builtin_prefetch(next + i * ldc + PM_NR - 1, 1);                                     \
        }                                                                                          \
        for (int64_t w = 0; w < n; w++, left += PM_NR, right += PM_NR) {                           \
            vf b0 = v_load(right), b1 = v_load(right + PM_WIDTH);                                  \
            __builtin_prefetch(fetch.left, 0, 2);                                                  \
            __builtin_prefetch(fetch.right, 0, 2);                                                 \
            fetch.left += fetch.left_step;                                                         \
            fetch.right += fetch.right_step;                                                       \
            _Pragma("GCC unroll 16") for (int i = 0; i < m; i++)                                   \
                PRODUCT_ROW(kind, t[i], left + i, b0, b1);                                         \
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
                                 float *c, int64_t ldc, const float *next, product_fetch fetch);
static const product_wgrad_fn product_wgrad_tile[PM_COMPUTES][PM_MR + 1] = PRODUCT_TABLE(wgrad);

#define PRODUCT_PARTS ((PM_NR + PM_MR - 1) / PM_MR) /* tiles of a panel of the left side */
#define PRODUCT_DEPTH (6144 / PM_NR) /* words at a time: 24 KiB of a panel stay in L1 */

/* dw[f][d] += sum over the rows row0 .. row0+rows-1 (row0 is even) of left[row][f] * right[row][d] for
 * one task's share; dw row f is at dw + f*ldw. The rows are summed in order, in near-equal chunks of
 * at most PRODUCT_DEPTH words. */
static void product_wgrad(pm_compute kind, const product_side *left, const product_side *right,
                          int64_t row0, int64_t rows, product_wgrad_share share, float *dw,
                          int64_t ldw)
{
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
            const int64_t shares = PRODUCT_PARTS * pm_max(1, wides - (chunk == 0));
            for (int64_t s = 0; s < highs; s++) {
                const product_word *slice = l0 + s * left_panel + w0 * PM_NR;
                const int64_t f = share.f0 + s * PM_NR, high = pm_min(PM_NR, share.f1 - f);
                const int64_t parts = product_slices(high);
                for (int64_t q = 0; q < parts; q++) {
                    const int64_t i0 = product_cut(high, parts, q),
                                  m = product_cut(high, parts, q + 1) - i0;
                    product_fetch fetch;
                    fetch.right_step = pm_blocks(line, highs * PRODUCT_PARTS);
                    fetch.right = (const char *)next_panel +
                                  (s * PRODUCT_PARTS + q) * fetch.right_step * n;
                    if (fresh) { /* the next panel */
                        fetch.left_step = pm_blocks(line, PRODUCT_PARTS);
                        fetch.left = (const char *)(s + 1 < highs ? slice + left_panel : slice) +
                                     q * fetch.left_step * n;
                    } else { /* the next chunk of this one */
                        fetch.left_step = pm_blocks(line, shares);
                        fetch.left = (const char *)(slice + (later - w0) * PM_NR) +
                                     ((p - (chunk == 0)) * PRODUCT_PARTS + q) * fetch.left_step * n;
                    }
                    float *c = dw + (f + i0) * ldw + d;
                    if (share.d1 - d >= PM_NR) {
                        const bool last = s + 1 == highs && q + 1 == parts;
                        const float *next = last ? dw + share.f0 * ldw + d + PM_NR : c + m * ldw;
                        product_wgrad_tile[kind][m](n, slice + i0, panel, c, ldw, next, fetch);
                        continue;
                    }
                    memset(edge, 0, sizeof edge);
                    product_wgrad_tile[kind][m](n, slice + i0, panel, edge, PM_NR, edge, fetch);
                    for (int64_t i = 0; i < m; i++)
                        for (int64_t j = 0; j < share.d1 - d; j++)
                            c[i * ldw + j] += edge[i * PM_NR + j];
                }
            }
        }
    }
}
