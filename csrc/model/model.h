/* model.h: a model in memory, and what one can do with it. Arrays that callers pass are host
 * memory, dense and row-major: images (B, C, voxels), times on the 0..1000 scale, labels 0..Y
 * with Y = "no class".
 *
 * State changes in pm_model_update and pm_model_load only; everything else leaves parameters,
 * moments and EMA alone, whether it succeeds or not. Nothing allocates once a batch size and
 * mode have been seen. */
#ifndef PM_MODEL_MODEL_H
#define PM_MODEL_MODEL_H

#include "params.h"

typedef struct pm_model pm_model;

/* Initial weights are a function of seed. */
pm_status pm_model_create(pm_ctx *ctx, const pm_config *cfg, int64_t seed, pm_model **out);
void pm_model_free(pm_ctx *ctx, pm_model *model);

const pm_config *pm_model_config(const pm_model *model);
int64_t pm_model_step(const pm_model *model);    /* updates done */
int64_t pm_model_skipped(const pm_model *model); /* updates left out: a gradient was not finite */

/* ---------------------------------------------------------------- state */

/* param and ema hold layout->total numbers, the others layout->train. */
typedef enum { PM_SLAB_PARAM, PM_SLAB_EMA, PM_SLAB_GRAD, PM_SLAB_M, PM_SLAB_V, PM_SLABS } pm_slab;
int64_t pm_slab_count(const pm_model *model, pm_slab slab);

/* There is an EMA: one was loaded, or made by the first update that asked for it. Until then it is
 * the parameters, whatever they are. */
bool pm_model_has_ema(const pm_model *model);

/* A copy of a slab; moments that there are not yet are zero. */
pm_status pm_model_read(pm_ctx *ctx, pm_model *model, pm_slab slab, float *out);

/* All of it or, when it fails, nothing. ema NULL: there is none, as in a new model. m and v NULL
 * (together): zero moments. The gradients are emptied. */
pm_status pm_model_load(pm_ctx *ctx, pm_model *model, const float *param, const float *ema,
                        const float *m, const float *v, int64_t step);

/* The gradient slab itself, in backend memory; made when there was none. */
pm_status pm_model_gradients(pm_ctx *ctx, pm_model *model, float **grad);

/* Releases everything but the gradient slab, which callers may still look at. */
void pm_model_close(pm_ctx *ctx, pm_model *model);

/* ---------------------------------------------------------------- forward */

/* choice (i32) and weight (f32), (layers, B, T, A), force the routing of every expert layer;
 * NULL: free. out (B, C_out, voxels). */
pm_status pm_model_forward(pm_ctx *ctx, pm_model *model, int64_t B, const float *x, const float *t,
                           const int64_t *y, const int32_t *choice, const float *weight,
                           float *out);

/* What the router did in the last pm_model_forward: choice and weight as above, and load
 * (layers, G): how many rows each group got. */
int64_t pm_model_expert_layers(const pm_model *model);
pm_status pm_model_routing(pm_ctx *ctx, pm_model *model, int32_t *choice, float *weight,
                           int32_t *load);

/* ---------------------------------------------------------------- training */

/* Deterministic loss and gradient: losses = {mse, aux}, grad (layout->train numbers).
 * accumulate: also added to the gradient slab. */
pm_status pm_model_loss_and_grad(pm_ctx *ctx, pm_model *model, int64_t B, const float *x,
                                 const float *t, const int64_t *y, const float *target,
                                 bool accumulate, double losses[2], float *grad);

/* One micro-batch: draws by (seed, position + i), forward, loss, gradient slab += scale *
 * gradient. An error before the first gradient leaves the slab as it was. One after it leaves
 * the gradients incomplete: the next accumulate or update empties them, refuses, and says so. */
pm_status pm_model_accumulate(pm_ctx *ctx, pm_model *model, int64_t B, const float *x0,
                              const int64_t *y, int64_t position, double scale);
pm_status pm_model_zero_gradients(pm_ctx *ctx, pm_model *model);

typedef struct {
    double lr, beta1, beta2, eps, weight_decay, clip, ema;
    bool has_ema; /* false: the EMA stays as it is */
} pm_update_options;
typedef struct {
    double mse, aux, grad_norm; /* losses: means over the micro-batches, weighted by scale */
    int64_t step;
    bool skipped;
} pm_step_info;
/* Clip, AdamW, EMA, and empty gradients. Not interruptible. */
pm_status pm_model_update(pm_ctx *ctx, pm_model *model, const pm_update_options *options,
                          pm_step_info *info);

/* ---------------------------------------------------------------- sampling */

typedef struct {
    int64_t n, first; /* samples; sample i draws its noise from (seed, first + i) */
    const int64_t *labels;
    int64_t steps, seed;
    double cfg;    /* guidance; up to 1: none, and no second pass */
    double shift;  /* of the noise levels */
    bool ema;      /* weights: the EMA, else the live ones */
    int one_batch; /* conditional and unconditional pass together: 1, apart: 0, -1: as is best */
    const float *noise; /* (n, C, voxels) to start from, or NULL: drawn */
    /* After each step, with the latents in backend memory; non-zero: stop with PM_EINTR. May be
     * NULL. */
    int (*on_step)(void *arg, int64_t step, const float *latents);
    void *arg;
} pm_sample_options;
/* out (n, C, voxels) */
pm_status pm_model_sample(pm_ctx *ctx, pm_model *model, const pm_sample_options *options,
                          float *out);

/* ---------------------------------------------------------------- where the time goes */

/* Empties the counters; on: seconds and calls of every op are counted from now. */
void pm_model_profile(pm_model *model, bool on);

typedef struct {
    const char *op; /* of ops.def, or "derive": packing the weights again after a load */
    bool backward;
    double seconds;
    int64_t calls;
} pm_profile_entry;
/* Entry i = 0, 1, ...; false: there are no more. */
bool pm_model_profile_entry(const pm_model *model, int64_t i, pm_profile_entry *entry);

/* ---------------------------------------------------------------- memory */

typedef struct {
    int64_t parameters, derived, gradients, moments, ema, activations, scratch; /* bytes */
} pm_memory;
/* What a model needs for batches of B, before anything is allocated. */
pm_status pm_memory_estimate(pm_ctx *ctx, const pm_config *cfg, int64_t B, bool training,
                             pm_memory *memory);

#endif
