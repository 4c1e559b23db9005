/* residual_layernorm_modulate: contract in ops/residual_layernorm_modulate.h.
 *
 * Bound by memory: a token row comes from memory once; the passes over it after the first find
 * it in L1. */

#define RLM_ELEMENTS 16384 /* of x per task */

/* How tokens are cut into tasks, a function of shape. A chunk is a run of tokens of one image, with
 * its own slot in the sums over T; a task is a few chunks, where chunks are small. */
typedef struct {
    int64_t tokens; /* per chunk */
    int64_t chunks; /* per image */
    int64_t group;  /* chunks per task */
} rlm_cut;

static rlm_cut rlm_plan(const pm_residual_layernorm_modulate_args *g)
{
    rlm_cut cut;
    int64_t D = pm_max(1, g->D), T = pm_max(1, g->T);
    cut.chunks = pm_blocks(T, pm_max(1, RLM_ELEMENTS / D));
    cut.tokens = pm_blocks(T, cut.chunks);
    cut.chunks = pm_blocks(T, cut.tokens); /* none is empty */
    cut.group = pm_max(1, RLM_ELEMENTS / (cut.tokens * D));
    return cut;
}

/* Slots of the sums over T: [3: gate, shift, scale][B, chunks, D]. */
static size_t rlm_slots(const pm_residual_layernorm_modulate_args *g)
{
    return (size_t)(g->B * rlm_plan(g).chunks * g->D);
}

static size_t residual_layernorm_modulate_workspace(const pm_ctx *ctx,
                                                    const pm_residual_layernorm_modulate_args *g,
                                                    bool backward)
{
    (void)ctx;
    return backward ? 3 * pm_round64(rlm_slots(g) * sizeof(float)) : 0;
}

/* ---------------------------------------------------------------- forward */

/* A row of an input; NULL where absent. */
static inline const float *rlm_row(const float *matrix, int64_t row, int64_t ld)
{
    return matrix ? matrix + row * ld : NULL;
}

/* The row of gate, shift and scale that image b has. */
static inline int64_t rlm_condition(const pm_residual_layernorm_modulate_args *g, int64_t b)
{
    return g->cond ? g->cond[b] : b;
}

static inline void rlm_forward_token(const pm_residual_layernorm_modulate_args *g, int64_t c,
                                     int64_t row)
{
    const int64_t D = g->D;
    const float *gate = rlm_row(g->gate, c, g->gate_ld);
    const float *shift = rlm_row(g->shift, c, g->mod_ld), *scale = rlm_row(g->scale, c, g->mod_ld);
    const float *x = g->x + row * D, *branch = rlm_row(g->branch, row, D);
    float *y = g->y + row * D;

    /* xo = x + gate * branch; it waits in y where nobody wants it */
    vf sum = v_zero();
    if (branch || g->xo) {
        float *xo = g->xo ? g->xo + row * D : y;
        for (int64_t i = 0; i < D; i += PM_WIDTH) {
            vf v = v_get(x + i, D - i);
            if (branch)
                v = gate ? v_fma(v_get(gate + i, D - i), v_get(branch + i, D - i), v)
                         : v + v_get(branch + i, D - i);
            v_put(xo + i, v, D - i);
            sum += v;
        }
        x = xo;
    } else {
        for (int64_t i = 0; i < D; i += PM_WIDTH)
            sum += v_get(x + i, D - i);
    }

    /* xhat = (xo - mean) * rstd. The variance is a second pass: no cancellation. */
    const float mean = v_sum(sum) / (float)D;
    vf squares = v_zero();
    for (int64_t i = 0; i < D; i += PM_WIDTH) {
        vf v = v_keep(v_get(x + i, D - i) - v_set(mean), D - i);
        squares = v_fma(v, v, squares);
    }
    const float rstd = 1.0f / sqrtf(v_sum(squares) / (float)D + (float)g->eps);
    if (g->mean)
        g->mean[row] = mean;
    if (g->rstd)
        g->rstd[row] = rstd;

    /* y = xhat * (1 + scale) + shift */
    for (int64_t i = 0; i < D; i += PM_WIDTH) {
        vf v = (v_get(x + i, D - i) - v_set(mean)) * v_set(rstd);
        if (scale)
            v = v_fma(v, v_get(scale + i, D - i), v);
        if (shift)
            v += v_get(shift + i, D - i);
        v_put(y + i, v, D - i);
    }
}

typedef struct {
    const pm_residual_layernorm_modulate_args *g;
    const pm_residual_layernorm_modulate_grads *d;
    rlm_cut cut;
    float *gate, *shift, *scale; /* slots: [B, chunks, D] each */
} rlm_job;

static void rlm_forward_task(void *arg, int64_t task, int worker)
{
    (void)worker;
    const rlm_job *j = arg;
    const int64_t T = j->g->T, end = pm_min(j->g->B * j->cut.chunks, (task + 1) * j->cut.group);
    for (int64_t chunk = task * j->cut.group; chunk < end; chunk++) {
        int64_t b = chunk / j->cut.chunks, t = chunk % j->cut.chunks * j->cut.tokens;
        const int64_t c = rlm_condition(j->g, b);
        for (int64_t stop = pm_min(T, t + j->cut.tokens); t < stop; t++)
            rlm_forward_token(j->g, c, b * T + t);
    }
}

static pm_status residual_layernorm_modulate_forward(pm_ctx *ctx,
                                                     const pm_residual_layernorm_modulate_args *g,
                                                     void *scratch)
{
    (void)scratch;
    if (!g->B || !g->T || !g->D)
        return PM_OK;
    rlm_job job = {.g = g, .cut = rlm_plan(g)};
    pm_parallel(ctx->pool, pm_blocks(g->B * job.cut.chunks, job.cut.group), rlm_forward_task, &job);
    return PM_OK;
}

/* ---------------------------------------------------------------- backward */

/* xhat at channels i...; xo is x, or x + gate * add where it was not kept. */
static inline vf rlm_xhat(const float *x, const float *gate, const float *add, int64_t i, int64_t D,
                          vf mean, vf rstd)
{
    vf xo = v_get(x + i, D - i);
    if (add)
        xo = gate ? v_fma(v_get(gate + i, D - i), v_get(add + i, D - i), xo)
                  : xo + v_get(add + i, D - i);
    return (xo - mean) * rstd;
}

/* One token; dgate, dshift and dscale are the slots of its chunk (+=), NULL where not wanted. */
static inline void rlm_backward_token(const pm_residual_layernorm_modulate_args *g,
                                      const pm_residual_layernorm_modulate_grads *d, int64_t c,
                                      int64_t row, float *dgate, float *dshift, float *dscale)
{
    const int64_t D = g->D;
    const float *gate = rlm_row(g->gate, c, g->gate_ld), *scale = rlm_row(g->scale, c, g->mod_ld);
    const float *branch = rlm_row(g->branch, row, D), *dy = d->dy + row * D;
    const float *x = (g->xo ? g->xo : g->x) + row * D, *dxo = rlm_row(d->dxo, row, D);
    const float *add = g->xo ? NULL : branch; /* xo was not kept: x + gate * branch again */
    float *dx = d->dx ? d->dx + row * D : NULL, *dbranch = d->dbranch ? d->dbranch + row * D : NULL;
    const vf mean = v_set(g->mean[row]), rstd = v_set(g->rstd[row]);

    /* y = xhat * (1 + scale) + shift; dxhat = dy * (1 + scale). Past D, dy reads as 0. */
    vf sum = v_zero(), dot = v_zero();
    for (int64_t i = 0; i < D; i += PM_WIDTH) {
        vf up = v_get(dy + i, D - i), xhat = rlm_xhat(x, gate, add, i, D, mean, rstd);
        if (dshift)
            v_put(dshift + i, v_get(dshift + i, D - i) + up, D - i);
        if (dscale)
            v_put(dscale + i, v_fma(up, xhat, v_get(dscale + i, D - i)), D - i);
        vf dxhat = scale ? v_fma(up, v_get(scale + i, D - i), up) : up;
        sum += dxhat;
        dot = v_fma(dxhat, xhat, dot);
    }
    if (!dx && !dbranch && !dgate)
        return;

    /* xhat = (xo - mean) * rstd:
     *   dx = dxo + rstd * (dxhat - mean(dxhat) - xhat * mean(dxhat * xhat))
     * xo = x + gate * branch:
     *   dbranch = gate * dx, dgate += branch * dx */
    const vf a = v_set(v_sum(sum) / (float)D), e = v_set(-v_sum(dot) / (float)D);
    for (int64_t i = 0; i < D; i += PM_WIDTH) {
        vf up = v_get(dy + i, D - i);
        vf dxhat = scale ? v_fma(up, v_get(scale + i, D - i), up) : up;
        vf v = rstd * v_fma(rlm_xhat(x, gate, add, i, D, mean, rstd), e, dxhat - a);
        if (dxo)
            v += v_get(dxo + i, D - i);
        if (dx)
            v_put(dx + i, v, D - i);
        if (dgate && branch)
            v_put(dgate + i, v_fma(v, v_get(branch + i, D - i), v_get(dgate + i, D - i)), D - i);
        if (dbranch)
            v_put(dbranch + i, gate ? v * v_get(gate + i, D - i) : v, D - i);
    }
}

static void rlm_backward_task(void *arg, int64_t task, int worker)
{
    (void)worker;
    const rlm_job *j = arg;
    const int64_t D = j->g->D, T = j->g->T;
    const int64_t end = pm_min(j->g->B * j->cut.chunks, (task + 1) * j->cut.group);
    float *const slots[3] = {j->gate, j->shift, j->scale};
    for (int64_t chunk = task * j->cut.group; chunk < end; chunk++) {
        float *sums[3];
        for (int s = 0; s < 3; s++) {
            sums[s] = slots[s] ? slots[s] + chunk * D : NULL;
            if (sums[s])
                memset(sums[s], 0, (size_t)D * sizeof(float));
        }
        int64_t b = chunk / j->cut.chunks, t = chunk % j->cut.chunks * j->cut.tokens;
        const int64_t c = rlm_condition(j->g, b);
        for (int64_t stop = pm_min(T, t + j->cut.tokens); t < stop; t++)
            rlm_backward_token(j->g, j->d, c, b * T + t, sums[0], sums[1], sums[2]);
    }
}

/* out (D) = the sum of the chunks of condition c: image by image, each in order. */
static void rlm_sum_chunks(const rlm_job *j, const float *slots, int64_t c, float *out)
{
    const pm_residual_layernorm_modulate_args *g = j->g;
    const int64_t D = g->D, chunks = j->cut.chunks;
    const int64_t begin = g->cond ? 0 : c, end = g->cond ? g->B : c + 1;
    for (int64_t i = 0; i < D; i += PM_WIDTH) {
        vf sum = v_zero();
        for (int64_t b = begin; b < end; b++) {
            if (rlm_condition(g, b) != c)
                continue;
            for (int64_t k = b * chunks; k < (b + 1) * chunks; k++)
                sum += v_get(slots + k * D + i, D - i);
        }
        v_put(out + i, sum, D - i);
    }
}
/* One condition per task. */
static void rlm_sum_task(void *arg, int64_t c, int worker)
{
    (void)worker;
    const rlm_job *j = arg;
    const pm_residual_layernorm_modulate_args *g = j->g;
    if (j->gate)
        rlm_sum_chunks(j, j->gate, c, j->d->dgate + c * g->gate_ld);
    if (j->shift)
        rlm_sum_chunks(j, j->shift, c, j->d->dshift + c * g->mod_ld);
    if (j->scale)
        rlm_sum_chunks(j, j->scale, c, j->d->dscale + c * g->mod_ld);
}

static pm_status residual_layernorm_modulate_backward(pm_ctx *ctx,
                                                      const pm_residual_layernorm_modulate_args *g,
                                                      const pm_residual_layernorm_modulate_grads *d,
                                                      void *scratch)
{
    if (!g->D)
        return PM_OK;
    rlm_job job = {.g = g, .d = d, .cut = rlm_plan(g)};
    const size_t bytes = rlm_slots(g) * sizeof(float);
    float *gate = pm_take(&scratch, bytes), *shift = pm_take(&scratch, bytes), *scale = scratch;
    job.gate = g->gate && d->dgate ? gate : NULL;
    job.shift = g->shift && d->dshift ? shift : NULL;
    job.scale = g->scale && d->dscale ? scale : NULL;
    pm_parallel(ctx->pool, pm_blocks(g->B * job.cut.chunks, job.cut.group), rlm_backward_task,
                &job);
    if (job.gate || job.shift || job.scale)
        pm_parallel(ctx->pool, g->C, rlm_sum_task, &job);
    return PM_OK;
}
