/* linear: contract in ops/linear.h. */

typedef struct {
    const pm_linear_args *g;
    const pm_linear_grads *d;
    product_grid grid;
    product_kind kind;
    const product_word *panels; /* of the weight, forward or backward */
    const float *dpre;          /* (N, F): dy * act'(pre); dy itself when there is no activation */
    void *scratch;              /* worker_bytes for each worker */
    size_t worker_bytes;
    product_side left,
        right;   /* dpre and x, packed for dweight; at is NULL when that isn't wanted */
    float *sums; /* (grid.row_tasks, F): of the rows of dpre of a block */
    product_wgrad_grid wgrad;
} linear_job;

/* The finish callback's view of a task. */
typedef struct {
    const linear_job *job;
    int64_t row0; /* first row of the task's block */
} linear_block;

static size_t linear_workspace(const pm_ctx *ctx, const pm_linear_args *g, bool backward)
{
    const product_kind kind = product_kind_of(ctx);
    const size_t workers = (size_t)pm_pool_threads(ctx->pool);
    const int64_t n = backward ? g->D : g->F, k = backward ? g->F : g->D;
    size_t bytes = g->weight.derived ? 0 : product_panel_bytes(kind, n, k);
    bytes += workers * product_room(kind, k);
    if (!backward)
        return bytes;
    if (g->activation != PM_ACT_NONE)
        bytes += pm_round64((size_t)(g->N * g->F) * 4);
    bytes += product_side_bytes(kind, g->N, g->F) + product_side_bytes(kind, g->N, g->D);
    return bytes + pm_round64((size_t)(product_grid_of(kind, g->N, n, k).row_tasks * g->F) * 4);
}

/* The rows of a task, n0 .. n0+m-1 of x, as left operands of k numbers. */
static inline void linear_rows(const linear_job *job, const float *x, int64_t n0, int64_t m,
                               int64_t k, int worker, const product_word **rows)
{
    product_word *room =
        (product_word *)((char *)job->scratch + (size_t)worker * job->worker_bytes);
    for (int64_t i = 0; i < m; i++)
        rows[i] = product_row(job->kind, x + (n0 + i) * k, k, &room);
}

/* ---------------------------------------------------------------- forward */

static inline vf linear_activate(vf x, int activation)
{
    if (activation == PM_ACT_SILU)
        return x * v_sigmoid(x);
    return activation == PM_ACT_GELU_TANH ? v_gelu(x) : x;
}

/* y = act(pre), pre = tile + bias, while the tile is in L1. */
static void linear_forward_finish(void *arg, int64_t row0, int m, int64_t col0, int64_t n,
                                  float *tile)
{
    const linear_block *block = arg;
    const pm_linear_args *g = block->job->g;
    for (int64_t j = 0; j < n; j += PM_WIDTH) {
        int64_t left = n - j;
        vf bias = g->bias ? v_get(g->bias + col0 + j, left) : v_zero();
        for (int i = 0; i < m; i++) {
            int64_t at = (block->row0 + row0 + i) * g->F + col0 + j;
            vf pre = v_load(tile + i * PM_NR + j) + bias;
            if (g->pre && g->activation != PM_ACT_NONE)
                v_put(g->pre + at, pre, left);
            v_put(g->y + at, linear_activate(pre, g->activation), left);
        }
    }
}

static void linear_forward_task(void *arg, int64_t task, int worker)
{
    const linear_job *job = arg;
    const pm_linear_args *g = job->g;
    product_share s = product_share_of(&job->grid, task);
    const product_word *rows[PRODUCT_MOST_ROWS];
    linear_rows(job, g->x, s.row0, s.rows, g->D, worker, rows);
    product_block(job->kind, s.rows, rows, g->D, g->F, job->panels, s.panel0, s.panel1,
                  linear_forward_finish, &(linear_block){job, s.row0},
                  (product_target){g->y + s.row0 * g->F, g->F});
}

static pm_status linear_forward(pm_ctx *ctx, const pm_linear_args *g, void *scratch)
{
    if (g->N == 0)
        return PM_OK;
    const product_kind kind = product_kind_of(ctx);
    linear_job job = {.g = g, .kind = kind, .grid = product_grid_of(kind, g->N, g->F, g->D)};
    void *panels = g->weight.derived ? NULL
                                     : pm_take(&scratch, product_panel_bytes(kind, g->F, g->D));
    job.panels = product_forward_of(ctx, g->weight, g->F, g->D, panels);
    job.scratch = scratch;
    job.worker_bytes = product_room(kind, g->D);
    pm_parallel(ctx->pool, product_tasks(&job.grid), linear_forward_task, &job);
    return PM_OK;
}

/* ---------------------------------------------------------------- backward */

#define LINEAR_ELEMENTS 16384 /* a task of the elementwise pass */

/* dpre = dy * act'(pre) */
static void linear_dpre_task(void *arg, int64_t task, int worker)
{
    (void)worker;
    const linear_job *job = arg;
    const pm_linear_args *g = job->g;
    float *dpre = (float *)job->dpre;
    int64_t begin = task * LINEAR_ELEMENTS, end = pm_min(g->N * g->F, begin + LINEAR_ELEMENTS);
    for (int64_t i = begin; i < end; i += PM_WIDTH) {
        int64_t left = end - i;
        vf x = v_get(g->pre + i, left), slope;
        if (g->activation == PM_ACT_SILU) {
            vf s = v_sigmoid(x);
            slope = v_fma(x * s, v_set(1.0f) - s, s);
        } else {
            slope = v_dgelu(x);
        }
        v_put(dpre + i, v_get(job->d->dy + i, left) * slope, left);
    }
}

/* dx = or += dpre . weight */
static void linear_dx_finish(void *arg, int64_t row0, int m, int64_t col0, int64_t n, float *tile)
{
    const linear_block *block = arg;
    const pm_linear_args *g = block->job->g;
    for (int i = 0; i < m; i++) {
        float *dx = block->job->d->dx + (block->row0 + row0 + i) * g->D + col0;
        for (int64_t j = 0; j < n; j += PM_WIDTH) {
            int64_t left = n - j;
            vf v = v_load(tile + i * PM_NR + j);
            v_put(dx + j, g->dx_add ? v_get(dx + j, left) + v : v, left);
        }
    }
}

/* Packs the rows n0 .. n0+m-1 of dpre and x for the weight gradient, and sums those of dpre. */
static void linear_pack(const linear_job *job, int64_t block, int64_t n0, int64_t m)
{
    const pm_linear_args *g = job->g;
    const float *dpre[PRODUCT_MOST_ROWS], *x[PRODUCT_MOST_ROWS];
    for (int64_t i = 0; i < m; i++) {
        dpre[i] = job->dpre + (n0 + i) * g->F;
        x[i] = g->x + (n0 + i) * g->D;
    }
    float *sum = job->sums + block * g->F;
    memset(sum, 0, (size_t)g->F * 4);
    product_side_pack(job->kind, &job->left, n0, m, dpre, g->F, NULL, sum);
    product_side_pack(job->kind, &job->right, n0, m, x, g->D, NULL, NULL);
    v_stream_end();
}

/* A block of dx. The first task that has its rows packs them: dpre is in L2 then. */
static void linear_dx_task(void *arg, int64_t task, int worker)
{
    const linear_job *job = arg;
    const pm_linear_args *g = job->g;
    product_share s = product_share_of(&job->grid, task);
    if (job->d->dx) {
        const product_word *rows[PRODUCT_MOST_ROWS];
        linear_rows(job, job->dpre, s.row0, s.rows, g->F, worker, rows);
        product_block(job->kind, s.rows, rows, g->F, g->D, job->panels, s.panel0, s.panel1,
                      linear_dx_finish, &(linear_block){job, s.row0},
                      (product_target){job->d->dx + s.row0 * g->D, g->D});
    }
    if (job->left.at && s.panel0 == 0)
        linear_pack(job, task % job->grid.row_tasks, s.row0, s.rows);
}

/* dweight += dpre^T . x; dbias += sum of dpre. A task owns its outputs. */
static void linear_wgrad_task(void *arg, int64_t task, int worker)
{
    (void)worker;
    const linear_job *job = arg;
    const pm_linear_args *g = job->g;
    const product_wgrad_share s = product_wgrad_share_of(&job->wgrad, task);
    if (job->d->dweight)
        product_wgrad(job->kind, &job->left, &job->right, 0, g->N, s, job->d->dweight, g->D);
    if (job->d->dbias && s.d0 == 0)
        product_add_sums(job->grid.row_tasks, job->sums, g->F, s.f0, s.f1, job->d->dbias);
}

static pm_status linear_backward(pm_ctx *ctx, const pm_linear_args *g, const pm_linear_grads *d,
                                 void *scratch)
{
    const bool weights = d->dweight || d->dbias;
    if (g->N == 0 || (!d->dx && !weights))
        return PM_OK;
    const product_kind kind = product_kind_of(ctx);
    linear_job job = {.g = g, .d = d, .kind = kind, .dpre = d->dy};
    if (g->activation != PM_ACT_NONE) {
        job.dpre = pm_take(&scratch, (size_t)(g->N * g->F) * 4);
        pm_parallel(ctx->pool, pm_blocks(g->N * g->F, LINEAR_ELEMENTS), linear_dpre_task, &job);
    }
    job.grid = product_grid_of(kind, g->N, g->D, g->F);
    if (weights) {
        job.left = product_side_take_left(kind, g->N, g->F, true, &scratch);
        job.right = product_side_take(kind, g->N, g->D, true, &scratch);
        job.sums = pm_take(&scratch, (size_t)(job.grid.row_tasks * g->F) * 4);
    }
    if (d->dx) {
        void *panels = g->weight.derived ? NULL
                                         : pm_take(&scratch, product_panel_bytes(kind, g->D, g->F));
        job.panels = product_backward_of(ctx, g->weight, g->F, g->D, panels);
        job.scratch = scratch;
        job.worker_bytes = product_room(kind, g->F);
    } else {
        job.grid.panel_tasks = 1;
    }
    pm_parallel(ctx->pool, product_tasks(&job.grid), linear_dx_task, &job);
    if (weights) {
        job.wgrad =
            product_wgrad_grid_of(kind, g->F, g->D, g->N, (double)(g->F * g->D) * (double)g->N);
        pm_parallel(ctx->pool, product_wgrad_tasks(&job.wgrad), linear_wgrad_task, &job);
    }
    return PM_OK;
}
