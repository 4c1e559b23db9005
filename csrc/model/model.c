/* model.c: the network, forward; then backward, the same numbered steps read upwards. */
#include "run.h"

enum { GATE2 = 5, PARTS = 6, FINAL_SHIFT = 0, FINAL_SCALE = 1, FINAL_PARTS = 2 };

/* -------------------------------------------------------------- args: shared by both directions */

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

static pm_timestep_embedding_args angles_args(const pm_run *r)
{
    return (pm_timestep_embedding_args){
        .B = r->acts->B,
        .F = PM_TIME_FEATURES,
        .t = r->acts->t,
        .e = r->acts->angles,
        .max_period = 10000,
    };
}

static pm_linear_args time0_args(const pm_run *r)
{
    return (pm_linear_args){
        .N = r->acts->B,
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
        .N = r->acts->B,
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
        .B = r->acts->B,
        .Y = pm_label_rows(r->cfg),
        .D = r->cfg->hidden,
        .y = r->acts->y,
        .table = pm_param_at(r, r->places->table),
        .add = r->acts->time,
        .c = r->acts->c,
    };
}

static pm_silu_args silu_args(const pm_run *r)
{
    return (pm_silu_args){
        .N = r->acts->B,
        .D = r->cfg->hidden,
        .x = r->acts->c,
        .y = r->acts->silu_c,
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

static pm_linear_args final_adaln_args(const pm_run *r)
{
    return (pm_linear_args){
        .N = r->acts->B,
        .D = r->cfg->hidden,
        .F = FINAL_PARTS * r->cfg->hidden,
        .x = r->acts->silu_c,
        .weight = pm_weight_at(r, r->places->final_adaln),
        .bias = pm_param_at(r, r->places->final_adaln_bias),
        .y = r->acts->final_mod,
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
        .T = pm_tokens(r->cfg),
        .D = D,
        .gate_ld = PARTS * D,
        .mod_ld = FINAL_PARTS * D,
        .x = last->x2,
        .branch = last->branch2,
        .gate = pm_act_at(r, last->mod, GATE2 * D),
        .shift = pm_act_at(r, a->final_mod, FINAL_SHIFT * D),
        .scale = pm_act_at(r, a->final_mod, FINAL_SCALE * D),
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

pm_status pm_network_forward(pm_run *r)
{
    PM_FORWARD(r, patch_embed, patch_args(r));         /*  1. tokens */
    PM_FORWARD(r, timestep_embedding, angles_args(r)); /*  2. angles */
    PM_FORWARD(r, linear, time0_args(r));              /*  3. time_h */
    PM_FORWARD(r, linear, time2_args(r));              /*  4. time */
    PM_FORWARD(r, label_embedding, label_args(r));     /*  5. c = time + label */
    PM_FORWARD(r, silu, silu_args(r));                 /*  6. silu_c */
    if (r->cfg->experts > 0)
        PM_FORWARD(r, conditional_routing, partition_args(r)); /*  7. part */
    for (int64_t i = 0; i < r->cfg->depth; i++)
        PM_TRY(pm_block_forward(r, i));                             /*  8. blocks */
    PM_FORWARD(r, linear, final_adaln_args(r));                     /*  9. final_mod */
    PM_FORWARD(r, residual_layernorm_modulate, final_norm_args(r)); /* 10. final_y */
    PM_FORWARD(r, linear, final_args(r));                           /* 11. patches */
    PM_FORWARD(r, unpatchify, unpatchify_args(r));                  /* 12. out */
    return PM_OK;
}

pm_status pm_network_loss(pm_run *r)
{
    PM_FORWARD(r, mse_loss, mse_args(r)); /* 13. mse */
    return PM_OK;
}

/* ---------------------------------------------------------------- backward */

pm_status pm_network_backward(pm_run *r)
{
    const pm_layout *p = r->places;
    const int64_t D = r->cfg->hidden;
    pm_acts a = *r->acts; /* dmod and dmod_next change places from block to block */
    const pm_acts *const acts = r->acts;

    /* 13. mse_loss(out, target) */
    PM_BACKWARD(r, mse_loss, mse_args(r), .dloss = a.dloss, .dpred = a.dout);
    /* 12. unpatchify(patches) -> out */
    PM_BACKWARD(r, unpatchify, unpatchify_args(r), .dy = a.dout, .dx = a.dpatches);
    /* 11. final linear(final_y) -> patches */
    PM_BACKWARD(r, linear, final_args(r), .dy = a.dpatches, .dx = a.dy,
                .dweight = pm_grad_at(r, p->final.at), .dbias = pm_grad_at(r, p->final_bias));
    /* 10. (x2, branch2, gate2 of the last block; shift, scale) -> final_x, final_y */
    PM_BACKWARD(r, residual_layernorm_modulate, final_norm_args(r), .dy = a.dy, .dx = a.dstream,
                .dbranch = a.dbranch, .dgate = pm_act_at(r, a.dmod, GATE2 * D),
                .dshift = pm_act_at(r, a.dfinal_mod, FINAL_SHIFT * D),
                .dscale = pm_act_at(r, a.dfinal_mod, FINAL_SCALE * D));
    /* 9. final adaln(silu_c) -> final_mod;  dsilu = */
    PM_BACKWARD(r, linear, final_adaln_args(r), .dy = a.dfinal_mod, .dx = a.dsilu,
                .dweight = pm_grad_at(r, p->final_adaln.at),
                .dbias = pm_grad_at(r, p->final_adaln_bias));
    /* 8. blocks;  dsilu += */
    r->acts = &a;
    pm_status status = PM_OK;
    for (int64_t i = r->cfg->depth - 1; i >= 0 && status == PM_OK; i--) {
        status = pm_block_backward(r, i);
        pm_act *const swap = a.dmod;
        a.dmod = a.dmod_next;
        a.dmod_next = swap;
    }
    r->acts = acts;
    PM_TRY(status);
    /* 7. part has no gradient */
    /* 6. silu(c) -> silu_c */
    PM_BACKWARD(r, silu, silu_args(r), .dy = a.dsilu, .dx = a.dc);
    /* 5. c = time + table[y]: the gradient of time is dc itself */
    PM_BACKWARD(r, label_embedding, label_args(r), .dc = a.dc, .dtable = pm_grad_at(r, p->table));
    /* 4. time2(time_h) -> time */
    PM_BACKWARD(r, linear, time2_args(r), .dy = a.dc, .dx = a.dtime_h,
                .dweight = pm_grad_at(r, p->time2.at), .dbias = pm_grad_at(r, p->time2_bias));
    /* 3. time0(angles) -> time_h */
    PM_BACKWARD(r, linear, time0_args(r), .dy = a.dtime_h, .dweight = pm_grad_at(r, p->time0.at),
                .dbias = pm_grad_at(r, p->time0_bias));
    /* 2. the angles have no gradient */
    /* 1. patch_embed(x) -> tokens */
    PM_BACKWARD(r, patch_embed, patch_args(r), .dy = a.dstream,
                .dweight = pm_grad_at(r, p->patch.at), .dbias = pm_grad_at(r, p->patch_bias));
    return PM_OK;
}
