/* prototypical_routing: contract in ops/prototypical_routing.h.
 *
 * Nothing is normalised in memory. With a_n = 1/max(|x_n|, eps) and b_i = 1/max(|p_i|, eps):
 *
 *   forward    z_ni = a_n b_i <x_n, p_i>
 *   backward   c_ni = dz_ni a_n b_i
 *              dx_n += tangent of sum_i c_ni p_i at x_n
 *              dp_i += tangent of sum_n c_ni x_n at p_i
 *
 * where the tangent of q at u is q - u <u, q> / |u|^2: moving u along itself does not change its
 * direction. Below eps the norm is the constant eps, and the tangent of q is q. */

/* ---------------------------------------------------------------- cosines */

/* These are also those of routing_contrastive_loss.c. */

#define COSINE_EPS 1e-12f /* as in PyTorch's normalize */

static inline float cosine_inverse(float norm)
{
    return 1.0f / (norm < COSINE_EPS ? COSINE_EPS : norm); /* a NaN stays one */
}

/* <a, b> over D numbers: four chains per lane, summed pairwise. */
static float cosine_dot(int64_t D, const float *a, const float *b)
{
    vf s0 = v_zero(), s1 = v_zero(), s2 = v_zero(), s3 = v_zero();
    int64_t d = 0;
    for (; d + 4 * PM_WIDTH <= D; d += 4 * PM_WIDTH) {
        s0 = v_fma(v_load(a + d), v_load(b + d), s0);
        s1 = v_fma(v_load(a + d + PM_WIDTH), v_load(b + d + PM_WIDTH), s1);
        s2 = v_fma(v_load(a + d + 2 * PM_WIDTH), v_load(b + d + 2 * PM_WIDTH), s2);
        s3 = v_fma(v_load(a + d + 3 * PM_WIDTH), v_load(b + d + 3 * PM_WIDTH), s3);
    }
    for (; d + PM_WIDTH <= D; d += PM_WIDTH)
        s0 = v_fma(v_load(a + d), v_load(b + d), s0);
    if (d < D)
        s1 = v_fma(v_load_n(a + d, D - d), v_load_n(b + d, D - d), s1);
    return v_sum((s0 + s1) + (s2 + s3));
}

/* y += c x over D numbers. */
static void cosine_axpy(int64_t D, float c, const float *x, float *y)
{
    vf k = v_set(c);
    int64_t d = 0;
    for (; d + PM_WIDTH <= D; d += PM_WIDTH)
        v_store(y + d, v_fma(k, v_load(x + d), v_load(y + d)));
    if (d < D)
        v_store_n(y + d, v_fma(k, v_load_n(x + d, D - d), v_load_n(y + d, D - d)), D - d);
}

/* Removes from q (D) its component along u (D), whose norm is given. */
static void cosine_tangent(int64_t D, const float *u, float norm, float *q)
{
    if (norm < COSINE_EPS)
        return;
    cosine_axpy(D, (float)(-(double)cosine_dot(D, u, q) / ((double)norm * norm)), u, q);
}

/* Sums over tokens go to slots: a slot has an (E, D) partial sum of a fixed range of tokens, and the
 * slots are added in order, in double. Clearing and adding a slot costs as much as E tokens, so it has
 * at least as many tokens, and all slots together take no more memory than x (or are one). */
#define COSINE_SLOTS 32
static inline int64_t cosine_slot_tokens(int64_t N, int64_t E)
{
    return pm_max(pm_max(256, E), pm_blocks(N, COSINE_SLOTS));
}
static inline int64_t cosine_slots(int64_t N, int64_t E)
{
    return pm_blocks(N, cosine_slot_tokens(N, E));
}

/* out (D) = sum over slots of row i of the (E, D) partial sums, times scale. */
static void cosine_sum_slots(int64_t slots, int64_t E, int64_t D, const float *partial, int64_t i,
                             double scale, float *out)
{
    enum { BLOCK = 64 };
    double sum[BLOCK];
    for (int64_t d0 = 0; d0 < D; d0 += BLOCK) {
        int64_t n = pm_min(BLOCK, D - d0);
        memset(sum, 0, sizeof sum);
        for (int64_t s = 0; s < slots; s++) {
            const float *from = partial + (s * E + i) * D + d0;
            for (int64_t d = 0; d < n; d++)
                sum[d] += (double)from[d];
        }
        for (int64_t d = 0; d < n; d++)
            out[d0 + d] = (float)(sum[d] * scale);
    }
}

/* ---------------------------------------------------------------- forward */

/* The routable ones of the tokens n0..n1-1, ascending: how many. */
static inline int64_t prototypical_routing_rows(const int32_t *part, int64_t n0, int64_t n1,
                                                int32_t *rows)
{
    int64_t m = 0;
    for (int64_t n = n0; n < n1; n++)
        if (!part || part[n] == -1)
            rows[m++] = (int32_t)n;
    return m;
}

typedef struct {
    const pm_prototypical_routing_args *g;
    float *panels; /* the prototypes, packed as the right operand of x . proto^T */
    float *b;      /* (E) 1/max(|p_i|, eps) */
} prototypical_routing_job;

typedef struct {
    const prototypical_routing_job *j;
    int32_t rows[PM_ROWS]; /* the tokens of this block */
    float a[PM_ROWS];      /* 1/max(|x_n|, eps) */
} prototypical_routing_block;

static size_t prototypical_routing_backward_workspace(const pm_ctx *ctx,
                                                      const pm_prototypical_routing_args *g);
static size_t prototypical_routing_workspace(const pm_ctx *ctx,
                                             const pm_prototypical_routing_args *g, bool backward)
{
    if (backward)
        return prototypical_routing_backward_workspace(ctx, g);
    return pm_round64((size_t)product_packed(PM_FP32, g->E, g->D) * 4) +
           pm_round64((size_t)g->E * 4);
}

/* Norms and panel of the PM_NR prototypes of one panel. */
static void prototypical_routing_pack(void *arg, int64_t task, int worker)
{
    (void)worker;
    const prototypical_routing_job *j = arg;
    const pm_prototypical_routing_args *g = j->g;
    int64_t E = g->E, D = g->D, first = task * PM_NR, n = pm_min(PM_NR, E - first);
    for (int64_t i = first; i < first + n; i++) {
        float norm = sqrtf(cosine_dot(D, g->proto + i * D, g->proto + i * D));
        j->b[i] = cosine_inverse(norm);
        if (g->pnorm)
            g->pnorm[i] = norm;
    }
    product_pack_rows(PM_FP32, n, D, g->proto + first * D, D, j->panels + first * D);
}

/* z = a b <x, p> on a finished tile. */
static void prototypical_routing_scale(void *arg, int64_t row0, int m, int64_t col0, int64_t n,
                                       float *tile)
{
    const prototypical_routing_block *t = arg;
    const prototypical_routing_job *j = t->j;
    for (int64_t r = 0; r < m; r++) {
        float *z = j->g->z + (int64_t)t->rows[row0 + r] * j->g->E + col0;
        float a = t->a[row0 + r];
        for (int64_t i = 0; i < n; i++)
            z[i] = tile[r * PM_NR + i] * (a * j->b[col0 + i]);
    }
}

/* PM_ROWS tokens: x comes to the cache for its norm, and is still there for the product. */
static void prototypical_routing_tokens(void *arg, int64_t task, int worker)
{
    (void)worker;
    const prototypical_routing_job *j = arg;
    const pm_prototypical_routing_args *g = j->g;
    int64_t E = g->E, D = g->D, n0 = task * PM_ROWS, n1 = pm_min(g->N, n0 + PM_ROWS);
    prototypical_routing_block t;
    const float *x[PM_ROWS];
    t.j = j;
    int64_t m = prototypical_routing_rows(g->part, n0, n1, t.rows);
    if (m < n1 - n0) {
        memset(g->z + n0 * E, 0, (size_t)((n1 - n0) * E) * sizeof(float));
        if (g->xnorm)
            memset(g->xnorm + n0, 0, (size_t)(n1 - n0) * sizeof(float));
    }
    for (int64_t r = 0; r < m; r++) {
        x[r] = g->x + (int64_t)t.rows[r] * D;
        float norm = sqrtf(cosine_dot(D, x[r], x[r]));
        t.a[r] = cosine_inverse(norm);
        if (g->xnorm)
            g->xnorm[t.rows[r]] = norm;
    }
    if (m)
        product_block(PM_FP32, m, x, D, E, j->panels, 0, product_panels(E),
                      prototypical_routing_scale, &t, (product_target){0});
}

static pm_status prototypical_routing_forward(pm_ctx *ctx, const pm_prototypical_routing_args *g,
                                              void *scratch)
{
    if (g->N > INT32_MAX)
        return pm_fail(ctx, PM_EINVAL, "prototypical_routing: N is %lld, at most 2^31 - 1 tokens",
                       (long long)g->N);
    prototypical_routing_job j = {.g = g};
    j.panels = pm_take(&scratch, (size_t)product_packed(PM_FP32, g->E, g->D) * 4);
    j.b = pm_take(&scratch, (size_t)g->E * 4);
    pm_parallel(ctx->pool, product_panels(g->E), prototypical_routing_pack, &j);
    pm_parallel(ctx->pool, pm_blocks(g->N, PM_ROWS), prototypical_routing_tokens, &j);
    return PM_OK;
}

/* ---------------------------------------------------------------- backward */

#define PROTOTYPICAL_ROUTING_BACK (2 * PM_MR) /* tokens whose x and q stay in L2 together */

typedef struct {
    const pm_prototypical_routing_args *g;
    const pm_prototypical_routing_grads *d;
    float *panels;  /* the prototypes, packed as the right operand of c . proto */
    float *b;       /* (E) 1/max(|p_i|, eps) */
    float *partial; /* (slots, E, D) sums over tokens of c x */
    char *worker;   /* per worker: c, q, then c and x packed for the sum */
    size_t worker_bytes;
} prototypical_routing_back_job;

static size_t prototypical_routing_back_c(int64_t E)
{
    return (size_t)(PROTOTYPICAL_ROUTING_BACK * E) * sizeof(float);
}
static size_t prototypical_routing_back_q(int64_t D)
{
    return (size_t)(PROTOTYPICAL_ROUTING_BACK * product_panels(D) * PM_NR) * sizeof(float);
}
static size_t prototypical_routing_worker_bytes(const pm_prototypical_routing_args *g)
{
    return pm_round64(prototypical_routing_back_c(g->E)) +
           pm_round64(prototypical_routing_back_q(g->D)) +
           product_side_bytes(PM_FP32, PROTOTYPICAL_ROUTING_BACK, g->E) +
           product_side_bytes(PM_FP32, PROTOTYPICAL_ROUTING_BACK, g->D);
}

static size_t prototypical_routing_backward_workspace(const pm_ctx *ctx,
                                                      const pm_prototypical_routing_args *g)
{
    return pm_round64((size_t)product_packed(PM_FP32, g->D, g->E) * 4) +
           pm_round64((size_t)g->E * 4) +
           pm_round64((size_t)(cosine_slots(g->N, g->E) * g->E * g->D) * 4) +
           (size_t)pm_pool_threads(ctx->pool) * prototypical_routing_worker_bytes(g);
}

typedef struct {
    float *q;   /* rows of ld floats */
    int64_t ld; /* D, rounded up to whole panels */
} prototypical_routing_q;

static void prototypical_routing_put_q(void *arg, int64_t row0, int m, int64_t col0, int64_t n,
                                       float *tile)
{
    (void)n;
    const prototypical_routing_q *to = arg;
    for (int64_t r = 0; r < m; r++)
        memcpy(to->q + (row0 + r) * to->ld + col0, tile + r * PM_NR, PM_NR * sizeof(float));
}

/* dx_n += q_n - along_n x_n, with q_n = sum_i c_ni p_i. The products go a panel at a time, but x and
 * dx come from memory, so they are visited a whole row at a time, in a pass of their own: half the
 * time of adding to dx tile by tile. */
static void prototypical_routing_back_dx(const prototypical_routing_back_job *j, int64_t m,
                                         const int32_t *rows, const float *const *c,
                                         const float *along, float *q)
{
    int64_t D = j->g->D;
    prototypical_routing_q to = {q, product_panels(D) * PM_NR};
    product_block(PM_FP32, m, c, j->g->E, D, j->panels, 0, product_panels(D),
                  prototypical_routing_put_q, &to, (product_target){0});
    for (int64_t r = 0; r < m; r++, q += to.ld) {
        const float *x = j->g->x + rows[r] * D;
        float *dx = j->d->dx + rows[r] * D;
        vf k = v_set(-along[r]);
        int64_t d = 0;
        for (; d + PM_WIDTH <= D; d += PM_WIDTH)
            v_store(dx + d, v_load(dx + d) + v_fma(k, v_load(x + d), v_load(q + d)));
        if (d < D)
            v_store_n(dx + d,
                      v_load_n(dx + d, D - d) + v_fma(k, v_load_n(x + d, D - d), v_load(q + d)),
                      D - d);
    }
}

/* One slot's tokens, a few at a time: their dx, and their share of the sum for dproto. */
static void prototypical_routing_back_tokens(void *arg, int64_t task, int worker)
{
    const prototypical_routing_back_job *j = arg;
    const pm_prototypical_routing_args *g = j->g;
    int64_t E = g->E, D = g->D, tokens = cosine_slot_tokens(g->N, E);
    int64_t n1 = pm_min(g->N, (task + 1) * tokens);
    void *scratch = j->worker + (size_t)worker * j->worker_bytes;
    float *c = pm_take(&scratch, prototypical_routing_back_c(E));
    float *q = pm_take(&scratch, prototypical_routing_back_q(D));
    product_side left = product_side_take(PM_FP32, PROTOTYPICAL_ROUTING_BACK, E, false, &scratch);
    product_side right = product_side_take(PM_FP32, PROTOTYPICAL_ROUTING_BACK, D, false, &scratch);
    float *partial = j->partial + task * E * D;
    int32_t rows[PROTOTYPICAL_ROUTING_BACK];
    float along[PROTOTYPICAL_ROUTING_BACK]; /* <x_n, q_n> / |x_n|^2 */
    const float *c_rows[PROTOTYPICAL_ROUTING_BACK], *x_rows[PROTOTYPICAL_ROUTING_BACK];
    if (j->d->dproto)
        memset(partial, 0, (size_t)(E * D) * sizeof(float));
    for (int64_t n0 = task * tokens; n0 < n1; n0 += PROTOTYPICAL_ROUTING_BACK) {
        int64_t n2 = pm_min(n1, n0 + PROTOTYPICAL_ROUTING_BACK);
        int64_t m = prototypical_routing_rows(g->part, n0, n2, rows);
        for (int64_t r = 0; r < m; r++) {
            const float *z = g->z + rows[r] * E, *dz = j->d->dz + rows[r] * E;
            float norm = g->xnorm[rows[r]], a = cosine_inverse(norm);
            float zdz = 0.0f; /* = <x_n, q_n> */
            for (int64_t i = 0; i < E; i++) {
                c[r * E + i] = dz[i] * (a * j->b[i]);
                zdz += z[i] * dz[i];
            }
            along[r] = norm < COSINE_EPS ? 0.0f : zdz * a * a;
            c_rows[r] = c + r * E;
            x_rows[r] = g->x + rows[r] * D;
        }
        if (m && j->d->dx)
            prototypical_routing_back_dx(j, m, rows, c_rows, along, q);
        if (m && j->d->dproto) {
            product_side_pack(PM_FP32, &left, 0, m, c_rows, E, NULL, NULL);
            product_side_pack(PM_FP32, &right, 0, m, x_rows, D, NULL, NULL);
            product_wgrad(PM_FP32, &left, &right, 0, m, (product_wgrad_share){0, E, 0, D}, partial,
                          D);
        }
    }
}

/* dproto of one prototype: the slots' sum, its tangent. */
static void prototypical_routing_back_proto(void *arg, int64_t i, int worker)
{
    (void)worker;
    const prototypical_routing_back_job *j = arg;
    const pm_prototypical_routing_args *g = j->g;
    int64_t D = g->D;
    float *q = j->partial + i * D; /* the first slot's row i, which no other task reads */
    cosine_sum_slots(cosine_slots(g->N, g->E), g->E, D, j->partial, i, 1.0, q);
    cosine_tangent(D, g->proto + i * D, g->pnorm[i], q);
    cosine_axpy(D, 1.0f, q, j->d->dproto + i * D);
}

static pm_status prototypical_routing_backward(pm_ctx *ctx, const pm_prototypical_routing_args *g,
                                               const pm_prototypical_routing_grads *d,
                                               void *scratch)
{
    int64_t E = g->E, D = g->D;
    if (!g->N)
        return PM_OK;
    prototypical_routing_back_job j = {.g = g, .d = d};
    j.panels = pm_take(&scratch, (size_t)product_packed(PM_FP32, D, E) * 4);
    j.b = pm_take(&scratch, (size_t)E * 4);
    j.partial = pm_take(&scratch, (size_t)(cosine_slots(g->N, E) * E * D) * 4);
    j.worker_bytes = prototypical_routing_worker_bytes(g);
    j.worker = scratch;
    for (int64_t i = 0; i < E; i++)
        j.b[i] = cosine_inverse(g->pnorm[i]);
    if (d->dx)
        product_pack_cols(PM_FP32, D, E, g->proto, D, j.panels);
    pm_parallel(ctx->pool, cosine_slots(g->N, E), prototypical_routing_back_tokens, &j);
    if (d->dproto)
        pm_parallel(ctx->pool, E, prototypical_routing_back_proto, &j);
    return PM_OK;
}
