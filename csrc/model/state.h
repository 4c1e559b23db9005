/* state.h: the inside of a pm_model, for the files of model/ that change it. */
#ifndef PM_MODEL_STATE_H
#define PM_MODEL_STATE_H

#include "model.h"
#include "run.h"

enum { PM_LOSS_SLOTS = 16 }; /* micro-batches whose losses wait in backend memory */

/* Numbers that an update leaves and reads, in backend memory. The loss slots follow, PM_LOSS_SLOTS + 1. */
typedef struct {
    double hyper[8]; /* PM_HYPER_COUNT */
    double norm;
    double unused[7];
} pm_step_numbers;

/* The distinct conditions of a batch, in the order in which they first occur: host memory. */
typedef struct {
    int64_t count;
    int64_t *label; /* (count) */
    float *t;       /* (count) */
    int32_t *image; /* (images) the condition of each image */
    int32_t *slot;  /* the hash table: a condition, or -1 */
    int64_t room;   /* for so many images */
} pm_conditions;

/* What is recorded as a graph: a stretch of a step whose arguments are all in the key, so that the same
 * key means the same arguments. Whole words, so that keys can be compared as bytes. */
typedef enum {
    PM_STRETCH_ACCUMULATE,
    PM_STRETCH_UPDATE,
    PM_STRETCH_CONDITIONS,
    PM_STRETCH_SAMPLE
} pm_stretch;
typedef struct {
    int64_t stretch, B, conditions, variant;
    const void *memory[7];
} pm_graph_key;
enum { PM_GRAPHS = 16 }; /* kept; a training run has 2, or 3 when the last micro-batch is smaller */
typedef struct {
    pm_graph_key key;
    void *graph; /* NULL: it has run once, op by op */
} pm_graph;

struct pm_model {
    pm_config cfg;
    pm_layout layout;
    int64_t seed, step, skipped;

    /* slabs, in backend memory; all but param are made when they are first needed */
    float *slab[PM_SLABS];
    char *derived, *ema_derived; /* ema_derived: made by the first sample() from the EMA */
    bool ema_derived_fresh;
    pm_twin *twins;                /* layout.matrices, in backend memory */
    int32_t *foff;                 /* dense (2), then experts (G+S+1) */
    pm_step_numbers *numbers;      /* and PM_LOSS_SLOTS * pm_loss_count floats behind */
    pm_step_numbers *host_numbers; /* where they are read to: host memory */

    /* one arena for activations and scratch, for the batch size and mode seen last */
    char *arena;
    size_t arena_bytes;
    pm_acts acts; /* acts.B = 0: nothing is placed */
    size_t scratch_at, scratch_bytes;
    int threads;              /* that scratch was measured for */
    pm_conditions conditions; /* of the batch seen last */

    pm_profile profile;

    pm_graph graphs[PM_GRAPHS]; /* the first graph_count; the oldest first */
    int graph_count;

    /* gradients since the last update */
    bool gradients_incomplete;
    int slots;                        /* losses waiting in backend memory */
    double slot_scale[PM_LOSS_SLOTS]; /* their weights */
    double mse, aux, weight;          /* weighted sums of those fetched, and the sum of weights */
};

/* Backend memory, zeroed; PM_ENOMEM says what for. */
pm_status pm_take_memory(pm_ctx *ctx, size_t bytes, const char *what, void *pointer_to_pointer);
pm_status pm_need_slab(pm_ctx *ctx, pm_model *m, pm_slab slab);

/* The arena holds at least so much. What was in it is lost when it must grow. */
pm_status pm_need_arena(pm_ctx *ctx, pm_model *m, size_t bytes);
/* The activations are placed for (B, mode) and the scratch is enough for a whole pass of that
 * mode. */
pm_status pm_need_acts(pm_ctx *ctx, pm_model *m, int64_t B, pm_mode mode);

/* t NULL: all images have the same time. */
pm_status pm_conditions_find(pm_ctx *ctx, pm_conditions *c, int64_t images, const float *t,
                             const int64_t *y);
void pm_conditions_free(pm_conditions *c);

/* A run over the live weights, with the activations and scratch that pm_need_acts placed. */
pm_run pm_model_run(pm_ctx *ctx, pm_model *m);
/* Live or EMA weights, with up-to-date derived twins. */
pm_status pm_model_weights(pm_ctx *ctx, pm_model *m, bool ema, pm_weights *weights);
/* Rewrites the derived twins of the live weights, which have changed. */
pm_status pm_model_derive(pm_ctx *ctx, pm_model *m);

/* graph.c: body(arg) is a stretch of ops. Its first time with a key it runs op by op; its second time it is
 * recorded, and from then on the recording runs. *changed: whatever body has set it to, or true while
 * a recording runs; false when nothing ran. Without graphs, or while somebody measures: body(arg). */
pm_status pm_run_stretch(pm_ctx *ctx, pm_model *m, const pm_graph_key *key,
                         pm_status (*body)(void *arg), void *arg, bool *changed);
void pm_forget_graphs(pm_ctx *ctx, pm_model *m);

/* Losses of a micro-batch; slot PM_LOSS_SLOTS is where the ops write them. */
float *pm_loss_slot(const pm_model *m, int slot);
pm_status pm_check_labels(pm_ctx *ctx, const pm_config *cfg, int64_t B, const int64_t *y);

#define PM_WRITE(ctx, to, from, count)                                                             \
    PM_TRY((ctx)->backend->write(ctx, to, from, (size_t)(count) * sizeof *(to)))
#define PM_READ(ctx, to, from, count)                                                              \
    PM_TRY((ctx)->backend->read(ctx, to, from, (size_t)(count) * sizeof *(to)))

#endif
