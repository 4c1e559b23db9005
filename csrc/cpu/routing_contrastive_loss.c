/* routing_contrastive_loss: contract in ops/routing_contrastive_loss.h.
 *
 * V valid clusters; u_i = p_i/|p_i|, v_j = m_j/|m_j|, l_ij = <u_i, v_j> / temperature:
 *
 *   forward    m_i = sum of x over cluster i / count_i;  prob_ij = exp(l_ij) / sum_k exp(l_ik)
 *              loss = weight / V * sum_i -log prob_ii
 *   backward   A_ij = dloss weight / (V temperature) (prob_ij - [i = j])
 *              dp_i += tangent at p_i of sum_j A_ij v_j / |p_i|
 *              dm_j  = tangent at m_j of sum_i A_ij u_i / |m_j|
 *              dx_n += sum over the clusters j of token n of dm_j / count_j
 *
 * Cosines, tangents and sums over tokens in slots are those of prototypical_routing.c. Only x and dx
 * are large: each is streamed once, a row at a time. */

typedef struct {
    const pm_routing_contrastive_loss_args *g;
    const pm_routing_contrastive_loss_grads *d;
    float *partial;         /* (slots, E, D) sums of x over clusters */
    int32_t *partial_count; /* (slots, E) */
    float *centroid;        /* (E, D) */
    int32_t *count;         /* (E) */
    int32_t *valid;         /* (V) the clusters that are not empty, ascending */
    int64_t V;
    float *pnorm, *mnorm; /* (E) norms, only of valid clusters */
    double *row_loss;     /* (V) -log prob_ii */
    float *prob_row;      /* per worker (E): where prob goes when it is not saved */
    float *dtoken;        /* (E, D) dm_j / count_j: what a member of cluster j adds to its dx */
    float *dproto_row;    /* per worker (D) */
} routing_contrastive_loss_job;

/* Cuts scratch; returns how many bytes the cut takes. */
static size_t routing_contrastive_loss_cut(const pm_ctx *ctx,
                                           const pm_routing_contrastive_loss_args *g, bool backward,
                                           void *scratch, routing_contrastive_loss_job *j)
{
    char *start = scratch;
    size_t E = (size_t)g->E, D = (size_t)g->D, slots = (size_t)cosine_slots(g->N, g->E);
    size_t workers = (size_t)pm_pool_threads(ctx->pool);
    j->valid = pm_take(&scratch, E * sizeof *j->valid);
    j->pnorm = pm_take(&scratch, E * sizeof *j->pnorm);
    j->mnorm = pm_take(&scratch, E * sizeof *j->mnorm);
    if (backward) {
        j->centroid = g->centroid;
        j->count = g->count;
        j->dtoken = pm_take(&scratch, E * D * sizeof *j->dtoken);
        j->dproto_row = pm_take(&scratch, workers * D * sizeof *j->dproto_row);
    } else {
        j->centroid = g->centroid ? g->centroid : pm_take(&scratch, E * D * sizeof *j->centroid);
        j->count = g->count ? g->count : pm_take(&scratch, E * sizeof *j->count);
        j->partial = pm_take(&scratch, slots * E * D * sizeof *j->partial);
        j->partial_count = pm_take(&scratch, slots * E * sizeof *j->partial_count);
        j->row_loss = pm_take(&scratch, E * sizeof *j->row_loss);
        j->prob_row = pm_take(&scratch, workers * E * sizeof *j->prob_row);
    }
    return (size_t)((char *)scratch - start);
}

static size_t routing_contrastive_loss_workspace(const pm_ctx *ctx,
                                                 const pm_routing_contrastive_loss_args *g,
                                                 bool backward)
{
    routing_contrastive_loss_job j;
    return routing_contrastive_loss_cut(ctx, g, backward, (void *)64, &j); /* any aligned address */
}

/* The cluster of slot a of a token, or -1: empty and forced slots, and an expert that an earlier
 * slot names already. */
static inline int32_t routing_contrastive_loss_cluster(const int32_t *choice, int64_t a, int64_t E)
{
    int32_t i = choice[a];
    if (i < 0 || i >= E)
        return -1;
    for (int64_t earlier = 0; earlier < a; earlier++)
        if (choice[earlier] == i)
            return -1;
    return i;
}
static inline int64_t routing_contrastive_loss_slots(const pm_routing_contrastive_loss_args *g)
{
    return g->assign == PM_ASSIGN_TOP1 ? pm_min(1, g->A) : g->A;
}

/* ---------------------------------------------------------------- forward */

static void routing_contrastive_loss_sum(void *arg, int64_t task, int worker)
{
    (void)worker;
    const routing_contrastive_loss_job *j = arg;
    const pm_routing_contrastive_loss_args *g = j->g;
    int64_t E = g->E, D = g->D, A = routing_contrastive_loss_slots(g);
    int64_t tokens = cosine_slot_tokens(g->N, E), n1 = pm_min(g->N, (task + 1) * tokens);
    float *sum = j->partial + task * E * D;
    int32_t *count = j->partial_count + task * E;
    memset(sum, 0, (size_t)(E * D) * sizeof(float));
    memset(count, 0, (size_t)E * sizeof(int32_t));
    for (int64_t n = task * tokens; n < n1; n++)
        for (int64_t a = 0; a < A; a++) {
            int32_t i = routing_contrastive_loss_cluster(g->choice + n * g->A, a, E);
            if (i < 0)
                continue;
            count[i]++;
            cosine_axpy(D, 1.0f, g->x + n * D, sum + i * D);
        }
}

static void routing_contrastive_loss_mean(void *arg, int64_t i, int worker)
{
    (void)worker;
    const routing_contrastive_loss_job *j = arg;
    const pm_routing_contrastive_loss_args *g = j->g;
    int64_t slots = cosine_slots(g->N, g->E), count = 0;
    for (int64_t s = 0; s < slots; s++)
        count += j->partial_count[s * g->E + i];
    j->count[i] = (int32_t)count;
    cosine_sum_slots(slots, g->E, g->D, j->partial, i, count ? 1.0 / (double)count : 0.0,
                     j->centroid + i * g->D);
}

/* valid and the norms, from centroid and count. */
static void routing_contrastive_loss_prepare(routing_contrastive_loss_job *j)
{
    int64_t D = j->g->D;
    j->V = 0;
    for (int64_t i = 0; i < j->g->E; i++) {
        if (!j->count[i])
            continue;
        const float *p = j->g->proto + i * D, *m = j->centroid + i * D;
        j->valid[j->V++] = (int32_t)i;
        j->pnorm[i] = sqrtf(cosine_dot(D, p, p));
        j->mnorm[i] = sqrtf(cosine_dot(D, m, m));
    }
}

/* Row i of prob, and -log prob_ii. */
static void routing_contrastive_loss_row(void *arg, int64_t task, int worker)
{
    const routing_contrastive_loss_job *j = arg;
    const pm_routing_contrastive_loss_args *g = j->g;
    int64_t E = g->E, D = g->D, i = j->valid[task];
    float *prob = g->prob ? g->prob + i * E : j->prob_row + (int64_t)worker * E;
    double sum = 0.0, own = 0.0;
    float largest = -INFINITY, scale = cosine_inverse(j->pnorm[i]) / (float)g->temperature;
    for (int64_t v = 0; v < j->V; v++) {
        int32_t k = j->valid[v];
        prob[k] = cosine_dot(D, g->proto + i * D, j->centroid + k * D) *
                  (scale * cosine_inverse(j->mnorm[k]));
        largest = prob[k] > largest ? prob[k] : largest;
    }
    for (int64_t v = 0; v < j->V; v++)
        sum += exp((double)prob[j->valid[v]] - largest);
    own = log(sum) - ((double)prob[i] - largest);
    for (int64_t v = 0; v < j->V; v++)
        prob[j->valid[v]] = (float)(exp((double)prob[j->valid[v]] - largest) / sum);
    j->row_loss[task] = own;
}

static pm_status routing_contrastive_loss_forward(pm_ctx *ctx,
                                                  const pm_routing_contrastive_loss_args *g,
                                                  void *scratch)
{
    int64_t E = g->E;
    if (!(g->temperature > 0.0))
        return pm_fail(ctx, PM_EINVAL,
                       "routing_contrastive_loss: temperature is %g, expected more than 0",
                       g->temperature);
    routing_contrastive_loss_job j = {.g = g};
    routing_contrastive_loss_cut(ctx, g, false, scratch, &j);
    pm_parallel(ctx->pool, cosine_slots(g->N, E), routing_contrastive_loss_sum, &j);
    pm_parallel(ctx->pool, E, routing_contrastive_loss_mean, &j);
    routing_contrastive_loss_prepare(&j);
    if (g->prob)
        memset(g->prob, 0, (size_t)(E * E) * sizeof(float));
    *g->loss = 0.0f;
    if (j.V < 2)
        return PM_OK;
    pm_parallel(ctx->pool, j.V, routing_contrastive_loss_row, &j);
    double loss = 0.0;
    for (int64_t v = 0; v < j.V; v++)
        loss += j.row_loss[v];
    *g->loss = (float)(g->weight * loss / (double)j.V);
    return PM_OK;
}

/* ---------------------------------------------------------------- backward */

/* A_ik. prob_ii - 1 would cancel as the clusters part, and is minus the sum of the rest of the row. */
static double routing_contrastive_loss_pair(const routing_contrastive_loss_job *j, int64_t i,
                                            int64_t k)
{
    const pm_routing_contrastive_loss_args *g = j->g;
    double scale = (double)*j->d->dloss * g->weight / ((double)j->V * g->temperature);
    const float *prob = g->prob + i * g->E;
    if (i != k)
        return scale * (double)prob[k];
    double rest = 0.0;
    for (int64_t v = 0; v < j->V; v++)
        rest += j->valid[v] == i ? 0.0 : (double)prob[j->valid[v]];
    return -scale * rest;
}

/* dproto of valid cluster i. */
static void routing_contrastive_loss_dproto(void *arg, int64_t task, int worker)
{
    const routing_contrastive_loss_job *j = arg;
    int64_t D = j->g->D, i = j->valid[task];
    float *q = j->dproto_row + (int64_t)worker * D;
    double b = cosine_inverse(j->pnorm[i]);
    memset(q, 0, (size_t)D * sizeof(float));
    for (int64_t v = 0; v < j->V; v++) {
        int64_t k = j->valid[v];
        double c = routing_contrastive_loss_pair(j, i, k) * b * cosine_inverse(j->mnorm[k]);
        cosine_axpy(D, (float)c, j->centroid + k * D, q);
    }
    cosine_tangent(D, j->g->proto + i * D, j->pnorm[i], q);
    cosine_axpy(D, 1.0f, q, j->d->dproto + i * D);
}

/* dm_k / count_k of valid cluster k. */
static void routing_contrastive_loss_dmean(void *arg, int64_t task, int worker)
{
    (void)worker;
    const routing_contrastive_loss_job *j = arg;
    int64_t D = j->g->D, k = j->valid[task];
    float *q = j->dtoken + k * D;
    double b = cosine_inverse(j->mnorm[k]) / (double)j->count[k];
    memset(q, 0, (size_t)D * sizeof(float));
    for (int64_t v = 0; v < j->V; v++) {
        int64_t i = j->valid[v];
        double c = routing_contrastive_loss_pair(j, i, k) * b * cosine_inverse(j->pnorm[i]);
        cosine_axpy(D, (float)c, j->g->proto + i * D, q);
    }
    cosine_tangent(D, j->centroid + k * D, j->mnorm[k], q);
}

#define ROUTING_CONTRASTIVE_LOSS_BLOCK 64 /* tokens per task */
static void routing_contrastive_loss_dx(void *arg, int64_t task, int worker)
{
    (void)worker;
    const routing_contrastive_loss_job *j = arg;
    const pm_routing_contrastive_loss_args *g = j->g;
    int64_t D = g->D, A = routing_contrastive_loss_slots(g);
    int64_t n1 = pm_min(g->N, (task + 1) * ROUTING_CONTRASTIVE_LOSS_BLOCK);
    for (int64_t n = task * ROUTING_CONTRASTIVE_LOSS_BLOCK; n < n1; n++)
        for (int64_t a = 0; a < A; a++) {
            int32_t k = routing_contrastive_loss_cluster(g->choice + n * g->A, a, g->E);
            if (k >= 0)
                cosine_axpy(D, 1.0f, j->dtoken + k * D, j->d->dx + n * D);
        }
}

static pm_status routing_contrastive_loss_backward(pm_ctx *ctx,
                                                   const pm_routing_contrastive_loss_args *g,
                                                   const pm_routing_contrastive_loss_grads *d,
                                                   void *scratch)
{
    routing_contrastive_loss_job j = {.g = g, .d = d};
    routing_contrastive_loss_cut(ctx, g, true, scratch, &j);
    routing_contrastive_loss_prepare(&j);
    if (j.V < 2)
        return PM_OK;
    if (d->dproto)
        pm_parallel(ctx->pool, j.V, routing_contrastive_loss_dproto, &j);
    if (d->dx) {
        pm_parallel(ctx->pool, j.V, routing_contrastive_loss_dmean, &j);
        pm_parallel(ctx->pool, pm_blocks(g->N, ROUTING_CONTRASTIVE_LOSS_BLOCK),
                    routing_contrastive_loss_dx, &j);
    }
    return PM_OK;
}
