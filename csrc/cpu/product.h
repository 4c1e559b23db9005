/* product.h: the one product family. Everything that multiplies matrices goes through here.
 *
 * The right operand is packed in panels of PM_NR columns, panel[k][PM_NR], zero padded; the left
 * operand is read in place, each row through its own pointer (that is the gather). A tile is at
 * most PM_MR rows of one panel: its accumulators live in registers over the whole of k, so a row's
 * result does not depend on which rows share its tile. Included once per level.
 *
 * There are kinds of products: those of pm_compute, and bf16 by AMX (product_amx.h); sums are fp32
 * in all of them. Operands are made of words of 4 bytes: one float, or two bf16 that are neighbours
 * along k, the first in the low half, and zeros behind an odd k, for AMX up to a multiple of 32. So
 * panels and the left rows of bf16 are the same for every kind: only packing and the tiles know the
 * difference.
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
#define PRODUCT_MOST_ROWS 256           /* the same of AMX */

/* The kind of a product: one of pm_compute, or one of these: bf16 by AMX. */
typedef int product_kind;
enum { PRODUCT_AMX = PM_COMPUTES, PRODUCT_AMX_EMULATED, PRODUCT_KINDS };

/* The kind of a backend's products. */
static inline product_kind product_kind_of(const pm_ctx *ctx) { return ctx->backend->products; }
static inline bool product_is_amx(product_kind kind) { return PM_HAS_AMX && kind >= PRODUCT_AMX; }
/* Whether the CPU has the instructions that round to bf16. */
static inline bool product_native(product_kind kind)
{
    return kind == PM_BF16 || kind == PRODUCT_AMX;
}

/* A word, whatever is in it: it is moved as a float, which changes no bit. */
typedef float product_word;

#define PRODUCT_DEPTH_AMX 32 /* numbers of a row of a tile register: 16 words */

/* Words of k numbers. */
static inline int64_t product_words(product_kind kind, int64_t k)
{
    if (product_is_amx(kind))
        return pm_blocks(k, PRODUCT_DEPTH_AMX) * (PRODUCT_DEPTH_AMX / 2);
    return kind == PM_FP32 ? k : (k + 1) / 2;
}
/* The numbers of a contraction are filled up with zeros to a multiple of this. */
static inline int64_t product_multiple(product_kind kind)
{
    return product_is_amx(kind) ? PRODUCT_DEPTH_AMX : kind == PM_FP32 ? 1 : 2;
}
/* How many numbers a word has. */
static inline int64_t product_per_word(product_kind kind) { return kind == PM_FP32 ? 1 : 2; }

/* Rows that a tile has at most, and a block of tiles: that many rows stay in L2. */
static inline int64_t product_tall(product_kind kind) { return product_is_amx(kind) ? 32 : PM_MR; }
static inline int64_t product_rows(product_kind kind)
{
    return product_is_amx(kind) ? PRODUCT_MOST_ROWS : PM_ROWS;
}

/* ---------------------------------------------------------------- left operand
 *
 * Rows of floats are fp32 operands as they are. For the other kinds a task rounds its rows into a
 * room of its own, where they lie at one distance. */

/* Words between two rows of a room; not a power of two, so that rows do not share cache sets. */
static inline int64_t product_row_words(int64_t k) { return pm_blocks(k, 32) * 16 + 16; }

/* Bytes of a room for a block of rows of k. Tiles of AMX read whole ones, of 16 rows. */
static inline size_t product_room(product_kind kind, int64_t k)
{
    return kind == PM_FP32
               ? 0
               : (size_t)(product_rows(kind) * product_row_words(k)) * sizeof(product_word);
}

/* Stores PM_WIDTH bf16 at the numbers at.. of a row of words. */
static inline void product_put(product_kind kind, product_word *row, int64_t at, vf x)
{
    v_store_bf16(product_native(kind), (char *)row + 2 * at, x);
}

/* A row x of k floats as a left operand; *room moves on by a row where it is needed. */
static inline const product_word *product_row(product_kind kind, const float *x, int64_t k,
                                              product_word **room)
{
    if (kind == PM_FP32)
        return x;
    product_word *row = *room;
    *room += product_row_words(k);
    int64_t i = 0;
    for (; i < k; i += PM_WIDTH)
        product_put(kind, row, i, v_get(x + i, k - i));
    for (; i < 2 * product_words(kind, k); i += PM_WIDTH)
        product_put(kind, row, i, v_zero());
    return row;
}

/* ---------------------------------------------------------------- packing */

static inline int64_t product_panels(int64_t n) { return (n + PM_NR - 1) / PM_NR; }
/* Words of the panels of n columns. */
static inline int64_t product_packed(product_kind kind, int64_t n, int64_t k)
{
    return product_panels(n) * PM_NR * product_words(kind, k);
}

/* t[j] = words of 2 PM_WIDTH numbers of row j of w. */
static inline __attribute__((always_inline)) void product_words_of(bool native, const float *w,
                                                                   int64_t ld, vf t[PM_WIDTH])
{
    _Pragma("GCC unroll 16")
    for (int j = 0; j < PM_WIDTH; j++, w += ld) {
        __builtin_prefetch(w + 8 * 16);
        __builtin_prefetch(w + 9 * 16);
        t[j] = v_words(native, v_load(w), v_load(w + PM_WIDTH));
    }
}

/* A panel of pairs: its columns are n <= PM_NR rows of w, of k numbers each, and zeros behind them.
 * Words are made before they are transposed, which is half the work. */
static void product_pack_pairs(product_kind kind, int64_t n, int64_t k, const float *w, int64_t ld,
                               product_word *panel)
{
    const bool native = product_native(kind);
    const int64_t words = product_words(kind, k);
    for (int64_t i = 0; i < words; i += PM_WIDTH)
        for (int half = 0; half < PM_NR; half += PM_WIDTH) {
            const int64_t left = k - 2 * i, rows = pm_min(PM_WIDTH, words - i);
            const float *from = w + half * ld + 2 * i;
            product_word *to = panel + i * PM_NR + half;
            vf t[PM_WIDTH];
            if (left >= 2 * PM_WIDTH && n - half >= PM_WIDTH) {
                if (native)
                    product_words_of(true, from, ld, t);
                else
                    product_words_of(false, from, ld, t);
                v_transpose(t);
                _Pragma("GCC unroll 16")
                for (int j = 0; j < PM_WIDTH; j++)
                    v_store(to + j * PM_NR, t[j]);
                continue;
            }
            for (int j = 0; j < PM_WIDTH; j++, from += ld) {
                const int64_t there = j < n - half ? left : 0;
                t[j] =
                    v_words(native, there > 0 ? v_get(from, there) : v_zero(),
                            there > PM_WIDTH ? v_get(from + PM_WIDTH, there - PM_WIDTH) : v_zero());
            }
            v_transpose(t);
            for (int j = 0; j < rows; j++)
                v_store(to + j * PM_NR, t[j]);
        }
}

/* Panels of the columns of B = W^T, for y = x W^T: W has n rows (outputs) of k, at distance ld. */
static void product_pack_rows(product_kind kind, int64_t n, int64_t k, const float *w, int64_t ld,
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
 * distance ld. k0 is even, and k1 is even or k; with k come the zeros behind it. */
static void product_pack_cols_range(product_kind kind, int64_t n, int64_t k, int64_t k0, int64_t k1,
                                    const float *w, int64_t ld, product_word *panels)
{
    const int64_t words = product_words(kind, k), per = product_per_word(kind);
    const bool native = product_native(kind);
    for (int64_t b = k0; b < k1; b += PRODUCT_PACK_ROWS)
        for (int64_t p = 0; p < n; p += PM_NR)
            for (int64_t i = b; i < pm_min(k1, b + PRODUCT_PACK_ROWS); i += per)
                for (int64_t j = 0; j < PM_NR; j += PM_WIDTH) {
                    const int64_t left = n - p - j;
                    const float *from = w + i * ld + p + j;
                    vf x = left > 0 ? v_get(from, left) : v_zero();
                    if (per == 2)
                        x = v_pairs(native, x,
                                    left > 0 && i + 1 < k ? v_get(from + ld, left) : v_zero());
                    v_store(panels + p * words + i / per * PM_NR + j, x);
                }
    const int64_t used = (k + per - 1) / per;
    if (k1 == k && used < words)
        for (int64_t p = 0; p < n; p += PM_NR)
            memset(panels + p * words + used * PM_NR, 0,
                   (size_t)((words - used) * PM_NR) * sizeof(product_word));
}
static void product_pack_cols(product_kind kind, int64_t n, int64_t k, const float *w, int64_t ld,
                              product_word *panels)
{
    product_pack_cols_range(kind, n, k, 0, k, w, ld, panels);
}

/* The derived twin of a weight (F, D): panels for y = x W^T, then panels for dx = dy W. */
static size_t product_panel_bytes(product_kind kind, int64_t n, int64_t k)
{
    return pm_round64((size_t)product_packed(kind, n, k) * sizeof(product_word));
}
static size_t product_derived_bytes(const pm_ctx *ctx, int64_t F, int64_t D)
{
    const product_kind kind = product_kind_of(ctx);
    return product_panel_bytes(kind, F, D) + product_panel_bytes(kind, D, F);
}
static inline product_word *product_backward_panels(product_kind kind, const void *derived,
                                                    int64_t F, int64_t D)
{
    return (product_word *)((const char *)derived + product_panel_bytes(kind, F, D));
}

/* Making panels of a weight (F, D), forward or backward or both, in parallel. */
typedef struct {
    product_kind kind;
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
    product_pack_job job = {product_kind_of(ctx), F, D, weight.w, scratch, NULL};
    pm_parallel(ctx->pool, product_panels(F), product_pack_forward_task, &job);
    return scratch;
}
static const product_word *product_backward_of(pm_ctx *ctx, pm_weight weight, int64_t F, int64_t D,
                                               void *scratch)
{
    const product_kind kind = product_kind_of(ctx);
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

/* The same for a kind. Those of AMX begin at multiples of 32, the depth of a side's tile. */
static inline int64_t product_slices_of(product_kind kind, int64_t m)
{
    return pm_blocks(m, product_tall(kind));
}
static inline int64_t product_slice_of(product_kind kind, int64_t m, int64_t slices, int64_t i)
{
    return product_is_amx(kind) ? pm_min(m, i * product_tall(kind)) : product_slice(m, slices, i);
}

/* Around a tile. */
static inline unsigned product_begin(product_kind kind)
{
    return kind == PM_BF16_EMULATED ? v_flush_denormals() : 0;
}
static inline void product_end(product_kind kind, unsigned mode)
{
    if (kind == PM_BF16_EMULATED)
        v_keep_denormals(mode);
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

#if PM_HAS_AMX
static inline void product_amx_block(product_kind kind, int64_t m, const product_word *const *a,
                                     int64_t k, int64_t n, const product_word *panels, int64_t p0,
                                     int64_t p1, product_finish finish, void *arg,
                                     product_target to);
#endif

/* One task's share of A.B: m rows (m <= product_rows; a[i] is a left operand of k numbers), panels
 * p0..p1-1 of the n-column packed operand. */
static inline void product_block(product_kind kind, int64_t m, const product_word *const *a,
                                 int64_t k, int64_t n, const product_word *panels, int64_t p0,
                                 int64_t p1, product_finish finish, void *arg, product_target to)
{
#if PM_HAS_AMX
    if (product_is_amx(kind)) {
        product_amx_block(kind, m, a, k, n, panels, p0, p1, finish, arg, to);
        return;
    }
#endif
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
            const unsigned mode = product_begin(kind);
            product_ahead[kind][rows](words, a + row, panel, tile, next + s * step * words, step);
            product_end(kind, mode);
            finish(arg, row, (int)rows, p * PM_NR, pm_min(PM_NR, n - p * PM_NR), tile);
        }
    }
}

/* How m rows by the panels of n columns, of depth k, are cut into tasks: blocks of row slices times
 * ranges of panels. Enough tasks for many threads, none too small to be worth handing out. */
typedef struct {
    product_kind kind;
    int64_t rows, row_tasks;     /* slices of a tile's rows are dealt to row_tasks blocks */
    int64_t panels, panel_tasks; /* panels to panel_tasks ranges */
} product_grid;
typedef struct {
    int64_t row0, rows, panel0, panel1;
} product_share;

#define PRODUCT_TASKS 64                /* tasks that keep 16 threads busy to the end */
#define PRODUCT_WORK ((int64_t)1 << 18) /* multiply-adds of the smallest task: 2 microseconds */
#define PRODUCT_THIN 16                 /* rows below which reading the panels sets the pace */

/* Tasks of AMX have 8 times the work and more: it is that much faster, and what surrounds a product
 * (rounding rows, fetching panels) is less with fewer tasks. */
static inline int64_t product_tasks_wanted(product_kind kind)
{
    return product_is_amx(kind) ? PRODUCT_TASKS / 4 : PRODUCT_TASKS;
}
static inline int64_t product_work(product_kind kind)
{
    return product_is_amx(kind) ? 8 * PRODUCT_WORK : PRODUCT_WORK;
}

static product_grid product_grid_of(product_kind kind, int64_t m, int64_t n, int64_t k)
{
    product_grid g = {.kind = kind, .rows = m, .panels = product_panels(n)};
    const int64_t most = pm_max(m, PRODUCT_THIN) * n * k / product_work(kind),
                  wanted = product_tasks_wanted(kind);
    g.row_tasks = pm_blocks(m, product_rows(kind));
    if (product_is_amx(kind)) /* each task of the same rows would round them again */
        g.row_tasks = pm_max(g.row_tasks, pm_min(wanted, product_slices_of(kind, m) / 2));
    g.panel_tasks = pm_blocks(wanted, pm_max(1, g.row_tasks));
    g.panel_tasks = pm_min(g.panel_tasks, most / pm_max(1, g.row_tasks));
    g.panel_tasks = pm_max(1, pm_min(g.panel_tasks, g.panels));
    return g;
}
static inline int64_t product_tasks(const product_grid *g) { return g->row_tasks * g->panel_tasks; }

/* Tasks that share a range of panels are neighbours. */
static product_share product_share_of(const product_grid *g, int64_t task)
{
    const int64_t p = task / g->row_tasks, b = task % g->row_tasks,
                  slices = product_slices_of(g->kind, g->rows);
    const int64_t row0 = product_slice_of(g->kind, g->rows, slices,
                                          product_cut(slices, g->row_tasks, b)),
                  row1 = product_slice_of(g->kind, g->rows, slices,
                                          product_cut(slices, g->row_tasks, b + 1));
    return (product_share){row0, row1 - row0, product_cut(g->panels, g->panel_tasks, p),
                           product_cut(g->panels, g->panel_tasks, p + 1)};
}

#include "product_wgrad.h"
#if PM_HAS_AMX
#include "product_amx.h"
#endif
