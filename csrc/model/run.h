/* run.h: one walk through the network: the weights it reads, the memory it works in, and the two
 * macros that call an op.
 *
 * The same functions run twice. A dry run calls no op: it only asks each for its workspace, so
 * the scratch of a whole step is known before the step begins, from the very arguments it will
 * be called with. In a dry run the activations have made-up addresses, which nobody reads. */
#ifndef PM_MODEL_RUN_H
#define PM_MODEL_RUN_H

#include "../base/os.h"
#include "acts.h"
#include "params.h"

/* Where the time goes, by op and direction. Off unless somebody asked (pm_model_profile). */
typedef enum {
#define PM_OP(op, OP, direction) PM_OP_##op,
#include "../ops.def"
#undef PM_OP
    PM_OP_COUNT
} pm_op;
typedef struct {
    bool on;
    double seconds[PM_OP_COUNT][2]; /* forward, backward */
    int64_t calls[PM_OP_COUNT][2];
    double derive_seconds; /* making derived twins outside an update: after a load */
    int64_t derive_calls;
} pm_profile;

/* A set of parameters and their derived twins: the live ones, or the EMA. */
typedef struct {
    const float *param;
    const char *derived;
} pm_weights;

typedef struct {
    pm_ctx *ctx;
    const pm_config *cfg;
    const pm_layout *places;
    const int32_t *foff_dense, *foff_experts; /* foff of ops/experts.h, in backend memory */
    pm_weights weights;
    float *grad; /* slab; NULL when there will be no backward */
    const pm_acts *acts;
    float *losses; /* pm_loss_count numbers: mse, then contrastive and balance of each block */
    bool forced;   /* choice and weight of every expert layer are given: the router is not asked */
    bool dry;
    pm_profile *profile; /* NULL: nobody is measuring */
    void *scratch;
    size_t scratch_bytes; /* what a dry run found */
} pm_run;

enum { PM_LOSS_MSE, PM_LOSS_CONTRASTIVE, PM_LOSS_BALANCE };
static inline int64_t pm_loss_count(const pm_config *c) { return 1 + 2 * c->depth; }
static inline float *pm_loss_at(const pm_run *r, int which, int64_t block)
{
    return r->losses + which + (which == PM_LOSS_MSE ? 0 : 2 * block);
}

/* The activation at index. */
static inline pm_act *pm_act_at(const pm_run *r, pm_act *acts, int64_t index)
{
    return (pm_act *)((char *)acts + index * (int64_t)r->ctx->backend->act_bytes);
}

static inline pm_weight pm_weight_at(const pm_run *r, pm_matrix place)
{
    return (pm_weight){r->weights.param + place.at,
                       r->weights.derived ? r->weights.derived + place.derived : NULL};
}
static inline const float *pm_param_at(const pm_run *r, int64_t at)
{
    return r->weights.param + at;
}
static inline float *pm_grad_at(const pm_run *r, int64_t at) { return r->grad + at; }

/* Between two ops: room for the next one, and the caller's wish to stop. */
static inline pm_status pm_before_op(pm_run *r, size_t workspace)
{
    if (r->dry) {
        r->scratch_bytes = workspace > r->scratch_bytes ? workspace : r->scratch_bytes;
        return PM_OK;
    }
    if (r->ctx->poll && r->ctx->poll(r->ctx->poll_arg))
        return pm_fail(r->ctx, PM_EINTR, "interrupted");
    return PM_OK;
}

/* Around an op that runs, when somebody measures. */
static inline pm_status pm_profile_begin(const pm_run *r, double *began)
{
    if (!r->profile)
        return PM_OK;
    PM_TRY(r->ctx->backend->sync(r->ctx));
    *began = pm_os_seconds();
    return PM_OK;
}
static inline pm_status pm_profile_end(const pm_run *r, pm_op op, bool backward, double began)
{
    if (!r->profile)
        return PM_OK;
    PM_TRY(r->ctx->backend->sync(r->ctx));
    r->profile->seconds[op][backward] += pm_os_seconds() - began;
    r->profile->calls[op][backward]++;
    return PM_OK;
}
#define PM_MEASURED(r, op, backward, call)                                                         \
    do {                                                                                           \
        double pm_began = 0;                                                                       \
        PM_TRY(pm_profile_begin(r, &pm_began));                                                    \
        PM_TRY(call);                                                                              \
        PM_TRY(pm_profile_end(r, PM_OP_##op, backward, pm_began));                                 \
    } while (0)

/* PM_FORWARD(r, linear, args): args is an expression of type pm_linear_args. */
#define PM_FORWARD(r, op, ...)                                                                     \
    do {                                                                                           \
        const pm_##op##_args pm_args = __VA_ARGS__;                                                \
        PM_TRY(pm_before_op(r, (r)->ctx->backend->op.workspace((r)->ctx, &pm_args, false)));       \
        if (!(r)->dry)                                                                             \
            PM_MEASURED(r, op, false,                                                              \
                        (r)->ctx->backend->op.forward((r)->ctx, &pm_args, (r)->scratch));          \
    } while (0)

/* PM_BACKWARD(r, linear, args, .dy = ..., .dx = ...): the same args, and the gradients by name. */
#define PM_BACKWARD(r, op, args, ...)                                                              \
    do {                                                                                           \
        const pm_##op##_args pm_args = args;                                                       \
        const pm_##op##_grads pm_grads = {__VA_ARGS__};                                            \
        PM_TRY(pm_before_op(r, (r)->ctx->backend->op.workspace((r)->ctx, &pm_args, true)));        \
        if (!(r)->dry)                                                                             \
            PM_MEASURED(                                                                           \
                r, op, true,                                                                       \
                (r)->ctx->backend->op.backward((r)->ctx, &pm_args, &pm_grads, (r)->scratch));      \
    } while (0)

/* model.c: the network: what time and label are to it, then the images. Inputs, outputs and losses
 * are in acts. */
pm_status pm_network_conditions(pm_run *r);
pm_status pm_network_images(pm_run *r);
pm_status pm_network_forward(pm_run *r);  /* both */
pm_status pm_network_loss(pm_run *r);     /* mse; the auxiliary losses are forward's, in training */
pm_status pm_network_backward(pm_run *r); /* grad += dloss * gradient of mse and of every aux */

/* block.c: one block: its adaLN projection of the conditions; and what it does to the images, whose
 * residual stream enters as (x, branch, gate): see the top of block.c. */
pm_status pm_block_condition(pm_run *r, int64_t block);
pm_status pm_block_condition_backward(pm_run *r, int64_t block);
pm_status pm_block_forward(pm_run *r, int64_t block);
pm_status pm_block_backward(pm_run *r, int64_t block);

/* moe.c: the feed-forward layer of a block, from y2 to branch2; backward from dbranch to dy. */
pm_status pm_ffn_forward(pm_run *r, int64_t block);
pm_status pm_ffn_backward(pm_run *r, int64_t block);

#endif
