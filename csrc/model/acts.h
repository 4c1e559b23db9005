/* acts.h: the activations of one (B, mode), laid out in one arena.
 *
 * Training keeps what backward reads, per block. Inference keeps nothing: the blocks share one
 * set of buffers, and what only backward needs is NULL. Choices and weights of the router stay
 * per layer in both (they are small, and Model.routing shows them). Everything here is backend
 * memory: no code in model/ looks at what a pointer points to. N = B*T. */
#ifndef PM_MODEL_ACTS_H
#define PM_MODEL_ACTS_H

#include "config.h"

typedef enum { PM_INFERENCE, PM_TRAINING } pm_mode;

/* What the router and the plan leave. R = N*A rows, G plan groups. */
typedef struct {
    float *z, *s,
        *p; /* (N, E) cosines, scores (= z for the identity gate), softmax of the scores */
    float *xnorm, *pnorm;   /* (N), (E) */
    int32_t *choice;        /* (N, A) */
    float *weight;          /* (N, A) */
    int32_t *row_off;       /* (G+1) */
    int32_t *row_token;     /* (R) */
    float *row_weight;      /* (R) */
    int32_t *tok_off;       /* (N+1) */
    int32_t *tok_row;       /* (R) */
    int32_t *choice_row;    /* (N, A) */
    float *centroid, *prob; /* (E, D), (E, E) */
    int32_t *count;         /* (E) */
    float *frac;            /* (B, E) */
} pm_route_acts;

/* One block. The residual stream x1 = stream before + gate * branch of the sublayer before; the
 * LayerNorm op that reads the stream does that addition. */
typedef struct {
    float *mod;           /* (B, 6 D): shift, scale, gate of attention, then of the FFN */
    float *x1;            /* (N, D) the stream that attention reads */
    float *mean1, *rstd1; /* (N) */
    float *y1;            /* (N, D) modulated */
    float *qkv;           /* (N, 3 H K) */
    float *lse;           /* (B, H, T) */
    float *heads;         /* (N, H K) attention before its projection */
    float *branch1;       /* (N, D) */
    float *x2;            /* (N, D) the stream that the FFN reads */
    float *mean2, *rstd2; /* (N) */
    float *y2;            /* (N, D) */
    float *pre;           /* (R, expert width) */
    float *pre_shared;    /* (N, shared width) */
    float *branch2;       /* (N, D) */
    pm_route_acts route;
} pm_block_acts;

typedef struct {
    int64_t B, N;
    pm_mode mode;

    /* what goes in: V voxels, C channels */
    int64_t *key;  /* (2) seed and position of the draws */
    float *x0;     /* (B, C, V) clean data */
    int64_t *y0;   /* (B) labels before the drop */
    float *x, *t;  /* (B, C, V), (B) */
    int64_t *y;    /* (B) labels */
    float *target; /* (B, C, V) */

    float *angles;            /* (B, 256) */
    float *time_pre, *time_h; /* (B, D) first time layer: before and after SiLU */
    float *time;              /* (B, D) time embedding */
    float *c, *silu_c;        /* (B, D) */
    int32_t *part;            /* (N) */
    float *tokens;            /* (N, D) patch embedding: the stream before block 0 */
    pm_block_acts *blocks;    /* (depth) host memory */
    float *final_mod;         /* (B, 2 D) */
    float *final_x;           /* (N, D) the stream at the end */
    float *final_mean, *final_rstd;
    float *final_y; /* (N, D) */
    float *patches; /* (N, p p C_out) */
    float *out;     /* (B, C_out, V) */

    /* backward; the gradient buffers are shared by all blocks */
    float *dloss; /* one number: the scale of every loss */
    float *dout, *dpatches;
    float *dstream;               /* (N, D) of the residual stream */
    float *dbranch;               /* (N, D) */
    float *dy;                    /* (N, max(D, H K)) of y1, y2, heads */
    float *dqkv;                  /* (N, 3 H K) */
    float *dmod, *dmod_next;      /* (B, 6 D) of this block, and of the block below */
    float *dfinal_mod;            /* (B, 2 D) */
    float *drow_weight, *dweight; /* (R), (N, A) */
    float *ds, *dp, *dz;          /* (N, E); dz = ds for the identity gate */
    float *dsilu, *dc, *dtime_h;  /* (B, D) */

    /* the sampler */
    double *schedule; /* (3) sigma, sigma_next, guidance */
    float *cond;      /* (B, C_out, V) the conditional output, while out is the other one */
} pm_acts;

/* Places everything from base on and returns the bytes in use. acts->blocks must be there
 * already. */
size_t pm_acts_place(const pm_config *cfg, int64_t B, pm_mode mode, char *base, pm_acts *acts);

#endif
