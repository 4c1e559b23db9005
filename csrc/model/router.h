/* router.h: what a router is to the layer around it (moe.c): it reads the modulated tokens and
 * makes choices and weights, which routing_plan turns into the rows that experts works on. */
#ifndef PM_MODEL_ROUTER_H
#define PM_MODEL_ROUTER_H

#include "run.h"

typedef struct pm_router {
    const char *name;
    /* Names and places its own tensors, in the official order. */
    void (*visit_params)(pm_walk *walk, const pm_config *cfg, pm_block_places *places);
    /* From tokens y2 to choice and weight; in training also its auxiliary losses. */
    pm_status (*plan)(pm_run *r, int64_t block);
    /* dy += the gradient through dweight and through the auxiliary losses; its tensors' +=. */
    pm_status (*backward)(pm_run *r, int64_t block);
} pm_router;

/* The router of a configuration with experts. */
const pm_router *pm_router_of(const pm_config *cfg);

#endif
