/* conditions.c: the distinct (time, label) pairs of a batch, by a hash table in host memory. */
#include "state.h"

#include <string.h>

#include "../base/os.h"

/* A power of two, and twice the images: half of the table stays empty. */
static int64_t slots_for(int64_t images)
{
    int64_t slots = 16;
    while (slots < 2 * images)
        slots *= 2;
    return slots;
}

static size_t conditions_bytes(int64_t images)
{
    return (size_t)images * (sizeof(int64_t) + sizeof(float) + sizeof(int32_t)) +
           (size_t)slots_for(images) * sizeof(int32_t);
}

void pm_conditions_free(pm_conditions *c)
{
    if (c->label)
        pm_os_free(c->label, conditions_bytes(c->room));
    *c = (pm_conditions){0};
}

static pm_status need_room(pm_ctx *ctx, pm_conditions *c, int64_t images)
{
    if (images <= c->room)
        return PM_OK;
    pm_conditions_free(c);
    c->label = pm_os_alloc(conditions_bytes(images));
    if (!c->label)
        return pm_fail(ctx, PM_ENOMEM, "no memory for the conditions of %lld images",
                       (long long)images);
    c->room = images;
    c->t = (float *)(c->label + images);
    c->image = (int32_t *)(c->t + images);
    c->slot = c->image + images;
    return PM_OK;
}

static uint32_t bits_of(float x)
{
    uint32_t bits;
    memcpy(&bits, &x, sizeof bits);
    return bits;
}

/* The number of the condition (t, label): a new one, when there was none. */
static int32_t condition_of(pm_conditions *c, int64_t slots, float t, int64_t label)
{
    uint64_t hash = ((uint64_t)label << 32 ^ bits_of(t)) * 0x9e3779b97f4a7c15u;
    for (uint64_t i = hash >> 32;; i++) {
        int32_t *const slot = &c->slot[i & (uint64_t)(slots - 1)];
        if (*slot < 0) {
            c->t[c->count] = t;
            c->label[c->count] = label;
            return *slot = (int32_t)c->count++;
        }
        if (c->label[*slot] == label && bits_of(c->t[*slot]) == bits_of(t))
            return *slot;
    }
}

pm_status pm_conditions_find(pm_ctx *ctx, pm_conditions *c, int64_t images, const float *t,
                             const int64_t *y)
{
    PM_TRY(need_room(ctx, c, images));
    const int64_t slots = slots_for(images); /* of those that there is room for */
    memset(c->slot, 0xff, (size_t)slots * sizeof *c->slot);
    c->count = 0;
    for (int64_t b = 0; b < images; b++)
        c->image[b] = condition_of(c, slots, t ? t[b] : 0, y[b]);
    return PM_OK;
}
