/* params.h: where every parameter lies, and what it is called.
 *
 * param, grad, m, v and ema are slabs of one layout: the official tensors, row-major, in the
 * order of the walk, those that are trained first and the frozen ones behind. A tensor starts at
 * a multiple of PM_SLAB_ALIGN elements; what lies between is zero and stays zero. The experts of
 * a layer are the exception that their op asks for: all up rows, all up biases, all down blocks,
 * all down biases, so that a name maps to a part of one of these four.
 *
 * The derived slab (packed panels on a CPU) follows the matrices in the same order. */
#ifndef PM_MODEL_PARAMS_H
#define PM_MODEL_PARAMS_H

#include "config.h"

enum { PM_SLAB_ALIGN = 64 };

typedef enum { PM_TRAIN, PM_FROZEN } pm_kind;
typedef enum {
    PM_INIT_ZERO,
    PM_INIT_ONE,
    PM_INIT_XAVIER, /* uniform in +-sqrt(6 / (rows + columns)); columns = the rest of the shape */
    PM_INIT_NORMAL, /* standard deviation 0.02 */
    PM_INIT_SINCOS, /* positions */
} pm_init;

/* One official tensor: elements at .. at + count of a slab. */
typedef struct {
    char name[128];
    int index; /* its place in the walk */
    int ndim;
    int64_t shape[5];
    int64_t at, count;
    pm_kind kind;
    pm_init init;
} pm_param;

/* A weight matrix (F, D): its first element in a slab and its first byte in the derived slab.
 * For the experts of a layer: the first group; the others follow. */
typedef struct {
    int64_t at, derived;
} pm_matrix;

/* Places of one block's tensors: elements of a slab. */
typedef struct {
    pm_matrix qkv, proj, up, down, adaln;
    int64_t qkv_bias, proj_bias, up_bias, down_bias, adaln_bias;
    int64_t q_weight, q_bias, k_weight, k_bias; /* qk-norm */
    int64_t proto;                              /* the router's prototypes (E, D) */
} pm_block_places;

typedef struct {
    int64_t train, total; /* elements: a slab's trained range, and all of it */
    int64_t derived;      /* bytes of the derived slab */
    int64_t params;       /* official tensors */
    int64_t numbers;      /* numbers in them (without the gaps) */

    int64_t pos;
    pm_matrix patch, time0, time2, final, final_adaln;
    int64_t patch_bias, time0_bias, time2_bias, final_bias, final_adaln_bias;
    int64_t table;
    pm_block_places *blocks; /* depth */
    pm_twin *matrices;       /* in the order of the slabs */
    int64_t matrix_count;
} pm_layout;

typedef pm_status (*pm_param_visitor)(void *arg, const pm_param *param);

/* Calls visit for every official tensor, in the official order (methods of the public code: the
 * state dict), and stops at the first that does not return PM_OK. */
pm_status pm_visit_params(pm_ctx *ctx, const pm_config *cfg, pm_param_visitor visit, void *arg);

/* The places of everything. PM_ENOMEM leaves *layout empty. */
pm_status pm_layout_make(pm_ctx *ctx, const pm_config *cfg, pm_layout *layout);
void pm_layout_free(const pm_config *cfg, pm_layout *layout);

/* What a router says about its own tensors (router.h): a walk in progress, and one tensor of it. */
typedef struct pm_walk pm_walk;
int64_t pm_walk_tensor(pm_walk *walk, const char *name, pm_init init, int ndim,
                       const int64_t *shape);

/* Elements first .. first + n - 1 of the initial value of a tensor, which is a function of seed
 * and of its place in the walk; first is a multiple of 4. */
void pm_param_init(const pm_config *cfg, const pm_param *param, int64_t seed, int64_t first,
                   int64_t n, float *out);

#endif
