// routing_contrastive_loss.cu: contract in csrc/ops/routing_contrastive_loss.h.
//
// V clusters that are not empty; u_i = p_i/|p_i|, v_j = m_j/|m_j|, l_ij = <u_i, v_j> / temperature:
//
//   forward    m_i = sum of x over cluster i / count_i;  prob_ij = exp(l_ij) / sum_k exp(l_ik)
//              loss = weight / V * sum_i -log prob_ii
//   backward   A_ij = dloss weight / (V temperature) (prob_ij - [i = j])
//              dp_i += tangent of sum_j A_ij v_j / |p_i| at p_i          (cosine.cuh)
//              dm_j  = tangent of sum_i A_ij u_i / |m_j| at m_j
//              dx_n += sum over the clusters j of token n of dm_j / count_j
//
// Only x and dx are large. Bytes: forward x once (per 16 clusters: the rows that they have); backward dx
// read and written. Rows of tokens without a cluster are not touched. The rest, (E, D) and (E, E), is
// in the caches: a block per prototype and one per mean; what is 0 because V < 2 is found out there,
// so that the launches do not depend on the choices.
//
// Order of sums: over tokens ascending in a quarter of a slot, then the quarters, then as in cosine.cuh; over D a thread adds its columns, then a tree; over
// clusters in logsumexp and the loss, which are in double, a thread every 256th, then a tree; in
// dp and dm ascending.
#include "cosine.cuh"

namespace {

constexpr int WARPS = 4;     // of a block that sums rows of x
constexpr int CLUSTERS = 16; // whose sums a warp has: 8 KB of shared memory, 32 KB a block
constexpr int BATCH = 16; // tokens whose rows are under way at once: 4 KB of bf16, in 32 registers

// The choices of tokens. A: the slots that count; stride: all of them.
struct members {
    const int32_t *choice;
    int64_t A, stride, E;
    // The cluster of slot a, or -1: empty and forced slots, and an expert that an earlier slot names.
    __device__ int32_t cluster(int64_t n, int64_t a) const
    {
        const int32_t *const own = choice + n * stride, i = own[a];
        if (i < 0 || i >= E)
            return -1;
        for (int64_t earlier = 0; earlier < a; earlier++)
            if (own[earlier] == i)
                return -1;
        return i;
    }
};
members members_of(const pm_routing_contrastive_loss_args *g)
{
    const int64_t first = g->A < 1 ? g->A : 1;
    return {g->choice, g->assign == PM_ASSIGN_TOP1 ? first : g->A, g->A, g->E};
}

// ---------------------------------------------------------------- forward

// partial[slot, i, :] = sum of x over the members of cluster i in the slot; counts[slot, i]: how many. A
// block has 16 clusters and 128 columns of a slot, each of its warps a quarter of the tokens. Which sum a
// row goes to is only known by reading, and registers have no index: the sums are in shared memory, where
// each lane sees its own columns alone. A lane finds out about one of 32 tokens, so that no row waits
// for its choice.
template <class T, bool WIDE>
__global__ void __launch_bounds__(32 * WARPS)
    partial_kernel(int64_t N, int64_t D, int64_t tokens, const T *__restrict__ x, members who,
                   float *__restrict__ partial, int32_t *__restrict__ counts)
{
    __shared__ four sums[WARPS][CLUSTERS][32];
    __shared__ int32_t found[WARPS][CLUSTERS];
    const int warp = threadIdx.x / 32, lane = threadIdx.x % 32;
    const unsigned tiles = (unsigned)((D + COLUMNS - 1) / COLUMNS);
    const unsigned passes = (unsigned)((who.E + CLUSTERS - 1) / CLUSTERS);
    const int64_t slot = blockIdx.x / (tiles * passes), tile = blockIdx.x % tiles;
    const int64_t d = tile * COLUMNS + 4 * lane;
    const int64_t i0 = blockIdx.x / tiles % passes * CLUSTERS;
    const int64_t begin = slot * tokens + warp * (tokens / WARPS);
    const int64_t end = min(begin + tokens / WARPS, N);
    int32_t count = 0;                                       // of cluster i0 + lane
    const auto add = [&](int64_t i, const pm_quad<T> &row) { // the same i in all lanes; any
        if (i < 0 || i >= CLUSTERS)
            return;
        count += i == lane;
        four *const to = &sums[warp][i][lane];
        four sum = *to;
#pragma unroll
        for (int k = 0; k < 4; k++)
            sum.v[k] += row[k];
        *to = sum;
    };
    for (int i = 0; i < CLUSTERS; i++)
        sums[warp][i][lane] = {};
    for (int64_t n0 = begin; n0 < end; n0 += 32) {
        bool wanted = false;
        int64_t own = -1; // of the first slot
        for (int64_t a = 0; n0 + lane < end && a < who.A; a++) {
            const int64_t i = who.cluster(n0 + lane, a) - i0;
            wanted = wanted || (i >= 0 && i < CLUSTERS);
            own = a ? own : i;
        }
        const unsigned rows = __ballot_sync(PM_ALL, wanted);
        for (int step = 0; step < 32; step += BATCH) {
            pm_quad<T> u[BATCH];
#pragma unroll
            for (int r = 0; r < BATCH; r++)
                u[r] = load_quad<WIDE>(x + (n0 + step + r) * D, d, D, rows >> (step + r) & 1);
#pragma unroll
            for (int r = 0; r < BATCH; r++) {
                if (!(rows >> (step + r) & 1))
                    continue;
                add(__shfl_sync(PM_ALL, own, step + r), u[r]);
                for (int64_t a = 1; a < who.A; a++)
                    add(who.cluster(n0 + step + r, a) - i0, u[r]);
            }
        }
    }
    if (lane < CLUSTERS)
        found[warp][lane] = count;
    __syncthreads();
    for (int i = warp; i < CLUSTERS && i0 + i < who.E; i += WARPS) {
        four sum = sums[0][i][lane];
#pragma unroll
        for (int w = 1; w < WARPS; w++)
#pragma unroll
            for (int k = 0; k < 4; k++)
                sum.v[k] += sums[w][i][lane].v[k];
        store_four<WIDE>(partial + (slot * who.E + i0 + i) * D, d, D, sum);
        if (tile == 0 && lane == 0)
            counts[slot * who.E + i0 + i] = (found[0][i] + found[1][i]) +
                                            (found[2][i] + found[3][i]);
    }
}

// V; by a block, for all of it.
PM_DEVICE int64_t clusters_in_use(int64_t E, const int32_t *count)
{
    int64_t used = 0;
    for (int64_t i = 0; i < E; i += blockDim.x)
        used += __syncthreads_count(i + threadIdx.x < E && count[i + threadIdx.x] > 0);
    return used;
}

// Row i of prob, and row_loss[i] = -log prob_ii; 0 for an empty cluster, and when V < 2. A block per row, a
// warp per logit.
__global__ void __launch_bounds__(256)
    row_kernel(int64_t E, int64_t D, float temperature, const float *__restrict__ proto,
               const float *__restrict__ centroid, const int32_t *__restrict__ count,
               const float *__restrict__ norms, float *prob, double *__restrict__ row_loss)
{
    __shared__ float largests[8];
    __shared__ double part[32];
    const int64_t i = blockIdx.x, used = clusters_in_use(E, count);
    const int warp = threadIdx.x / 32, lane = threadIdx.x % 32;
    const bool valid = used >= 2 && count[i] > 0;
    float *const row = prob + i * E;
    const float scale = cosine_inverse(norms[i]) / temperature;
    float largest = -INFINITY; // a NaN is never the largest, but shows in the sum
    for (int64_t k = warp; k < E; k += 8) {
        float logit = 0;
        if (valid && count[k] > 0) {
            logit = cosine_dot(D, proto + i * D, centroid + k * D) *
                    (scale * cosine_inverse(norms[E + k]));
            largest = fmaxf(largest, logit);
        }
        if (lane == 0)
            row[k] = logit;
    }
    if (lane == 0)
        largests[warp] = largest;
    if (threadIdx.x == 0)
        row_loss[i] = 0;
    if (!valid)
        return;
    __syncthreads();
    for (int w = 0; w < 8; w++)
        largest = fmaxf(largest, largests[w]);
    const float own = row[i];
    double sum = 0;
    for (int64_t k = threadIdx.x; k < E; k += 256)
        sum += count[k] > 0 ? exp((double)row[k] - largest) : 0;
    sum = pm_block_sum(sum, part); // all have read row[i]
    for (int64_t k = threadIdx.x; k < E; k += 256)
        if (count[k] > 0)
            row[k] = (float)(exp((double)row[k] - largest) / sum);
    if (threadIdx.x == 0)
        row_loss[i] = log(sum) - ((double)own - largest);
}

__global__ void __launch_bounds__(256)
    loss_kernel(int64_t E, double weight, const int32_t *__restrict__ count,
                const double *__restrict__ row_loss, float *__restrict__ loss)
{
    __shared__ double part[32];
    const int64_t used = clusters_in_use(E, count);
    double sum = 0;
    for (int64_t i = threadIdx.x; i < E; i += 256)
        sum += row_loss[i];
    sum = pm_block_sum(sum, part);
    if (threadIdx.x == 0)
        *loss = used < 2 ? 0.0f : (float)(weight * sum / (double)used);
}

template <class T, bool WIDE>
pm_status partial_sums(pm_ctx *ctx, const pm_routing_contrastive_loss_args *g, float *partial,
                       int32_t *counts)
{
    const int64_t tiles = (g->D + COLUMNS - 1) / COLUMNS, passes = (g->E + CLUSTERS - 1) / CLUSTERS;
    PM_RUN(ctx, (partial_kernel<T, WIDE>), (unsigned)(slot_count(g->N, g->E) * passes * tiles),
           32 * WARPS, 0, g->N, g->D, slot_tokens(g->N, g->E), static_cast<const T *>(g->x),
           members_of(g), partial, counts);
    return PM_OK;
}

// ---------------------------------------------------------------- backward

// Blocks 0 .. E-1: dproto of a prototype; E .. 2E-1: dmean (E, D), dm_k / count_k of a mean. q: (2E, D) and
// weights: (2E, E) of scratch. A thread has every 256th column.
__global__ void __launch_bounds__(256)
    tangent_kernel(int64_t E, int64_t D, double scale_of_dloss, const float *__restrict__ dloss,
                   const float *__restrict__ proto, const float *__restrict__ centroid,
                   const int32_t *__restrict__ count, const float *__restrict__ prob,
                   const float *__restrict__ norms, float *weights, float *q,
                   float *__restrict__ dproto, float *__restrict__ dmean)
{
    __shared__ double rests[32];
    __shared__ float part[32];
    const bool of_mean = blockIdx.x >= E;
    const int64_t i = of_mean ? blockIdx.x - E : blockIdx.x, used = clusters_in_use(E, count);
    if (used < 2 || count[i] == 0) {
        for (int64_t d = threadIdx.x; of_mean && d < D; d += 256)
            dmean[i * D + d] = 0;
        return;
    }
    // prob_ii - 1 would cancel as the clusters part, and is minus the sum of the rest of the row.
    double rest = 0;
    for (int64_t k = threadIdx.x; k < E; k += 256)
        rest += k == i ? 0.0 : (double)prob[i * E + k];
    rest = pm_block_sum(rest, rests);

    const double scale = *dloss * scale_of_dloss / (double)used / (of_mean ? count[i] : 1);
    const float *const own_norms = of_mean ? norms + E : norms;
    const float *const other_norms = of_mean ? norms : norms + E;
    float *const w = weights + blockIdx.x * E;
    for (int64_t k = threadIdx.x; k < E; k += 256) {
        const double a = k == i ? -rest : (double)(of_mean ? prob[k * E + i] : prob[i * E + k]);
        w[k] = count[k] > 0 ? (float)(scale * a * cosine_inverse(own_norms[i]) *
                                      cosine_inverse(other_norms[k]))
                            : 0.0f;
    }
    __syncthreads();

    const float *const own = (of_mean ? centroid : proto) + i * D;
    const float *const others = of_mean ? proto : centroid;
    float *const sums = q + blockIdx.x * D; // a thread reads what it wrote
    float dot = 0;
    for (int64_t d = threadIdx.x; d < D; d += 256) {
        float sum = 0;
#pragma unroll 4 // loads that no branch separates
        for (int64_t k = 0; k < E; k++) {
            const float other = others[k * D + d];
            sum = count[k] > 0 ? fmaf(w[k], other, sum) : sum;
        }
        sums[d] = sum;
        dot = fmaf(own[d], sum, dot);
    }
    const float along = tangent_along(own_norms[i], pm_block_sum(dot, part));
    for (int64_t d = threadIdx.x; d < D; d += 256) {
        const float tangent = fmaf(along, own[d], sums[d]);
        if (of_mean)
            dmean[i * D + d] = tangent;
        else if (dproto)
            dproto[i * D + d] += tangent;
    }
}

// dx_n += the sum of dmean over the clusters of token n. A warp per token; of its row, STRIPS times 128
// columns are under way at once (3, 6, 8 or 9 are all).
constexpr int STRIPS = 3;

template <class T, bool WIDE>
__global__ void __launch_bounds__(32 * WARPS)
    dx_kernel(int64_t N, int64_t D, members who, const float *__restrict__ dmean,
              T *__restrict__ dx)
{
    const int lane = threadIdx.x % 32;
    const int64_t n = pm_thread() / 32;
    if (n >= N)
        return;
    bool wanted = false;
    for (int64_t a = 0; a < who.A; a++)
        wanted = wanted || who.cluster(n, a) >= 0;
    for (int64_t d = 4 * lane; wanted && d < D; d += STRIPS * COLUMNS) {
        pm_quad<T> old[STRIPS];
        four sum[STRIPS] = {};
#pragma unroll
        for (int s = 0; s < STRIPS; s++)
            old[s] = load_quad<WIDE>(dx + n * D, d + s * COLUMNS, D);
        for (int64_t a = 0; a < who.A; a++) {
            const int32_t i = who.cluster(n, a);
            if (i < 0)
                continue;
#pragma unroll
            for (int s = 0; s < STRIPS; s++) {
                const pm_quad<float> add = load_quad<WIDE>(dmean + i * D, d + s * COLUMNS, D);
#pragma unroll
                for (int k = 0; k < 4; k++)
                    sum[s].v[k] += add[k];
            }
        }
#pragma unroll
        for (int s = 0; s < STRIPS; s++) {
#pragma unroll
            for (int k = 0; k < 4; k++)
                sum[s].v[k] += old[s][k];
            store_four<WIDE>(dx + n * D, d + s * COLUMNS, D, sum[s]);
        }
    }
}

template <class T, bool WIDE>
pm_status backward_dx(pm_ctx *ctx, const pm_routing_contrastive_loss_args *g, const float *dmean,
                      void *dx)
{
    PM_RUN(ctx, (dx_kernel<T, WIDE>), pm_blocks(g->N, WARPS), 32 * WARPS, 0, g->N, g->D,
           members_of(g), dmean, static_cast<T *>(dx));
    return PM_OK;
}

// ---------------------------------------------------------------- scratch

struct room {
    float *norms; // (2, E) of prototypes and of means
    float *centroid, *prob, *partial;
    int32_t *count, *counts;
    double *row_loss;
    float *weights, *q, *dmean;
};
size_t take(const pm_routing_contrastive_loss_args *g, bool backward, void *scratch, room *r)
{
    char *const start = static_cast<char *>(scratch);
    const int64_t E = g->E, D = g->D, slots = slot_count(g->N, E);
    r->norms = pm_take<float>(&scratch, 2 * E);
    if (backward) {
        r->weights = pm_take<float>(&scratch, 2 * E * E);
        r->q = pm_take<float>(&scratch, 2 * E * D);
        r->dmean = pm_take<float>(&scratch, E * D);
    } else {
        r->centroid = g->centroid ? g->centroid : pm_take<float>(&scratch, E * D);
        r->count = g->count ? g->count : pm_take<int32_t>(&scratch, E);
        r->prob = g->prob ? g->prob : pm_take<float>(&scratch, E * E);
        r->partial = pm_take<float>(&scratch, slots * E * D);
        r->counts = pm_take<int32_t>(&scratch, slots * E);
        r->row_loss = pm_take<double>(&scratch, E);
    }
    return (size_t)(static_cast<char *>(scratch) - start);
}

} // namespace

template <class T>
size_t routing_contrastive_loss_workspace(const pm_ctx *, const pm_routing_contrastive_loss_args *g,
                                          bool backward)
{
    static char anywhere; // no address is looked at
    room r;
    return take(g, backward, &anywhere, &r);
}

template <class T>
pm_status routing_contrastive_loss_forward(pm_ctx *ctx, const pm_routing_contrastive_loss_args *g,
                                           void *scratch)
{
    if (!(g->temperature > 0.0))
        return pm_fail(ctx, PM_EINVAL,
                       "routing_contrastive_loss: temperature is %g, expected more than 0",
                       g->temperature);
    room r;
    take(g, false, scratch, &r);
    PM_TRY(fours(g->D, g->x, nullptr, nullptr)
               ? partial_sums<T, true>(ctx, g, r.partial, r.counts)
               : partial_sums<T, false>(ctx, g, r.partial, r.counts));
    PM_RUN(ctx, slot_sum_kernel, pm_blocks(g->E * g->D, 32), 32 * SLOT_WARPS, 0,
           slot_count(g->N, g->E), g->E, g->D, r.partial, r.counts, r.centroid, r.count);
    PM_RUN(ctx, norm_kernel, pm_blocks(2 * g->E, 4), 128, 0, g->E, g->D, g->proto, r.centroid,
           r.norms);
    PM_RUN(ctx, row_kernel, (unsigned)g->E, 256, 0, g->E, g->D, (float)g->temperature, g->proto,
           r.centroid, r.count, r.norms, r.prob, r.row_loss);
    PM_RUN(ctx, loss_kernel, 1, 256, 0, g->E, g->weight, r.count, r.row_loss, g->loss);
    return PM_OK;
}

template <class T>
pm_status routing_contrastive_loss_backward(pm_ctx *ctx, const pm_routing_contrastive_loss_args *g,
                                            const pm_routing_contrastive_loss_grads *d,
                                            void *scratch)
{
    room r;
    take(g, true, scratch, &r);
    PM_RUN(ctx, norm_kernel, pm_blocks(2 * g->E, 4), 128, 0, g->E, g->D, g->proto, g->centroid,
           r.norms);
    PM_RUN(ctx, tangent_kernel, (unsigned)(2 * g->E), 256, 0, g->E, g->D,
           g->weight / g->temperature, d->dloss, g->proto, g->centroid, g->count, g->prob, r.norms,
           r.weights, r.q, d->dproto, r.dmean);
    if (!d->dx)
        return PM_OK;
    return fours(g->D, d->dx, nullptr, nullptr) ? backward_dx<T, true>(ctx, g, r.dmean, d->dx)
                                                : backward_dx<T, false>(ctx, g, r.dmean, d->dx);
}

PM_INSTANTIATE_BOTH(routing_contrastive_loss)
