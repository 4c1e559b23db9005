/* place.c: arrays to the memory of a backend, and back. */
#include "place.h"

#include <string.h>

/* The nearest bf16, ties to even; a NaN stays one. */
static uint16_t to_bf16(float x)
{
    uint32_t bits;
    memcpy(&bits, &x, sizeof bits);
    if (x != x)
        return (uint16_t)(bits >> 16 | 0x40);
    return (uint16_t)((bits + 0x7fff + (bits >> 16 & 1)) >> 16);
}

static float from_bf16(uint16_t half)
{
    const uint32_t bits = (uint32_t)half << 16;
    float x;
    memcpy(&x, &bits, sizeof x);
    return x;
}

/* Between floats and the backend's bf16, in pieces. */
static pm_status move_bf16(pm_ctx *ctx, uint16_t *there, float *array, int64_t count, bool back)
{
    enum { PIECE = 4096 };
    uint16_t piece[PIECE];
    for (int64_t at = 0; at < count; at += PIECE) {
        const int64_t n = count - at < PIECE ? count - at : PIECE;
        if (back)
            PM_TRY(ctx->backend->read(ctx, piece, there + at, (size_t)n * sizeof *piece));
        for (int64_t i = 0; i < n; i++)
            if (back)
                array[at + i] = from_bf16(piece[i]);
            else
                piece[i] = to_bf16(array[at + i]);
        if (!back)
            PM_TRY(ctx->backend->write(ctx, there + at, piece, (size_t)n * sizeof *piece));
    }
    return PM_OK;
}

pm_status place_move(pm_ctx *ctx, void *at, void *data, int64_t count, size_t item, bool bf16,
                     bool back)
{
    const size_t bytes = (size_t)count * item;
    if (bf16)
        return move_bf16(ctx, at, data, count, back);
    if (!bytes)
        return PM_OK;
    return back ? ctx->backend->read(ctx, data, at, bytes)
                : ctx->backend->write(ctx, at, data, bytes);
}

static pm_status move(pm_ctx *ctx, const place *p, bool back)
{
    return place_move(ctx, p->at, p->data, p->count, (size_t)p->item,
                      p->act && ctx->backend->act_bytes == sizeof(uint16_t), back);
}

static size_t at_least_one(size_t bytes) { return bytes ? bytes : 1; }

pm_status place_arrays(pm_ctx *ctx, place *places, int n)
{
    for (place *p = places; p < places + n; p++) {
        if (!p->data)
            continue;
        p->bytes = (size_t)(p->count * (p->act ? (int64_t)ctx->backend->act_bytes : p->item));
        if (ctx->backend->host || p->device)
            p->at = p->data;
        for (const place *q = places; q < p && !p->at; q++)
            if (!q->device && q->data == p->data && q->bytes == p->bytes && q->act == p->act)
                p->at = q->at;
        if (p->at)
            continue;
        p->at = ctx->backend->alloc(ctx, at_least_one(p->bytes));
        if (!p->at)
            return PM_ENOMEM;
        p->owned = true;
        PM_TRY(move(ctx, p, false));
    }
    return PM_OK;
}

pm_status place_fetch(pm_ctx *ctx, const place *places, int n)
{
    for (const place *p = places; p < places + n && !ctx->backend->host; p++)
        if (p->writes && p->at && !p->device)
            PM_TRY(move(ctx, p, true));
    return PM_OK;
}

void place_free(pm_ctx *ctx, const place *places, int n)
{
    for (const place *p = places; p < places + n; p++)
        if (p->owned)
            ctx->backend->free(ctx, p->at, at_least_one(p->bytes));
}
