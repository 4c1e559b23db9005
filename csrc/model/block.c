/* block.c: one transformer block with adaLN-Zero. The residual addition of a sublayer is done by
 * the LayerNorm op that comes next: so a block begins by adding what the block before left in
 * branch2, and leaves its own branch2 to the next. */
#include "run.h"

/* Columns of the adaLN projection, in the order of the public code. */
enum { SHIFT1, SCALE1, GATE1, SHIFT2, SCALE2, GATE2, PARTS };

static pm_act *part(const pm_run *r, pm_act *mod, int which)
{
    return pm_act_at(r, mod, which * r->cfg->hidden);
}

/* -------------------------------------------------------------- args: shared by both directions */

static pm_linear_args adaln_args(const pm_run *r, int64_t block)
{
    const pm_block_places *p = &r->places->blocks[block];
    return (pm_linear_args){
        .N = r->acts->conditions,
        .D = r->cfg->hidden,
        .F = PARTS * r->cfg->hidden,
        .x = r->acts->silu_c,
        .weight = pm_weight_at(r, p->adaln),
        .bias = pm_param_at(r, p->adaln_bias),
        .y = r->acts->blocks[block].mod,
        .dx_add = 1,
    };
}

/* x1 = x2 of the block below + gate2 * branch2 (block 0: the tokens alone);  y1 = LN(x1)
 * modulated */
static pm_residual_layernorm_modulate_args norm1_args(const pm_run *r, int64_t block)
{
    const pm_block_acts *b = &r->acts->blocks[block], *below = b - 1;
    const bool first = block == 0;
    return (pm_residual_layernorm_modulate_args){
        .B = r->acts->B,
        .C = r->acts->conditions,
        .T = pm_tokens(r->cfg),
        .D = r->cfg->hidden,
        .gate_ld = PARTS * r->cfg->hidden,
        .mod_ld = PARTS * r->cfg->hidden,
        .x = first ? r->acts->tokens : below->x2,
        .branch = first ? NULL : below->branch2,
        .gate = first ? NULL : part(r, below->mod, GATE2),
        .shift = part(r, b->mod, SHIFT1),
        .scale = part(r, b->mod, SCALE1),
        .cond = r->acts->condition,
        .xo = first ? NULL : b->x1,
        .y = b->y1,
        .mean = b->mean1,
        .rstd = b->rstd1,
        .eps = 1e-6,
    };
}

static pm_linear_args qkv_args(const pm_run *r, int64_t block)
{
    const pm_block_places *p = &r->places->blocks[block];
    const pm_block_acts *b = &r->acts->blocks[block];
    return (pm_linear_args){
        .N = r->acts->N,
        .D = r->cfg->hidden,
        .F = 3 * r->cfg->heads * r->cfg->head,
        .x = b->y1,
        .weight = pm_weight_at(r, p->qkv),
        .bias = pm_param_at(r, p->qkv_bias),
        .y = b->qkv,
    };
}

static pm_attention_args attention_args(const pm_run *r, int64_t block)
{
    const pm_block_places *p = &r->places->blocks[block];
    const pm_block_acts *b = &r->acts->blocks[block];
    pm_attention_args args = {
        .B = r->acts->B,
        .T = pm_tokens(r->cfg),
        .H = r->cfg->heads,
        .K = r->cfg->head,
        .qkv = b->qkv,
        .y = b->heads,
        .lse = b->lse,
        .eps = 1e-5,
    };
    if (r->cfg->qk_norm) {
        args.q_weight = pm_param_at(r, p->q_weight);
        args.q_bias = pm_param_at(r, p->q_bias);
        args.k_weight = pm_param_at(r, p->k_weight);
        args.k_bias = pm_param_at(r, p->k_bias);
    }
    return args;
}

static pm_linear_args proj_args(const pm_run *r, int64_t block)
{
    const pm_block_places *p = &r->places->blocks[block];
    const pm_block_acts *b = &r->acts->blocks[block];
    return (pm_linear_args){
        .N = r->acts->N,
        .D = r->cfg->heads * r->cfg->head,
        .F = r->cfg->hidden,
        .x = b->heads,
        .weight = pm_weight_at(r, p->proj),
        .bias = pm_param_at(r, p->proj_bias),
        .y = b->branch1,
    };
}

/* x2 = x1 + gate1 * branch1;  y2 = LN(x2) modulated */
static pm_residual_layernorm_modulate_args norm2_args(const pm_run *r, int64_t block)
{
    const pm_block_acts *b = &r->acts->blocks[block];
    return (pm_residual_layernorm_modulate_args){
        .B = r->acts->B,
        .C = r->acts->conditions,
        .T = pm_tokens(r->cfg),
        .D = r->cfg->hidden,
        .gate_ld = PARTS * r->cfg->hidden,
        .mod_ld = PARTS * r->cfg->hidden,
        .x = b->x1,
        .branch = b->branch1,
        .gate = part(r, b->mod, GATE1),
        .shift = part(r, b->mod, SHIFT2),
        .scale = part(r, b->mod, SCALE2),
        .cond = r->acts->condition,
        .xo = b->x2,
        .y = b->y2,
        .mean = b->mean2,
        .rstd = b->rstd2,
        .eps = 1e-6,
    };
}

/* ---------------------------------------------------------------- its conditions */

pm_status pm_block_condition(pm_run *r, int64_t block)
{
    PM_FORWARD(r, linear, adaln_args(r, block));
    return PM_OK;
}

/* dsilu += */
pm_status pm_block_condition_backward(pm_run *r, int64_t block)
{
    const pm_block_places *p = &r->places->blocks[block];
    PM_BACKWARD(r, linear, adaln_args(r, block), .dy = r->acts->blocks[block].dmod,
                .dx = r->acts->dsilu, .dweight = pm_grad_at(r, p->adaln.at),
                .dbias = pm_grad_at(r, p->adaln_bias));
    return PM_OK;
}

/* ---------------------------------------------------------------- the block */

pm_status pm_block_forward(pm_run *r, int64_t block)
{
    PM_FORWARD(r, residual_layernorm_modulate, norm1_args(r, block)); /* 1. x1, y1 */
    PM_FORWARD(r, linear, qkv_args(r, block));                        /* 2. qkv */
    PM_FORWARD(r, attention, attention_args(r, block));               /* 3. heads */
    PM_FORWARD(r, linear, proj_args(r, block));                       /* 4. branch1 */
    PM_FORWARD(r, residual_layernorm_modulate, norm2_args(r, block)); /* 5. x2, y2 */
    return pm_ffn_forward(r, block);                                  /* 6. branch2 */
}

/* On entry dstream, dbranch and the gate2 column of this block's dmod come from the LayerNorm
 * above. On return they are those of the block below, and the rest of dmod is complete. */
pm_status pm_block_backward(pm_run *r, int64_t block)
{
    const pm_block_places *p = &r->places->blocks[block];
    const pm_acts *a = r->acts;
    pm_act *const dmod = a->blocks[block].dmod;
    const bool first = block == 0;

    /* 6. ffn(y2) -> branch2 */
    PM_TRY(pm_ffn_backward(r, block));
    /* 5. (x1, branch1, gate1, shift2, scale2) -> x2, y2 */
    PM_BACKWARD(r, residual_layernorm_modulate, norm2_args(r, block), .dy = a->dy,
                .dxo = a->dstream, .dx = a->dstream, .dbranch = a->dbranch,
                .dgate = part(r, dmod, GATE1), .dshift = part(r, dmod, SHIFT2),
                .dscale = part(r, dmod, SCALE2));
    /* 4. proj(heads) -> branch1 */
    PM_BACKWARD(r, linear, proj_args(r, block), .dy = a->dbranch, .dx = a->dy,
                .dweight = pm_grad_at(r, p->proj.at), .dbias = pm_grad_at(r, p->proj_bias));
    /* 3. attention(qkv) -> heads */
    PM_BACKWARD(r, attention, attention_args(r, block), .dy = a->dy, .dqkv = a->dqkv,
                .dq_weight = r->cfg->qk_norm ? pm_grad_at(r, p->q_weight) : NULL,
                .dq_bias = r->cfg->qk_norm ? pm_grad_at(r, p->q_bias) : NULL,
                .dk_weight = r->cfg->qk_norm ? pm_grad_at(r, p->k_weight) : NULL,
                .dk_bias = r->cfg->qk_norm ? pm_grad_at(r, p->k_bias) : NULL);
    /* 2. qkv(y1) -> qkv */
    PM_BACKWARD(r, linear, qkv_args(r, block), .dy = a->dqkv, .dx = a->dy,
                .dweight = pm_grad_at(r, p->qkv.at), .dbias = pm_grad_at(r, p->qkv_bias));
    /* 1. (stream below, branch2 below, gate2 below, shift1, scale1) -> x1, y1 */
    PM_BACKWARD(r, residual_layernorm_modulate, norm1_args(r, block), .dy = a->dy,
                .dxo = a->dstream, .dx = a->dstream, .dbranch = first ? NULL : a->dbranch,
                .dgate = first ? NULL : part(r, a->blocks[block - 1].dmod, GATE2),
                .dshift = part(r, dmod, SHIFT1), .dscale = part(r, dmod, SCALE1));
    return PM_OK;
}
