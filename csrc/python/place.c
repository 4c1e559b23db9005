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

/* Between an array of activations and the backend's bf16, in pieces. */
static pm_status move_bf16(pm_ctx *ctx, const place *p, bool back)
{
    enum { PIECE = 4096 };
    uint16_t piece[PIECE], *const there = p->at;
    float *const array = p->data;
    for (int64_t at = 0; at < p->count; at += PIECE) {
        const int64_t n = p->count - at < PIECE ? p->count - at : PIECE;
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

static pm_status move(pm_ctx *ctx, const place *p, bool back)
{
    if (p->act && ctx->backend->act_bytes == sizeof(uint16_t))
        return move_bf16(ctx, p, back);
    if (!p->bytes)
        return PM_OK;
    return back ? ctx->backend->read(ctx, p->data, p->at, p->bytes)
                : ctx->backend->write(ctx, p->at, p->data, p->bytes);
}

static size_t at_least_one(size_t bytes) { return bytes ? bytes : 1; }

pm_status place_arrays(pm_ctx *ctx, place *places, int n)
{
    for (place *p = places; p < places + n; p++) {
        if (!p->data)
            continue;
        p->bytes = (size_t)(p->count * (p->act ? (int64_t)ctx->backend->act_bytes : p->item));
        if (ctx->backend->host)
            p->at = p->data;
        for (const place *q = places; q < p && !p->at; q++)
            if (q->data == p->data && q->bytes == p->bytes && q->act == p->act)
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
        if (p->writes && p->at)
            PM_TRY(move(ctx, p, true));
    return PM_OK;
}

void place_free(pm_ctx *ctx, const place *places, int n)
{
    for (const place *p = places; p < places + n; p++)
        if (p->owned)
            ctx->backend->free(ctx, p->at, at_least_one(p->bytes));
}
