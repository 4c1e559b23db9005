/* experts: contract in ops/experts.h.
 *
 * Work is cut by rows: a block is at most PM_ROWS rows of one group, which go through the whole
 * expert while they are in L2. The plan groups come first and leave a row of D per plan row in
 * scratch; then the block of tokens that owns rows n0..n1 of y gathers what its tokens have there,
 * in the order of tok_row, and adds the shared groups on top. Backward walks the same two steps
 * with dx in the place of y, and keeps dpre and h for the third: the weights, cut by rows of dW.
 * So every element has one owner, and the order of a sum is that of the plan. */

enum {
    EXPERTS_MIN_ITEMS = 16,        /* blocks get smaller when there would be fewer */
    EXPERTS_TASK_WORK = 250000,    /* multiply-adds that are worth a task */
    EXPERTS_SLICE_WORK = 60 << 20, /* multiply-adds of a slice of a weight gradient, which has */
    EXPERTS_SLICE_LEAST = 192,     /* at least so many rows: each slice reads all of x, or of h, */
    EXPERTS_SLICE = 384,           /* and at most so many: they are packed in scratch */
};

/* One group of this call: what it has, and where. */
typedef struct {
    int64_t F;                     /* width */
    int64_t first;                 /* its first row in up, up_bias */
    int64_t rows, row0;            /* of the plan: row0 .. row0+rows-1; shared: N tokens from 0 */
    int64_t item0, items;          /* its share of the items of the phase */
    const product_word *up, *down; /* panels (forward: y = x W^T; backward: dx = dy W) */
    const float *up_bias, *down_bias; /* (F), (D) */
    float *pre, *dpre, *h;            /* (rows, F) at distance ld_pre, ld, ld; pre may be NULL */
    int64_t ld_pre, ld;
} experts_group;

typedef struct experts_job experts_job;
typedef void (*experts_item)(const experts_job *job, int64_t item, int worker);
struct experts_job {
    const pm_experts_args *g;
    const pm_experts_grads *d;
    pm_compute kind;
    experts_group *group; /* G plan groups, S shared ones */
    int64_t block;        /* slices of a block, at most */
    float *rows;          /* (R, D): what a plan row adds to y, or to dx */
    float *dy;            /* (R, D): row_weight * dy, in plan order */
    float *out;           /* (N, D): y, or dx; NULL when dx is not wanted */
    char *worker;         /* worker_bytes for each thread */
    size_t worker_bytes;
    experts_item item; /* of the phase that runs now */
    int64_t items, chunk;
};

/* ---------------------------------------------------------------- sizes */

/* Distance between rows of hidden floats: whole vectors can be stored to the end of the last panel,
 * and rows of a power of two don't fall into the same sets of the cache. */
static inline int64_t experts_ld(int64_t width) { return product_panels(width) * PM_NR + 16; }

/* Bound on the panels of all groups of one matrix: by columns of the groups' width, or of D. */
static size_t experts_packed_bytes(pm_compute kind, const pm_experts_args *g)
{
    /* one row of words more for each group whose contraction is odd */
    int64_t groups = g->G + g->S;
    int64_t by_width = (g->F + groups * (PM_NR - 1)) * product_words(kind, g->D),
            by_d = product_packed(kind, g->D, g->F + groups);
    return (size_t)pm_max(by_width, by_d) * sizeof(product_word) + (size_t)groups * 64;
}

/* Forward: rows of x as left operands, then rows of h. Backward: the same of dy and dpre, or what
 * the weight gradients need. */
static size_t experts_worker_bytes(pm_compute kind, const pm_experts_args *g, bool backward)
{
    int64_t width = pm_max(g->W, g->Z);
    size_t rooms = product_room(kind, PM_ROWS, g->D);
    if (!backward)
        return rooms + (size_t)PM_ROWS * experts_ld(width) * sizeof(product_word);
    rooms += product_room(kind, PM_ROWS, width);
    size_t weights = product_wgrad_scratch(EXPERTS_SLICE, pm_max(width, g->D));
    return pm_round64(rooms > weights ? rooms : weights);
}

static size_t experts_workspace(const pm_ctx *ctx, const pm_experts_args *g, bool backward)
{
    const pm_compute kind = ctx->backend->compute;
    int64_t plan_rows = g->G ? g->R : 0;
    size_t bytes = pm_round64((size_t)(g->G + g->S) * sizeof(experts_group));
    bytes += (size_t)(!g->up.derived + !g->down.derived) *
             pm_round64(experts_packed_bytes(kind, g));
    bytes += pm_round64((size_t)(plan_rows * g->D) * 4) * (backward ? 2 : 1);
    if (backward)
        bytes += 2 * (pm_round64((size_t)(plan_rows * experts_ld(g->W)) * 4) +
                      pm_round64((size_t)(g->S * g->N * experts_ld(g->Z)) * 4));
    return bytes + (size_t)pm_pool_threads(ctx->pool) * experts_worker_bytes(kind, g, backward);
}

/* ---------------------------------------------------------------- items and tasks */

static void experts_task(void *arg, int64_t task, int worker)
{
    const experts_job *job = arg;
    for (int64_t i = task * job->chunk; i < pm_min((task + 1) * job->chunk, job->items); i++)
        job->item(job, i, worker);
}

/* Runs the items; work (multiply-adds of all of them) decides how many make a task. */
static void experts_run(pm_ctx *ctx, experts_job *job, int64_t items, double work,
                        experts_item item)
{
    if (!items)
        return;
    job->item = item;
    job->items = items;
    double fit = EXPERTS_TASK_WORK * (double)items / (work + 1);
    job->chunk = pm_max(1, fit < (double)items ? (int64_t)fit : items);
    pm_parallel(ctx->pool, pm_blocks(items, job->chunk), experts_task, job);
}

/* The group of an item; *item becomes its number within the group. */
static const experts_group *experts_find(const experts_group *e, int64_t *item)
{
    while (*item >= e->item0 + e->items)
        e++;
    *item -= e->item0;
    return e;
}

/* Blocks are of whole slices of tiles (product.h), near-equal ones: no tile is a thin remainder. */
static inline int64_t experts_blocks(int64_t rows, int64_t block)
{
    return pm_blocks(product_slices(rows), block);
}
/* The first row of block i of so many. */
static inline int64_t experts_cut(int64_t rows, int64_t blocks, int64_t i)
{
    int64_t slices = product_slices(rows);
    return product_cut(rows, slices, product_cut(slices, blocks, i));
}

/* Slices of a block: PM_ROWS rows, less when that gives too few blocks. */
static void experts_choose_block(experts_job *job)
{
    const pm_experts_args *g = job->g;
    for (job->block = PM_ROWS / PM_MR; job->block > 2; job->block--) {
        int64_t routed = 0;
        for (int64_t i = 0; i < g->G; i++)
            routed += experts_blocks(job->group[i].rows, job->block);
        if ((!g->G || routed >= EXPERTS_MIN_ITEMS) &&
            (!g->S || experts_blocks(g->N, job->block) >= EXPERTS_MIN_ITEMS))
            break;
    }
}

/* Makes the blocks of the plan groups the items; returns how many. *work: multiply-adds of one
 * product over all of them. */
static int64_t experts_plan_blocks(experts_job *job, double *work)
{
    int64_t items = 0;
    *work = 0;
    for (int64_t i = 0; i < job->g->G; i++) {
        experts_group *e = job->group + i;
        e->item0 = items;
        e->items = experts_blocks(e->rows, job->block);
        items += e->items;
        *work += (double)e->rows * (double)e->F * (double)job->g->D;
    }
    return items;
}
static double experts_shared_work(const experts_job *job)
{
    const pm_experts_args *g = job->g;
    double width = 4; /* the gather */
    for (int64_t s = 0; s < g->S; s++)
        width += (double)job->group[g->G + s].F;
    return (double)g->N * (double)g->D * width;
}

/* ---------------------------------------------------------------- groups */

/* Fills the groups and the pieces of scratch of both directions; packs what isn't derived. */
static void experts_begin(pm_ctx *ctx, experts_job *job, bool backward, void **scratch)
{
    const pm_experts_args *g = job->g;
    const pm_compute kind = job->kind = ctx->backend->compute;
    int64_t groups = g->G + g->S, plan_rows = g->G ? g->R : 0;
    job->group = pm_take(scratch, (size_t)groups * sizeof(experts_group));
    char *up_scratch = g->up.derived ? NULL : pm_take(scratch, experts_packed_bytes(kind, g));
    char *down_scratch = g->down.derived ? NULL : pm_take(scratch, experts_packed_bytes(kind, g));
    const char *up_derived = g->up.derived, *down_derived = g->down.derived;
    for (int64_t i = 0; i < groups; i++) {
        experts_group *e = job->group + i;
        const bool shared = i >= g->G;
        const int64_t F = g->foff[i + 1] - g->foff[i], D = g->D;
        *e = (experts_group){.F = F,
                             .first = g->foff[i],
                             .up_bias = g->up_bias + g->foff[i],
                             .down_bias = g->down_bias + i * D};
        e->row0 = shared ? 0 : g->row_off[i];
        e->rows = shared ? g->N : g->row_off[i + 1] - g->row_off[i];
        e->ld_pre = shared ? g->Z : g->W;
        e->pre = shared ? g->pre_shared : g->pre;
        if (e->pre)
            e->pre += (shared ? (i - g->G) * g->N : e->row0) * e->ld_pre;

        const pm_weight up = {g->up.w + e->first * D, up_derived};
        const pm_weight down = {g->down.w + e->first * D, down_derived};
        e->up = backward ? product_backward_of(ctx, up, F, D, up_scratch)
                         : product_forward_of(ctx, up, F, D, up_scratch);
        e->down = backward ? product_backward_of(ctx, down, D, F, down_scratch)
                           : product_forward_of(ctx, down, D, F, down_scratch);
        const size_t by_width = product_panel_bytes(kind, F, D),
                     by_d = product_panel_bytes(kind, D, F);
        if (up_derived)
            up_derived += product_derived_bytes(ctx, F, D);
        else
            up_scratch += backward ? by_d : by_width;
        if (down_derived)
            down_derived += product_derived_bytes(ctx, D, F);
        else
            down_scratch += backward ? by_width : by_d;
    }
    job->rows = pm_take(scratch, (size_t)(plan_rows * g->D) * 4);
    job->worker_bytes = experts_worker_bytes(kind, g, backward);
    experts_choose_block(job);
}

/* ---------------------------------------------------------------- tiles */

/* out (=, or += when add) weight * (tile + bias): the end of a product that goes to rows of D. */
typedef struct {
    float *out; /* (rows, D) */
    int64_t ld;
    const float *bias;   /* (D), or NULL */
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
static inline void experts_put(pm_compute kind, product_word *row, int64_t at, vf x)
{
    if (kind == PM_FP32)
        v_store(row + at, x);
    else
        product_put(kind, row, at, x);
}

/* h = gelu(tile + bias); the pre-activation is kept when there will be a backward. */
typedef struct {
    pm_compute kind;
    const float *bias; /* (F) */
    float *pre;        /* (rows, F) */
    product_word *h;   /* (rows) left operands of F numbers */
    int64_t ld_pre, ld;
} experts_up;

static inline void experts_up_tile(void *arg, int64_t row0, int m, int64_t col0, int64_t n,
                                   float *tile)
{
    const experts_up *t = arg;
    for (int64_t j = 0; j < n; j += PM_WIDTH) {
        vf bias = v_get(t->bias + col0 + j, n - j);
        for (int i = 0; i < m; i++) {
            vf x = v_load(tile + i * PM_NR + j) + bias;
            if (t->pre)
                v_put(t->pre + (row0 + i) * t->ld_pre + col0 + j, x, n - j);
            experts_put(t->kind, t->h + (row0 + i) * t->ld, col0 + j, v_gelu(x));
        }
    }
}

/* tile = dh: h = gelu(pre), dot += dh * h, dpre = weight * dh * gelu'(pre). */
typedef struct {
    const float *pre, *weight; /* (rows, F); (rows) or NULL */
    float *dpre, *h;           /* (rows, F) */
    int64_t ld_pre, ld;
    vf dot[PM_ROWS]; /* lanes of <dh, h> of each row */
} experts_hidden;

static inline void experts_hidden_tile(void *arg, int64_t row0, int m, int64_t col0, int64_t n,
                                       float *tile)
{
    experts_hidden *t = arg;
    for (int i = 0; i < m; i++) {
        vf weight = v_set(t->weight ? t->weight[row0 + i] : 1.0f), dot = t->dot[row0 + i];
        for (int64_t j = 0; j < n; j += PM_WIDTH) {
            vf x = v_get(t->pre + (row0 + i) * t->ld_pre + col0 + j, n - j);
            vf slope, dh = v_load(tile + i * PM_NR + j), h = v_gelu_slope(x, &slope);
            dot = v_fma(dh, h, dot);
            int64_t at = (row0 + i) * t->ld + col0 + j;
            v_store(t->h + at, h);
            v_store(t->dpre + at, weight * dh * slope);
        }
        t->dot[row0 + i] = dot;
    }
}

/* out_n = sum over the plan rows of token n of rows[r], for tokens n0..n1-1. */
static void experts_gather(const experts_job *job, int64_t n0, int64_t n1)
{
    const pm_experts_args *g = job->g;
    int64_t D = g->D;
    for (int64_t n = n0; n < n1; n++) {
        float *out = job->out + n * D;
        int64_t k = g->G ? g->tok_off[n] : 0, end = g->G ? g->tok_off[n + 1] : 0;
        if (k == end) {
            memset(out, 0, (size_t)D * 4);
            continue;
        }
        memcpy(out, job->rows + g->tok_row[k] * D, (size_t)D * 4);
        while (++k < end) {
            const float *row = job->rows + g->tok_row[k] * D;
            for (int64_t j = 0; j < D; j += PM_WIDTH)
                v_put(out + j, v_get(out + j, D - j) + v_get(row + j, D - j), D - j);
        }
    }
}

/* ---------------------------------------------------------------- forward */

/* What a task has for left operands, and behind them for rows of h. */
static inline product_word *experts_room(const experts_job *job, int worker)
{
    return (product_word *)(job->worker + (size_t)worker * job->worker_bytes);
}

/* m rows through one expert: x[i] are left operands of D numbers, pre is their first row (or NULL),
 * h has room for them. */
static void experts_forward_rows(const experts_job *job, const experts_group *e, int64_t m,
                                 const product_word *const *x, float *pre, experts_out *out,
                                 product_word *h)
{
    experts_up up = {job->kind, e->up_bias, pre, h, e->ld_pre, experts_ld(e->F)};
    product_block(job->kind, m, x, job->g->D, e->F, e->up, 0, product_panels(e->F), experts_up_tile,
                  &up);
    const product_word *rows[PM_ROWS];
    for (int64_t i = 0; i < m; i++)
        rows[i] = h + i * up.ld;
    product_block(job->kind, m, rows, e->F, job->g->D, e->down, 0, product_panels(job->g->D),
                  experts_out_tile, out);
}

static void experts_forward_plan(const experts_job *job, int64_t item, int worker)
{
    const pm_experts_args *g = job->g;
    const experts_group *e = experts_find(job->group, &item);
    int64_t i0 = experts_cut(e->rows, e->items, item),
            m = experts_cut(e->rows, e->items, item + 1) - i0;
    int64_t r0 = e->row0 + i0;
    const product_word *x[PM_ROWS];
    product_word *room = experts_room(job, worker);
    for (int64_t i = 0; i < m; i++)
        x[i] = product_row(job->kind, g->x + g->row_token[r0 + i] * g->D, g->D, &room);
    experts_out out = {job->rows + r0 * g->D, g->D, e->down_bias, g->row_weight + r0, false};
    experts_forward_rows(job, e, m, x, e->pre ? e->pre + i0 * e->ld_pre : NULL, &out, room);
}

static void experts_forward_tokens(const experts_job *job, int64_t item, int worker)
{
    const pm_experts_args *g = job->g;
    int64_t n0 = experts_cut(g->N, job->items, item),
            m = experts_cut(g->N, job->items, item + 1) - n0;
    experts_gather(job, n0, n0 + m);
    const product_word *x[PM_ROWS];
    product_word *room = experts_room(job, worker);
    for (int64_t i = 0; i < m; i++)
        x[i] = product_row(job->kind, g->x + (n0 + i) * g->D, g->D, &room);
    for (int64_t s = 0; s < g->S; s++) {
        const experts_group *e = job->group + g->G + s;
        experts_out out = {g->y + n0 * g->D, g->D, e->down_bias, NULL, true};
        experts_forward_rows(job, e, m, x, e->pre ? e->pre + n0 * e->ld_pre : NULL, &out, room);
    }
}

static pm_status experts_forward(pm_ctx *ctx, const pm_experts_args *g, void *scratch)
{
    experts_job job = {.g = g, .out = g->y};
    experts_begin(ctx, &job, false, &scratch);
    job.worker = scratch;
    double work;
    int64_t blocks = experts_plan_blocks(&job, &work);
    experts_run(ctx, &job, blocks, 2 * work, experts_forward_plan);
    experts_run(ctx, &job, experts_blocks(g->N, job.block), 2 * experts_shared_work(&job),
                experts_forward_tokens);
    return PM_OK;
}

/* ---------------------------------------------------------------- backward: dpre, h, dx */

/* m rows back through one expert, from row i0 of its rows: dy[i] are left operands of D numbers, room
 * has space for those of dpre. hidden->dot becomes <dh, h>; dx goes to out, when it is wanted. */
static void experts_backward_rows(const experts_job *job, const experts_group *e, int64_t i0,
                                  int64_t m, const product_word *const *dy, const float *weight,
                                  experts_hidden *hidden, experts_out *out, product_word *room)
{
    hidden->pre = e->pre + i0 * e->ld_pre;
    hidden->weight = weight;
    hidden->dpre = e->dpre + i0 * e->ld;
    hidden->h = e->h + i0 * e->ld;
    hidden->ld_pre = e->ld_pre;
    hidden->ld = e->ld;
    for (int64_t i = 0; i < m; i++)
        hidden->dot[i] = v_zero();
    product_block(job->kind, m, dy, job->g->D, e->F, e->down, 0, product_panels(e->F),
                  experts_hidden_tile, hidden);
    if (!job->out)
        return;
    const product_word *dpre[PM_ROWS];
    for (int64_t i = 0; i < m; i++)
        dpre[i] = product_row(job->kind, hidden->dpre + i * e->ld, e->F, &room);
    product_block(job->kind, m, dpre, e->F, job->g->D, e->up, 0, product_panels(job->g->D),
                  experts_out_tile, out);
}

static void experts_backward_plan(const experts_job *job, int64_t item, int worker)
{
    const pm_experts_args *g = job->g;
    const experts_group *e = experts_find(job->group, &item);
    int64_t i0 = experts_cut(e->rows, e->items, item),
            m = experts_cut(e->rows, e->items, item + 1) - i0;
    int64_t r0 = e->row0 + i0, D = g->D;
    const product_word *rows[PM_ROWS];
    product_word *room = experts_room(job, worker);
    float from_bias[PM_ROWS]; /* <dy, down_bias> */
    for (int64_t i = 0; i < m; i++) {
        const float *dy = job->d->dy + g->row_token[r0 + i] * D;
        rows[i] = product_row(job->kind, dy, D, &room);
        float *weighted = job->dy + (r0 + i) * D;
        vf weight = v_set(g->row_weight[r0 + i]), dot = v_zero();
        for (int64_t j = 0; j < D; j += PM_WIDTH) {
            vf G = v_get(dy + j, D - j);
            dot = v_fma(G, v_get(e->down_bias + j, D - j), dot);
            v_put(weighted + j, weight * G, D - j);
        }
        from_bias[i] = v_sum(dot);
    }
    experts_hidden hidden;
    experts_out out = {job->rows + r0 * D, D, NULL, NULL, false};
    experts_backward_rows(job, e, i0, m, rows, g->row_weight + r0, &hidden, &out, room);
    if (job->d->drow_weight)
        for (int64_t i = 0; i < m; i++)
            job->d->drow_weight[r0 + i] = v_sum(hidden.dot[i]) + from_bias[i];
}

static void experts_backward_tokens(const experts_job *job, int64_t item, int worker)
{
    const pm_experts_args *g = job->g;
    int64_t n0 = experts_cut(g->N, job->items, item),
            m = experts_cut(g->N, job->items, item + 1) - n0;
    const product_word *dy[PM_ROWS];
    product_word *room = experts_room(job, worker);
    for (int64_t i = 0; i < m; i++)
        dy[i] = product_row(job->kind, job->d->dy + (n0 + i) * g->D, g->D, &room);
    if (job->out)
        experts_gather(job, n0, n0 + m);
    experts_hidden hidden;
    for (int64_t s = 0; s < g->S; s++) {
        experts_out out = {job->out ? job->out + n0 * g->D : NULL, g->D, NULL, NULL, true};
        experts_backward_rows(job, job->group + g->G + s, n0, m, dy, NULL, &hidden, &out, room);
    }
}

/* ---------------------------------------------------------------- backward: weights */

/* How many slices the n rows of a weight gradient are cut into, with columns of m, for a group. */
static int64_t experts_slices(const experts_group *e, int64_t n, int64_t m)
{
    int64_t most = EXPERTS_SLICE_WORK / pm_max(1, e->rows * m);
    return pm_blocks(n, pm_max(EXPERTS_SLICE_LEAST, pm_min(EXPERTS_SLICE, most)));
}

/* A slice of rows of dup, or of ddown, of one group, and the same part of the bias. The shared
 * groups, which have the most rows, go first: then the last tasks to finish are short ones. */
static void experts_backward_weights(const experts_job *job, int64_t item, int worker)
{
    const pm_experts_args *g = job->g;
    const pm_experts_grads *d = job->d;
    item = job->items - 1 - item;
    const experts_group *e = experts_find(job->group, &item);
    int64_t D = g->D, F = e->F;
    int64_t up_slices = experts_slices(e, F, D), down_slices = experts_slices(e, D, F);
    bool shared = e - job->group >= g->G;
    void *scratch = job->worker + (size_t)worker * job->worker_bytes;
    if (item < up_slices) {
        int64_t f0 = product_cut(F, up_slices, item), f1 = product_cut(F, up_slices, item + 1);
        const int32_t *tokens = shared ? NULL : g->row_token + e->row0;
        if (d->dup)
            product_wgrad(e->rows, e->dpre, e->ld, g->x, D, tokens, f0, f1, D,
                          d->dup + e->first * D, D, scratch);
        if (d->dup_bias)
            product_bias_grad(e->rows, e->dpre, e->ld, f0, f1, d->dup_bias + e->first);
    } else {
        item -= up_slices;
        int64_t d0 = product_cut(D, down_slices, item), d1 = product_cut(D, down_slices, item + 1);
        const float *dy = shared ? d->dy : job->dy + e->row0 * D;
        if (d->ddown)
            product_wgrad(e->rows, dy, D, e->h, e->ld, NULL, d0, d1, F, d->ddown + e->first * D, F,
                          scratch);
        if (d->ddown_bias)
            product_bias_grad(e->rows, dy, D, d0, d1, d->ddown_bias + (e - job->group) * D);
    }
}

static pm_status experts_backward(pm_ctx *ctx, const pm_experts_args *g, const pm_experts_grads *d,
                                  void *scratch)
{
    experts_job job = {.g = g, .d = d, .out = d->dx};
    experts_begin(ctx, &job, true, &scratch);
    int64_t plan_rows = g->G ? g->R : 0, ld = experts_ld(g->W), ld_shared = experts_ld(g->Z);
    job.dy = pm_take(&scratch, (size_t)(plan_rows * g->D) * 4);
    float *dpre = pm_take(&scratch, (size_t)(plan_rows * ld) * 4);
    float *h = pm_take(&scratch, (size_t)(plan_rows * ld) * 4);
    float *dpre_shared = pm_take(&scratch, (size_t)(g->S * g->N * ld_shared) * 4);
    float *h_shared = pm_take(&scratch, (size_t)(g->S * g->N * ld_shared) * 4);
    job.worker = scratch;
    for (int64_t i = 0; i < g->G + g->S; i++) {
        experts_group *e = job.group + i;
        int64_t at = i < g->G ? e->row0 * ld : (i - g->G) * g->N * ld_shared;
        e->ld = i < g->G ? ld : ld_shared;
        e->dpre = (i < g->G ? dpre : dpre_shared) + at;
        e->h = (i < g->G ? h : h_shared) + at;
    }

    double work;
    int64_t blocks = experts_plan_blocks(&job, &work);
    experts_run(ctx, &job, blocks, 2 * work, experts_backward_plan);
    int64_t used = g->G ? g->row_off[g->G] : 0;
    if (d->drow_weight && g->R > used)
        memset(d->drow_weight + used, 0, (size_t)(g->R - used) * 4);
    experts_run(ctx, &job, experts_blocks(g->N, job.block), 2 * experts_shared_work(&job),
                experts_backward_tokens);

    if (!d->dup && !d->dup_bias && !d->ddown && !d->ddown_bias)
        return PM_OK;
    int64_t items = 0;
    for (int64_t i = 0; i < g->G + g->S; i++) {
        experts_group *e = job.group + i;
        e->item0 = items;
        e->items = e->rows ? experts_slices(e, e->F, g->D) + experts_slices(e, g->D, e->F) : 0;
        items += e->items;
    }
    experts_run(ctx, &job, items, 2 * work + 2 * experts_shared_work(&job),
                experts_backward_weights);
    return PM_OK;
}
