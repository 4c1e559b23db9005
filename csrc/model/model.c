/* model.c: the network, forward; then backward, the same numbered steps read upwards. */
#include "run.h"

enum { GATE2 = 5, PARTS = 6, FINAL_SHIFT = 0, FINAL_SCALE = 1, FINAL_PARTS = 2 };

/* -------------------------------------------------------------- args: shared by both directions */

static pm_timestep_embedding_args angles_args(const pm_run *r)
{
    return (pm_timestep_embedding_args){
        .B = r->acts->conditions,
        .F = PM_TIME_FEATURES,
        .t = r->acts->t,
        .e = r->acts->angles,
        .max_period = 10000,
    };
}

static pm_linear_args time0_args(const pm_run *r)
{
    return (pm_linear_args){
        .N = r->acts->conditions,
        .D = PM_TIME_FEATURES,
        .F = r->cfg->hidden,
        .x = r->acts->angles,
        .weight = pm_weight_at(r, r->places->time0),
        .bias = pm_param_at(r, r->places->time0_bias),
        .y = r->acts->time_h,
        .pre = r->acts->time_pre,
        .activation = PM_ACT_SILU,
    };
}

static pm_linear_args time2_args(const pm_run *r)
{
    return (pm_linear_args){
        .N = r->acts->conditions,
        .D = r->cfg->hidden,
        .F = r->cfg->hidden,
        .x = r->acts->time_h,
        .weight = pm_weight_at(r, r->places->time2),
        .bias = pm_param_at(r, r->places->time2_bias),
        .y = r->acts->time,
    };
}

static pm_label_embedding_args label_args(const pm_run *r)
{
    return (pm_label_embedding_args){
        .B = r->acts->conditions,
        .Y = pm_label_rows(r->cfg),
        .D = r->cfg->hidden,
        .y = r->acts->label,
        .table = pm_param_at(r, r->places->table),
        .add = r->acts->time,
        .c = r->acts->c,
    };
}

static pm_silu_args silu_args(const pm_run *r)
{
    return (pm_silu_args){
        .N = r->acts->conditions,
        .D = r->cfg->hidden,
        .x = r->acts->c,
        .y = r->acts->silu_c,
    };
}

static pm_linear_args final_adaln_args(const pm_run *r)
{
    return (pm_linear_args){
        .N = r->acts->conditions,
        .D = r->cfg->hidden,
        .F = FINAL_PARTS * r->cfg->hidden,
        .x = r->acts->silu_c,
        .weight = pm_weight_at(r, r->places->final_adaln),
        .bias = pm_param_at(r, r->places->final_adaln_bias),
        .y = r->acts->final_mod,
    };
}

static pm_patch_embed_args patch_args(const pm_run *r)
{
    const pm_config *c = r->cfg;
    return (pm_patch_embed_args){
        .B = r->acts->B,
        .C = c->channels,
        .V = pm_voxels(c),
        .T = pm_tokens(c),
        .P = c->channels * pm_patch_voxels(c),
        .D = c->hidden,
        .x = r->acts->x,
        .weight = pm_weight_at(r, r->places->patch),
        .bias = pm_param_at(r, r->places->patch_bias),
        .pos = pm_param_at(r, r->places->pos),
        .y = r->acts->tokens,
        .s0 = c->size[0],
        .s1 = c->size[1],
        .s2 = c->size[2],
        .p0 = c->patch[0],
        .p1 = c->patch[1],
        .p2 = c->patch[2],
    };
}

static pm_conditional_routing_args partition_args(const pm_run *r)
{
    return (pm_conditional_routing_args){
        .B = r->acts->B,
        .T = pm_tokens(r->cfg),
        .y = r->acts->y,
        .part = r->acts->part,
        .null_label = r->cfg->classes,
        .group = r->cfg->unconditional ? r->cfg->experts : -1,
    };
}

/* final_x = x2 of the last block + gate2 * branch2;  final_y = LN(final_x) modulated */
static pm_residual_layernorm_modulate_args final_norm_args(const pm_run *r)
{
    const pm_acts *a = r->acts;
    const pm_block_acts *last = &a->blocks[r->cfg->depth - 1];
    const int64_t D = r->cfg->hidden;
    return (pm_residual_layernorm_modulate_args){
        .B = a->B,
        .C = a->conditions,
        .T = pm_tokens(r->cfg),
        .D = D,
        .gate_ld = PARTS * D,
        .mod_ld = FINAL_PARTS * D,
        .x = last->x2,
        .branch = last->branch2,
        .gate = pm_act_at(r, last->mod, GATE2 * D),
        .shift = pm_act_at(r, a->final_mod, FINAL_SHIFT * D),
        .scale = pm_act_at(r, a->final_mod, FINAL_SCALE * D),
        .cond = a->condition,
        .xo = a->final_x,
        .y = a->final_y,
        .mean = a->final_mean,
        .rstd = a->final_rstd,
        .eps = 1e-6,
    };
}

static pm_linear_args final_args(const pm_run *r)
{
    return (pm_linear_args){
        .N = r->acts->N,
        .D = r->cfg->hidden,
        .F = pm_patch_voxels(r->cfg) * r->cfg->out_channels,
        .x = r->acts->final_y,
        .weight = pm_weight_at(r, r->places->final),
        .bias = pm_param_at(r, r->places->final_bias),
        .y = r->acts->patches,
    };
}

static pm_unpatchify_args unpatchify_args(const pm_run *r)
{
    const pm_config *c = r->cfg;
    return (pm_unpatchify_args){
        .B = r->acts->B,
        .T = pm_tokens(c),
        .P = pm_patch_voxels(c) * c->out_channels,
        .C = c->out_channels,
        .V = pm_voxels(c),
        .x = r->acts->patches,
        .y = r->acts->out,
        .s0 = c->size[0],
        .s1 = c->size[1],
        .s2 = c->size[2],
        .p0 = c->patch[0],
        .p1 = c->patch[1],
        .p2 = c->patch[2],
    };
}

static pm_mse_loss_args mse_args(const pm_run *r)
{
    return (pm_mse_loss_args){
        .B = r->acts->B,
        .M = r->cfg->out_channels,
        .C = r->cfg->channels,
        .V = pm_voxels(r->cfg),
        .pred = r->acts->out,
        .target = r->acts->target,
        .loss = pm_loss_at(r, PM_LOSS_MSE, 0),
    };
}

/* ---------------------------------------------------------------- forward */

pm_status pm_network_conditions(pm_run *r)
{
    PM_FORWARD(r, timestep_embedding, angles_args(r)); /*  1. angles */
    PM_FORWARD(r, linear, time0_args(r));              /*  2. time_h */
    PM_FORWARD(r, linear, time2_args(r));              /*  3. time */
    PM_FORWARD(r, label_embedding, label_args(r));     /*  4. c = time + label */
    PM_FORWARD(r, silu, silu_args(r));                 /*  5. silu_c */
    for (int64_t i = 0; i < r->cfg->depth; i++)
        PM_TRY(pm_block_condition(r, i));       /*  6. mod of every block */
    PM_FORWARD(r, linear, final_adaln_args(r)); /*  7. final_mod */
    return PM_OK;
}

pm_status pm_network_images(pm_run *r)
{
    PM_FORWARD(r, patch_embed, patch_args(r)); /*  8. tokens */
    if (r->cfg->experts > 0)
        PM_FORWARD(r, conditional_routing, partition_args(r)); /*  9. part */
    for (int64_t i = 0; i < r->cfg->depth; i++)
        PM_TRY(pm_block_forward(r, i));                             /* 10. blocks */
    PM_FORWARD(r, residual_layernorm_modulate, final_norm_args(r)); /* 11. final_y */
    PM_FORWARD(r, linear, final_args(r));                           /* 12. patches */
    PM_FORWARD(r, unpatchify, unpatchify_args(r));                  /* 13. out */
    return PM_OK;
}

pm_status pm_network_forward(pm_run *r)
{
    PM_TRY(pm_network_conditions(r));
    return pm_network_images(r);
}

pm_status pm_network_loss(pm_run *r)
{
    PM_FORWARD(r, mse_loss, mse_args(r)); /* 14. mse */
    return PM_OK;
}

/* ---------------------------------------------------------------- backward */

pm_status pm_network_backward(pm_run *r)
{
    const pm_layout *p = r->places;
    const pm_acts *a = r->acts;
    const int64_t D = r->cfg->hidden, last = r->cfg->depth - 1;

    /* 14. mse_loss(out, target) */
    PM_BACKWARD(r, mse_loss, mse_args(r), .dloss = a->dloss, .dpred = a->dout);
    /* 13. unpatchify(patches) -> out */
    PM_BACKWARD(r, unpatchify, unpatchify_args(r), .dy = a->dout, .dx = a->dpatches);
    /* 12. final linear(final_y) -> patches */
    PM_BACKWARD(r, linear, final_args(r), .dy = a->dpatches, .dx = a->dy,
                .dweight = pm_grad_at(r, p->final.at), .dbias = pm_grad_at(r, p->final_bias));
    /* 11. (x2, branch2, gate2 of the last block; shift, scale) -> final_x, final_y */
    PM_BACKWARD(r, residual_layernorm_modulate, final_norm_args(r), .dy = a->dy, .dx = a->dstream,
                .dbranch = a->dbranch, .dgate = pm_act_at(r, a->blocks[last].dmod, GATE2 * D),
                .dshift = pm_act_at(r, a->dfinal_mod, FINAL_SHIFT * D),
                .dscale = pm_act_at(r, a->dfinal_mod, FINAL_SCALE * D));
    /* 10. blocks */
    for (int64_t i = last; i >= 0; i--)
        PM_TRY(pm_block_backward(r, i));
    /* 9. part has no gradient */
    /* 8. patch_embed(x) -> tokens */
    PM_BACKWARD(r, patch_embed, patch_args(r), .dy = a->dstream,
                .dweight = pm_grad_at(r, p->patch.at), .dbias = pm_grad_at(r, p->patch_bias));
    /* 7. final adaln(silu_c) -> final_mod;  dsilu = */
    PM_BACKWARD(r, linear, final_adaln_args(r), .dy = a->dfinal_mod, .dx = a->dsilu,
                .dweight = pm_grad_at(r, p->final_adaln.at),
                .dbias = pm_grad_at(r, p->final_adaln_bias));
    /* 6. adaln(silu_c) -> mod of every block;  dsilu += */
    for (int64_t i = last; i >= 0; i--)
        PM_TRY(pm_block_condition_backward(r, i));
    /* 5. silu(c) -> silu_c */
    PM_BACKWARD(r, silu, silu_args(r), .dy = a->dsilu, .dx = a->dc);
    /* 4. c = time + table[label]: the gradient of time is dc itself */
    PM_BACKWARD(r, label_embedding, label_args(r), .dc = a->dc, .dtable = pm_grad_at(r, p->table));
    /* 3. time2(time_h) -> time */
    PM_BACKWARD(r, linear, time2_args(r), .dy = a->dc, .dx = a->dtime_h,
                .dweight = pm_grad_at(r, p->time2.at), .dbias = pm_grad_at(r, p->time2_bias));
    /* 2. time0(angles) -> time_h */
    PM_BACKWARD(r, linear, time0_args(r), .dy = a->dtime_h, .dweight = pm_grad_at(r, p->time0.at),
                .dbias = pm_grad_at(r, p->time0_bias));
    /* 1. the angles have no gradient */
    return PM_OK;
}
