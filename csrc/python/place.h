/* place.h: the arrays of one call of an op in the memory of its backend: where they are when that is
 * the host's, copies otherwise. */
#ifndef PM_PYTHON_PLACE_H
#define PM_PYTHON_PLACE_H

#include "../promoe.h"

typedef struct {
    void *data; /* of the array; NULL: there is none */
    int64_t count, item;
    bool act, writes; /* floats that are activations; to be fetched afterwards */
    bool device;      /* data is in the backend's memory already */
    void *at;         /* in the backend's memory */
    size_t bytes;     /* there */
    bool owned;
} place;

/* Fills in at, bytes and owned of n places. Arrays with the same data (aliases that a contract
 * allows) are one there, too. place_free must follow, whatever came of it. */
pm_status place_arrays(pm_ctx *ctx, place *places, int n);
/* Brings back what the op may have written. */
pm_status place_fetch(pm_ctx *ctx, const place *places, int n);
/* count numbers of `item` bytes to `at`, in the backend's memory, or back; bf16: they are 2 bytes there
 * and floats here, rounded to nearest even. */
pm_status place_move(pm_ctx *ctx, void *at, void *data, int64_t count, size_t item, bool bf16,
                     bool back);
void place_free(pm_ctx *ctx, const place *places, int n);

#endif
