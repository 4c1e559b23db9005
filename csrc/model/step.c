/* step.c: forward for its output, accumulate, update. */
#include "state.h"

#include <math.h>

#include "../base/os.h"

pm_status pm_check_labels(pm_ctx *ctx, const pm_config *cfg, int64_t B, const int64_t *y)
{
    const int64_t rows = pm_label_rows(cfg);
    for (int64_t b = 0; b < B; b++)
        if (y[b] < 0 || y[b] >= rows)
            return pm_fail(ctx, PM_EINVAL, "y[%lld] = %lld: a label is 0 to %lld%s", (long long)b,
                           (long long)y[b], (long long)(rows - 1),
                           cfg->null_label ? ", the last one meaning no class"
                           : y[b] == cfg->classes
                               ? " (this model was made without a row for no class)"
                               : "");
    return PM_OK;
}

/* ---------------------------------------------------------------- forward */

/* Writes the routing of every expert layer, from (layers, B, T, A) host arrays. */
static pm_status force_routing(pm_run *r, const int32_t *choice, const float *weight)
{
    const int64_t slots = r->acts->N * r->cfg->top_k;
    for (int64_t i = 0; i < r->cfg->depth; i++) {
        if (!pm_has_experts(r->cfg, i))
            continue;
        PM_WRITE(r->ctx, r->acts->blocks[i].route.choice, choice, slots);
        PM_WRITE(r->ctx, r->acts->blocks[i].route.weight, weight, slots);
        choice += slots;
        weight += slots;
    }
    r->forced = true;
    return PM_OK;
}

static pm_status write_images(pm_run *r, const float *x, const int64_t *y)
{
    const pm_acts *a = r->acts;
    PM_WRITE(r->ctx, a->x, x, a->B * r->cfg->channels * pm_voxels(r->cfg));
    PM_WRITE(r->ctx, a->y, y, a->B);
    return PM_OK;
}

static pm_status write_conditions(pm_ctx *ctx, pm_model *m, const float *t, const int64_t *y)
{
    pm_acts *const a = &m->acts;
    pm_conditions *const c = &m->conditions;
    PM_TRY(pm_conditions_find(ctx, c, a->B, t, y));
    a->conditions = c->count;
    PM_WRITE(ctx, a->t, c->t, c->count);
    PM_WRITE(ctx, a->label, c->label, c->count);
    PM_WRITE(ctx, a->condition, c->image, a->B);
    return PM_OK;
}

pm_status pm_model_forward(pm_ctx *ctx, pm_model *m, int64_t B, const float *x, const float *t,
                           const int64_t *y, const int32_t *choice, const float *weight, float *out)
{
    PM_TRY(pm_check_labels(ctx, &m->cfg, B, y));
    PM_TRY(pm_need_acts(ctx, m, B, PM_INFERENCE));
    pm_run r = pm_model_run(ctx, m);
    PM_TRY(write_images(&r, x, y));
    PM_TRY(write_conditions(ctx, m, t, y));
    if (choice)
        PM_TRY(force_routing(&r, choice, weight));
    PM_TRY(pm_network_forward(&r));
    PM_READ(ctx, out, m->acts.out, B * m->cfg.out_channels * pm_voxels(&m->cfg));
    return PM_OK;
}

int64_t pm_model_expert_layers(const pm_model *m)
{
    int64_t layers = 0;
    for (int64_t i = 0; i < m->cfg.depth; i++)
        layers += pm_has_experts(&m->cfg, i);
    return layers;
}

pm_status pm_model_routing(pm_ctx *ctx, pm_model *m, int32_t *choice, float *weight, int32_t *load)
{
    const int64_t slots = m->acts.N * m->cfg.top_k, G = pm_plan_groups(&m->cfg);
    for (int64_t i = 0; i < m->cfg.depth; i++) {
        if (!pm_has_experts(&m->cfg, i))
            continue;
        const pm_route_acts *u = &m->acts.blocks[i].route;
        int32_t begin = 0;
        PM_READ(ctx, choice, u->choice, slots);
        PM_READ(ctx, weight, u->weight, slots);
        PM_READ(ctx, load, u->row_off + 1, G);
        for (int64_t g = 0; g < G; g++) {
            const int32_t end = load[g];
            load[g] = end - begin;
            begin = end;
        }
        choice += slots;
        weight += slots;
        load += G;
    }
    return PM_OK;
}

/* ---------------------------------------------------------------- gradients */

static pm_status reset_gradients(pm_ctx *ctx, pm_model *m, bool zero)
{
    m->gradients_incomplete = false;
    m->slots = 0;
    m->mse = m->aux = m->weight = 0;
    float *const grad = m->slab[PM_SLAB_GRAD];
    return grad && zero ? ctx->backend->zero(ctx, grad, (size_t)m->layout.train * sizeof *grad)
                        : PM_OK;
}

pm_status pm_model_zero_gradients(pm_ctx *ctx, pm_model *m)
{
    return reset_gradients(ctx, m, true);
}

static pm_status refuse_incomplete(pm_ctx *ctx, pm_model *m)
{
    if (!m->gradients_incomplete)
        return PM_OK;
    PM_TRY(reset_gradients(ctx, m, true));
    return pm_fail(
        ctx, PM_EINTERNAL,
        "the gradients were incomplete, because an accumulate was stopped halfway; they are "
        "empty now: accumulate the whole step again");
}

/* Sums of one loss slot. */
static void add_losses(const pm_config *c, const float *losses, double *mse, double *aux)
{
    *mse = losses[PM_LOSS_MSE];
    *aux = 0;
    for (int64_t i = 1; i < pm_loss_count(c); i++)
        *aux += losses[i];
}

/* Brings the norm and the waiting losses to the host, in one copy. */
static pm_status fetch_numbers(pm_ctx *ctx, pm_model *m)
{
    const int64_t count = pm_loss_count(&m->cfg);
    PM_TRY(ctx->backend->read(ctx, m->host_numbers, m->numbers,
                              sizeof *m->numbers + (size_t)(m->slots * count) * sizeof(float)));
    const float *losses = (const float *)(m->host_numbers + 1);
    for (int slot = 0; slot < m->slots; slot++) {
        double mse, aux;
        add_losses(&m->cfg, losses + slot * count, &mse, &aux);
        m->mse += m->slot_scale[slot] * mse;
        m->aux += m->slot_scale[slot] * aux;
        m->weight += m->slot_scale[slot];
    }
    m->slots = 0;
    return PM_OK;
}

/* Forward, loss, and grad += dloss * gradient. *touched: the gradients are no longer what they
 * were. From here on nothing comes from the host. */
static pm_status forward_backward(pm_run *r, float *grad, bool *touched)
{
    PM_TRY(pm_network_forward(r));
    PM_TRY(pm_network_loss(r));
    r->grad = grad;
    *touched = true;
    return pm_network_backward(r);
}

static pm_status write_data(pm_run *r, const pm_model *m, const float *x0, const int64_t *y,
                            int64_t position, double scale)
{
    const pm_acts *a = r->acts;
    const int64_t key[2] = {m->seed, position};
    const float dloss = (float)scale;
    PM_WRITE(r->ctx, a->key, key, 2);
    PM_WRITE(r->ctx, a->x0, x0, a->B * r->cfg->channels * pm_voxels(r->cfg));
    PM_WRITE(r->ctx, a->y0, y, a->B);
    PM_WRITE(r->ctx, a->dloss, &dloss, 1);
    return PM_OK;
}

static pm_status draw(pm_run *r)
{
    const pm_acts *a = r->acts;
    const pm_config *c = r->cfg;
    PM_FORWARD(r, rectified_flow,
               (pm_rectified_flow_args){.B = a->B,
                                        .C = c->channels,
                                        .V = pm_voxels(c),
                                        .x0 = a->x0,
                                        .y = a->y0,
                                        .key = a->key,
                                        .xt = a->x,
                                        .target = a->target,
                                        .t = a->t,
                                        .label = a->y,
                                        .density = c->density,
                                        .logit_mean = c->logit_mean,
                                        .logit_std = c->logit_std,
                                        .sigmoid_scale = c->sigmoid_scale,
                                        .shift = c->shift,
                                        .drop_prob = c->drop_prob,
                                        .null_label = c->classes});
    return PM_OK;
}

typedef struct {
    pm_run run;
    float *grad;
    bool *touched;
} accumulation;

static pm_status draw_and_add(void *arg)
{
    const accumulation *const a = arg;
    pm_run r = a->run;
    PM_TRY(draw(&r));
    return forward_backward(&r, a->grad, a->touched);
}

pm_status pm_model_accumulate(pm_ctx *ctx, pm_model *m, int64_t B, const float *x0,
                              const int64_t *y, int64_t position, double scale)
{
    PM_TRY(refuse_incomplete(ctx, m));
    PM_TRY(pm_check_labels(ctx, &m->cfg, B, y));
    PM_TRY(pm_need_slab(ctx, m, PM_SLAB_GRAD));
    PM_TRY(pm_need_acts(ctx, m, B, PM_TRAINING));
    if (m->slots == PM_LOSS_SLOTS)
        PM_TRY(fetch_numbers(ctx, m));
    float *const grad = m->slab[PM_SLAB_GRAD];
    accumulation a = {pm_model_run(ctx, m), grad, &m->gradients_incomplete};
    PM_TRY(write_data(&a.run, m, x0, y, position, scale));
    const pm_graph_key key = {
        PM_STRETCH_ACCUMULATE, B,
        .memory = {m->arena, grad, a.run.weights.param, a.run.weights.derived}};
    PM_TRY(pm_run_stretch(ctx, m, &key, draw_and_add, &a, &m->gradients_incomplete));
    PM_TRY(ctx->backend->copy(ctx, pm_loss_slot(m, m->slots), a.run.losses,
                              (size_t)pm_loss_count(&m->cfg) * sizeof(float)));
    m->gradients_incomplete = false;
    m->slot_scale[m->slots++] = scale;
    return PM_OK;
}

/* grad slab += more, which is host memory, a piece at a time. */
static pm_status add_to_slab(pm_ctx *ctx, pm_model *m, const float *more)
{
    enum { PIECE = 1 << 20 };
    float *const grad = m->slab[PM_SLAB_GRAD];
    float *const piece = pm_os_alloc(PIECE * sizeof *piece);
    if (!piece)
        return pm_fail(ctx, PM_ENOMEM, "no memory to add up gradients");
    pm_status status = PM_OK;
    m->gradients_incomplete = true;
    for (int64_t at = 0; at < m->layout.train && status == PM_OK; at += PIECE) {
        const int64_t count = m->layout.train - at < PIECE ? m->layout.train - at : PIECE;
        const size_t bytes = (size_t)count * sizeof *piece;
        status = ctx->backend->read(ctx, piece, grad + at, bytes);
        for (int64_t i = 0; i < count; i++)
            piece[i] += more[at + i];
        if (status == PM_OK)
            status = ctx->backend->write(ctx, grad + at, piece, bytes);
    }
    m->gradients_incomplete = status != PM_OK;
    pm_os_free(piece, PIECE * sizeof *piece);
    return status;
}

static pm_status loss_and_grad(pm_ctx *ctx, pm_model *m, int64_t B, const float *x, const float *t,
                               const int64_t *y, const float *target, float *own, double losses[2],
                               float *grad)
{
    PM_TRY(pm_need_acts(ctx, m, B, PM_TRAINING));
    if (m->slots == PM_LOSS_SLOTS)
        PM_TRY(fetch_numbers(ctx, m));
    pm_run r = pm_model_run(ctx, m);
    r.losses = pm_loss_slot(m, m->slots);
    PM_TRY(write_images(&r, x, y));
    PM_WRITE(ctx, m->acts.t, t, B);
    PM_WRITE(ctx, m->acts.target, target, B * m->cfg.channels * pm_voxels(&m->cfg));
    PM_WRITE(ctx, m->acts.dloss, &(float){1}, 1);
    bool touched;
    PM_TRY(forward_backward(&r, own, &touched));
    float *const host = (float *)(m->host_numbers + 1);
    PM_READ(ctx, host, r.losses, pm_loss_count(&m->cfg));
    add_losses(&m->cfg, host, &losses[0], &losses[1]);
    PM_READ(ctx, grad, own, m->layout.train);
    return PM_OK;
}

pm_status pm_model_loss_and_grad(pm_ctx *ctx, pm_model *m, int64_t B, const float *x,
                                 const float *t, const int64_t *y, const float *target,
                                 bool accumulate, double losses[2], float *grad)
{
    PM_TRY(pm_check_labels(ctx, &m->cfg, B, y));
    if (accumulate) {
        PM_TRY(refuse_incomplete(ctx, m));
        PM_TRY(pm_need_slab(ctx, m, PM_SLAB_GRAD));
    }
    const size_t bytes = (size_t)m->layout.train * sizeof(float);
    float *own; /* the gradient of this call */
    PM_TRY(pm_take_memory(ctx, bytes, "the gradients of this call", &own));
    const pm_status status = loss_and_grad(ctx, m, B, x, t, y, target, own, losses, grad);
    ctx->backend->free(ctx, own, bytes);
    if (status != PM_OK || !accumulate)
        return status;
    PM_TRY(add_to_slab(ctx, m, grad));
    m->slot_scale[m->slots++] = 1;
    return PM_OK;
}

/* ---------------------------------------------------------------- update */

typedef struct {
    pm_run run;
    pm_model *model;
    bool has_ema;
} optimization;

/* Norm, AdamW, and the derived twins of the new weights (a skipped update leaves them). */
static pm_status optimize(void *arg)
{
    optimization *const o = arg;
    pm_run *const r = &o->run;
    pm_model *const m = o->model;
    float *const grad = m->slab[PM_SLAB_GRAD];
    PM_FORWARD(r, grad_norm,
               (pm_grad_norm_args){.M = m->layout.train, .g = grad, .norm = &m->numbers->norm});
    PM_FORWARD(r, adamw,
               (pm_adamw_args){.M = m->layout.train,
                               .hyper = m->numbers->hyper,
                               .norm = &m->numbers->norm,
                               .grad = grad,
                               .param = m->slab[PM_SLAB_PARAM],
                               .m = m->slab[PM_SLAB_M],
                               .v = m->slab[PM_SLAB_V],
                               .avg = o->has_ema ? m->slab[PM_SLAB_EMA] : NULL,
                               .twins = {.count = m->derived ? m->layout.matrix_count : 0,
                                         .list = m->twins,
                                         .derived = m->derived}});
    return PM_OK;
}

static pm_status update(pm_ctx *ctx, pm_model *m, const pm_update_options *o, pm_step_info *info)
{
    PM_TRY(refuse_incomplete(ctx, m));
    if (!m->slab[PM_SLAB_GRAD])
        return pm_fail(ctx, PM_EINTERNAL,
                       "update: there are no gradients yet: accumulate comes first");
    PM_TRY(pm_need_slab(ctx, m, PM_SLAB_M));
    PM_TRY(pm_need_slab(ctx, m, PM_SLAB_V));
    optimization all = {pm_model_run(ctx, m), m, o->has_ema};
    all.run.dry = true;
    all.run.scratch_bytes = 0;
    PM_TRY(optimize(&all));
    PM_TRY(pm_need_arena(ctx, m, all.run.scratch_bytes));
    if (o->has_ema) /* last: it is one once it is made */
        PM_TRY(pm_need_slab(ctx, m, PM_SLAB_EMA));
    /* Nothing is missing now. */
    const double hyper[PM_HYPER_COUNT] = {[PM_HYPER_LR] = o->lr,
                                          [PM_HYPER_BETA1] = o->beta1,
                                          [PM_HYPER_BETA2] = o->beta2,
                                          [PM_HYPER_EPS] = o->eps,
                                          [PM_HYPER_WEIGHT_DECAY] = o->weight_decay,
                                          [PM_HYPER_CLIP] = o->clip,
                                          [PM_HYPER_EMA] = o->ema,
                                          [PM_HYPER_STEP] = (double)(m->step + 1)};
    PM_WRITE(ctx, m->numbers->hyper, hyper, PM_HYPER_COUNT);
    all.run.dry = false;
    all.run.scratch = m->arena;
    const pm_graph_key key = {PM_STRETCH_UPDATE, .variant = o->has_ema,
                              .memory = {m->arena, m->slab[PM_SLAB_GRAD], m->slab[PM_SLAB_PARAM],
                                         m->derived, m->slab[PM_SLAB_M], m->slab[PM_SLAB_V],
                                         m->slab[PM_SLAB_EMA]}};
    bool changed = false;
    PM_TRY(pm_run_stretch(ctx, m, &key, optimize, &all, &changed));
    m->ema_derived_fresh = false;
    PM_TRY(fetch_numbers(ctx, m));
    const double norm = m->host_numbers->norm;
    const bool skipped = !isfinite(norm);
    if (skipped)
        m->skipped++;
    else
        m->step++;
    *info = (pm_step_info){.mse = m->mse / m->weight,
                           .aux = m->aux / m->weight,
                           .grad_norm = norm,
                           .step = m->step,
                           .skipped = skipped};
    return reset_gradients(ctx, m, false); /* adamw has emptied the slab */
}

pm_status pm_model_update(pm_ctx *ctx, pm_model *m, const pm_update_options *options,
                          pm_step_info *info)
{
    int (*const poll)(void *) = ctx->poll;
    ctx->poll = NULL; /* all of it or nothing */
    const pm_status status = update(ctx, m, options, info);
    ctx->poll = poll;
    return status;
}
