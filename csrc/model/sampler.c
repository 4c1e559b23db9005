/* sampler.c: Euler steps along the flow from noise to data, with classifier-free guidance. */
#include "state.h"

#include "../base/os.h"

/* Rows of tokens from which a larger batch no longer makes the products faster. */
enum { ENOUGH_TOKENS = 8192 };

typedef struct {
    pm_ctx *ctx;
    pm_model *m;
    const pm_sample_options *o;
    pm_run run;
    bool guided, together; /* two passes; in one batch of 2n */
    int64_t passes;        /* images of all passes: n, or 2n when guided */
    int64_t at_once;       /* steps whose conditions are worked out together */
    int64_t *labels;       /* host: (2n) the labels asked for, then "no class" */
    int32_t *condition;    /* host: (2n) */
    float *condition_t;    /* host: (most_conditions) */
    int64_t *condition_label;
} sampling;

/* Noise level i of n: n + 1 equidistant ones from 1 to 0, then the shift. */
static double sigma_at(const pm_sample_options *o, int64_t i)
{
    const double sigma = 1 - (double)i / (double)o->steps;
    return o->shift * sigma / (1 + (o->shift - 1) * sigma);
}

/* What a recording of a stretch holds: all that follows from these. */
static pm_graph_key key_of(const sampling *s, pm_stretch stretch)
{
    const pm_model *m = s->m;
    return (pm_graph_key){stretch,
                          s->o->n,
                          stretch == PM_STRETCH_CONDITIONS ? m->acts.conditions : 0,
                          s->guided + s->together,
                          {m->arena, s->run.weights.param, s->run.weights.derived}};
}

static pm_status run_conditions(void *arg)
{
    return pm_network_conditions(&((sampling *)arg)->run);
}

/* The conditions of the steps from i on: every label that occurs, for each of them in turn. */
static pm_status conditions(sampling *s, int64_t i)
{
    const pm_conditions *c = &s->m->conditions;
    pm_acts *a = &s->m->acts;
    const int64_t left = s->o->steps - i, steps = left < s->at_once ? left : s->at_once;
    for (int64_t k = 0; k < steps * c->count; k++) {
        s->condition_t[k] = (float)(1000 * sigma_at(s->o, i + k / c->count));
        s->condition_label[k] = c->label[k % c->count];
    }
    a->conditions = steps * c->count;
    PM_WRITE(s->ctx, a->t, s->condition_t, a->conditions);
    PM_WRITE(s->ctx, a->label, s->condition_label, a->conditions);
    const pm_graph_key key = key_of(s, PM_STRETCH_CONDITIONS);
    bool changed;
    return pm_run_stretch(s->ctx, s->m, &key, run_conditions, s, &changed);
}

/* The network on the latents in acts.x; `which` is 0, or 1 for the second pass of two. */
static pm_status pass(sampling *s, int which)
{
    const pm_acts *all = &s->m->acts;
    pm_acts one = *all;
    pm_run r = s->run;
    one.y += which * all->B;
    one.condition += which * all->B;
    /* Room for every condition: how many there are now is not for a recording to know. */
    one.conditions = all->most_conditions;
    r.acts = &one;
    return pm_network_images(&r);
}

/* The velocity at the latents in acts.x: conditional and (when guided) unconditional output. */
static pm_status velocity(sampling *s, float **cond, float **uncond)
{
    pm_ctx *ctx = s->ctx;
    const pm_acts *a = &s->m->acts;
    const pm_config *c = &s->m->cfg;
    const int64_t n = s->o->n, image = c->channels * pm_voxels(c),
                  output = c->out_channels * pm_voxels(c);
    *cond = a->out;
    *uncond = NULL;
    if (s->together) {
        PM_TRY(
            ctx->backend->copy(ctx, a->x + n * image, a->x, (size_t)(n * image) * sizeof(float)));
        *uncond = a->out + n * output;
    }
    PM_TRY(pass(s, 0));
    if (s->guided && !s->together) {
        PM_TRY(ctx->backend->copy(ctx, a->cond, a->out, (size_t)(n * output) * sizeof(float)));
        PM_TRY(pass(s, 1));
        *cond = a->cond;
        *uncond = a->out;
    }
    return PM_OK;
}

static pm_status run_step(void *arg)
{
    sampling *const s = arg;
    pm_run *const r = &s->run;
    const pm_acts *a = &s->m->acts;
    const pm_config *c = &s->m->cfg;
    float *cond, *uncond;
    PM_TRY(velocity(s, &cond, &uncond));
    PM_FORWARD(r, euler_step,
               (pm_euler_step_args){.B = s->o->n,
                                    .C = c->channels,
                                    .M = c->out_channels,
                                    .V = pm_voxels(c),
                                    .x = a->x,
                                    .cond = cond,
                                    .uncond = uncond,
                                    .schedule = a->schedule,
                                    .y = a->x});
    return PM_OK;
}

static pm_status one_step(sampling *s, int64_t i)
{
    pm_ctx *ctx = s->ctx;
    const pm_acts *a = &s->m->acts;
    const pm_conditions *c = &s->m->conditions;
    const double schedule[3] = {sigma_at(s->o, i), sigma_at(s->o, i + 1), s->o->cfg};
    if (i % s->at_once == 0)
        PM_TRY(conditions(s, i));
    for (int64_t b = 0; b < s->passes; b++)
        s->condition[b] = (int32_t)(i % s->at_once * c->count) + c->image[b];
    PM_WRITE(ctx, a->condition, s->condition, s->passes);
    PM_WRITE(ctx, a->schedule, schedule, 3);
    const pm_graph_key key = key_of(s, PM_STRETCH_SAMPLE);
    bool changed;
    PM_TRY(pm_run_stretch(ctx, s->m, &key, run_step, s, &changed));
    if (s->o->on_step && s->o->on_step(s->o->arg, i, a->x))
        return pm_fail(ctx, PM_EINTR, "stopped by the callback");
    return PM_OK;
}

static pm_status start(sampling *s)
{
    pm_ctx *ctx = s->ctx;
    pm_run *r = &s->run;
    const pm_acts *a = &s->m->acts;
    const int64_t M = s->m->cfg.channels * pm_voxels(&s->m->cfg);
    PM_WRITE(ctx, a->y, s->labels, s->passes);
    if (s->o->noise) {
        PM_WRITE(ctx, a->x, s->o->noise, s->o->n * M);
        return PM_OK;
    }
    const int64_t key[2] = {s->o->seed, s->o->first};
    PM_WRITE(ctx, a->key, key, 2);
    PM_FORWARD(r, gaussian_noise,
               (pm_gaussian_noise_args){.B = s->o->n, .M = M, .key = a->key, .x = a->x});
    return PM_OK;
}

pm_status pm_model_sample(pm_ctx *ctx, pm_model *m, const pm_sample_options *o, float *out)
{
    const pm_config *c = &m->cfg;
    const int64_t image = c->channels * pm_voxels(c);
    PM_TRY(pm_check_labels(ctx, c, o->n, o->labels));
    const bool guided = o->cfg > 1;
    if (guided && !c->null_label)
        return pm_fail(ctx, PM_EINVAL, "cfg = %g: this model was made without a row for no class",
                       o->cfg);
    const bool together =
        guided && (o->one_batch < 0 ? o->n * pm_tokens(c) < ENOUGH_TOKENS : o->one_batch > 0);
    sampling s = {.ctx = ctx, .m = m, .o = o, .guided = guided, .together = together};

    pm_weights weights;
    PM_TRY(pm_model_weights(ctx, m, o->ema, &weights));
    PM_TRY(pm_need_acts(ctx, m, together ? 2 * o->n : o->n, PM_INFERENCE));
    s.run = pm_model_run(ctx, m);
    s.run.weights = weights;

    /* host memory of this call: labels, then 4-byte numbers */
    const int64_t passes = s.passes = guided ? 2 * o->n : o->n, most = m->acts.most_conditions;
    const size_t bytes = (size_t)(passes + most) * (sizeof *s.labels + sizeof *s.condition);
    s.labels = pm_os_alloc(bytes);
    if (!s.labels)
        return pm_fail(ctx, PM_ENOMEM, "no memory for %lld samples", (long long)o->n);
    s.condition_label = s.labels + passes;
    s.condition = (int32_t *)(s.condition_label + most);
    s.condition_t = (float *)(s.condition + passes);
    for (int64_t b = 0; b < passes; b++)
        s.labels[b] = b < o->n ? o->labels[b] : c->classes;

    pm_status status = pm_conditions_find(ctx, &m->conditions, passes, NULL, s.labels);
    if (status == PM_OK) {
        s.at_once = most / m->conditions.count;
        status = start(&s);
    }
    for (int64_t i = 0; i < o->steps && status == PM_OK; i++)
        status = one_step(&s, i);
    if (status == PM_OK)
        status = ctx->backend->read(ctx, out, m->acts.x, (size_t)(o->n * image) * sizeof *out);
    pm_os_free(s.labels, bytes);
    return status;
}
