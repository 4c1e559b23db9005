/* moe.c: the feed-forward layer of a block. y2 -> router -> plan -> experts -> branch2; a dense
 * one is experts with a single shared group and no plan. Below it the router of ProMoE:
 * partition by label, cosine to prototypes, gate, token choice, and its two auxiliary losses. */
#include "router.h"

/* -------------------------------------------------------------- args: shared by both directions */

static pm_routing_plan_args plan_args(const pm_run *r, int64_t block)
{
    const pm_route_acts *u = &r->acts->blocks[block].route;
    return (pm_routing_plan_args){
        .N = r->acts->N,
        .A = r->cfg->top_k,
        .G = pm_plan_groups(r->cfg),
        .choice = u->choice,
        .weight = u->weight,
        .row_off = u->row_off,
        .row_token = u->row_token,
        .row_weight = u->row_weight,
        .tok_off = u->tok_off,
        .tok_row = u->tok_row,
        .choice_row = u->choice_row,
    };
}

static pm_experts_args experts_args(const pm_run *r, int64_t block)
{
    const pm_block_places *p = &r->places->blocks[block];
    const pm_block_acts *b = &r->acts->blocks[block];
    const pm_route_acts *u = &b->route;
    const pm_ffn f = pm_ffn_of(r->cfg, block);
    return (pm_experts_args){
        .N = r->acts->N,
        .D = r->cfg->hidden,
        .G = f.G,
        .S = f.S,
        .F = f.F,
        .P = f.F,
        .R = f.G > 0 ? r->acts->N * r->cfg->top_k : 0,
        .W = f.width,
        .Z = f.shared,
        .x = b->y2,
        .row_off = u->row_off,
        .row_token = u->row_token,
        .row_weight = u->row_weight,
        .tok_off = u->tok_off,
        .tok_row = u->tok_row,
        .foff = f.G > 0 ? r->foff_experts : r->foff_dense,
        .up = pm_weight_at(r, p->up),
        .up_bias = pm_param_at(r, p->up_bias),
        .down = pm_weight_at(r, p->down),
        .down_bias = pm_param_at(r, p->down_bias),
        .y = b->branch2,
        .pre = b->pre,
        .pre_shared = b->pre_shared,
    };
}

/* ---------------------------------------------------------------- the layer */

pm_status pm_ffn_forward(pm_run *r, int64_t block)
{
    if (pm_has_experts(r->cfg, block)) {
        if (!r->forced) /* 1. choices, weights */
            PM_TRY(pm_router_of(r->cfg)->plan(r, block));
        PM_FORWARD(r, routing_plan, plan_args(r, block)); /* 2. rows by expert */
    }
    PM_FORWARD(r, experts, experts_args(r, block)); /* 3. branch2 */
    return PM_OK;
}

pm_status pm_ffn_backward(pm_run *r, int64_t block)
{
    const pm_block_places *p = &r->places->blocks[block];
    const pm_acts *a = r->acts;
    const bool routed = pm_has_experts(r->cfg, block);

    /* 3. experts(y2) -> branch2 */
    PM_BACKWARD(r, experts, experts_args(r, block), .dy = a->dbranch, .dx = a->dy,
                .drow_weight = routed ? a->drow_weight : NULL, .dup = pm_grad_at(r, p->up.at),
                .dup_bias = pm_grad_at(r, p->up_bias), .ddown = pm_grad_at(r, p->down.at),
                .ddown_bias = pm_grad_at(r, p->down_bias));
    if (!routed)
        return PM_OK;
    /* 2. routing_plan(choice, weight) -> row_weight */
    PM_BACKWARD(r, routing_plan, plan_args(r, block), .drow_weight = a->drow_weight,
                .dweight = a->dweight);
    /* 1. router(y2) -> weight, losses */
    return pm_router_of(r->cfg)->backward(r, block);
}

/* ---------------------------------------------------------------- the router of ProMoE */

/* The load-balance loss is on and this walk computes losses. */
static bool balances(const pm_run *r)
{
    return r->acts->mode == PM_TRAINING && r->cfg->balance_weight != 0;
}
static bool contrasts(const pm_run *r)
{
    return r->acts->mode == PM_TRAINING && r->cfg->contrastive_weight != 0;
}

static pm_prototypical_routing_args cosine_args(const pm_run *r, int64_t block)
{
    const pm_block_acts *b = &r->acts->blocks[block];
    return (pm_prototypical_routing_args){
        .N = r->acts->N,
        .D = r->cfg->hidden,
        .E = r->cfg->experts,
        .x = b->y2,
        .proto = pm_param_at(r, r->places->blocks[block].proto),
        .part = r->acts->part,
        .z = b->route.z,
        .xnorm = b->route.xnorm,
        .pnorm = b->route.pnorm,
    };
}

static pm_router_gate_args gate_args(const pm_run *r, const float *z, float *s, int gate)
{
    return (pm_router_gate_args){
        .N = r->acts->N,
        .E = r->cfg->experts,
        .z = z,
        .part = r->acts->part,
        .s = s,
        .gate = gate,
    };
}

static pm_token_choice_args choice_args(const pm_run *r, int64_t block)
{
    const pm_route_acts *u = &r->acts->blocks[block].route;
    return (pm_token_choice_args){
        .N = r->acts->N,
        .E = r->cfg->experts,
        .A = r->cfg->top_k,
        .s = u->s,
        .part = r->acts->part,
        .choice = u->choice,
        .weight = u->weight,
    };
}

static pm_routing_contrastive_loss_args contrastive_args(const pm_run *r, int64_t block)
{
    const pm_block_acts *b = &r->acts->blocks[block];
    return (pm_routing_contrastive_loss_args){
        .N = r->acts->N,
        .D = r->cfg->hidden,
        .E = r->cfg->experts,
        .A = r->cfg->top_k,
        .x = b->y2,
        .proto = pm_param_at(r, r->places->blocks[block].proto),
        .choice = b->route.choice,
        .loss = pm_loss_at(r, PM_LOSS_CONTRASTIVE, block),
        .centroid = b->route.centroid,
        .count = b->route.count,
        .prob = b->route.prob,
        .assign = r->cfg->contrastive_assign,
        .temperature = r->cfg->contrastive_temperature,
        .weight = r->cfg->contrastive_weight,
    };
}

static pm_load_balance_loss_args balance_args(const pm_run *r, int64_t block)
{
    const pm_route_acts *u = &r->acts->blocks[block].route;
    return (pm_load_balance_loss_args){
        .B = r->acts->B,
        .T = pm_tokens(r->cfg),
        .E = r->cfg->experts,
        .A = r->cfg->top_k,
        .p = u->p,
        .choice = u->choice,
        .part = r->acts->part,
        .loss = pm_loss_at(r, PM_LOSS_BALANCE, block),
        .frac = u->frac,
        .per = r->cfg->balance_per,
        .weight = r->cfg->balance_weight,
    };
}

static pm_status promoe_plan(pm_run *r, int64_t block)
{
    const pm_route_acts *u = &r->acts->blocks[block].route;
    const int gate = r->cfg->gate;
    PM_FORWARD(r, prototypical_routing, cosine_args(r, block)); /* 1. z */
    if (gate != PM_GATE_IDENTITY)
        PM_FORWARD(r, router_gate, gate_args(r, u->z, u->s, gate)); /* 2. s */
    PM_FORWARD(r, token_choice, choice_args(r, block));             /* 3. choice, weight */
    if (contrasts(r))
        PM_FORWARD(r, routing_contrastive_loss, contrastive_args(r, block)); /* 4. */
    if (balances(r)) {
        if (gate != PM_GATE_SOFTMAX)
            PM_FORWARD(r, router_gate, gate_args(r, u->s, u->p, PM_GATE_SOFTMAX)); /* 5. p of s */
        PM_FORWARD(r, load_balance_loss, balance_args(r, block));                  /* 6. */
    }
    return PM_OK;
}

static pm_status promoe_backward(pm_run *r, int64_t block)
{
    const pm_route_acts *u = &r->acts->blocks[block].route;
    const pm_acts *a = r->acts;
    const int gate = r->cfg->gate;
    float *const dproto = pm_grad_at(r, r->places->blocks[block].proto);

    /* Two uses of s add up in ds (or, for the softmax gate, in dz): the first one sets it, so
     * the order is not quite the reverse. */
    /* 3. token_choice(s) -> weight */
    PM_BACKWARD(r, token_choice, choice_args(r, block), .dweight = a->dweight, .ds = a->ds);
    if (gate != PM_GATE_IDENTITY && !r->dry)
        PM_TRY(
            r->ctx->backend->zero(r->ctx, a->dz, (size_t)(a->N * r->cfg->experts) * sizeof(float)));
    if (balances(r)) {
        /* 6. load_balance_loss(p);  5. p = softmax(s) */
        PM_BACKWARD(r, load_balance_loss, balance_args(r, block), .dloss = a->dloss, .dp = a->dp);
        if (gate == PM_GATE_SOFTMAX)
            PM_BACKWARD(r, router_gate, gate_args(r, u->z, u->s, gate), .ds = a->dp, .dz = a->dz);
        else
            PM_BACKWARD(r, router_gate, gate_args(r, u->s, u->p, PM_GATE_SOFTMAX), .ds = a->dp,
                        .dz = a->ds);
    }
    /* 4. routing_contrastive_loss(y2, proto, choice) */
    if (contrasts(r))
        PM_BACKWARD(r, routing_contrastive_loss, contrastive_args(r, block), .dloss = a->dloss,
                    .dx = a->dy, .dproto = dproto);
    /* 2. router_gate(z) -> s */
    if (gate != PM_GATE_IDENTITY)
        PM_BACKWARD(r, router_gate, gate_args(r, u->z, u->s, gate), .ds = a->ds, .dz = a->dz);
    /* 1. prototypical_routing(y2, proto) -> z */
    PM_BACKWARD(r, prototypical_routing, cosine_args(r, block), .dz = a->dz, .dx = a->dy,
                .dproto = dproto);
    return PM_OK;
}

static void promoe_visit(pm_walk *walk, const pm_config *cfg, pm_block_places *places)
{
    const int64_t shape[] = {cfg->experts, cfg->hidden};
    places->proto = pm_walk_tensor(walk, "mlp.cluster_centers", PM_INIT_NORMAL, 2, shape);
}

const pm_router *pm_router_of(const pm_config *cfg)
{
    static const pm_router promoe = {"promoe", promoe_visit, promoe_plan, promoe_backward};
    (void)cfg;
    return &promoe;
}
