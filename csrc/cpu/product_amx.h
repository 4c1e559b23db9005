/* product_amx.h: products of bf16 by the tile registers of AMX. The end of product.h.
 *
 * A tile register has 16 rows of 16 words. TDPBF16PS adds to a tile of sums the product of a tile
 * of left rows by a tile of right words, 16 of each: 16384 operations in 16 clocks, where a
 * vector's fused multiply-add has 32. So a block here is 32 rows by the 32 columns of a panel: four
 * tiles of sums, two of either side, and of 4 tiles loaded (4 KB from L1 or L2) each is used twice.
 *
 * Sums, as the manual says and the tests compare: of the 16 pairs of a row, the low products and the
 * high ones each in a chain from zero, by fused multiply-adds; then the two together, to the sum.
 * Denormals are zero, on both ends. product_amx_emulated does just that, and has the same bits. */

#define PRODUCT_AMX_ROWS 16  /* of a tile register, and words of a row */
#define PRODUCT_AMX_TILE 256 /* words of a tile */
#define PRODUCT_AMX_SIDE 32  /* rows and columns of a block of sums */

/* Tile registers: sums 0..3 ([row half][column half]), left 4 and 5, right 6 and 7. All are whole:
 * where there are fewer rows, the rest is computed in vain; where there are fewer words, the
 * operands have zeros. */
static const struct {
    uint8_t palette, start, reserved[14];
    uint16_t row_bytes[16];
    uint8_t rows[16];
} product_amx_registers = {
    .palette = 1,
    .row_bytes = {64, 64, 64, 64, 64, 64, 64, 64},
    .rows = {16, 16, 16, 16, 16, 16, 16, 16},
};

/* Around the tiles of a task. A thread that holds tile registers pays 8 KB at each switch. */
static inline void product_amx_begin(product_kind kind)
{
    if (kind == PRODUCT_AMX)
        _tile_loadconfig(&product_amx_registers);
}
static inline void product_amx_end(product_kind kind)
{
    if (kind == PRODUCT_AMX)
        _tile_release();
}

/* Two halves of left rows, the second one NULL when there are no more than 16: tiles of so many bytes
 * between rows, and so many words from one block of depth to the next. */
typedef struct {
    const product_word *half[2];
    int64_t row_bytes, step;
} product_amx_left;

/* What is fetched meanwhile: into L2, from two places, so many lines of each per block of depth; and for
 * writing, so many rows of the sums that come next. */
typedef struct {
    const char *at[2];
    int64_t lines;
    const float *sums;
    int64_t ld, rows;
} product_amx_fetch;
static inline void product_amx_ahead(const char *at[2], int64_t lines)
{
    for (int64_t l = 0; l < lines; l++, at[0] += 64, at[1] += 64) {
        __builtin_prefetch(at[0], 0, 2);
        __builtin_prefetch(at[1], 0, 2);
    }
}
static inline const float *product_amx_sums_ahead(const float *sums, int64_t ld, int64_t rows)
{
    for (int64_t i = 0; i < rows; i++, sums += ld) {
        __builtin_prefetch(sums, 1);
        __builtin_prefetch(sums + PRODUCT_AMX_ROWS, 1);
    }
    return sums;
}
/* Sets it to the words of a panel (blocks * 32 lines), a part of them: the i'th of so many. */
static inline void product_amx_part(product_amx_fetch *fetch, const product_word *panel,
                                    int64_t blocks, int64_t i, int64_t parts)
{
    fetch->lines = pm_blocks(PRODUCT_AMX_ROWS, pm_max(1, parts));
    fetch->at[0] = (const char *)panel + 2 * i * fetch->lines * blocks * 64;
    fetch->at[1] = fetch->at[0] + fetch->lines * blocks * 64;
}

/* (Both go by pointer: a copy of them would be loaded as vectors from the scalars just stored, and such
 * a load waits until every store before it has reached the cache.)
 *
 * c[i][0..32) = or += the sum over blocks of 32 numbers of left rows i < 32 (or 16) by a panel. */
typedef void (*product_amx_tile_fn)(int64_t blocks, const product_amx_left *left,
                                    const product_word *panel, float *c, int64_t ldc, bool add,
                                    const product_amx_fetch *fetch);

/* GCC does not know that a tile is loaded from memory. */
#define PRODUCT_AMX_MEMORY __asm__ volatile("" ::: "memory")

static void product_amx_native(int64_t blocks, const product_amx_left *left,
                               const product_word *panel, float *c, int64_t ldc, bool add,
                               const product_amx_fetch *fetch)
{
    const int64_t line = PM_NR * (int64_t)sizeof(product_word), row = ldc * (int64_t)sizeof(float);
    const product_word *a0 = left->half[0], *a1 = left->half[1];
    const int64_t left_row = left->row_bytes, step = left->step;
    const char *ahead[2] = {fetch->at[0], fetch->at[1]};
    const float *sums = fetch->sums;
    const int64_t lines = fetch->lines, ld = fetch->ld, rows = fetch->rows;
    float *const lower = c + PRODUCT_AMX_ROWS * ldc;
    PRODUCT_AMX_MEMORY;
    if (add) {
        _tile_loadd(0, c, row);
        _tile_loadd(1, c + PRODUCT_AMX_ROWS, row);
    } else {
        _tile_zero(0);
        _tile_zero(1);
    }
    if (!a1) {
        for (int64_t b = 0; b < blocks; b++, a0 += step, panel += PRODUCT_AMX_ROWS * PM_NR) {
            _tile_loadd(6, panel, line);
            _tile_loadd(4, a0, left_row);
            _tile_loadd(7, panel + PRODUCT_AMX_ROWS, line);
            _tile_dpbf16ps(0, 4, 6);
            _tile_dpbf16ps(1, 4, 7);
            product_amx_ahead(ahead, lines);
            sums = product_amx_sums_ahead(sums, ld, rows);
        }
        _tile_stored(0, c, row);
        _tile_stored(1, c + PRODUCT_AMX_ROWS, row);
        return;
    }
    if (add) {
        _tile_loadd(2, lower, row);
        _tile_loadd(3, lower + PRODUCT_AMX_ROWS, row);
    } else {
        _tile_zero(2);
        _tile_zero(3);
    }
    for (int64_t b = 0; b < blocks; b++, panel += PRODUCT_AMX_ROWS * PM_NR) {
        _tile_loadd(6, panel, line);
        _tile_loadd(4, a0, left_row);
        _tile_loadd(5, a1, left_row);
        _tile_loadd(7, panel + PRODUCT_AMX_ROWS, line);
        _tile_dpbf16ps(0, 4, 6);
        _tile_dpbf16ps(2, 5, 6);
        _tile_dpbf16ps(1, 4, 7);
        _tile_dpbf16ps(3, 5, 7);
        product_amx_ahead(ahead, lines);
        sums = product_amx_sums_ahead(sums, ld, rows);
        a0 += step;
        a1 += step;
    }
    _tile_stored(0, c, row);
    _tile_stored(1, c + PRODUCT_AMX_ROWS, row);
    _tile_stored(2, lower, row);
    _tile_stored(3, lower + PRODUCT_AMX_ROWS, row);
}

/* A row of sums of the emulation, of PM_WIDTH columns: words of the left row are stride apart. */
static inline vf product_amx_emulated_row(int64_t blocks, const product_word *a, int64_t step,
                                          const product_word *panel, vf sum)
{
    const vi high = (vi){0} - 0x10000; /* 0xffff0000 */
    for (int64_t b = 0; b < blocks; b++, a += step) {
        vf chain[2] = {v_zero(), v_zero()};
        for (int w = 0; w < PRODUCT_AMX_ROWS; w++, panel += PM_NR) {
            int32_t word;
            memcpy(&word, a + w, sizeof word);
            const vi x = (vi){0} + word, y = (vi)v_load(panel);
            chain[0] = v_fma((vf)(x << 16), (vf)(y << 16), chain[0]);
            chain[1] = v_fma((vf)(x & high), (vf)(y & high), chain[1]);
        }
        sum = sum + (chain[0] + chain[1]);
    }
    return sum;
}
static __attribute__((noinline)) void product_amx_emulated_sums(int64_t blocks,
                                                                const product_amx_left *left,
                                                                const product_word *panel, float *c,
                                                                int64_t ldc, bool add)
{
    for (int h = 0; h < 2 && left->half[h]; h++)
        for (int i = 0; i < PRODUCT_AMX_ROWS; i++)
            for (int j = 0; j < PM_NR; j += PM_WIDTH) {
                const product_word *a = left->half[h] +
                                        i * left->row_bytes / (int64_t)sizeof(product_word);
                float *to = c + (h * PRODUCT_AMX_ROWS + i) * ldc + j;
                v_store(to, product_amx_emulated_row(blocks, a, left->step, panel + j,
                                                     add ? v_load(to) : v_zero()));
            }
}
static void product_amx_emulated(int64_t blocks, const product_amx_left *left,
                                 const product_word *panel, float *c, int64_t ldc, bool add,
                                 const product_amx_fetch *fetch)
{
    (void)fetch;
    const unsigned mode = v_flush_denormals();
    product_amx_emulated_sums(blocks, left, panel, c, ldc, add);
    v_keep_denormals(mode);
}

static inline product_amx_tile_fn product_amx_tile(product_kind kind)
{
    return kind == PRODUCT_AMX ? product_amx_native : product_amx_emulated;
}

/* product_block by tiles: the rows are at one distance, in a room of whole tiles. */
static inline void product_amx_block(product_kind kind, int64_t m, const product_word *const *a,
                                     int64_t k, int64_t n, const product_word *panels, int64_t p0,
                                     int64_t p1, product_finish finish, void *arg,
                                     product_target to)
{
    float tile[PRODUCT_AMX_SIDE * PM_NR] __attribute__((aligned(64)));
    const product_amx_tile_fn multiply = product_amx_tile(kind);
    const int64_t words = product_words(kind, k), blocks = words / PRODUCT_AMX_ROWS;
    const int64_t ld = m > 1 ? a[1] - a[0] : 0;
    const int64_t slices = pm_blocks(m, PRODUCT_AMX_SIDE);
    product_amx_fetch fetch = {0};
    product_amx_begin(kind);
    for (int64_t p = p0; p < p1; p++) {
        const product_word *panel = panels + p * PM_NR * words;
        const product_word *next = p + 1 < p1 ? panel + PM_NR * words : panel;
        for (int64_t s = 0; s < slices; s++) {
            const int64_t row = s * PRODUCT_AMX_SIDE, rows = pm_min(PRODUCT_AMX_SIDE, m - row);
            const product_word *x = a[0] + row * ld;
            product_fetch_target(to, row, rows, p * PM_NR);
            const product_amx_left left = {
                {x, rows > PRODUCT_AMX_ROWS ? x + PRODUCT_AMX_ROWS * ld : NULL},
                ld * (int64_t)sizeof(product_word),
                PRODUCT_AMX_ROWS};
            product_amx_part(&fetch, next, blocks, s, slices);
            multiply(blocks, &left, panel, tile, PM_NR, false, &fetch);
            finish(arg, row, (int)rows, p * PM_NR, pm_min(PM_NR, n - p * PM_NR), tile);
        }
    }
    product_amx_end(kind);
}

/* Blocks of depth of the weight gradient that go together: those of a right panel are 16 KB and stay
 * in L1 while the left panels pass by, which are as large. */
#define PRODUCT_AMX_DEPTH 8

/* product_wgrad by tiles: left is turned. */
static void product_amx_wgrad(product_kind kind, const product_side *left,
                              const product_side *right, int64_t row0, int64_t rows,
                              product_wgrad_share share, float *dw, int64_t ldw)
{
    const product_amx_tile_fn multiply = product_amx_tile(kind);
    const int64_t blocks = product_words(kind, rows) / PRODUCT_AMX_ROWS,
                  chunks = pm_blocks(blocks, PRODUCT_AMX_DEPTH);
    float edge[PRODUCT_AMX_SIDE * PM_NR] __attribute__((aligned(64)));
    product_amx_begin(kind);
    for (int64_t chunk = 0; chunk < chunks; chunk++) {
        const int64_t b = product_cut(blocks, chunks, chunk),
                      n = product_cut(blocks, chunks, chunk + 1) - b;
        const int64_t word = row0 / 2 + b * PRODUCT_AMX_ROWS;
        /* sums are in L2 after the first chunk */
        product_amx_fetch fetch = {.ld = ldw,
                                   .rows = chunk == 0 ? pm_blocks(PRODUCT_AMX_SIDE, n) : 0};
        for (int64_t d = share.d0; d < share.d1; d += PM_NR) {
            const product_word *panel = product_side_at(right, word, d);
            for (int64_t f = share.f0; f < share.f1; f += PRODUCT_AMX_SIDE) {
                const int64_t high = pm_min(PRODUCT_AMX_SIDE, share.f1 - f),
                              wide = pm_min(PM_NR, share.d1 - d);
                const product_amx_left x = {{product_side_at(left, word, f),
                                             high > PRODUCT_AMX_ROWS
                                                 ? product_side_at(left, word, f + PRODUCT_AMX_ROWS)
                                                 : NULL},
                                            PRODUCT_AMX_ROWS * (int64_t)sizeof(product_word),
                                            PRODUCT_AMX_TILE};
                const int64_t next_f = f + PRODUCT_AMX_SIDE < share.f1 ? f + PRODUCT_AMX_SIDE : f;
                if (d == share.d0) { /* nobody has fetched the left side */
                    fetch.at[0] = (const char *)product_side_at(left, word, next_f);
                    fetch.at[1] =
                        (const char *)product_side_at(left, word, next_f + PRODUCT_AMX_ROWS);
                    fetch.lines = PRODUCT_AMX_ROWS;
                } else {
                    product_amx_part(
                        &fetch, product_side_at(right, word, d + PM_NR < share.d1 ? d + PM_NR : d),
                        n, (f - share.f0) / PRODUCT_AMX_SIDE,
                        pm_blocks(share.f1 - share.f0, PRODUCT_AMX_SIDE));
                }
                float *c = dw + f * ldw + d;
                fetch.sums = next_f > f ? c + PRODUCT_AMX_SIDE * ldw
                                        : dw + share.f0 * ldw + d + PM_NR;
                if (high == PRODUCT_AMX_SIDE && wide == PM_NR) {
                    multiply(n, &x, panel, c, ldw, true, &fetch);
                    continue;
                }
                for (int64_t i = 0; i < PRODUCT_AMX_SIDE; i++)
                    for (int64_t j = 0; j < PM_NR; j += PM_WIDTH)
                        v_store(edge + i * PM_NR + j,
                                i < high && j < wide ? v_get(c + i * ldw + j, wide - j) : v_zero());
                multiply(n, &x, panel, edge, PM_NR, true, &fetch);
                for (int64_t i = 0; i < high; i++)
                    for (int64_t j = 0; j < wide; j += PM_WIDTH)
                        v_put(c + i * ldw + j, v_load(edge + i * PM_NR + j), wide - j);
            }
        }
    }
    product_amx_end(kind);
}
