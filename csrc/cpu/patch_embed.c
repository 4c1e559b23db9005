/* patch_embed: contract in ops/patch_embed.h. Patches become rows of P (im2col), then it is a
 * product. */

/* A grid of patches over up to three spatial axes; unpatchify has the same. */
typedef struct {
    int64_t size[3], patch[3], count[3]; /* voxels, voxels per patch, patches along each axis */
    int64_t voxels, tokens, inside;      /* products of the three */
} patch_grid;

static pm_status patch_grid_make(pm_ctx *ctx, const char *op, const int64_t size[3],
                                 const int64_t patch[3], int64_t C, int64_t V, int64_t T, int64_t P,
                                 patch_grid *grid)
{
    *grid = (patch_grid){.voxels = 1, .tokens = 1, .inside = 1};
    for (int i = 0; i < 3; i++) {
        if (size[i] < 1 || size[i] > V || patch[i] < 1 || size[i] % patch[i])
            return pm_fail(ctx, PM_EINVAL,
                           "%s: s%d=%lld must be a positive multiple of p%d=%lld, at most V=%lld",
                           op, i, (long long)size[i], i, (long long)patch[i], (long long)V);
        grid->size[i] = size[i];
        grid->patch[i] = patch[i];
        grid->count[i] = size[i] / patch[i];
        if (grid->voxels > V / size[i])
            return pm_fail(ctx, PM_EINVAL, "%s: s0*s1*s2 must be V=%lld", op, (long long)V);
        grid->voxels *= size[i];
        grid->tokens *= grid->count[i];
        grid->inside *= patch[i];
    }
    if (grid->voxels != V || grid->tokens != T || C * grid->inside != P)
        return pm_fail(ctx, PM_EINVAL,
                       "%s: s0*s1*s2=%lld must be V=%lld, the patches %lld must be T=%lld, and "
                       "C*p0*p1*p2=%lld must be P=%lld",
                       op, (long long)grid->voxels, (long long)V, (long long)grid->tokens,
                       (long long)T, (long long)(C * grid->inside), (long long)P);
    return PM_OK;
}

/* The first voxel of patch i of an image. */
static int64_t patch_origin(const patch_grid *g, int64_t i)
{
    int64_t i2 = i % g->count[2], i1 = i / g->count[2] % g->count[1],
            i0 = i / g->count[2] / g->count[1];
    return (i0 * g->patch[0] * g->size[1] + i1 * g->patch[1]) * g->size[2] + i2 * g->patch[2];
}

/* Where element p of a patch lies in its image, counted from the patch's origin: offset[P]. The
 * channel is the slowest index inside a patch (a convolution weight) or the fastest (unpatchify).
 */
static void patch_offsets(const patch_grid *g, int64_t C, bool channel_fastest, int64_t *offset)
{
    for (int64_t c = 0; c < C; c++)
        for (int64_t q = 0; q < g->inside; q++) {
            int64_t q2 = q % g->patch[2], q1 = q / g->patch[2] % g->patch[1],
                    q0 = q / g->patch[2] / g->patch[1];
            offset[channel_fastest ? q * C + c : c * g->inside + q] =
                c * g->voxels + (q0 * g->size[1] + q1) * g->size[2] + q2;
        }
}

typedef struct {
    const pm_patch_embed_args *g;
    const pm_patch_embed_grads *d;
    patch_grid patches;
    product_grid grid;
    product_kind kind;
    const product_word *panels;
    int64_t *offset; /* (P): patch_offsets */
    char *scratch;   /* worker_bytes for each worker */
    size_t worker_bytes;
    product_side left, right; /* backward: dy and the patches, packed for dweight */
    float *sums;              /* (tasks, D): of the rows of dy of a task */
    product_wgrad_grid wgrad;
} patch_embed_job;

/* The finish callback's view of a task. */
typedef struct {
    const patch_embed_job *job;
    int64_t row0; /* first row of the task's block */
} patch_embed_block;

#define PATCH_EMBED_ROWS 64 /* patches packed by a task of the backward pass */

/* Bytes of a forward task: its patches, and those as left operands. */
static size_t patch_embed_room(product_kind kind, int64_t P)
{
    return pm_round64((size_t)(PRODUCT_MOST_ROWS * P) * 4) + product_room(kind, P);
}

static size_t patch_embed_workspace(const pm_ctx *ctx, const pm_patch_embed_args *g, bool backward)
{
    const product_kind kind = product_kind_of(ctx);
    size_t workers = (size_t)pm_pool_threads(ctx->pool),
           bytes = pm_round64((size_t)g->P * sizeof(int64_t));
    if (!backward) {
        bytes += g->weight.derived ? 0 : product_panel_bytes(kind, g->D, g->P);
        return bytes + workers * patch_embed_room(kind, g->P);
    }
    const int64_t N = g->B * g->T;
    size_t dx = g->weight.derived ? 0 : product_panel_bytes(kind, g->P, g->D);
    dx += workers * product_room(kind, g->D);
    size_t weights = product_side_bytes(kind, N, g->D) + product_side_bytes(kind, N, g->P) +
                     pm_round64((size_t)(pm_blocks(N, PATCH_EMBED_ROWS) * g->D) * 4) +
                     workers * pm_round64((size_t)(PATCH_EMBED_ROWS * g->P) * 4);
    return bytes + (dx > weights ? dx : weights);
}

static pm_status patch_embed_begin(pm_ctx *ctx, const pm_patch_embed_args *g, patch_embed_job *job,
                                   void **scratch)
{
    const int64_t size[3] = {g->s0, g->s1, g->s2}, patch[3] = {g->p0, g->p1, g->p2};
    PM_TRY(patch_grid_make(ctx, "patch_embed", size, patch, g->C, g->V, g->T, g->P, &job->patches));
    job->g = g;
    job->offset = pm_take(scratch, (size_t)g->P * sizeof(int64_t));
    patch_offsets(&job->patches, g->C, false, job->offset);
    return PM_OK;
}

/* The image part that patch n = b*T + i starts at, as an index into x (B, C, V). */
static inline int64_t patch_embed_start(const patch_embed_job *job, int64_t n)
{
    return n / job->g->T * job->g->C * job->g->V + patch_origin(&job->patches, n % job->g->T);
}

static void patch_embed_gather(const patch_embed_job *job, int64_t n, float *row)
{
    const float *x = job->g->x + patch_embed_start(job, n);
    for (int64_t p = 0; p < job->g->P; p++)
        row[p] = x[job->offset[p]];
}

/* ---------------------------------------------------------------- forward */

/* y = tile + bias + pos, while the tile is in L1. */
static void patch_embed_forward_finish(void *arg, int64_t row0, int m, int64_t col0, int64_t n,
                                       float *tile)
{
    const patch_embed_block *block = arg;
    const pm_patch_embed_args *g = block->job->g;
    for (int i = 0; i < m; i++) {
        int64_t row = block->row0 + row0 + i;
        for (int64_t j = 0; j < n; j += PM_WIDTH) {
            int64_t left = n - j, col = col0 + j;
            vf y = v_load(tile + i * PM_NR + j) + v_get(g->bias + col, left);
            if (g->pos)
                y += v_get(g->pos + row % g->T * g->D + col, left);
            v_put(g->y + row * g->D + col, y, left);
        }
    }
}

static void patch_embed_forward_task(void *arg, int64_t task, int worker)
{
    const patch_embed_job *job = arg;
    const pm_patch_embed_args *g = job->g;
    product_share s = product_share_of(&job->grid, task);
    void *scratch = job->scratch + (size_t)worker * job->worker_bytes;
    float *patches = pm_take(&scratch, (size_t)(PRODUCT_MOST_ROWS * g->P) * 4);
    product_word *room = scratch;
    const product_word *rows[PRODUCT_MOST_ROWS];
    for (int64_t i = 0; i < s.rows; i++) {
        patch_embed_gather(job, s.row0 + i, patches + i * g->P);
        rows[i] = product_row(job->kind, patches + i * g->P, g->P, &room);
    }
    product_block(job->kind, s.rows, rows, g->P, g->D, job->panels, s.panel0, s.panel1,
                  patch_embed_forward_finish, &(patch_embed_block){job, s.row0},
                  (product_target){g->y + s.row0 * g->D, g->D});
}

static pm_status patch_embed_forward(pm_ctx *ctx, const pm_patch_embed_args *g, void *scratch)
{
    const product_kind kind = product_kind_of(ctx);
    patch_embed_job job = {.kind = kind, .worker_bytes = patch_embed_room(kind, g->P)};
    PM_TRY(patch_embed_begin(ctx, g, &job, &scratch));
    job.scratch = pm_take(&scratch, (size_t)pm_pool_threads(ctx->pool) * job.worker_bytes);
    job.panels = product_forward_of(ctx, g->weight, g->D, g->P, scratch);
    job.grid = product_grid_of(kind, g->B * g->T, g->D, g->P);
    pm_parallel(ctx->pool, product_tasks(&job.grid), patch_embed_forward_task, &job);
    return PM_OK;
}

/* ---------------------------------------------------------------- backward */

/* dx = dy . weight, put back where the patch came from: each voxel is in exactly one patch. */
static void patch_embed_dx_finish(void *arg, int64_t row0, int m, int64_t col0, int64_t n,
                                  float *tile)
{
    const patch_embed_block *block = arg;
    const patch_embed_job *job = block->job;
    for (int i = 0; i < m; i++) {
        float *dx = job->d->dx + patch_embed_start(job, block->row0 + row0 + i);
        for (int64_t j = 0; j < n; j++)
            dx[job->offset[col0 + j]] = tile[i * PM_NR + j];
    }
}

static void patch_embed_dx_task(void *arg, int64_t task, int worker)
{
    const patch_embed_job *job = arg;
    const pm_patch_embed_args *g = job->g;
    product_share s = product_share_of(&job->grid, task);
    product_word *room = (product_word *)(job->scratch + (size_t)worker * job->worker_bytes);
    const product_word *rows[PRODUCT_MOST_ROWS];
    for (int64_t i = 0; i < s.rows; i++)
        rows[i] = product_row(job->kind, job->d->dy + (s.row0 + i) * g->D, g->D, &room);
    product_block(job->kind, s.rows, rows, g->D, g->P, job->panels, s.panel0, s.panel1,
                  patch_embed_dx_finish, &(patch_embed_block){job, s.row0}, (product_target){0});
}

/* Packs some rows of dy and their patches, and sums those of dy. */
static void patch_embed_pack_task(void *arg, int64_t task, int worker)
{
    const patch_embed_job *job = arg;
    const pm_patch_embed_args *g = job->g;
    int64_t begin = task * PATCH_EMBED_ROWS,
            m = pm_min(g->B * g->T, begin + PATCH_EMBED_ROWS) - begin;
    float *patches = (float *)(job->scratch + (size_t)worker * job->worker_bytes);
    const float *dy[PATCH_EMBED_ROWS], *rows[PATCH_EMBED_ROWS];
    for (int64_t i = 0; i < m; i++) {
        patch_embed_gather(job, begin + i, patches + i * g->P);
        dy[i] = job->d->dy + (begin + i) * g->D;
        rows[i] = patches + i * g->P;
    }
    float *sum = job->sums + task * g->D;
    memset(sum, 0, (size_t)g->D * 4);
    product_side_pack(job->kind, &job->left, begin, m, dy, g->D, NULL, sum);
    product_side_pack(job->kind, &job->right, begin, m, rows, g->P, NULL, NULL);
    v_stream_end();
}

/* dweight += dy^T . patches; dbias += sum of dy. A task owns its outputs. */
static void patch_embed_wgrad_task(void *arg, int64_t task, int worker)
{
    (void)worker;
    const patch_embed_job *job = arg;
    const pm_patch_embed_args *g = job->g;
    const int64_t N = g->B * g->T;
    const product_wgrad_share s = product_wgrad_share_of(&job->wgrad, task);
    if (job->d->dweight)
        product_wgrad(job->kind, &job->left, &job->right, 0, N, s, job->d->dweight, g->P);
    if (job->d->dbias && s.d0 == 0)
        product_add_sums(pm_blocks(N, PATCH_EMBED_ROWS), job->sums, g->D, s.f0, s.f1,
                         job->d->dbias);
}

/* dpos += sum of dy over the images, for one token */
static void patch_embed_dpos_task(void *arg, int64_t i, int worker)
{
    (void)worker;
    const patch_embed_job *job = arg;
    const pm_patch_embed_args *g = job->g;
    product_add_sums(g->B, job->d->dy + i * g->D, g->T * g->D, 0, g->D, job->d->dpos + i * g->D);
}

static pm_status patch_embed_backward(pm_ctx *ctx, const pm_patch_embed_args *g,
                                      const pm_patch_embed_grads *d, void *scratch)
{
    int64_t N = g->B * g->T;
    const product_kind kind = product_kind_of(ctx);
    patch_embed_job job = {.d = d, .kind = kind};
    PM_TRY(patch_embed_begin(ctx, g, &job, &scratch));
    if (d->dx) {
        void *room = scratch;
        void *panels = g->weight.derived ? NULL
                                         : pm_take(&room, product_panel_bytes(kind, g->P, g->D));
        job.panels = product_backward_of(ctx, g->weight, g->D, g->P, panels);
        job.scratch = room;
        job.worker_bytes = product_room(kind, g->D);
        job.grid = product_grid_of(kind, N, g->P, g->D);
        pm_parallel(ctx->pool, product_tasks(&job.grid), patch_embed_dx_task, &job);
    }
    if (d->dweight || d->dbias) {
        job.left =
            product_side_take_left(kind, N, g->D, true, &scratch); /* where the panels were */
        job.right = product_side_take(kind, N, g->P, true, &scratch);
        job.sums = pm_take(&scratch, (size_t)(pm_blocks(N, PATCH_EMBED_ROWS) * g->D) * 4);
        job.scratch = scratch;
        job.worker_bytes = pm_round64((size_t)(PATCH_EMBED_ROWS * g->P) * 4);
        pm_parallel(ctx->pool, pm_blocks(N, PATCH_EMBED_ROWS), patch_embed_pack_task, &job);
        job.wgrad = product_wgrad_grid_of(kind, g->D, g->P, N, (double)(g->D * g->P) * (double)N);
        pm_parallel(ctx->pool, product_wgrad_tasks(&job.wgrad), patch_embed_wgrad_task, &job);
    }
    if (d->dpos && g->pos)
        pm_parallel(ctx->pool, g->T, patch_embed_dpos_task, &job);
    return PM_OK;
}
