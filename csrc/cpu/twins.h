/* twins.h: writing the derived twin of a weight (F, D), as product.h lays it out: the panels for
 * y = x W^T, then those for dx = dy W. Zeros stand behind a contraction to the end of its words.
 *
 * It is written a strip of rows at a time, and of that a few columns, from rows that the caller has just
 * read or made, so that they come out of the cache. Nobody reads panels soon: they are streamed past it,
 * whole lines of 64 bytes at a time, which saves reading what is overwritten. */

/* Rows of a strip: a line of a forward panel (half of one at 16 floats of width, all of it else). */
#define TWIN_ROWS (PM_NR < 16 ? PM_NR : 16)
#define TWIN_VECTORS (TWIN_ROWS / PM_WIDTH)
/* Columns that go to the twins at a time: a line of a row of a backward panel, or whole ones. */
#define TWIN_COLUMNS 16

typedef struct {
    product_kind kind;
    int64_t F, D;
    product_word *forward, *backward;
} twin;

/* The columns of D with the zeros that fill the last panel. */
static inline int64_t twin_width(int64_t D) { return product_panels(D) * PM_NR; }

static inline twin twin_at(product_kind kind, int64_t F, int64_t D, void *derived)
{
    return (twin){kind, F, D, derived, product_backward_panels(kind, derived, F, D)};
}

/* Columns i.. of a strip, transposed, to so many rows of its panel. whole: TWIN_ROWS rows and PM_WIDTH
 * columns are there; else n rows and `left` columns, perhaps none, and zeros behind them. */
static inline __attribute__((always_inline)) void twin_square(product_kind kind, bool whole,
                                                              int64_t n, int64_t left, int64_t rows,
                                                              const float *w, int64_t ld,
                                                              product_word *to)
{
    vf t[TWIN_VECTORS][PM_WIDTH];
    for (int h = 0; h < TWIN_VECTORS; h++) {
        for (int j = 0; j < PM_WIDTH; j++) {
            const int64_t row = h * PM_WIDTH + j;
            if (whole)
                t[h][j] = v_load(w + row * ld);
            else
                t[h][j] = left > 0 && row < n ? v_get(w + row * ld, left) : v_zero();
        }
        v_transpose(t[h]);
    }
    for (int j = 0; j < PM_WIDTH && (whole || j < rows); j += kind == PM_FP32 ? 1 : 2)
        for (int h = 0; h < TWIN_VECTORS; h++)
            if (kind == PM_FP32)
                v_stream(to + j * PM_NR + h * PM_WIDTH, t[h][j]);
            else
                v_stream(to + j / 2 * PM_NR + h * PM_WIDTH,
                         v_pairs(product_native(kind), t[h][j], t[h][j + 1]));
}

/* Columns c.. of the n rows of the strip at row f, TWIN_COLUMNS of them: to the rows of one forward panel,
 * and to the strip's rows of a backward panel. */
static inline __attribute__((always_inline)) void twin_columns_of(product_kind kind, const twin *t,
                                                                  int64_t f, int64_t n,
                                                                  const float *w, int64_t c)
{
    const int64_t D = t->D, per = product_per_word(kind), end = c + TWIN_COLUMNS;

    const int64_t rows = product_words(kind, D) * per, panel = f / PM_NR * PM_NR;
    product_word *to = t->forward + panel * product_words(kind, D) + f - panel;
    for (int64_t i = c; i < pm_min(end, rows); i += PM_WIDTH)
        if (n >= TWIN_ROWS && i + PM_WIDTH <= D)
            twin_square(kind, true, n, D - i, rows - i, w + i, D, to + i / per * PM_NR);
        else
            twin_square(kind, false, n, D - i, rows - i, w + i, D, to + i / per * PM_NR);

    /* A row at a time: the halves of a line are streamed one after the other. */
    const int64_t words = product_words(kind, t->F), deep = pm_min(TWIN_ROWS, words * per - f);
    for (int64_t i = 0; i < deep; i += per)
        for (int64_t j = c; j < pm_min(end, twin_width(D)); j += PM_WIDTH) {
            const int64_t left = D - j;
            const float *from = w + i * D + j;
            vf x = left > 0 && i < n ? v_get(from, left) : v_zero();
            if (per == 2)
                x = v_pairs(product_native(kind), x,
                            left > 0 && i + 1 < n ? v_get(from + D, left) : v_zero());
            v_stream(t->backward + j / PM_NR * PM_NR * words + (f + i) / per * PM_NR + j % PM_NR,
                     x);
        }
}

/* Columns c.. of the strip at row f: multiples of TWIN_COLUMNS, below twin_width, and TWIN_ROWS, below
 * the rows of all panels. w has the strip's rows, as many of TWIN_ROWS as there are; none is a strip of
 * padding. v_stream_end ends it. */
static void twin_columns(const twin *t, int64_t f, const float *w, int64_t c)
{
    const int64_t n = pm_max(0, pm_min(TWIN_ROWS, t->F - f));
    switch (t->kind) {
    case PM_FP32:
        twin_columns_of(PM_FP32, t, f, n, w, c);
        break;
    case PM_BF16:
        twin_columns_of(PM_BF16, t, f, n, w, c);
        break;
    case PM_BF16_EMULATED:
        twin_columns_of(PM_BF16_EMULATED, t, f, n, w, c);
        break;
#if PM_HAS_AMX
    case PRODUCT_AMX:
        twin_columns_of(PRODUCT_AMX, t, f, n, w, c);
        break;
    case PRODUCT_AMX_EMULATED:
        twin_columns_of(PRODUCT_AMX_EMULATED, t, f, n, w, c);
        break;
#endif
    }
}

/* ---------------------------------------------------------------- a whole weight */

typedef struct {
    twin twin;
    const float *w;
} twin_job;

static void twin_task(void *arg, int64_t task, int worker)
{
    (void)worker;
    const twin_job *const job = arg;
    const int64_t D = job->twin.D;
    for (int64_t f = task * PM_NR; f < (task + 1) * PM_NR; f += TWIN_ROWS)
        for (int64_t c = 0; c < twin_width(D); c += TWIN_COLUMNS)
            twin_columns(&job->twin, f, job->w + f * D, c);
    v_stream_end();
}

static pm_status twin_derive(pm_ctx *ctx, int64_t F, int64_t D, const float *w, void *derived)
{
    twin_job job = {twin_at(product_kind_of(ctx), F, D, derived), w};
    pm_parallel(ctx->pool, product_panels(F), twin_task, &job);
    return PM_OK;
}
