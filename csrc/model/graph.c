/* graph.c: stretches of a step, recorded once as graphs of the backend and run again.
 *
 * A recording holds every argument of every op, pointers included. So it is found by a key that has all
 * that these are made of, and whatever changes from step to step (data, seed and position, rates, noise
 * levels) lies in backend memory and is written there before. The first run of a key goes op by op: it
 * costs nothing extra, and it loads kernels and makes plans, which may not happen in a recording. */
#include "state.h"

#include <string.h>

void pm_forget_graphs(pm_ctx *ctx, pm_model *m)
{
    for (int i = 0; i < m->graph_count; i++)
        if (m->graphs[i].graph)
            ctx->backend->free_graph(ctx, m->graphs[i].graph);
    m->graph_count = 0;
}

static pm_graph *find(pm_model *m, const pm_graph_key *key)
{
    for (int i = 0; i < m->graph_count; i++)
        if (!memcmp(&m->graphs[i].key, key, sizeof *key))
            return &m->graphs[i];
    return NULL;
}

/* A place for a key that was not seen before; the oldest makes room. */
static void add(pm_ctx *ctx, pm_model *m, const pm_graph_key *key)
{
    if (m->graph_count == PM_GRAPHS) {
        if (m->graphs[0].graph)
            ctx->backend->free_graph(ctx, m->graphs[0].graph);
        memmove(m->graphs, m->graphs + 1, (PM_GRAPHS - 1) * sizeof *m->graphs);
        m->graph_count--;
    }
    m->graphs[m->graph_count++] = (pm_graph){.key = *key};
}

static pm_status record(pm_ctx *ctx, pm_graph *g, pm_status (*body)(void *arg), void *arg)
{
    char why[sizeof ctx->message];
    void *graph = NULL;
    PM_TRY(ctx->backend->begin_capture(ctx));
    int (*const poll)(void *) = ctx->poll;
    ctx->poll = NULL; /* a signal handler may do anything, and nothing may be done now */
    const pm_status status = body(arg);
    ctx->poll = poll;
    memcpy(why, ctx->message, sizeof why);
    const pm_status end = ctx->backend->end_capture(ctx, &graph);
    if (status != PM_OK) { /* why is the reason; the end only follows from it */
        if (graph)
            ctx->backend->free_graph(ctx, graph);
        memcpy(ctx->message, why, sizeof why);
        return status;
    }
    g->graph = graph;
    return end;
}

pm_status pm_run_stretch(pm_ctx *ctx, pm_model *m, const pm_graph_key *key,
                         pm_status (*body)(void *arg), void *arg, bool *changed)
{
    if (!ctx->backend->launch || m->profile.on)
        return body(arg);
    pm_graph *const g = find(m, key);
    if (!g) {
        PM_TRY(body(arg));
        add(ctx, m, key); /* after a run that went well */
        return PM_OK;
    }
    if (!g->graph) {
        const pm_status status = record(ctx, g, body, arg);
        *changed = false;
        PM_TRY(status);
    }
    if (ctx->poll && ctx->poll(ctx->poll_arg))
        return pm_fail(ctx, PM_EINTR, "interrupted");
    *changed = true;
    return ctx->backend->launch(ctx, g->graph);
}
