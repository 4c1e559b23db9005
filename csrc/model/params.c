/* params.c: the one walk over the parameters. Names, shapes, places and initial values all come
 * from walk_model below, which reads like the state dict of the public code. */
#include "params.h"

#include <math.h>
#include <stdarg.h>
#include <stdio.h>
#include <string.h>

#include "../base/os.h"
#include "../base/rng.h"
#include "router.h"

struct pm_walk {
    const pm_config *cfg;
    const pm_ctx *ctx;
    char prefix[32];        /* "blocks.3." */
    int64_t cursor[2];      /* next free element of each kind; the frozen ones start behind */
    int64_t derived;        /* next free byte of the derived slab */
    int64_t index, numbers; /* tensors named so far, and the numbers in them */
    int64_t matrix_count;
    pm_twin *matrices;      /* NULL: only count */
    pm_param_visitor visit; /* NULL: no names wanted */
    void *arg;
    pm_status status; /* of the first visit that failed: no more names then */
};

/* ---------------------------------------------------------------- one tensor */

static int64_t reserve(pm_walk *w, pm_kind kind, int64_t count)
{
    const int64_t at = w->cursor[kind];
    w->cursor[kind] += (count + PM_SLAB_ALIGN - 1) / PM_SLAB_ALIGN * PM_SLAB_ALIGN;
    return at;
}

/* Says the name of the tensor at `at`. */
static void name_tensor(pm_walk *w, pm_kind kind, int64_t at, const char *name, pm_init init,
                        int ndim, const int64_t *shape)
{
    pm_param p = {
        .index = (int)w->index++, .ndim = ndim, .at = at, .count = 1, .kind = kind, .init = init};
    for (int i = 0; i < ndim; i++)
        p.count *= p.shape[i] = shape[i];
    w->numbers += p.count;
    if (!w->visit || w->status != PM_OK)
        return;
    snprintf(p.name, sizeof p.name, "%s%s", w->prefix, name);
    w->status = w->visit(w->arg, &p);
}

int64_t pm_walk_tensor(pm_walk *w, const char *name, pm_init init, int ndim, const int64_t *shape)
{
    int64_t count = 1;
    for (int i = 0; i < ndim; i++)
        count *= shape[i];
    const int64_t at = reserve(w, PM_TRAIN, count);
    name_tensor(w, PM_TRAIN, at, name, init, ndim, shape);
    return at;
}

static int64_t vector(pm_walk *w, const char *name, pm_init init, int64_t n)
{
    return pm_walk_tensor(w, name, init, 1, &n);
}

/* Room in the derived slab for the twin of an (F, D) matrix at `at`. */
static pm_matrix derive(pm_walk *w, int64_t at, int64_t F, int64_t D)
{
    const pm_matrix place = {at, w->derived};
    if (w->matrices)
        w->matrices[w->matrix_count] = (pm_twin){F, D, place.at, place.derived};
    w->matrix_count++;
    w->derived += (int64_t)w->ctx->backend->derived_bytes(w->ctx, F, D);
    return place;
}

/* A linear layer name.weight (F, D) and name.bias (F). */
static void linear(pm_walk *w, const char *name, pm_init init, int64_t F, int64_t D,
                   pm_matrix *weight, int64_t *bias)
{
    char full[80];
    snprintf(full, sizeof full, "%s.weight", name);
    *weight = derive(w, pm_walk_tensor(w, full, init, 2, (const int64_t[]){F, D}), F, D);
    snprintf(full, sizeof full, "%s.bias", name);
    *bias = vector(w, full, PM_INIT_ZERO, F);
}

/* ---------------------------------------------------------------- the walk */

/* Group j of the layer is called `name`, its halves `up` and `down`; it starts at unit `begin`. */
static void name_expert(pm_walk *w, const pm_block_places *b, const char *name, const char *up,
                        const char *down, int64_t j, int64_t begin, int64_t width)
{
    const int64_t D = w->cfg->hidden;
    char full[80];
    snprintf(full, sizeof full, "%s%s.weight", name, up);
    name_tensor(w, PM_TRAIN, b->up.at + begin * D, full, PM_INIT_XAVIER, 2, (int64_t[]){width, D});
    snprintf(full, sizeof full, "%s%s.bias", name, up);
    name_tensor(w, PM_TRAIN, b->up_bias + begin, full, PM_INIT_ZERO, 1, (int64_t[]){width});
    snprintf(full, sizeof full, "%s%s.weight", name, down);
    name_tensor(w, PM_TRAIN, b->down.at + begin * D, full, PM_INIT_XAVIER, 2,
                (int64_t[]){D, width});
    snprintf(full, sizeof full, "%s%s.bias", name, down);
    name_tensor(w, PM_TRAIN, b->down_bias + j * D, full, PM_INIT_ZERO, 1, (int64_t[]){D});
}

/* The feed-forward layer: the router's own tensors, then the groups of ops/experts.h. */
static void walk_ffn(pm_walk *w, int64_t block, pm_block_places *b)
{
    const pm_config *c = w->cfg;
    const pm_ffn f = pm_ffn_of(c, block);
    const int64_t D = c->hidden;
    if (f.G > 0)
        pm_router_of(c)->visit_params(w, c, b);

    b->up.at = reserve(w, PM_TRAIN, f.F * D);
    b->up_bias = reserve(w, PM_TRAIN, f.F);
    b->down.at = reserve(w, PM_TRAIN, f.F * D);
    b->down_bias = reserve(w, PM_TRAIN, (f.G + f.S) * D);
    b->up.derived = w->derived;
    for (int64_t j = 0; j < f.G + f.S; j++)
        derive(w, b->up.at + j * f.width * D, j < f.G ? f.width : f.shared, D);
    b->down.derived = w->derived;
    for (int64_t j = 0; j < f.G + f.S; j++)
        derive(w, b->down.at + j * f.width * D, D, j < f.G ? f.width : f.shared);

    if (f.G == 0) {
        name_expert(w, b, "mlp.", "fc1", "fc2", 0, 0, f.shared);
        return;
    }
    for (int64_t j = 0; j < f.G; j++) {
        char name[40];
        snprintf(name, sizeof name, "mlp.experts.%lld.", (long long)j);
        name_expert(w, b, name, "up_proj", "down_proj", j, j * f.width, f.width);
    }
    if (f.S > 0)
        name_expert(w, b, "mlp.shared_expert.", "up_proj", "down_proj", f.G, f.G * f.width,
                    f.shared);
}

static void walk_block(pm_walk *w, int64_t block, pm_block_places *b)
{
    const int64_t D = w->cfg->hidden, K = w->cfg->head, HK = w->cfg->heads * K;
    snprintf(w->prefix, sizeof w->prefix, "blocks.%lld.", (long long)block);
    linear(w, "attn.qkv", PM_INIT_XAVIER, 3 * HK, D, &b->qkv, &b->qkv_bias);
    if (w->cfg->qk_norm) {
        b->q_weight = vector(w, "attn.q_norm.weight", PM_INIT_ONE, K);
        b->q_bias = vector(w, "attn.q_norm.bias", PM_INIT_ZERO, K);
        b->k_weight = vector(w, "attn.k_norm.weight", PM_INIT_ONE, K);
        b->k_bias = vector(w, "attn.k_norm.bias", PM_INIT_ZERO, K);
    }
    linear(w, "attn.proj", PM_INIT_XAVIER, D, HK, &b->proj, &b->proj_bias);
    walk_ffn(w, block, b);
    linear(w, "adaLN_modulation.1", PM_INIT_ZERO, 6 * D, D, &b->adaln, &b->adaln_bias);
    w->prefix[0] = 0;
}

/* The whole model. layout->blocks may be NULL: then the places of the blocks are not kept. */
static void walk_model(pm_walk *w, pm_layout *layout)
{
    const pm_config *c = w->cfg;
    const int64_t D = c->hidden, P = c->channels * pm_patch_voxels(c);
    const int64_t out = pm_patch_voxels(c) * c->out_channels;

    const int64_t pos[] = {1, pm_tokens(c), D};
    layout->pos = reserve(w, PM_FROZEN, pos[1] * D);
    name_tensor(w, PM_FROZEN, layout->pos, "pos_embed", PM_INIT_SINCOS, 3, pos);

    int64_t patch[5] = {D, c->channels};
    for (int64_t i = 0; i < c->axes; i++)
        patch[2 + i] = c->patch[3 - c->axes + i];
    const int64_t at =
        pm_walk_tensor(w, "x_embedder.proj.weight", PM_INIT_XAVIER, 2 + (int)c->axes, patch);
    layout->patch = derive(w, at, D, P);
    layout->patch_bias = vector(w, "x_embedder.proj.bias", PM_INIT_ZERO, D);

    linear(w, "t_embedder.mlp.0", PM_INIT_NORMAL, D, PM_TIME_FEATURES, &layout->time0,
           &layout->time0_bias);
    linear(w, "t_embedder.mlp.2", PM_INIT_NORMAL, D, D, &layout->time2, &layout->time2_bias);
    layout->table = pm_walk_tensor(w, "y_embedder.embedding_table.weight", PM_INIT_NORMAL, 2,
                                   (int64_t[]){pm_label_rows(c), D});

    pm_block_places unused = {0};
    for (int64_t i = 0; i < c->depth; i++)
        walk_block(w, i, layout->blocks ? &layout->blocks[i] : &unused);

    linear(w, "final_layer.linear", PM_INIT_ZERO, out, D, &layout->final, &layout->final_bias);
    linear(w, "final_layer.adaLN_modulation.1", PM_INIT_ZERO, 2 * D, D, &layout->final_adaln,
           &layout->final_adaln_bias);
}

/* ---------------------------------------------------------------- its uses */

/* The frozen tensors lie behind the trained ones, whose total only a walk tells. */
static pm_walk count_model(pm_ctx *ctx, const pm_config *cfg)
{
    pm_walk count = {.cfg = cfg, .ctx = ctx};
    pm_layout unused = {0};
    walk_model(&count, &unused);
    return count;
}

pm_status pm_visit_params(pm_ctx *ctx, const pm_config *cfg, pm_param_visitor visit, void *arg)
{
    const pm_walk count = count_model(ctx, cfg);
    pm_walk walk = {.cfg = cfg, .ctx = ctx, .visit = visit, .arg = arg};
    walk.cursor[PM_FROZEN] = count.cursor[PM_TRAIN];
    pm_layout unused = {0};
    walk_model(&walk, &unused);
    return walk.status;
}

pm_status pm_layout_make(pm_ctx *ctx, const pm_config *cfg, pm_layout *layout)
{
    const pm_walk count = count_model(ctx, cfg);
    *layout = (pm_layout){.matrix_count = count.matrix_count};
    layout->blocks = pm_os_alloc((size_t)cfg->depth * sizeof *layout->blocks);
    layout->matrices = pm_os_alloc((size_t)count.matrix_count * sizeof *layout->matrices);
    if (!layout->blocks || !layout->matrices) {
        pm_layout_free(cfg, layout);
        return pm_fail(ctx, PM_ENOMEM, "no memory for the layout of the model");
    }
    pm_walk walk = {.cfg = cfg, .ctx = ctx, .matrices = layout->matrices};
    walk.cursor[PM_FROZEN] = count.cursor[PM_TRAIN];
    walk_model(&walk, layout);
    layout->train = walk.cursor[PM_TRAIN];
    layout->total = walk.cursor[PM_FROZEN];
    layout->derived = walk.derived;
    layout->params = walk.index;
    layout->numbers = walk.numbers;
    return PM_OK;
}

void pm_layout_free(const pm_config *cfg, pm_layout *layout)
{
    if (layout->blocks)
        pm_os_free(layout->blocks, (size_t)cfg->depth * sizeof *layout->blocks);
    if (layout->matrices)
        pm_os_free(layout->matrices, (size_t)layout->matrix_count * sizeof *layout->matrices);
    *layout = (pm_layout){0};
}

/* ---------------------------------------------------------------- initial values */

/* Fixed positions, elements first .. first + n - 1: the width is split evenly over the axes, the
 * last axis (the column) first; each part is [sin | cos] of position * 10000^(-i / half), in
 * double. */
static void init_positions(const pm_config *c, int64_t first, int64_t n, float *out)
{
    const int64_t part = c->hidden / c->axes, half = part / 2;
    int64_t grid[3];
    for (int i = 0; i < 3; i++)
        grid[i] = c->size[i] / c->patch[i];
    for (int64_t e = first; e < first + n; e++) {
        const int64_t token = e / c->hidden, axis = e % c->hidden / part, i = e % c->hidden % part;
        const int64_t at[3] = {token / (grid[1] * grid[2]), token / grid[2] % grid[1],
                               token % grid[2]};
        const double angle = (double)at[2 - axis] *
                             pow(10000.0, -(double)(i % half) / (double)half);
        out[e - first] = (float)(i < half ? sin(angle) : cos(angle));
    }
}

void pm_param_init(const pm_config *cfg, const pm_param *p, int64_t seed, int64_t first, int64_t n,
                   float *out)
{
    switch (p->init) {
    case PM_INIT_ZERO:
    case PM_INIT_ONE:
        for (int64_t i = 0; i < n; i++)
            out[i] = p->init == PM_INIT_ONE;
        return;
    case PM_INIT_XAVIER: {
        const double fan = (double)p->shape[0] + (double)(p->count / p->shape[0]);
        const float bound = (float)sqrt(6.0 / fan);
        pm_draws(seed, PM_STREAM_INIT, p->index, first, n, out, 0);
        for (int64_t i = 0; i < n; i++)
            out[i] = (2 * out[i] - 1) * bound;
        return;
    }
    case PM_INIT_NORMAL:
        pm_draws(seed, PM_STREAM_INIT, p->index, first, n, out, 1);
        for (int64_t i = 0; i < n; i++)
            out[i] *= 0.02f;
        return;
    case PM_INIT_SINCOS:
        init_positions(cfg, first, n, out);
        return;
    }
}
