/* acts.h: the activations of one (B, mode), laid out in one arena.
 *
 * Training keeps what backward reads, per block. Inference keeps nothing: the blocks share one
 * set of buffers, and what only backward needs is NULL. Choices and weights of the router stay
 * per layer in both (they are small, and Model.routing shows them). Everything here is backend
 * memory: no code in model/ looks at what a pointer points to. A pm_act is a number of the
 * backend's own size (promoe.h). N = B*T.
 *
 * Time and label reach the network only through the condition of an image, so whatever is computed
 * from them has a row for each condition and not for each image. In inference a condition is a
 * (time, label) pair that occurs: images that share one share its row, and the sampler works out
 * those of several steps at a time. In training it is an image. */
#ifndef PM_MODEL_ACTS_H
#define PM_MODEL_ACTS_H

#include "config.h"

typedef enum { PM_INFERENCE, PM_TRAINING } pm_mode;

enum { PM_FEW_CONDITIONS = 16 }; /* there is always room for so many: a tile of every product */

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
    pm_act *mod, *dmod;   /* (conditions, 6 D): shift, scale, gate of attention, then of the FFN */
    float *x1;            /* (N, D) the stream that attention reads */
    float *mean1, *rstd1; /* (N) */
    pm_act *y1;           /* (N, D) modulated */
    pm_act *qkv;          /* (N, 3 H K) */
    float *lse;           /* (B, H, T) */
    pm_act *heads;        /* (N, H K) attention before its projection */
    pm_act *branch1;      /* (N, D) */
    float *x2;            /* (N, D) the stream that the FFN reads */
    float *mean2, *rstd2; /* (N) */
    pm_act *y2;           /* (N, D) */
    pm_act *pre;          /* (R, expert width) */
    pm_act *pre_shared;   /* (N, shared width) */
    pm_act *branch2;      /* (N, D) */
    pm_route_acts route;
} pm_block_acts;

typedef struct {
    int64_t B, N;
    pm_mode mode;
    int64_t conditions, most_conditions; /* in use; at most */

    /* what goes in: V voxels, C channels */
    int64_t *key;  /* (2) seed and position of the draws */
    float *x0;     /* (B, C, V) clean data */
    int64_t *y0;   /* (B) labels before the drop */
    float *x;      /* (B, C, V) */
    int64_t *y;    /* (B) labels; in inference (2, B): there may be two passes */
    float *target; /* (B, C, V) */

    float *t;                  /* (conditions) */
    int64_t *label;            /* (conditions) in training y itself */
    int32_t *condition;        /* of each image, shaped as y; NULL in training */
    pm_act *angles;            /* (conditions, 256) */
    pm_act *time_pre, *time_h; /* (conditions, D) first time layer: before and after SiLU */
    pm_act *time;              /* (conditions, D) time embedding */
    pm_act *c, *silu_c;        /* (conditions, D) */
    int32_t *part;             /* (N) */
    float *tokens;             /* (N, D) patch embedding: the stream before block 0 */
    pm_block_acts *blocks;     /* (depth) host memory */
    pm_act *final_mod;         /* (conditions, 2 D) */
    float *final_x;            /* (N, D) the stream at the end */
    float *final_mean, *final_rstd;
    pm_act *final_y; /* (N, D) */
    pm_act *patches; /* (N, p p C_out) */
    float *out;      /* (B, C_out, V) */

    /* backward; the gradient buffers are shared by all blocks */
    float *dloss;                 /* one number: the scale of every loss */
    float *dout;                  /* (B, C_out, V) */
    pm_act *dpatches;             /* (N, p p C_out) */
    float *dstream;               /* (N, D) of the residual stream */
    pm_act *dbranch;              /* (N, D) */
    pm_act *dy;                   /* (N, max(D, H K)) of y1, y2, heads */
    pm_act *dqkv;                 /* (N, 3 H K) */
    pm_act *dfinal_mod;           /* (conditions, 2 D) */
    float *drow_weight, *dweight; /* (R), (N, A) */
    float *ds, *dp, *dz;          /* (N, E); dz = ds for the identity gate */
    pm_act *dsilu, *dc, *dtime_h; /* (conditions, D) */

    /* the sampler */
    double *schedule; /* (3) sigma, sigma_next, guidance */
    float *cond;      /* (B, C_out, V) the conditional output, while out is the other one */
} pm_acts;

/* Places everything, for at most most_conditions, from base on and returns the bytes in use; an activation takes act_bytes (of the
 * backend). acts->blocks must be there already. */
size_t pm_acts_place(const pm_config *cfg, int64_t B, pm_mode mode, size_t act_bytes, char *base,
                     pm_acts *acts);

#endif
