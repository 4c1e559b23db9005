/* adamw: contract in ops/adamw.h. Bound by memory: every array is read once and written once. */

enum { ADAMW_BLOCK = 16384 };
/* Panels of a matrix in a task: its first and its last strip of rows overlap with nothing. */
enum { ADAMW_PANELS = 8 };
/* Floats of each array that are fetched ahead, into L1: 1 KB. 5 % faster than 4 KB into L2. */
enum { ADAMW_AHEAD = 256 };

/* What is the same for all elements, worked out in double. */
typedef struct {
    const pm_adamw_args *g;
    product_kind kind;
    const int64_t *first; /* adamw_cut */
    bool skip;
    float scale;             /* c, of the clip */
    float decay;             /* lr weight_decay */
    float beta1, beta1_rest; /* rest: 1 - beta */
    float beta2, beta2_rest;
    float step; /* lr / (1 - beta1^step) */
    float root; /* 1 / sqrt(1 - beta2^step) */
    float eps;
    float ema_rest; /* 1 - ema */
} adamw_job;

static size_t adamw_workspace(const pm_ctx *ctx, const pm_adamw_args *g, bool backward)
{
    (void)ctx, (void)backward;
    return pm_round64((size_t)(g->twins.count + 2) * sizeof(int64_t)); /* adamw_cut */
}

/* PM_WIDTH elements; p is updated in place and returned. */
static inline vf adamw_move(const adamw_job *job, vf p, vf g, vf *m, vf *v)
{
    g *= v_set(job->scale);
    *m = v_fma(v_set(job->beta1_rest), g, v_set(job->beta1) * *m);
    *v = v_fma(v_set(job->beta2_rest) * g, g, v_set(job->beta2) * *v);
    const vf size = v_fma(v_sqrt(*v), v_set(job->root), v_set(job->eps));
    p = v_fma(v_set(-job->decay), p, p);
    return v_fma(v_set(-job->step), *m / size, p);
}

/* The average moves by a part of what it lacks: exact when it lacks nothing. */
static inline vf adamw_average(const adamw_job *job, vf avg, vf p)
{
    return v_fma(v_set(job->ema_rest), p - avg, avg);
}

/* Elements begin..end-1 of the slabs. */
static void adamw_range(const adamw_job *job, int64_t begin, int64_t end)
{
    const pm_adamw_args *const a = job->g;
    int64_t i = begin;
    if (job->skip) {
        memset(a->grad + begin, 0, (size_t)(end - begin) * sizeof(float));
        return;
    }
    for (; i + PM_WIDTH <= end; i += PM_WIDTH) {
        const int64_t ahead = i + ADAMW_AHEAD;
        __builtin_prefetch(a->param + ahead, 1, 3);
        __builtin_prefetch(a->grad + ahead, 1, 3);
        __builtin_prefetch(a->m + ahead, 1, 3);
        __builtin_prefetch(a->v + ahead, 1, 3);
        if (a->avg)
            __builtin_prefetch(a->avg + ahead, 1, 3);
        vf m = v_load(a->m + i), v = v_load(a->v + i);
        const vf p = adamw_move(job, v_load(a->param + i), v_load(a->grad + i), &m, &v);
        v_store(a->param + i, p);
        v_store(a->m + i, m);
        v_store(a->v + i, v);
        v_store(a->grad + i, v_zero());
        if (a->avg)
            v_store(a->avg + i, adamw_average(job, v_load(a->avg + i), p));
    }
    if (i < end) {
        const int64_t n = end - i;
        vf m = v_load_n(a->m + i, n), v = v_load_n(a->v + i, n);
        const vf p = adamw_move(job, v_load_n(a->param + i, n), v_load_n(a->grad + i, n), &m, &v);
        v_store_n(a->param + i, p, n);
        v_store_n(a->m + i, m, n);
        v_store_n(a->v + i, v, n);
        v_store_n(a->grad + i, v_zero(), n);
        if (a->avg)
            v_store_n(a->avg + i, adamw_average(job, v_load_n(a->avg + i, n), p), n);
    }
}

/* Rows f0..f1-1 of a matrix, whole panels of them, and their twins. A strip of rows is moved a piece at a
 * time, and after each piece, columns of the strip before it go to the twins, out of the cache: so memory is
 * read all the time, also while twins are streamed to it. */
static void adamw_rows(const adamw_job *job, const pm_twin *matrix, int64_t f0, int64_t f1)
{
    const int64_t D = matrix->D;
    const float *const w = job->g->param + matrix->at;
    const twin t =
        twin_at(job->kind, matrix->F, D, (char *)job->g->twins.derived + matrix->derived);
    for (int64_t f = f0; f < f1 + TWIN_ROWS; f += TWIN_ROWS) {
        const int64_t before = f - TWIN_ROWS;
        const int64_t end = pm_min(f1, pm_min(matrix->F, f + TWIN_ROWS)) * D;
        for (int64_t c = 0; c < twin_width(D); c += TWIN_COLUMNS) {
            const int64_t at = f * D + c * TWIN_ROWS;
            if (at < end)
                adamw_range(job, matrix->at + at,
                            matrix->at + pm_min(end, at + TWIN_COLUMNS * TWIN_ROWS));
            if (before >= f0 && !job->skip)
                twin_columns(&t, before, w + before * D, c);
        }
    }
    v_stream_end();
}

/* Piece i of the slab: what lies between matrix i - 1 and matrix i, in blocks, and then matrix i, in
 * panels. Behind the last matrix there is no other. */
typedef struct {
    int64_t begin, end, blocks; /* before the matrix */
    const pm_twin *matrix;      /* NULL: the last piece */
} adamw_piece;

static adamw_piece adamw_piece_at(const pm_adamw_args *g, int64_t i)
{
    const pm_twin *const last = i > 0 ? &g->twins.list[i - 1] : NULL;
    adamw_piece piece = {.matrix = i < g->twins.count ? &g->twins.list[i] : NULL};
    piece.begin = last ? last->at + last->F * last->D : 0;
    piece.end = piece.matrix ? piece.matrix->at : g->M;
    piece.blocks = pm_blocks(piece.end - piece.begin, ADAMW_BLOCK);
    return piece;
}

/* first[i]: the first task of piece i; the last entry: all tasks. */
static void adamw_cut(const pm_adamw_args *g, int64_t *first)
{
    first[0] = 0;
    for (int64_t i = 0; i <= g->twins.count; i++) {
        const adamw_piece piece = adamw_piece_at(g, i);
        first[i + 1] = first[i] + piece.blocks;
        if (piece.matrix)
            first[i + 1] += pm_blocks(product_panels(piece.matrix->F), ADAMW_PANELS);
    }
}

static void adamw_task(void *arg, int64_t task, int worker)
{
    (void)worker;
    const adamw_job *const job = arg;
    int64_t low = 0, high = job->g->twins.count; /* the piece is one of low..high */
    while (low < high) {
        const int64_t middle = (low + high + 1) / 2;
        if (job->first[middle] <= task)
            low = middle;
        else
            high = middle - 1;
    }
    const adamw_piece piece = adamw_piece_at(job->g, low);
    task -= job->first[low];
    if (task < piece.blocks) {
        const int64_t begin = piece.begin + task * ADAMW_BLOCK;
        adamw_range(job, begin, pm_min(piece.end, begin + ADAMW_BLOCK));
    } else {
        const int64_t f = (task - piece.blocks) * ADAMW_PANELS * PM_NR;
        adamw_rows(job, piece.matrix, f,
                   pm_min(twin_width(piece.matrix->F), f + ADAMW_PANELS * PM_NR));
    }
}

static pm_status adamw_forward(pm_ctx *ctx, const pm_adamw_args *g, void *scratch)
{
    const double *const h = g->hyper, norm = *g->norm;
    const double beta1 = h[PM_HYPER_BETA1], beta2 = h[PM_HYPER_BETA2], step = h[PM_HYPER_STEP];
    if (!(step >= 1) || !(beta1 >= 0 && beta1 < 1) || !(beta2 >= 0 && beta2 < 1))
        return pm_fail(ctx, PM_EINVAL,
                       "adamw: step %g must be at least 1, betas %g and %g in 0 <= beta < 1", step,
                       beta1, beta2);
    if (!isfinite(h[PM_HYPER_LR]) || !isfinite(h[PM_HYPER_WEIGHT_DECAY]) ||
        !(h[PM_HYPER_EPS] >= 0) || !(h[PM_HYPER_CLIP] >= 0) ||
        !(h[PM_HYPER_EMA] >= 0 && h[PM_HYPER_EMA] <= 1))
        return pm_fail(ctx, PM_EINVAL,
                       "adamw: lr and weight_decay must be finite, eps and clip at least 0, "
                       "ema in 0..1");
    const double clip = h[PM_HYPER_CLIP] / (norm + 1e-6);
    const adamw_job job = {
        .g = g,
        .kind = product_kind_of(ctx),
        .first = scratch,
        .skip = !isfinite(norm),
        .scale = h[PM_HYPER_CLIP] > 0 && clip < 1 ? (float)clip : 1,
        .decay = (float)(h[PM_HYPER_LR] * h[PM_HYPER_WEIGHT_DECAY]),
        .beta1 = (float)beta1,
        .beta1_rest = (float)(1 - beta1),
        .beta2 = (float)beta2,
        .beta2_rest = (float)(1 - beta2),
        .step = (float)(h[PM_HYPER_LR] / (1 - pow(beta1, step))),
        .root = (float)(1 / sqrt(1 - pow(beta2, step))),
        .eps = (float)h[PM_HYPER_EPS],
        .ema_rest = (float)(1 - h[PM_HYPER_EMA]),
    };
    adamw_cut(g, scratch);
    pm_parallel(ctx->pool, job.first[g->twins.count + 1], adamw_task, (void *)&job);
    return PM_OK;
}
