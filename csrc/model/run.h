/* run.h: one walk through the network: the weights it reads, the memory it works in, and the two
 * macros that call an op.
 *
 * The same functions run twice. A dry run calls no op: it only asks each for its workspace, so
 * the scratch of a whole step is known before the step begins, from the very arguments it will
 * be called with. In a dry run the activations have made-up addresses, which nobody reads. */
#ifndef PM_MODEL_RUN_H
#define PM_MODEL_RUN_H

#include "acts.h"
#include "params.h"

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
    void *scratch;
    size_t scratch_bytes; /* what a dry run found */
} pm_run;

enum { PM_LOSS_MSE, PM_LOSS_CONTRASTIVE, PM_LOSS_BALANCE };
static inline int64_t pm_loss_count(const pm_config *c) { return 1 + 2 * c->depth; }
static inline float *pm_loss_at(const pm_run *r, int which, int64_t block)
{
    return r->losses + which + (which == PM_LOSS_MSE ? 0 : 2 * block);
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

/* PM_FORWARD(r, linear, args): args is an expression of type pm_linear_args. */
#define PM_FORWARD(r, op, ...)                                                                     \
    do {                                                                                           \
        const pm_##op##_args pm_args = __VA_ARGS__;                                                \
        PM_TRY(pm_before_op(r, (r)->ctx->backend->op.workspace((r)->ctx, &pm_args, false)));       \
        if (!(r)->dry)                                                                             \
            PM_TRY((r)->ctx->backend->op.forward((r)->ctx, &pm_args, (r)->scratch));               \
    } while (0)

/* PM_BACKWARD(r, linear, args, .dy = ..., .dx = ...): the same args, and the gradients by name. */
#define PM_BACKWARD(r, op, args, ...)                                                              \
    do {                                                                                           \
        const pm_##op##_args pm_args = args;                                                       \
        const pm_##op##_grads pm_grads = {__VA_ARGS__};                                            \
        PM_TRY(pm_before_op(r, (r)->ctx->backend->op.workspace((r)->ctx, &pm_args, true)));        \
        if (!(r)->dry)                                                                             \
            PM_TRY((r)->ctx->backend->op.backward((r)->ctx, &pm_args, &pm_grads, (r)->scratch));   \
    } while (0)

/* model.c: the network. Inputs, outputs and losses are in acts. */
pm_status pm_network_forward(pm_run *r);
pm_status pm_network_loss(pm_run *r);     /* mse; the auxiliary losses are forward's, in training */
pm_status pm_network_backward(pm_run *r); /* grad += dloss * gradient of mse and of every aux */

/* block.c: one block. The residual stream enters as (x, branch, gate): see pm_stream in acts.h. */
pm_status pm_block_forward(pm_run *r, int64_t block);
pm_status pm_block_backward(pm_run *r, int64_t block);

/* moe.c: the feed-forward layer of a block, from y2 to branch2; backward from dbranch to dy. */
pm_status pm_ffn_forward(pm_run *r, int64_t block);
pm_status pm_ffn_backward(pm_run *r, int64_t block);

#endif
