/* product.h: the one product family. Everything that multiplies matrices goes through here.
 *
 * The right operand is packed in panels of PM_NR columns, panel[k][PM_NR], zero padded; the left
 * operand is read in place, each row through its own pointer (that is the gather). A tile is at most
 * PM_MR rows of one panel: its accumulators live in registers over the whole of k, so a row's result
 * does not depend on which rows share its tile. Included once per level.
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

/* ---------------------------------------------------------------- packing */

static inline int64_t product_panels(int64_t n) { return (n + PM_NR - 1) / PM_NR; }
static inline int64_t product_packed(int64_t n, int64_t k) { return product_panels(n) * PM_NR * k; }

/* Panels of the columns of B = W^T, for y = x W^T: W has n rows (outputs) of k, at distance ld. */
static void product_pack_rows(int64_t n, int64_t k, const float *w, int64_t ld, float *panels)
{
    for (int64_t p = 0; p < n; p += PM_NR) {
        int64_t width = pm_min(PM_NR, n - p);
        for (int64_t i = 0; i < k; i++)
            for (int64_t j = 0; j < PM_NR; j++)
                *panels++ = j < width ? w[(p + j) * ld + i] : 0.0f;
    }
}

/* Panels of the columns of B = W, for dx = dy W: W has k rows of n, at distance ld. */
static void product_pack_cols(int64_t n, int64_t k, const float *w, int64_t ld, float *panels)
{
    for (int64_t p = 0; p < n; p += PM_NR) {
        int64_t width = pm_min(PM_NR, n - p);
        for (int64_t i = 0; i < k; i++)
            for (int64_t j = 0; j < PM_NR; j++)
                *panels++ = j < width ? w[i * ld + p + j] : 0.0f;
    }
}

/* The derived twin of a weight (F, D): panels for y = x W^T, then panels for dx = dy W. */
static size_t product_derived_bytes(int64_t F, int64_t D)
{
    return pm_round64((size_t)product_packed(F, D) * 4) + pm_round64((size_t)product_packed(D, F) * 4);
}
static inline const float *product_forward_panels(const void *derived, int64_t F, int64_t D)
{
    (void)F, (void)D;
    return derived;
}
static inline const float *product_backward_panels(const void *derived, int64_t F, int64_t D)
{
    return (const float *)((const char *)derived + pm_round64((size_t)product_packed(F, D) * 4));
}

typedef struct {
    int64_t F, D;
    const float *w;
    void *derived;
} product_derive_job;
static void product_derive_task(void *arg, int64_t task, int worker)
{
    (void)worker;
    product_derive_job *j = arg;
    int64_t forward = product_panels(j->F);
    if (task < forward) {
        int64_t p = task * PM_NR;
        product_pack_rows(pm_min(PM_NR, j->F - p), j->D, j->w + p * j->D, j->D,
                          (float *)product_forward_panels(j->derived, j->F, j->D) + p * j->D);
    } else {
        int64_t p = (task - forward) * PM_NR;
        product_pack_cols(pm_min(PM_NR, j->D - p), j->F, j->w + p, j->D,
                          (float *)product_backward_panels(j->derived, j->F, j->D) + p * j->F);
    }
}
static pm_status product_derive(pm_ctx *ctx, int64_t F, int64_t D, const float *w, void *derived)
{
    product_derive_job job = {F, D, w, derived};
    pm_parallel(ctx->pool, product_panels(F) + product_panels(D), product_derive_task, &job);
    return PM_OK;
}

/* One direction alone, for a weight without a derived twin: panels of product_packed(F, D) floats for
 * y = x W^T, or of product_packed(D, F) floats for dx = dy W. */
typedef struct {
    int64_t F, D;
    const float *w;
    float *panels;
} product_pack_job;
static void product_pack_forward_task(void *arg, int64_t task, int worker)
{
    (void)worker;
    const product_pack_job *j = arg;
    int64_t p = task * PM_NR;
    product_pack_rows(pm_min(PM_NR, j->F - p), j->D, j->w + p * j->D, j->D, j->panels + p * j->D);
}
static void product_pack_backward_task(void *arg, int64_t task, int worker)
{
    (void)worker;
    const product_pack_job *j = arg;
    int64_t p = task * PM_NR;
    product_pack_cols(pm_min(PM_NR, j->D - p), j->F, j->w + p, j->D, j->panels + p * j->F);
}

/* The panels of a weight (F, D): its derived twin's, or packed into scratch. */
static const float *product_forward_of(pm_ctx *ctx, pm_weight weight, int64_t F, int64_t D, float *scratch)
{
    if (weight.derived)
        return product_forward_panels(weight.derived, F, D);
    product_pack_job job = {F, D, weight.w, scratch};
    pm_parallel(ctx->pool, product_panels(F), product_pack_forward_task, &job);
    return scratch;
}
static const float *product_backward_of(pm_ctx *ctx, pm_weight weight, int64_t F, int64_t D, float *scratch)
{
    if (weight.derived)
        return product_backward_panels(weight.derived, F, D);
    product_pack_job job = {F, D, weight.w, scratch};
    pm_parallel(ctx->pool, product_panels(D), product_pack_backward_task, &job);
    return scratch;
}

/* ---------------------------------------------------------------- tile */

/* c[i][0..PM_NR) (+)= sum over kk < k of a[i][kk] * panel[kk][0..PM_NR), i < m <= PM_MR. */
#define PRODUCT_TILE(m)                                                                            \
    static void product_tile_##m(int64_t k, const float *const *a, const float *panel, float *c,   \
                                 int64_t ldc, bool add)                                            \
    {                                                                                              \
        vf t[m][2];                                                                                \
        const float *r[m];                                                                         \
        _Pragma("GCC unroll 16") for (int i = 0; i < m; i++)                                       \
        {                                                                                          \
            r[i] = a[i];                                                                           \
            t[i][0] = add ? v_load(c + i * ldc) : v_zero();                                        \
            t[i][1] = add ? v_load(c + i * ldc + PM_WIDTH) : v_zero();                             \
        }                                                                                          \
        for (int64_t kk = 0; kk < k; kk++) {                                                       \
            vf b0 = v_load(panel + kk * PM_NR), b1 = v_load(panel + kk * PM_NR + PM_WIDTH);        \
            __builtin_prefetch(panel + (kk + 16) * PM_NR);                                         \
            __builtin_prefetch(panel + (kk + 16) * PM_NR + PM_WIDTH);                              \
            _Pragma("GCC unroll 16") for (int i = 0; i < m; i++)                                   \
            {                                                                                      \
                vf x = v_set(r[i][kk]);                                                            \
                t[i][0] = v_fma(x, b0, t[i][0]);                                                   \
                t[i][1] = v_fma(x, b1, t[i][1]);                                                   \
            }                                                                                      \
        }                                                                                          \
        _Pragma("GCC unroll 16") for (int i = 0; i < m; i++)                                       \
        {                                                                                          \
            v_store(c + i * ldc, t[i][0]);                                                         \
            v_store(c + i * ldc + PM_WIDTH, t[i][1]);                                              \
        }                                                                                          \
    }
PRODUCT_TILE(1)
PRODUCT_TILE(2)
PRODUCT_TILE(3)
PRODUCT_TILE(4)
PRODUCT_TILE(5)
PRODUCT_TILE(6)
#if PM_MR == 14
PRODUCT_TILE(7)
PRODUCT_TILE(8)
PRODUCT_TILE(9)
PRODUCT_TILE(10)
PRODUCT_TILE(11)
PRODUCT_TILE(12)
PRODUCT_TILE(13)
PRODUCT_TILE(14)
#endif
#undef PRODUCT_TILE

typedef void (*product_tile_fn)(int64_t k, const float *const *a, const float *panel, float *c,
                                int64_t ldc, bool add);
static const product_tile_fn product_tile[PM_MR + 1] = {
    NULL, product_tile_1, product_tile_2, product_tile_3, product_tile_4, product_tile_5, product_tile_6,
#if PM_MR == 14
    product_tile_7, product_tile_8, product_tile_9, product_tile_10, product_tile_11, product_tile_12,
    product_tile_13, product_tile_14,
#endif
};

/* m rows in near-equal slices of at most PM_MR, so that no slice is a thin remainder. */
static inline int64_t product_slices(int64_t m) { return (m + PM_MR - 1) / PM_MR; }
static inline int64_t product_cut(int64_t m, int64_t slices, int64_t i) { return m * i / slices; }

/* ---------------------------------------------------------------- block */

/* Called on every finished tile while it is in L1: rows row0..row0+m-1 of the block, columns
 * col0..col0+n-1 (n <= PM_NR), tile[i*PM_NR + j]; the tile may be overwritten. */
typedef void (*product_finish)(void *arg, int64_t row0, int m, int64_t col0, int64_t n, float *tile);

/* One task's share of A.B: m rows (m <= a few PM_ROWS; a[i] points to k floats), panels p0..p1-1 of the
 * n-column packed operand. */
static inline void product_block(int64_t m, const float *const *a, int64_t k, int64_t n,
                                 const float *panels, int64_t p0, int64_t p1, product_finish finish,
                                 void *arg)
{
    float tile[PM_MR * PM_NR] __attribute__((aligned(64)));
    int64_t slices = product_slices(m);
    for (int64_t p = p0; p < p1; p++)
        for (int64_t s = 0; s < slices; s++) {
            int64_t row = product_cut(m, slices, s), rows = product_cut(m, slices, s + 1) - row;
            product_tile[rows](k, a + row, panels + p * PM_NR * k, tile, PM_NR, false);
            finish(arg, row, (int)rows, p * PM_NR, pm_min(PM_NR, n - p * PM_NR), tile);
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

#define PRODUCT_TASKS 64               /* tasks that keep 16 threads busy to the end */
#define PRODUCT_WORK ((int64_t)1 << 20) /* multiply-adds of the smallest task: about 10 microseconds */

static product_grid product_grid_of(int64_t m, int64_t n, int64_t k)
{
    product_grid g = {.rows = m, .panels = product_panels(n)};
    int64_t most = m * n * k / PRODUCT_WORK;
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

/* dw[f][d] += sum over r < R of dy[r][f] * x_r[d] for f0 <= f < f1, d < D, where dy row r is at dy + r*ldy
 * and x_r = x + (rows ? rows[r] : r) * ldx; dw row f is at dw + f*ldw. One task calls it for the rows
 * f0..f1-1 that it owns; r is summed in order. scratch: product_wgrad_scratch(f1 - f0, D) bytes. */
static inline size_t product_wgrad_scratch(int64_t F, int64_t D);
static void product_wgrad(int64_t R, const float *dy, int64_t ldy, const float *x, int64_t ldx,
                          const int32_t *rows, int64_t f0, int64_t f1, int64_t D, float *dw, int64_t ldw,
                          void *scratch);

/* db[f] += sum over r < R of dy[r][f], f0 <= f < f1, in the same order whatever f0 and f1 are. */
static void product_bias_grad(int64_t R, const float *dy, int64_t ldy, int64_t f0, int64_t f1, float *db)
{
    for (int64_t f = f0; f < f1; f += PM_WIDTH) {
        int64_t width = pm_min(PM_WIDTH, f1 - f);
        vf sum = v_zero();
        for (int64_t r0 = 0; r0 < R; r0 += 64) { /* sums of 64, then their sum: smaller rounding errors */
            vf part = v_zero();
            for (int64_t r = r0; r < pm_min(R, r0 + 64); r++)
                part += v_load_n(dy + r * ldy + f, width);
            sum += part;
        }
        v_store_n(db + f, v_load_n(db + f, width) + sum, width);
    }
}

#define PRODUCT_TOKENS 256 /* rows packed at a time */

static inline size_t product_wgrad_scratch(int64_t F, int64_t D)
{
    return pm_round64((size_t)PRODUCT_TOKENS * (size_t)F * 4) +
           pm_round64((size_t)PRODUCT_TOKENS * (size_t)product_panels(D) * PM_NR * 4);
}

/* The same for the largest share of a grid whose rows are F and whose panels are those of D. */
static inline size_t product_grid_wgrad_scratch(const product_grid *g)
{
    return product_wgrad_scratch(pm_min(PM_ROWS, g->rows),
                                 pm_blocks(g->panels, pm_max(1, g->panel_tasks)) * PM_NR);
}

static void product_wgrad(int64_t R, const float *dy, int64_t ldy, const float *x, int64_t ldx,
                          const int32_t *rows, int64_t f0, int64_t f1, int64_t D, float *dw, int64_t ldw,
                          void *scratch)
{
    int64_t F = f1 - f0;
    float *left = pm_take(&scratch, (size_t)PRODUCT_TOKENS * (size_t)F * 4); /* dy^T: [f][r] */
    float *right = scratch;                                                 /* panels of x: [d/NR][r][NR] */
    int64_t slices = product_slices(F);
    for (int64_t r0 = 0; r0 < R; r0 += PRODUCT_TOKENS) {
        int64_t n = pm_min(PRODUCT_TOKENS, R - r0);
        for (int64_t r = 0; r < n; r++)
            for (int64_t f = 0; f < F; f++)
                left[f * n + r] = dy[(r0 + r) * ldy + f0 + f];
        for (int64_t p = 0; p < D; p += PM_NR) {
            int64_t width = pm_min(PM_NR, D - p);
            float *out = right + p * n;
            for (int64_t r = 0; r < n; r++, out += PM_NR) {
                const float *from = x + (rows ? rows[r0 + r] : r0 + r) * ldx + p;
                for (int64_t j = 0; j < PM_NR; j++)
                    out[j] = j < width ? from[j] : 0.0f;
            }
        }
        for (int64_t p = 0; p < D; p += PM_NR)
            for (int64_t s = 0; s < slices; s++) {
                int64_t f = product_cut(F, slices, s), m = product_cut(F, slices, s + 1) - f;
                const float *a[PM_MR];
                for (int64_t i = 0; i < m; i++)
                    a[i] = left + (f + i) * n;
                float *c = dw + (f0 + f) * ldw + p;
                if (D - p >= PM_NR) {
                    product_tile[m](n, a, right + p * n, c, ldw, true);
                } else {
                    float tile[PM_MR * PM_NR] __attribute__((aligned(64)));
                    product_tile[m](n, a, right + p * n, tile, PM_NR, false);
                    for (int64_t i = 0; i < m; i++)
                        for (int64_t j = 0; j < D - p; j++)
                            c[i * ldw + j] += tile[i * PM_NR + j];
                }
            }
    }
}
