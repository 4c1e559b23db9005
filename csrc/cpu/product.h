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
/* The same PM_NR rows of w for both: read once from memory. */
static void product_derive_task(void *arg, int64_t task, int worker)
{
    product_pack_forward_task(arg, task, worker);
    product_pack_backward_task(arg, task, worker);
}

static pm_status product_derive(pm_ctx *ctx, int64_t F, int64_t D, const float *w, void *derived)
{
    const pm_compute kind = ctx->backend->compute;
    product_pack_job job = {kind, F, D, w, derived, product_backward_panels(kind, derived, F, D)};
    pm_parallel(ctx->pool, product_panels(F), product_derive_task, &job);
    return PM_OK;
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
        for (int64_t kk = 0; kk < k; kk++) {                                                       \
            vf b0 = v_load(panel + kk * PM_NR), b1 = v_load(panel + kk * PM_NR + PM_WIDTH);        \
            PRODUCT_##form##_FETCH                                                                 \
            _Pragma("GCC unroll 16") for (int i = 0; i < m; i++)                                   \
            {                                                                                      \
                vf x = v_set(r[i][kk]);                                                            \
                t[i][0] = PRODUCT_ADD_##kind(t[i][0], x, b0);                                      \
                t[i][1] = PRODUCT_ADD_##kind(t[i][1], x, b1);                                      \
            }                                                                                      \
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

/* ---------------------------------------------------------------- block */

/* Called on every finished tile while it is in L1: rows row0..row0+m-1 of the block, columns
 * col0..col0+n-1 (n <= PM_NR), tile[i*PM_NR + j]; the tile may be overwritten. */
typedef void (*product_finish)(void *arg, int64_t row0, int m, int64_t col0, int64_t n,
                               float *tile);

/* One task's share of A.B: m rows (m <= a few PM_ROWS; a[i] is a left operand of k numbers), panels
 * p0..p1-1 of the n-column packed operand. */
static inline void product_block(pm_compute kind, int64_t m, const product_word *const *a,
                                 int64_t k, int64_t n, const product_word *panels, int64_t p0,
                                 int64_t p1, product_finish finish, void *arg)
{
    float tile[PM_MR * PM_NR] __attribute__((aligned(64)));
    const int64_t words = product_words(kind, k), slices = product_slices(m);
    const int64_t line = PM_NR * (int64_t)sizeof(product_word), bytes = words * line;
    const int64_t step = pm_max(1, pm_blocks(line, pm_max(1, slices)));
    for (int64_t p = p0; p < p1; p++) {
        const product_word *panel = panels + p * PM_NR * words;
        const char *next = (const char *)panel + (p + 1 < p1 ? bytes : 0);
        for (int64_t s = 0; s < slices; s++) {
            int64_t row = product_cut(m, slices, s), rows = product_cut(m, slices, s + 1) - row;
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
    int64_t row0 = product_cut(g->rows, slices, product_cut(slices, g->row_tasks, b));
    int64_t row1 = product_cut(g->rows, slices, product_cut(slices, g->row_tasks, b + 1));
    return (product_share){row0, row1 - row0, product_cut(g->panels, g->panel_tasks, p),
                           product_cut(g->panels, g->panel_tasks, p + 1)};
}

/* ---------------------------------------------------------------- weight gradient */

/* The same cut for a weight gradient: rows are F, panels those of D, depth R. A task packs its
 * columns of dy once for all of its panels, so it gets at least four panels where it can. */
static product_grid product_wgrad_grid(int64_t F, int64_t D, int64_t R)
{
    product_grid g = {.rows = F, .panels = product_panels(D)};
    int64_t most = pm_max(1, F * D * R / PRODUCT_WORK);
    int64_t fewest = pm_max(1, pm_blocks(F, PM_ROWS)), enough = pm_min(PRODUCT_TASKS / 2, most);
    g.panel_tasks = pm_max(1, pm_min(pm_blocks(enough, fewest), g.panels / 4));
    g.row_tasks = pm_max(fewest, pm_min(enough / g.panel_tasks, product_slices(F) / 2));
    return g;
}

/* db[f] += sum over r < R of dy[r][f], f0 <= f < f1, in the same order whatever f0 and f1 are. */
static void product_bias_grad(int64_t R, const float *dy, int64_t ldy, int64_t f0, int64_t f1,
                              float *db)
{
    for (int64_t f = f0; f < f1; f += PM_WIDTH) {
        int64_t left = f1 - f;
        vf sum = v_zero();
        for (int64_t r0 = 0; r0 < R; r0 += 64) { /* sums of 64, then their sum: smaller errors */
            vf part = v_zero();
            for (int64_t r = r0; r < pm_min(R, r0 + 64); r++)
                part += v_get(dy + r * ldy + f, left);
            sum += part;
        }
        v_put(db + f, v_get(db + f, left) + sum, left);
    }
}

#define PRODUCT_TOKENS 256 /* rows at a time: a packed panel of x and a slice of dy stay in L1 */
#define PRODUCT_AHEAD 16   /* rows of x fetched ahead */
/* Floats of a slice of dy; whole vectors run over its end. */
#define PRODUCT_SLICE (PRODUCT_TOKENS * PM_MR + 2 * PM_WIDTH)

/* c[i][0..PM_NR) += sum over r < n of dy[r][i] * x[r][0..PM_NR), i < m <= PM_MR, where dy[r][i] is
 * left[r*m + i]. packed reads x from panel; fresh from the rows, and leaves it in panel. next is
 * where the next tile goes to. */
#define PRODUCT_packed_ROW v_load(panel + r * PM_NR), b1 = v_load(panel + r * PM_NR + PM_WIDTH);
#define PRODUCT_fresh_ROW                                                                          \
    v_load(x[r] + col), b1 = v_load(x[r] + col + PM_WIDTH);                                        \
    v_store(panel + r * PM_NR, b0);                                                                \
    v_store(panel + r * PM_NR + PM_WIDTH, b1);                                                     \
    __builtin_prefetch(x[r + PRODUCT_AHEAD] + col);                                                \
    __builtin_prefetch(x[r + PRODUCT_AHEAD] + col + PM_NR - 1);
/* clang-format takes the macros of this body for types. */
/* clang-format off */
#define PRODUCT_WGRAD_TILE(kind, m)                                                                \
    static void product_wgrad_##kind##_##m(int64_t n, const float *left, const float *const *x,    \
                                           int64_t col, float *panel, float *c, int64_t ldc,       \
                                           const float *next)                                      \
    {                                                                                              \
        (void)x, (void)col;                                                                        \
        vf t[m][2];                                                                                \
        _Pragma("GCC unroll 16") for (int i = 0; i < m; i++)                                       \
        {                                                                                          \
            t[i][0] = t[i][1] = v_zero();                                                          \
            __builtin_prefetch(next + i * ldc, 1);                                                 \
            __builtin_prefetch(next + i * ldc + PM_NR - 1, 1);                                     \
        }                                                                                          \
        for (int64_t r = 0; r < n; r++, left += m) {                                               \
            vf b0 = PRODUCT_##kind##_ROW                                                           \
            _Pragma("GCC unroll 16") for (int i = 0; i < m; i++)                                   \
            {                                                                                      \
                vf a = v_set(left[i]);                                                             \
                t[i][0] = v_fma(a, b0, t[i][0]);                                                   \
                t[i][1] = v_fma(a, b1, t[i][1]);                                                   \
            }                                                                                      \
        }                                                                                          \
        _Pragma("GCC unroll 16") for (int i = 0; i < m; i++)                                       \
        {                                                                                          \
            float *row = c + i * ldc;                                                              \
            v_store(row, v_load(row) + t[i][0]);                                                   \
            v_store(row + PM_WIDTH, v_load(row + PM_WIDTH) + t[i][1]);                             \
        }                                                                                          \
    }
/* clang-format on */
PRODUCT_HEIGHTS(PRODUCT_WGRAD_TILE, packed)
PRODUCT_HEIGHTS(PRODUCT_WGRAD_TILE, fresh)

typedef void (*product_wgrad_fn)(int64_t n, const float *left, const float *const *x, int64_t col,
                                 float *panel, float *c, int64_t ldc, const float *next);
static const product_wgrad_fn product_wgrad_packed[PM_MR + 1] = {
    NULL, PRODUCT_HEIGHTS(PRODUCT_NAME, wgrad_packed)};
static const product_wgrad_fn product_wgrad_fresh[PM_MR + 1] = {
    NULL, PRODUCT_HEIGHTS(PRODUCT_NAME, wgrad_fresh)};

static inline size_t product_wgrad_scratch(int64_t F, int64_t D)
{
    (void)D;
    return pm_round64((size_t)(product_slices(F) * PRODUCT_SLICE) * 4) +
           pm_round64((size_t)(PRODUCT_TOKENS * PM_NR) * 4);
}

/* The same for the largest share of a product_wgrad_grid. */
static inline size_t product_grid_wgrad_scratch(const product_grid *g)
{
    return product_wgrad_scratch(pm_min(PM_ROWS, g->rows), 0);
}

/* Fetches columns col..col+n-1 of rows r0..r1-1 into L2. */
static inline void product_wgrad_fetch(const float *const *x, int64_t col, int64_t n, int64_t r0,
                                       int64_t r1)
{
    if (n > 0)
        for (int64_t r = r0; r < r1; r++)
            for (int64_t j = 0; j < n; j += 16)
                __builtin_prefetch(x[r] + col + j, 0, 2);
}

/* dw[f][d] += sum over r < R of dy[r][f] * x_r[d] for f0 <= f < f1, d < D, where dy row r is at
 * dy + r*ldy and x_r = x + (rows ? rows[r] : r) * ldx; dw row f is at dw + f*ldw. One task calls it
 * for the rows f0..f1-1 that it owns; r is summed in order, by chunks of at most PRODUCT_TOKENS.
 * scratch: product_wgrad_scratch(f1 - f0, D) bytes. */
static void product_wgrad(int64_t R, const float *dy, int64_t ldy, const float *x, int64_t ldx,
                          const int32_t *rows, int64_t f0, int64_t f1, int64_t D, float *dw,
                          int64_t ldw, void *scratch)
{
    int64_t F = f1 - f0, slices = product_slices(F), panels = product_panels(D);
    int64_t chunks = pm_blocks(R, PRODUCT_TOKENS);
    float *left = pm_take(&scratch, (size_t)(slices * PRODUCT_SLICE) * 4); /* [slice][r][f] */
    float *panel = scratch;                                                /* [r][PM_NR] */
    float edge[PM_MR * PM_NR] __attribute__((aligned(64))); /* the tile of a partial panel */
    const float *x_rows[PRODUCT_TOKENS + PRODUCT_AHEAD];
    for (int64_t chunk = 0; chunk < chunks; chunk++) {
        int64_t r0 = product_cut(R, chunks, chunk), n = product_cut(R, chunks, chunk + 1) - r0;
        for (int64_t r = 0; r < n + PRODUCT_AHEAD; r++) {
            int64_t row = r0 + pm_min(r, n - 1);
            x_rows[r] = x + (rows ? rows[row] : row) * ldx;
        }
        for (int64_t s = 0; s < slices; s++) {
            int64_t f = product_cut(F, slices, s), m = product_cut(F, slices, s + 1) - f;
            const float *from = dy + r0 * ldy + f0 + f;
            float *to = left + s * PRODUCT_SLICE;
            /* whole vectors: row r + 1 overwrites what runs over */
            for (int64_t r = 0; r < n; r++, from += ldy, to += m)
                for (int64_t i = 0; i < m; i += PM_WIDTH)
                    v_store(to + i, v_get(from + i, m - i));
        }
        for (int64_t p = 0; p < panels; p++) {
            int64_t d = p * PM_NR;
            bool whole = D - d >= PM_NR;
            for (int64_t r = 0; !whole && r < n; r++)
                for (int64_t j = 0; j < PM_NR; j++)
                    panel[r * PM_NR + j] = j < D - d ? x_rows[r][d + j] : 0.0f;
            for (int64_t s = 0; s < slices; s++) {
                int64_t f = product_cut(F, slices, s), m = product_cut(F, slices, s + 1) - f;
                float *c = dw + (f0 + f) * ldw + d;
                const float *slice = left + s * PRODUCT_SLICE;
                product_wgrad_fetch(x_rows, d + PM_NR, pm_min(PM_NR, D - d - PM_NR),
                                    product_cut(n, slices, s), product_cut(n, slices, s + 1));
                if (chunk + 1 < chunks) { /* a share of the next rows of dy */
                    int64_t end = product_cut(R, chunks, chunk + 2), share = p * slices + s;
                    for (int64_t r = r0 + n + product_cut(end - r0 - n, panels * slices, share);
                         r < r0 + n + product_cut(end - r0 - n, panels * slices, share + 1); r++)
                        for (int64_t i = 0; i < F; i += 16)
                            __builtin_prefetch(dy + r * ldy + f0 + i, 0, 2);
                }
                if (whole) {
                    const float *next = s + 1 < slices ? c + m * ldw : dw + f0 * ldw + d + PM_NR;
                    const product_wgrad_fn *tile = s ? product_wgrad_packed : product_wgrad_fresh;
                    tile[m](n, slice, x_rows, d, panel, c, ldw, next);
                    continue;
                }
                memset(edge, 0, sizeof edge);
                product_wgrad_packed[m](n, slice, x_rows, d, panel, edge, PM_NR, edge);
                for (int64_t i = 0; i < m; i++)
                    for (int64_t j = 0; j < D - d; j++)
                        c[i * ldw + j] += edge[i * PM_NR + j];
            }
        }
    }
}
