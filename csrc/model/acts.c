/* acts.c: the liveness plan, in data-flow order. */
#include "acts.h"

typedef struct {
    char *base;
    size_t used, act_bytes;
} cursor;

static void *take_bytes(cursor *at, size_t bytes)
{
    void *piece = at->base + at->used;
    at->used += (bytes + 63) & ~(size_t)63;
    return piece;
}

/* Room for count numbers at a multiple of 64 bytes: of 4 bytes (floats, 32-bit integers), of 8, and
 * activations. */
static void *take(cursor *at, int64_t count) { return take_bytes(at, (size_t)count * 4); }
static void *take64(cursor *at, int64_t count) { return take_bytes(at, (size_t)count * 8); }
static pm_act *take_act(cursor *at, int64_t count)
{
    return take_bytes(at, (size_t)count * at->act_bytes);
}

static int64_t larger(int64_t a, int64_t b) { return a > b ? a : b; }

/* The router's buffers of one layer. In inference only what Model.routing shows is its own. */
static void place_route(const pm_config *c, int64_t B, int64_t N, bool train, cursor *at,
                        const pm_route_acts *shared, pm_route_acts *route)
{
    const int64_t E = c->experts, A = c->top_k, G = pm_plan_groups(c), R = N * A;
    *route = *shared;
    route->choice = take(at, R);
    route->weight = take(at, R);
    route->row_off = take(at, G + 1);
    if (!train)
        return;
    route->z = take(at, N * E);
    route->s = c->gate == PM_GATE_IDENTITY ? route->z : take(at, N * E);
    route->xnorm = take(at, N);
    route->pnorm = take(at, E);
    route->row_token = take(at, R);
    route->row_weight = take(at, R);
    route->tok_off = take(at, N + 1);
    route->tok_row = take(at, R);
    route->choice_row = take(at, R);
    if (c->contrastive_weight != 0) {
        route->centroid = take(at, E * c->hidden);
        route->prob = take(at, E * E);
        route->count = take(at, E);
    }
    if (c->balance_weight != 0) {
        route->p = c->gate == PM_GATE_SOFTMAX ? route->s : take(at, N * E);
        route->frac = take(at, B * E);
    }
}

/* The router's buffers that all layers share in inference. */
static pm_route_acts place_shared_route(const pm_config *c, int64_t N, cursor *at)
{
    const int64_t E = c->experts, R = N * c->top_k;
    pm_route_acts route = {0};
    route.z = take(at, N * E);
    route.s = c->gate == PM_GATE_IDENTITY ? route.z : take(at, N * E);
    route.row_token = take(at, R);
    route.row_weight = take(at, R);
    route.tok_off = take(at, N + 1);
    route.tok_row = take(at, R);
    return route;
}

static void place_training_blocks(const pm_config *c, int64_t B, int64_t N, cursor *at, pm_acts *a)
{
    const int64_t D = c->hidden, HK = c->heads * c->head;
    const pm_route_acts none = {0};
    for (int64_t i = 0; i < c->depth; i++) {
        pm_block_acts *b = &a->blocks[i];
        const pm_ffn f = pm_ffn_of(c, i);
        *b = (pm_block_acts){0};
        b->mod = take_act(at, B * 6 * D);
        b->dmod = take_act(at, B * 6 * D);
        b->x1 = i == 0 ? a->tokens : take(at, N * D);
        b->mean1 = take(at, N);
        b->rstd1 = take(at, N);
        b->y1 = take_act(at, N * D);
        b->qkv = take_act(at, N * 3 * HK);
        b->lse = take(at, N * c->heads);
        b->heads = take_act(at, N * HK);
        b->branch1 = take_act(at, N * D);
        b->x2 = take(at, N * D);
        b->mean2 = take(at, N);
        b->rstd2 = take(at, N);
        b->y2 = take_act(at, N * D);
        if (f.G > 0) {
            place_route(c, B, N, true, at, &none, &b->route);
            b->pre = take_act(at, N * c->top_k * f.width);
        }
        b->pre_shared = f.S > 0 ? take_act(at, N * f.shared) : NULL;
        b->branch2 = take_act(at, N * D);
    }
}

/* Inference: one stream, updated in place; one modulated buffer, reused by attention (which
 * reads only qkv); one branch. */
static void place_inference_blocks(const pm_config *c, int64_t B, int64_t N, cursor *at, pm_acts *a)
{
    const int64_t D = c->hidden, HK = c->heads * c->head;
    pm_block_acts all = {0};
    all.x1 = all.x2 = a->tokens;
    all.y1 = all.y2 = all.heads = take_act(at, N * larger(D, HK));
    all.qkv = take_act(at, N * 3 * HK);
    all.branch1 = all.branch2 = take_act(at, N * D);
    const pm_route_acts route = c->experts > 0 ? place_shared_route(c, N, at) : (pm_route_acts){0};
    for (int64_t i = 0; i < c->depth; i++) {
        a->blocks[i] = all;
        a->blocks[i].mod = take_act(at, a->most_conditions * 6 * D);
        if (pm_has_experts(c, i))
            place_route(c, B, N, false, at, &route, &a->blocks[i].route);
    }
}

static void place_backward(const pm_config *c, int64_t B, int64_t N, cursor *at, pm_acts *a)
{
    const int64_t D = c->hidden, HK = c->heads * c->head,
                  out = c->out_channels * pm_patch_voxels(c);
    a->dout = take(at, B * c->out_channels * pm_voxels(c));
    a->dpatches = take_act(at, N * out);
    a->dstream = take(at, N * D);
    a->dbranch = take_act(at, N * D);
    a->dy = take_act(at, N * larger(D, HK));
    a->dqkv = take_act(at, N * 3 * HK);
    a->dfinal_mod = take_act(at, B * 2 * D);
    if (c->experts > 0) {
        a->drow_weight = take(at, N * c->top_k);
        a->dweight = take(at, N * c->top_k);
        a->ds = take(at, N * c->experts);
        a->dz = c->gate == PM_GATE_IDENTITY ? a->ds : take(at, N * c->experts);
        a->dp = c->balance_weight != 0 ? take(at, N * c->experts) : NULL;
    }
    a->dsilu = take_act(at, B * D);
    a->dc = take_act(at, B * D);
    a->dtime_h = take_act(at, B * D);
}

size_t pm_acts_place(const pm_config *c, int64_t B, pm_mode mode, size_t act_bytes, char *base,
                     pm_acts *acts)
{
    cursor at = {base, 0, act_bytes};
    const bool train = mode == PM_TRAINING;
    const int64_t D = c->hidden, V = pm_voxels(c), N = B * pm_tokens(c);
    /* With guidance in two passes there is one label more than there are images in a pass. */
    const int64_t Q = train ? B : larger(B + 1, PM_FEW_CONDITIONS);
    pm_acts a = {.B = B,
                 .N = N,
                 .mode = mode,
                 .conditions = Q,
                 .most_conditions = Q,
                 .blocks = acts->blocks};

    a.x = take(&at, B * c->channels * V);
    a.y = take64(&at, train ? B : 2 * B);
    a.key = take64(&at, 2);
    a.schedule = take64(&at, 3);
    if (train) {
        a.x0 = take(&at, B * c->channels * V);
        a.y0 = take64(&at, B);
        a.target = take(&at, B * c->channels * V);
    }
    a.t = take(&at, Q);
    a.label = train ? a.y : take64(&at, Q);
    a.condition = train ? NULL : take(&at, 2 * B);
    a.angles = take_act(&at, Q * PM_TIME_FEATURES);
    a.time_pre = train ? take_act(&at, Q * D) : NULL;
    a.time_h = take_act(&at, Q * D);
    a.time = take_act(&at, Q * D);
    a.c = take_act(&at, Q * D);
    a.silu_c = take_act(&at, Q * D);
    a.part = c->experts > 0 ? take(&at, N) : NULL;
    a.tokens = take(&at, N * D);
    if (train)
        place_training_blocks(c, B, N, &at, &a);
    else
        place_inference_blocks(c, B, N, &at, &a);

    const pm_block_acts *last = &a.blocks[c->depth - 1];
    a.final_mod = take_act(&at, Q * 2 * D);
    a.final_x = train ? take(&at, N * D) : last->x2;
    a.final_mean = train ? take(&at, N) : NULL;
    a.final_rstd = train ? take(&at, N) : NULL;
    a.final_y = train ? take_act(&at, N * D) : last->y2;
    a.patches = take_act(&at, N * c->out_channels * pm_patch_voxels(c));
    a.out = take(&at, B * c->out_channels * V);
    if (!train)
        a.cond = take(&at, B * c->out_channels * V);
    if (train) {
        a.dloss = take(&at, 1);
        place_backward(c, B, N, &at, &a);
    }
    *acts = a;
    return at.used;
}
