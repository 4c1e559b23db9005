/* experts: contract in ops/experts.h.
 *
 * Work is cut by rows: a block is at most product_rows of one group, which go through the whole
 * expert while they are in L2. The plan groups come first and leave a row of D per plan row in
 * scratch; then the block of tokens that owns rows n0..n1 of y gathers what its tokens have there,
 * in the order of tok_row, and adds the shared groups on top. Backward walks the same two steps
 * with dx in the place of y, and packs x, dy, h and dpre for the third: the gradients of the weights
 * (product.h). So every element has one owner, and the order of a sum is that of the plan. */

#include "experts_tiles.h"

enum {
    EXPERTS_MIN_ITEMS = 16,     /* blocks get smaller when there would be fewer (half, of AMX), */
    EXPERTS_LEAST_BLOCK = 2,    /* down to so many slices, or one of AMX */
    EXPERTS_TASK_WORK = 250000, /* multiply-adds that are worth a task */
};

/* Backward: what a block of rows leaves for the weights' gradients. The rows of a plan group begin
 * where those of a product may. */
typedef struct {
    product_side x, dy; /* dy times the row's weight */
    float *dy_sums;     /* (blocks, D) */
} experts_sides;

/* One group of this call: what it has, and where. */
typedef struct {
    int64_t F;                 /* width */
    int64_t first;             /* its first hidden unit among those of all groups */
    int64_t rows, row0;        /* of the plan: row0 .. row0+rows-1; shared: N tokens from 0 */
    int64_t item0, items;      /* its share of the items of the phase */
    const product_word *up[2]; /* panels (forward: y = x W^T; backward: dx = dy W): those of up; */
    const product_word *down;  /* swiglu: of the gate and of up */
    const float *up_bias, *down_bias; /* (halves, F), (D); or NULL */
    float *pre;                       /* (rows, halves * F) at distance ld_pre, or NULL */
    int64_t ld_pre;
    /* backward */
    const experts_sides *sides; /* of the plan, or of the tokens; its rows begin at side0 */
    product_side dpre[2], h;    /* the same rows */
    float *dpre_sums;           /* (blocks, halves * F) */
    int64_t side0;
    int64_t block0, blocks; /* of rows; block0 is the first among those of all groups */
} experts_group;

typedef struct experts_job experts_job;
typedef void (*experts_item)(const experts_job *job, int64_t item, int worker);
struct experts_job {
    const pm_experts_args *g;
    const pm_experts_grads *d;
    product_kind kind;
    int halves;           /* 1; swiglu: 2, the gate and up */
    experts_group *group; /* G plan groups, S shared ones */
    int64_t block;        /* slices of a block, at most */
    float *rows;          /* (R, D): what a plan row adds to y, or to dx */
    float *out;           /* (N, D): y, or dx; NULL when dx is not wanted */
    char *worker;         /* worker_bytes for each thread */
    size_t worker_bytes;
    experts_item item; /* of the phase that runs now */
    int64_t items, chunk;
    experts_sides plan, tokens;
    double work; /* multiply-adds of a product over all groups */
};

/* ---------------------------------------------------------------- sizes */

/* Distance between rows of hidden floats: whole vectors can be stored to the end of the last panel,
 * and rows of a power of two don't fall into the same sets of the cache. */
static inline int64_t experts_ld(int64_t width) { return product_panels(width) * PM_NR + 16; }

static inline int experts_halves(const pm_experts_args *g)
{
    return g->activation == PM_EXPERTS_SWIGLU ? 2 : 1;
}

/* Bound on the panels of so many matrices, of F hidden units in all: by columns of their widths, or
 * of D. */
static size_t experts_packed_bytes(product_kind kind, const pm_experts_args *g, int64_t matrices,
                                   int64_t F)
{
    /* each matrix's contraction is filled up with zeros */
    int64_t by_width = (F + matrices * (PM_NR - 1)) * product_words(kind, g->D),
            by_d = product_packed(kind, g->D, F + matrices * (product_multiple(kind) - 1));
    return (size_t)pm_max(by_width, by_d) * sizeof(product_word) + (size_t)matrices * 64;
}
static size_t experts_up_bytes(product_kind kind, const pm_experts_args *g)
{
    return experts_packed_bytes(kind, g, (g->G + g->S) * experts_halves(g), g->P);
}
static size_t experts_down_bytes(product_kind kind, const pm_experts_args *g)
{
    return experts_packed_bytes(kind, g, g->G + g->S, g->F);
}

/* Rows of x or dy as left operands, then rows of h and, for swiglu, of the gate; or of dpre. */
static size_t experts_worker_bytes(product_kind kind, const pm_experts_args *g)
{
    const int halves = experts_halves(g);
    const int64_t ld = experts_ld(pm_max(g->W, g->Z) / halves);
    return pm_round64(product_room(kind, g->D) +
                      (size_t)(product_rows(kind) * halves * ld) * sizeof(product_word));
}

/* Bounds on the rows and on the blocks of rows of the plan groups, and of each shared group. */
static inline int64_t experts_plan_rows(product_kind kind, const pm_experts_args *g)
{
    return g->G ? g->R + g->G * (product_side_rows(kind, 1) - 1) : 0;
}
static inline int64_t experts_shared_rows(const pm_experts_args *g) { return g->S ? g->N : 0; }
static inline int64_t experts_least_block(product_kind kind)
{
    return product_is_amx(kind) ? 1 : EXPERTS_LEAST_BLOCK;
}
static inline int64_t experts_most_blocks(product_kind kind, int64_t rows, int64_t groups)
{
    return rows / (experts_least_block(kind) * product_tall(kind)) + groups;
}

/* What a backward pass leaves for the weights. */
static size_t experts_sides_bytes(product_kind kind, const pm_experts_args *g)
{
    const int64_t plan_rows = experts_plan_rows(kind, g), rows = experts_shared_rows(g);
    const int64_t plan_sums = experts_most_blocks(kind, plan_rows, g->G) * (g->D + g->W),
                  sums = experts_most_blocks(kind, rows, 1) * (g->D + g->S * g->Z);
    const size_t halves = (size_t)experts_halves(g), hidden = halves + 1; /* dpre and h */
    const size_t plan = 2 * product_side_bytes(kind, plan_rows, g->D) +
                        hidden * product_side_bytes(kind, plan_rows, g->W / (int64_t)halves);
    const size_t shared = 2 * product_side_bytes(kind, rows, g->D) +
                          (size_t)g->S * hidden *
                              product_side_bytes(kind, rows, g->Z / (int64_t)halves);
    return plan + shared + pm_round64((size_t)plan_sums * 4) + pm_round64((size_t)sums * 4);
}

static size_t experts_workspace(const pm_ctx *ctx, const pm_experts_args *g, bool backward)
{
    const product_kind kind = product_kind_of(ctx);
    size_t bytes = pm_round64((size_t)(g->G + g->S) * sizeof(experts_group));
    bytes += g->up.derived ? 0 : pm_round64(experts_up_bytes(kind, g));
    bytes += g->down.derived ? 0 : pm_round64(experts_down_bytes(kind, g));
    bytes += pm_round64((size_t)(g->G ? g->R * g->D : 0) * 4);
    bytes += backward ? experts_sides_bytes(kind, g) : 0;
    return bytes + (size_t)pm_pool_threads(ctx->pool) * experts_worker_bytes(kind, g);
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
static inline int64_t experts_blocks(const experts_job *job, int64_t rows)
{
    return pm_blocks(product_slices_of(job->kind, rows), job->block);
}
/* The first row of block i of so many. */
static inline int64_t experts_cut(product_kind kind, int64_t rows, int64_t blocks, int64_t i)
{
    const int64_t slices = product_slices_of(kind, rows);
    return product_slice_of(kind, rows, slices, product_cut(slices, blocks, i));
}

/* Slices of a block: product_rows, less when that gives too few blocks. */
static void experts_choose_block(experts_job *job)
{
    const pm_experts_args *g = job->g;
    const product_kind kind = job->kind;
    const int64_t least = product_is_amx(kind) ? EXPERTS_MIN_ITEMS / 2 : EXPERTS_MIN_ITEMS;
    job->block = product_rows(kind) / product_tall(kind);
    for (; job->block > experts_least_block(kind); job->block--) {
        int64_t routed = 0;
        for (int64_t i = 0; i < g->G; i++)
            routed += experts_blocks(job, job->group[i].rows);
        if ((!g->G || routed >= least) && (!g->S || experts_blocks(job, g->N) >= least))
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
        e->items = experts_blocks(job, e->rows);
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
    const product_kind kind = job->kind = product_kind_of(ctx);
    const int halves = job->halves = experts_halves(g);
    int64_t groups = g->G + g->S, plan_rows = g->G ? g->R : 0;
    job->group = pm_take(scratch, (size_t)groups * sizeof(experts_group));
    char *up_scratch = g->up.derived ? NULL : pm_take(scratch, experts_up_bytes(kind, g));
    char *down_scratch = g->down.derived ? NULL : pm_take(scratch, experts_down_bytes(kind, g));
    const char *up_derived = g->up.derived, *down_derived = g->down.derived;
    for (int64_t i = 0; i < groups; i++) {
        experts_group *e = job->group + i;
        const bool shared = i >= g->G;
        const int64_t F = g->foff[i + 1] - g->foff[i], D = g->D;
        *e = (experts_group){.F = F,
                             .first = g->foff[i],
                             .up_bias = g->up_bias ? g->up_bias + halves * g->foff[i] : NULL,
                             .down_bias = g->down_bias ? g->down_bias + i * D : NULL};
        e->row0 = shared ? 0 : g->row_off[i];
        e->rows = shared ? g->N : g->row_off[i + 1] - g->row_off[i];
        e->ld_pre = shared ? g->Z : g->W;
        e->pre = shared ? g->pre_shared : g->pre;
        if (e->pre)
            e->pre += (shared ? (i - g->G) * g->N : e->row0) * e->ld_pre;

        const size_t by_width = product_panel_bytes(kind, F, D),
                     by_d = product_panel_bytes(kind, D, F);
        for (int half = 0; half < halves; half++) {
            const pm_weight up = {g->up.w + (halves * e->first + half * F) * D, up_derived};
            e->up[half] = backward ? product_backward_of(ctx, up, F, D, up_scratch)
                                   : product_forward_of(ctx, up, F, D, up_scratch);
            if (up_derived)
                up_derived += product_derived_bytes(ctx, F, D);
            else
                up_scratch += backward ? by_d : by_width;
        }
        const pm_weight down = {g->down.w + e->first * D, down_derived};
        e->down = backward ? product_backward_of(ctx, down, D, F, down_scratch)
                           : product_forward_of(ctx, down, D, F, down_scratch);
        if (down_derived)
            down_derived += product_derived_bytes(ctx, D, F);
        else
            down_scratch += backward ? by_width : by_d;
    }
    job->rows = pm_take(scratch, (size_t)(plan_rows * g->D) * 4);
    job->worker_bytes = experts_worker_bytes(kind, g);
    experts_choose_block(job);
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
    const int64_t F = e->F, D = job->g->D, panels = product_panels(F);
    experts_up up = {.kind = job->kind, .h = h, .ld_pre = e->ld_pre, .ld = experts_ld(F)};
    product_finish finish = experts_up_tile;
    up.bias = e->up_bias;
    up.pre = pre;
    if (job->halves == 2) {
        experts_out gate = {h + m * up.ld, up.ld, e->up_bias, NULL, false}; /* behind h */
        if (pre)
            gate.out = pre, gate.ld = e->ld_pre;
        product_block(job->kind, m, x, D, F, e->up[0], 0, panels, experts_out_tile, &gate,
                      (product_target){gate.out, gate.ld});
        up.bias = e->up_bias ? e->up_bias + F : NULL;
        up.pre = pre ? pre + F : NULL;
        up.gate = gate.out;
        up.ld_gate = gate.ld;
        finish = experts_pair_tile;
    }
    up.far = experts_is_far(job->kind, up.pre, up.ld_pre);
    product_block(job->kind, m, x, D, F, e->up[job->halves - 1], 0, panels, finish, &up,
                  (product_target){up.far ? NULL : up.pre, up.ld_pre});
    const product_word *rows[PRODUCT_MOST_ROWS];
    for (int64_t i = 0; i < m; i++, h += up.ld) {
        rows[i] = h;
        for (int64_t j = pm_blocks(F, PM_WIDTH) * PM_WIDTH; j < panels * PM_NR; j += PM_WIDTH)
            experts_put(job->kind, h, j, v_zero()); /* behind the last vector */
    }
    product_block(job->kind, m, rows, F, D, e->down, 0, product_panels(D), experts_out_tile, out,
                  (product_target){out->out, out->ld});
    v_stream_end();
}

static void experts_forward_plan(const experts_job *job, int64_t item, int worker)
{
    const pm_experts_args *g = job->g;
    const experts_group *e = experts_find(job->group, &item);
    int64_t i0 = experts_cut(job->kind, e->rows, e->items, item),
            m = experts_cut(job->kind, e->rows, e->items, item + 1) - i0;
    int64_t r0 = e->row0 + i0;
    const product_word *x[PRODUCT_MOST_ROWS];
    product_word *room = experts_room(job, worker);
    for (int64_t i = 0; i < m; i++)
        x[i] = product_row(job->kind, g->x + g->row_token[r0 + i] * g->D, g->D, &room);
    experts_out out = {job->rows + r0 * g->D, g->D, e->down_bias, g->row_weight + r0, false};
    experts_forward_rows(job, e, m, x, e->pre ? e->pre + i0 * e->ld_pre : NULL, &out, room);
}

static void experts_forward_tokens(const experts_job *job, int64_t item, int worker)
{
    const pm_experts_args *g = job->g;
    int64_t n0 = experts_cut(job->kind, g->N, job->items, item),
            m = experts_cut(job->kind, g->N, job->items, item + 1) - n0;
    experts_gather(job, n0, n0 + m);
    const product_word *x[PRODUCT_MOST_ROWS];
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
    const double products = 1 + job.halves;
    experts_run(ctx, &job, blocks, products * work, experts_forward_plan);
    experts_run(ctx, &job, experts_blocks(&job, g->N), products * experts_shared_work(&job),
                experts_forward_tokens);
    return PM_OK;
}

/* ---------------------------------------------------------------- backward: dpre, h, dx */

/* m rows back through one expert, the rows i0.. of its block'th block: dy[i] are left operands of D
 * numbers, room has space for those of dpre. hidden->dot becomes <dh, h>; dx goes to out, when it is
 * wanted. */
static void experts_backward_rows(const experts_job *job, const experts_group *e, int64_t block,
                                  int64_t i0, int64_t m, const product_word *const *dy,
                                  const float *weight, experts_hidden *hidden, experts_out *out,
                                  product_word *room)
{
    hidden->kind = job->kind;
    hidden->pre = e->pre + i0 * e->ld_pre;
    hidden->weight = weight;
    hidden->ld_pre = e->ld_pre;
    hidden->F = e->F;
    hidden->ld = experts_ld(e->F);
    hidden->dpre[0] = room;
    hidden->dpre[1] = room + m * hidden->ld;
    hidden->dpre_side = e->dpre;
    hidden->h_side = &e->h;
    hidden->row0 = e->side0 + i0;
    hidden->sum = e->dpre_sums + block * job->halves * e->F;
    memset(hidden->sum, 0, (size_t)(job->halves * e->F) * 4);
    for (int64_t i = 0; i < m; i++)
        hidden->dot[i] = v_zero();
    if (job->halves == 1)
        product_block(job->kind, m, dy, job->g->D, e->F, e->down, 0, product_panels(e->F),
                      experts_hidden_tile, hidden, (product_target){0});
    else
        product_block(job->kind, m, dy, job->g->D, e->F, e->down, 0, product_panels(e->F),
                      experts_hidden_pair_tile, hidden, (product_target){0});
    for (int half = 0; half < job->halves && job->out; half++) {
        const product_word *dpre[PRODUCT_MOST_ROWS];
        for (int64_t i = 0; i < m; i++)
            dpre[i] = hidden->dpre[half] + i * hidden->ld;
        product_block(job->kind, m, dpre, e->F, job->g->D, e->up[half], 0,
                      product_panels(job->g->D), experts_out_tile, out,
                      (product_target){out->out, out->ld});
        out->add = true;
    }
}

/* Packs m rows of dy (times their weight) and of x as the rows row0.. of the sides: dy is in L2, as
 * it has just been multiplied. */
static void experts_pack(const experts_job *job, const experts_sides *sides, int64_t block,
                         int64_t row0, int64_t m, const float *const *dy, const float *weight,
                         const float *const *x)
{
    const int64_t D = job->g->D;
    float *sum = sides->dy_sums + block * D;
    memset(sum, 0, (size_t)D * 4);
    product_side_pack(job->kind, &sides->dy, row0, m, dy, D, weight, sum);
    product_side_pack(job->kind, &sides->x, row0, m, x, D, NULL, NULL);
    v_stream_end(); /* of h and dpre, too */
}

static void experts_backward_plan(const experts_job *job, int64_t item, int worker)
{
    const pm_experts_args *g = job->g;
    const experts_group *e = experts_find(job->group, &item);
    int64_t i0 = experts_cut(job->kind, e->rows, e->items, item),
            m = experts_cut(job->kind, e->rows, e->items, item + 1) - i0;
    int64_t r0 = e->row0 + i0, D = g->D;
    const float *dy[PRODUCT_MOST_ROWS], *x[PRODUCT_MOST_ROWS];
    const product_word *rows[PRODUCT_MOST_ROWS];
    product_word *room = experts_room(job, worker);
    float from_bias[PRODUCT_MOST_ROWS]; /* <dy, down_bias> */
    for (int64_t i = 0; i < m; i++) {
        dy[i] = job->d->dy + g->row_token[r0 + i] * D;
        x[i] = g->x + g->row_token[r0 + i] * D;
        rows[i] = product_row(job->kind, dy[i], D, &room);
        vf dot = v_zero();
        for (int64_t j = 0; j < D && e->down_bias; j += PM_WIDTH)
            dot = v_fma(v_get(dy[i] + j, D - j), v_get(e->down_bias + j, D - j), dot);
        from_bias[i] = v_sum(dot);
    }
    experts_hidden hidden;
    experts_out out = {job->rows + r0 * D, D, NULL, NULL, false};
    experts_backward_rows(job, e, item, i0, m, rows, g->row_weight + r0, &hidden, &out, room);
    experts_pack(job, e->sides, e->block0 + item, e->side0 + i0, m, dy, g->row_weight + r0, x);
    if (job->d->drow_weight)
        for (int64_t i = 0; i < m; i++)
            job->d->drow_weight[r0 + i] = v_sum(hidden.dot[i]) + from_bias[i];
}

static void experts_backward_tokens(const experts_job *job, int64_t item, int worker)
{
    const pm_experts_args *g = job->g;
    int64_t n0 = experts_cut(job->kind, g->N, job->items, item),
            m = experts_cut(job->kind, g->N, job->items, item + 1) - n0;
    const float *dy[PRODUCT_MOST_ROWS], *x[PRODUCT_MOST_ROWS];
    const product_word *rows[PRODUCT_MOST_ROWS];
    product_word *room = experts_room(job, worker);
    for (int64_t i = 0; i < m; i++) {
        dy[i] = job->d->dy + (n0 + i) * g->D;
        x[i] = g->x + (n0 + i) * g->D;
        rows[i] = product_row(job->kind, dy[i], g->D, &room);
    }
    if (job->out)
        experts_gather(job, n0, n0 + m);
    experts_hidden hidden;
    for (int64_t s = 0; s < g->S; s++) {
        experts_out out = {job->out ? job->out + n0 * g->D : NULL, g->D, NULL, NULL, true};
        experts_backward_rows(job, job->group + g->G + s, item, n0, m, rows, NULL, &hidden, &out,
                              room);
    }
    if (g->S)
        experts_pack(job, &job->tokens, item, n0, m, dy, NULL, x);
}

/* ---------------------------------------------------------------- backward: weights */

/* The tasks of dup and ddown of a group. */
static product_wgrad_grid experts_up_grid(const experts_job *job, const experts_group *e)
{
    return product_wgrad_grid_of(job->kind, e->F, job->g->D, e->rows, job->work);
}
static product_wgrad_grid experts_down_grid(const experts_job *job, const experts_group *e)
{
    return product_wgrad_grid_of(job->kind, job->g->D, e->F, e->rows, job->work);
}

/* A share of dup, or of ddown, of one group, and of the bias. The shared groups, which have the most
 * rows, go first: then the last tasks to finish are short ones. */
static void experts_backward_weights(const experts_job *job, int64_t item, int worker)
{
    (void)worker;
    const pm_experts_grads *d = job->d;
    item = job->items - 1 - item;
    const experts_group *e = experts_find(job->group, &item);
    const int64_t D = job->g->D, F = e->F;
    const product_wgrad_grid up = experts_up_grid(job, e), down = experts_down_grid(job, e);
    const int64_t up_tasks = product_wgrad_tasks(&up);
    if (item < job->halves * up_tasks) {
        const int64_t half = item / up_tasks, row = job->halves * e->first + half * F;
        const product_wgrad_share s = product_wgrad_share_of(&up, item % up_tasks);
        if (d->dup)
            product_wgrad(job->kind, &e->dpre[half], &e->sides->x, e->side0, e->rows, s,
                          d->dup + row * D, D);
        if (d->dup_bias && s.d0 == 0)
            product_add_sums(e->blocks, e->dpre_sums + half * F, job->halves * F, s.f0, s.f1,
                             d->dup_bias + row);
    } else {
        const product_wgrad_share s = product_wgrad_share_of(&down, item - job->halves * up_tasks);
        if (d->ddown)
            product_wgrad(job->kind, &e->sides->dy, &e->h, e->side0, e->rows, s,
                          d->ddown + e->first * D, F);
        if (d->ddown_bias && s.d0 == 0)
            product_add_sums(e->blocks, e->sides->dy_sums + e->block0 * D, D, s.f0, s.f1,
                             d->ddown_bias + (e - job->group) * D);
    }
}

/* Places what the blocks of rows leave for the weights. */
static void experts_place_sides(experts_job *job, void **scratch)
{
    const pm_experts_args *g = job->g;
    const product_kind kind = job->kind;
    const int64_t plan_rows = experts_plan_rows(kind, g), rows = experts_shared_rows(g);
    const int64_t plan_blocks = experts_most_blocks(kind, plan_rows, g->G),
                  blocks = experts_most_blocks(kind, rows, 1);
    job->plan.x = product_side_take(kind, plan_rows, g->D, true, scratch);
    job->plan.dy = product_side_take_left(kind, plan_rows, g->D, true, scratch);
    const int64_t wide = g->W / job->halves, wide_shared = g->Z / job->halves;
    product_side dpre[2] = {0};
    for (int half = 0; half < job->halves; half++)
        dpre[half] = product_side_take_left(kind, plan_rows, wide, true, scratch);
    const product_side h = product_side_take(kind, plan_rows, wide, true, scratch);
    float *sums = pm_take(scratch, (size_t)(plan_blocks * (g->D + g->W)) * 4);
    job->plan.dy_sums = sums;
    sums += plan_blocks * g->D;
    int64_t side0 = 0, block0 = 0;
    for (experts_group *e = job->group; e < job->group + g->G; e++) {
        e->sides = &job->plan;
        memcpy(e->dpre, dpre, sizeof dpre);
        e->h = h;
        e->side0 = side0;
        e->block0 = block0;
        e->blocks = experts_blocks(job, e->rows);
        e->dpre_sums = sums;
        side0 += product_side_rows(kind, e->rows);
        block0 += e->blocks;
        sums += e->blocks * job->halves * e->F;
    }
    job->tokens.x = product_side_take(kind, rows, g->D, true, scratch);
    job->tokens.dy = product_side_take_left(kind, rows, g->D, true, scratch);
    sums = pm_take(scratch, (size_t)(blocks * (g->D + g->S * g->Z)) * 4);
    job->tokens.dy_sums = sums;
    sums += blocks * g->D;
    for (experts_group *e = job->group + g->G; e < job->group + g->G + g->S; e++) {
        e->sides = &job->tokens;
        for (int half = 0; half < job->halves; half++)
            e->dpre[half] = product_side_take_left(kind, rows, wide_shared, true, scratch);
        e->h = product_side_take(kind, rows, wide_shared, true, scratch);
        e->blocks = experts_blocks(job, e->rows);
        e->dpre_sums = sums;
        sums += e->blocks * job->halves * e->F;
    }
}

static pm_status experts_backward(pm_ctx *ctx, const pm_experts_args *g, const pm_experts_grads *d,
                                  void *scratch)
{
    experts_job job = {.g = g, .d = d, .out = d->dx};
    experts_begin(ctx, &job, true, &scratch);
    experts_place_sides(&job, &scratch);
    job.worker = scratch;
    double plan_work;
    int64_t blocks = experts_plan_blocks(&job, &plan_work);
    const double products = 1 + job.halves;
    job.work = products * (plan_work + experts_shared_work(&job));
    experts_run(ctx, &job, blocks, products * plan_work, experts_backward_plan);
    int64_t used = g->G ? g->row_off[g->G] : 0;
    if (d->drow_weight && g->R > used)
        memset(d->drow_weight + used, 0, (size_t)(g->R - used) * 4);
    experts_run(ctx, &job, experts_blocks(&job, g->N), products * experts_shared_work(&job),
                experts_backward_tokens);

    if (!d->dup && !d->dup_bias && !d->ddown && !d->ddown_bias)
        return PM_OK;
    int64_t items = 0;
    for (experts_group *e = job.group; e < job.group + g->G + g->S; e++) {
        const product_wgrad_grid up = experts_up_grid(&job, e), down = experts_down_grid(&job, e);
        e->item0 = items;
        e->items = e->rows ? job.halves * product_wgrad_tasks(&up) + product_wgrad_tasks(&down) : 0;
        items += e->items;
    }
    experts_run(ctx, &job, items, job.work, experts_backward_weights);
    return PM_OK;
}
