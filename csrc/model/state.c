/* state.c: memory of a model: slabs, derived weights, the arena; making, loading and freeing. */
#include "state.h"

#include <string.h>

#include "../base/os.h"
#include "../base/threads.h"

const pm_config *pm_model_config(const pm_model *m) { return &m->cfg; }
int64_t pm_model_step(const pm_model *m) { return m->step; }
int64_t pm_model_skipped(const pm_model *m) { return m->skipped; }

bool pm_model_has_ema(const pm_model *m) { return m->slab[PM_SLAB_EMA] != NULL; }

int64_t pm_slab_count(const pm_model *m, pm_slab slab)
{
    return slab == PM_SLAB_PARAM || slab == PM_SLAB_EMA ? m->layout.total : m->layout.train;
}
static size_t slab_bytes(const pm_model *m, pm_slab slab)
{
    return (size_t)pm_slab_count(m, slab) * sizeof(float);
}

static int64_t foff_count(const pm_config *c)
{
    return 2 + (c->experts > 0 ? pm_plan_groups(c) + c->shared + 1 : 0);
}
static size_t twins_bytes(const pm_model *m)
{
    return (size_t)m->layout.matrix_count * sizeof *m->twins;
}
static size_t numbers_bytes(const pm_config *c)
{
    return sizeof(pm_step_numbers) +
           (size_t)(PM_LOSS_SLOTS + 1) * (size_t)pm_loss_count(c) * sizeof(float);
}
float *pm_loss_slot(const pm_model *m, int slot)
{
    return (float *)(m->numbers + 1) + slot * pm_loss_count(&m->cfg);
}

/* ---------------------------------------------------------------- memory */

pm_status pm_take_memory(pm_ctx *ctx, size_t bytes, const char *what, void *pointer_to_pointer)
{
    ctx->message[0] = 0;
    void *memory = ctx->backend->alloc(ctx, bytes);
    memcpy(pointer_to_pointer, &memory, sizeof memory);
    if (memory)
        return PM_OK;
    char why[sizeof ctx->message]; /* what the backend has to say */
    memcpy(why, ctx->message, sizeof why);
    return pm_fail(ctx, PM_ENOMEM, "no memory for %s: %.1f MB%s%.400s", what, (double)bytes / 1e6,
                   *why ? "; " : "", why);
}

static void give_memory(pm_ctx *ctx, void *memory, size_t bytes)
{
    if (memory)
        ctx->backend->free(ctx, memory, bytes);
}

pm_status pm_need_slab(pm_ctx *ctx, pm_model *m, pm_slab slab)
{
    static const char *const names[PM_SLABS] = {"the parameters", "the EMA of the parameters",
                                                "the gradients", "the first moments",
                                                "the second moments"};
    if (m->slab[slab])
        return PM_OK;
    PM_TRY(pm_take_memory(ctx, slab_bytes(m, slab), names[slab], &m->slab[slab]));
    if (slab == PM_SLAB_EMA)
        PM_TRY(ctx->backend->copy(ctx, m->slab[slab], m->slab[PM_SLAB_PARAM], slab_bytes(m, slab)));
    return PM_OK;
}

pm_status pm_need_arena(pm_ctx *ctx, pm_model *m, size_t bytes)
{
    if (bytes <= m->arena_bytes)
        return PM_OK;
    pm_forget_graphs(ctx, m);
    give_memory(ctx, m->arena, m->arena_bytes); /* first, so that both need not fit together */
    m->arena = NULL;
    m->arena_bytes = 0;
    m->acts.B = 0;
    PM_TRY(pm_take_memory(ctx, bytes, "activations", &m->arena));
    m->arena_bytes = bytes;
    return PM_OK;
}

/* ---------------------------------------------------------------- plans */

/* An address for dry runs: never read, and not NULL, which would mean "absent". */
static char *nowhere(void) { return (char *)(uintptr_t)4096; }

static pm_run make_run(pm_ctx *ctx, const pm_config *cfg, const pm_layout *layout,
                       const pm_acts *acts)
{
    return (pm_run){.ctx = ctx, .cfg = cfg, .places = layout, .acts = acts};
}

/* Bytes of the activations, and of the scratch behind them. */
static pm_status measure(pm_ctx *ctx, const pm_config *cfg, const pm_layout *layout, int64_t B,
                         pm_mode mode, pm_acts *acts, size_t *acts_bytes, size_t *scratch_bytes)
{
    *acts_bytes = pm_acts_place(cfg, B, mode, ctx->backend->act_bytes, nowhere(), acts);
    pm_run r = make_run(ctx, cfg, layout, acts);
    r.dry = true;
    r.weights = (pm_weights){(const float *)nowhere(), nowhere()};
    r.foff_dense = r.foff_experts = (const int32_t *)nowhere();
    r.losses = (float *)nowhere();
    PM_TRY(pm_network_forward(&r));
    if (mode == PM_TRAINING) {
        r.grad = (float *)nowhere();
        PM_TRY(pm_network_loss(&r));
        PM_TRY(pm_network_backward(&r));
        const pm_rectified_flow_args draw = {.B = B, .C = cfg->channels, .V = pm_voxels(cfg)};
        PM_TRY(pm_before_op(&r, ctx->backend->rectified_flow.workspace(ctx, &draw, false)));
    } else {
        const pm_gaussian_noise_args noise = {.B = B, .M = cfg->channels * pm_voxels(cfg)};
        PM_TRY(pm_before_op(&r, ctx->backend->gaussian_noise.workspace(ctx, &noise, false)));
        const pm_euler_step_args euler = {
            .B = B, .C = cfg->channels, .M = cfg->out_channels, .V = pm_voxels(cfg)};
        PM_TRY(pm_before_op(&r, ctx->backend->euler_step.workspace(ctx, &euler, false)));
    }
    *scratch_bytes = r.scratch_bytes;
    return PM_OK;
}

pm_status pm_need_acts(pm_ctx *ctx, pm_model *m, int64_t B, pm_mode mode)
{
    const int threads = pm_pool_threads(ctx->pool);
    if (m->acts.B == B && m->acts.mode == mode && m->threads == threads)
        return PM_OK;
    m->acts.B = 0;
    size_t acts = 0, scratch = 0;
    PM_TRY(measure(ctx, &m->cfg, &m->layout, B, mode, &m->acts, &acts, &scratch));
    m->acts.B = 0; /* the places are made up until the arena is there */
    PM_TRY(pm_need_arena(ctx, m, acts + scratch));
    pm_acts_place(&m->cfg, B, mode, ctx->backend->act_bytes, m->arena, &m->acts);
    m->scratch_at = acts;
    m->scratch_bytes = scratch;
    m->threads = threads;
    return PM_OK;
}

pm_status pm_memory_estimate(pm_ctx *ctx, const pm_config *cfg, int64_t B, bool training,
                             pm_memory *memory)
{
    pm_layout layout;
    PM_TRY(pm_config_check(ctx, cfg));
    PM_TRY(pm_layout_make(ctx, cfg, &layout));
    pm_status status = PM_OK;
    pm_acts acts = {0};
    const size_t blocks = (size_t)cfg->depth * sizeof *acts.blocks;
    acts.blocks = pm_os_alloc(blocks);
    if (!acts.blocks) {
        status = pm_fail(ctx, PM_ENOMEM, "no memory for the plan of the activations");
        goto done;
    }
    size_t act_bytes = 0, scratch_bytes = 0;
    status = measure(ctx, cfg, &layout, B, training ? PM_TRAINING : PM_INFERENCE, &acts, &act_bytes,
                     &scratch_bytes);
    const int64_t train = layout.train * (int64_t)sizeof(float);
    *memory = (pm_memory){
        .parameters = layout.total * (int64_t)sizeof(float),
        .derived = layout.derived,
        .gradients = training ? train : 0,
        .moments = training ? 2 * train : 0,
        .ema = training ? layout.total * (int64_t)sizeof(float) : 0,
        .activations = (int64_t)act_bytes,
        .scratch = (int64_t)scratch_bytes,
    };
    pm_os_free(acts.blocks, blocks);
done:
    pm_layout_free(cfg, &layout);
    return status;
}

/* ---------------------------------------------------------------- weights */

static pm_status derive_all(pm_ctx *ctx, const pm_layout *layout, const float *param, char *derived)
{
    for (int64_t i = 0; i < layout->matrix_count; i++) {
        const pm_twin *d = &layout->matrices[i];
        PM_TRY(ctx->backend->derive(ctx, d->F, d->D, param + d->at, derived + d->derived));
    }
    return PM_OK;
}

pm_status pm_model_derive(pm_ctx *ctx, pm_model *m)
{
    m->ema_derived_fresh = false;
    if (!m->derived)
        return PM_OK;
    const double began = pm_os_seconds();
    PM_TRY(derive_all(ctx, &m->layout, m->slab[PM_SLAB_PARAM], m->derived));
    if (m->profile.on) {
        PM_TRY(ctx->backend->sync(ctx));
        m->profile.derive_seconds += pm_os_seconds() - began;
        m->profile.derive_calls++;
    }
    return PM_OK;
}

pm_status pm_model_weights(pm_ctx *ctx, pm_model *m, bool ema, pm_weights *weights)
{
    *weights = (pm_weights){m->slab[PM_SLAB_PARAM], m->derived};
    if (!ema || !m->slab[PM_SLAB_EMA]) /* without an update the EMA is the parameters */
        return PM_OK;
    if (m->layout.derived && !m->ema_derived)
        PM_TRY(pm_take_memory(ctx, (size_t)m->layout.derived, "the packed EMA weights",
                              &m->ema_derived));
    if (m->ema_derived && !m->ema_derived_fresh) {
        PM_TRY(derive_all(ctx, &m->layout, m->slab[PM_SLAB_EMA], m->ema_derived));
        m->ema_derived_fresh = true;
    }
    *weights = (pm_weights){m->slab[PM_SLAB_EMA], m->ema_derived};
    return PM_OK;
}

pm_run pm_model_run(pm_ctx *ctx, pm_model *m)
{
    pm_run r = make_run(ctx, &m->cfg, &m->layout, &m->acts);
    r.weights = (pm_weights){m->slab[PM_SLAB_PARAM], m->derived};
    r.foff_dense = m->foff;
    r.foff_experts = m->foff + 2;
    r.losses = pm_loss_slot(m, PM_LOSS_SLOTS);
    r.scratch = m->arena + m->scratch_at;
    r.scratch_bytes = m->scratch_bytes;
    r.profile = m->profile.on ? &m->profile : NULL;
    return r;
}

/* ---------------------------------------------------------------- where the time goes */

void pm_model_profile(pm_model *m, bool on) { m->profile = (pm_profile){.on = on}; }

bool pm_model_profile_entry(const pm_model *m, int64_t i, pm_profile_entry *entry)
{
    static const char *const names[PM_OP_COUNT] = {
#define PM_OP(op, OP, direction) #op,
#include "../ops.def"
#undef PM_OP
    };
    const pm_profile *p = &m->profile;
    if (i > 2 * PM_OP_COUNT)
        return false;
    if (i == 2 * PM_OP_COUNT)
        *entry = (pm_profile_entry){"derive", false, p->derive_seconds, p->derive_calls};
    else
        *entry = (pm_profile_entry){names[i / 2], i % 2 > 0, p->seconds[i / 2][i % 2],
                                    p->calls[i / 2][i % 2]};
    return true;
}

/* ---------------------------------------------------------------- making and freeing */

enum { INIT_TASK = 1 << 15, INIT_PIECE = 1 << 21 }; /* elements of a task, and between two writes */

typedef struct {
    pm_ctx *ctx;
    pm_model *model;
    const pm_param *param;
    int64_t first, n;
    float *staging; /* INIT_PIECE floats */
} init_job;

static void init_task(void *arg, int64_t task, int worker)
{
    (void)worker;
    const init_job *job = arg;
    const int64_t at = task * INIT_TASK, left = job->n - at;
    pm_param_init(&job->model->cfg, job->param, job->model->seed, job->first + at,
                  left < INIT_TASK ? left : INIT_TASK, job->staging + at);
}

static pm_status init_tensor(void *arg, const pm_param *param)
{
    init_job *job = arg;
    pm_ctx *ctx = job->ctx;
    job->param = param;
    for (job->first = 0; job->first < param->count; job->first += INIT_PIECE) {
        const int64_t left = param->count - job->first;
        job->n = left < INIT_PIECE ? left : INIT_PIECE;
        if (ctx->poll && ctx->poll(ctx->poll_arg))
            return pm_fail(ctx, PM_EINTR, "interrupted");
        pm_parallel(ctx->pool, (job->n + INIT_TASK - 1) / INIT_TASK, init_task, job);
        float *const to = job->model->slab[PM_SLAB_PARAM] + param->at + job->first;
        PM_WRITE(ctx, to, job->staging, job->n);
    }
    return PM_OK;
}

static pm_status init_weights(pm_ctx *ctx, pm_model *m)
{
    init_job job = {.ctx = ctx, .model = m};
    const size_t bytes = (size_t)INIT_PIECE * sizeof(float);
    job.staging = pm_os_alloc(bytes);
    if (!job.staging)
        return pm_fail(ctx, PM_ENOMEM, "no memory for the initial weights");
    const pm_status status = pm_visit_params(ctx, &m->cfg, init_tensor, &job);
    pm_os_free(job.staging, bytes);
    PM_TRY(status);
    return pm_model_derive(ctx, m);
}

static pm_status write_foff(pm_ctx *ctx, pm_model *m)
{
    const pm_config *c = &m->cfg;
    const int64_t count = foff_count(c);
    int32_t *host = pm_os_alloc((size_t)count * sizeof *host);
    if (!host)
        return pm_fail(ctx, PM_ENOMEM, "no memory for the widths of the experts");
    host[1] = (int32_t)c->mlp_hidden;
    if (c->experts > 0) {
        const int64_t G = pm_plan_groups(c);
        for (int64_t g = 0; g <= G; g++)
            host[2 + g] = (int32_t)(g * c->expert_width);
        if (c->shared)
            host[2 + G + 1] = (int32_t)(G * c->expert_width + c->shared_width);
    }
    const pm_status status = ctx->backend->write(ctx, m->foff, host, (size_t)count * sizeof *host);
    pm_os_free(host, (size_t)count * sizeof *host);
    return status;
}

static pm_status fill(pm_ctx *ctx, pm_model *m)
{
    PM_TRY(pm_layout_make(ctx, &m->cfg, &m->layout));
    m->acts.blocks = pm_os_alloc((size_t)m->cfg.depth * sizeof *m->acts.blocks);
    m->host_numbers = pm_os_alloc(numbers_bytes(&m->cfg));
    if (!m->acts.blocks || !m->host_numbers)
        return pm_fail(ctx, PM_ENOMEM, "no memory for the model");
    PM_TRY(pm_need_slab(ctx, m, PM_SLAB_PARAM));
    if (m->layout.derived > 0) {
        PM_TRY(pm_take_memory(ctx, (size_t)m->layout.derived, "the packed weights", &m->derived));
        PM_TRY(pm_take_memory(ctx, twins_bytes(m), "the model", &m->twins));
        PM_WRITE(ctx, m->twins, m->layout.matrices, m->layout.matrix_count);
    }
    PM_TRY(
        pm_take_memory(ctx, (size_t)foff_count(&m->cfg) * sizeof *m->foff, "the model", &m->foff));
    PM_TRY(pm_take_memory(ctx, numbers_bytes(&m->cfg), "the model", &m->numbers));
    PM_TRY(write_foff(ctx, m));
    return init_weights(ctx, m);
}

pm_status pm_model_create(pm_ctx *ctx, const pm_config *cfg, int64_t seed, pm_model **out)
{
    *out = NULL;
    PM_TRY(pm_config_check(ctx, cfg));
    pm_model *m = pm_os_alloc(sizeof *m);
    if (!m)
        return pm_fail(ctx, PM_ENOMEM, "no memory for the model");
    m->cfg = *cfg;
    m->seed = seed;
    const pm_status status = fill(ctx, m);
    if (status == PM_OK)
        *out = m;
    else
        pm_model_free(ctx, m);
    return status;
}

void pm_model_close(pm_ctx *ctx, pm_model *m)
{
    pm_forget_graphs(ctx, m);
    for (int slab = 0; slab < PM_SLABS; slab++)
        if (slab != PM_SLAB_GRAD) {
            give_memory(ctx, m->slab[slab], slab_bytes(m, slab));
            m->slab[slab] = NULL;
        }
    give_memory(ctx, m->derived, (size_t)m->layout.derived);
    give_memory(ctx, m->ema_derived, (size_t)m->layout.derived);
    give_memory(ctx, m->twins, twins_bytes(m));
    give_memory(ctx, m->foff, (size_t)foff_count(&m->cfg) * sizeof *m->foff);
    give_memory(ctx, m->numbers, numbers_bytes(&m->cfg));
    give_memory(ctx, m->arena, m->arena_bytes);
    if (m->acts.blocks)
        pm_os_free(m->acts.blocks, (size_t)m->cfg.depth * sizeof *m->acts.blocks);
    if (m->host_numbers)
        pm_os_free(m->host_numbers, numbers_bytes(&m->cfg));
    pm_conditions_free(&m->conditions);
    m->derived = m->ema_derived = m->arena = NULL;
    m->twins = NULL;
    m->foff = NULL;
    m->numbers = m->host_numbers = NULL;
    m->arena_bytes = 0;
    m->acts = (pm_acts){0};
}

void pm_model_free(pm_ctx *ctx, pm_model *m)
{
    if (!m)
        return;
    pm_model_close(ctx, m);
    give_memory(ctx, m->slab[PM_SLAB_GRAD], slab_bytes(m, PM_SLAB_GRAD));
    pm_layout_free(&m->cfg, &m->layout);
    pm_os_free(m, sizeof *m);
}

/* ---------------------------------------------------------------- reading and loading */

pm_status pm_model_read(pm_ctx *ctx, pm_model *m, pm_slab slab, float *out)
{
    const float *from = m->slab[slab];
    if (!from && slab == PM_SLAB_EMA)
        from = m->slab[PM_SLAB_PARAM];
    if (!from) {
        memset(out, 0, slab_bytes(m, slab));
        return PM_OK;
    }
    return ctx->backend->read(ctx, out, from, slab_bytes(m, slab));
}

pm_status pm_model_load(pm_ctx *ctx, pm_model *m, const float *param, const float *ema,
                        const float *m1, const float *v, int64_t step)
{
    const float *const from[PM_SLABS] = {
        [PM_SLAB_PARAM] = param, [PM_SLAB_EMA] = ema, [PM_SLAB_M] = m1, [PM_SLAB_V] = v};
    /* Everything that can fail comes first, and the EMA last of that: it is one once it is made. */
    for (int slab = PM_SLABS - 1; slab >= 0; slab--)
        if (from[slab])
            PM_TRY(pm_need_slab(ctx, m, slab));
    for (int slab = 0; slab < PM_SLABS; slab++) {
        if (!m->slab[slab])
            continue;
        if (from[slab])
            PM_TRY(ctx->backend->write(ctx, m->slab[slab], from[slab], slab_bytes(m, slab)));
        else if (slab == PM_SLAB_EMA) {
            give_memory(ctx, m->slab[slab], slab_bytes(m, slab));
            m->slab[slab] = NULL;
        } else if (slab != PM_SLAB_GRAD)
            PM_TRY(ctx->backend->zero(ctx, m->slab[slab], slab_bytes(m, slab)));
    }
    m->step = step;
    PM_TRY(pm_model_zero_gradients(ctx, m));
    return pm_model_derive(ctx, m);
}

pm_status pm_model_gradients(pm_ctx *ctx, pm_model *m, float **grad)
{
    PM_TRY(pm_need_slab(ctx, m, PM_SLAB_GRAD));
    *grad = m->slab[PM_SLAB_GRAD];
    return PM_OK;
}
