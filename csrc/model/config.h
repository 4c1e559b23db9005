/* config.h: what a model is. Sizes are those of promoe.ModelConfig and promoe.RectifiedFlow. */
#ifndef PM_MODEL_CONFIG_H
#define PM_MODEL_CONFIG_H

#include "../promoe.h"

enum { PM_TIME_FEATURES = 256 }; /* width of the sinusoidal time embedding */

typedef struct {
    /* the data: C channels on one to three axes. Unused axes come first and are 1 long. */
    int64_t channels, out_channels;
    int64_t axes, size[3], patch[3];

    /* the transformer */
    int64_t hidden, depth, heads, head, mlp_hidden; /* head: the width K of one */
    int64_t classes;
    bool null_label; /* the label table has a row for "no class" */
    bool qk_norm;

    /* the experts; experts = 0: a dense DiT */
    int64_t experts; /* routed experts = prototypes */
    bool unconditional, shared;
    bool interleave; /* experts in the odd blocks only */
    int64_t expert_width, shared_width, top_k;
    int gate; /* PM_GATE_... */
    double contrastive_weight, contrastive_temperature;
    int contrastive_assign; /* PM_ASSIGN_... */
    double balance_weight;
    int balance_per; /* PM_PER_... */

    /* the objective: rectified flow */
    int density; /* PM_DENSITY_... */
    double logit_mean, logit_std, sigmoid_scale, shift, drop_prob;
} pm_config;

/* PM_EINVAL, with a message, for a model that cannot be. */
pm_status pm_config_check(pm_ctx *ctx, const pm_config *cfg);

static inline int64_t pm_voxels(const pm_config *c) { return c->size[0] * c->size[1] * c->size[2]; }
static inline int64_t pm_patch_voxels(const pm_config *c)
{
    return c->patch[0] * c->patch[1] * c->patch[2];
}
static inline int64_t pm_tokens(const pm_config *c) { return pm_voxels(c) / pm_patch_voxels(c); }
static inline int64_t pm_label_rows(const pm_config *c) { return c->classes + c->null_label; }

static inline bool pm_has_experts(const pm_config *c, int64_t block)
{
    return c->experts > 0 && (!c->interleave || block % 2 == 1);
}
/* Groups of a routing plan: the routed experts, then the unconditional one. */
static inline int64_t pm_plan_groups(const pm_config *c) { return c->experts + c->unconditional; }

/* The feed-forward layer of a block in the terms of ops/experts.h. A dense one is a shared
 * group. */
typedef struct {
    int64_t G, S, F;       /* plan groups, shared groups, all widths together */
    int64_t width, shared; /* of a plan group and of a shared one (0 where there is none) */
} pm_ffn;

static inline pm_ffn pm_ffn_of(const pm_config *c, int64_t block)
{
    if (!pm_has_experts(c, block))
        return (pm_ffn){0, 1, c->mlp_hidden, 0, c->mlp_hidden};
    const int64_t G = pm_plan_groups(c), shared = c->shared ? c->shared_width : 0;
    return (pm_ffn){G, c->shared, G * c->expert_width + shared, c->expert_width, shared};
}

#endif
