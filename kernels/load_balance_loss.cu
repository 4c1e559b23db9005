// load_balance_loss.cu: contract in csrc/ops/load_balance_loss.h. A set S is the batch, or an image.
//
//   forward    a block per image: sums of p, in double, and slots of its routable tokens;
//              a block per set: f and sum_i f_i P_i; one block: the mean over the sets that have tokens
//   backward   a block per image: its routable tokens; one block: what f is scaled by; a pass over dp
//
// Bytes: forward p, choice and part once: 4 N (E + A + 1); backward part twice, dp written.
// Order of sums: over the tokens of an image a thread adds every (256 / lanes)-th, then these in order;
// over images a lane every 32nd, then a tree; over experts and sets a warp or thread every so many,
// then a tree. Counts are integers.
#include "rows.cuh"

namespace {

constexpr int THREADS = PM_ROW_THREADS, WARPS = THREADS / 32;

PM_DEVICE bool is_routable(const int32_t *part, int64_t n) { return !part || part[n] == -1; }

// The routable tokens of image blockIdx.x; counts: 32 numbers of shared memory.
PM_DEVICE int64_t routable_of_image(int64_t T, const int32_t *part, int64_t *counts)
{
    int64_t own = 0;
    for (int64_t n = threadIdx.x; n < T; n += THREADS)
        own += is_routable(part, blockIdx.x * T + n);
    return pm_block_sum(own, counts);
}

__global__ void __launch_bounds__(THREADS)
    image_kernel(int64_t T, int64_t E, int64_t A, int lanes, const float *__restrict__ p,
                 const int32_t *__restrict__ choice, const int32_t *__restrict__ part,
                 double *__restrict__ sums, int64_t *__restrict__ slots, int64_t *__restrict__ size)
{
    __shared__ int64_t counts[32];
    __shared__ double sum_parts[THREADS];
    __shared__ int64_t slot_parts[THREADS];
    const int64_t first = blockIdx.x * T, routable = routable_of_image(T, part, counts);
    const int lane = threadIdx.x % lanes;
    if (threadIdx.x == 0)
        size[blockIdx.x] = routable;
    for (int64_t i0 = 0; i0 < E; i0 += lanes) { // lanes experts at a time
        const int64_t i = i0 + lane;
        double sum = 0;
        int64_t chosen = 0;
        for (int64_t n = first + threadIdx.x / lanes; i < E && n < first + T;
             n += THREADS / lanes) {
            if (!is_routable(part, n))
                continue;
            sum += p[n * E + i];
            for (int64_t a = 0; a < A; a++)
                chosen += choice[n * A + a] == i;
        }
        sum_parts[threadIdx.x] = sum;
        slot_parts[threadIdx.x] = chosen;
        __syncthreads();
        if (threadIdx.x / lanes == 0 && i < E) {
            for (int k = threadIdx.x + lanes; k < THREADS; k += lanes) {
                sum += sum_parts[k];
                chosen += slot_parts[k];
            }
            sums[blockIdx.x * E + i] = sum;
            slots[blockIdx.x * E + i] = chosen;
        }
        __syncthreads();
    }
}

// Of images b0 .. b0 + images - 1: frac, and their loss and size as a set. A warp per expert.
__global__ void __launch_bounds__(THREADS)
    set_kernel(int64_t images, int64_t E, int64_t A, const double *__restrict__ sums,
               const int64_t *__restrict__ slots, const int64_t *__restrict__ size,
               float *__restrict__ frac, double *__restrict__ set_loss,
               int64_t *__restrict__ set_size)
{
    __shared__ int64_t counts[32];
    __shared__ double part[32];
    const int warp = threadIdx.x / 32, lane = threadIdx.x % 32;
    const int64_t b0 = blockIdx.x * images, b1 = b0 + images;
    int64_t tokens = 0;
    for (int64_t b = b0 + threadIdx.x; b < b1; b += THREADS)
        tokens += size[b];
    tokens = pm_block_sum(tokens, counts);
    double loss = 0;
    for (int64_t i = warp; i < E; i += WARPS) {
        double sum = 0;
        int64_t chosen = 0;
        for (int64_t b = b0 + lane; b < b1; b += 32) {
            sum += sums[b * E + i];
            chosen += slots[b * E + i];
        }
        sum = pm_warp_sum(sum);
        chosen = pm_warp_sum(chosen);
        const double f = tokens ? (double)E * (double)chosen / ((double)A * (double)tokens) : 0;
        for (int64_t b = b0 + lane; frac && b < b1; b += 32)
            frac[b * E + i] = (float)f;
        if (lane == 0 && tokens)
            loss += f * (sum / (double)tokens);
    }
    loss = pm_block_sum(loss, part);
    if (threadIdx.x == 0) {
        set_loss[blockIdx.x] = loss;
        set_size[blockIdx.x] = tokens;
    }
}

__global__ void __launch_bounds__(THREADS)
    loss_kernel(int64_t sets, double weight, const double *__restrict__ set_loss,
                const int64_t *__restrict__ set_size, float *__restrict__ loss)
{
    __shared__ int64_t counts[32];
    __shared__ double part[32];
    double sum = 0;
    int64_t used = 0;
    for (int64_t s = threadIdx.x; s < sets; s += THREADS) {
        sum += set_loss[s];
        used += set_size[s] > 0;
    }
    sum = pm_block_sum(sum, part);
    used = pm_block_sum(used, counts);
    if (threadIdx.x == 0)
        *loss = used ? (float)(weight * (sum / (double)used)) : 0.0f;
}

// ---------------------------------------------------------------- backward

__global__ void __launch_bounds__(THREADS)
    size_kernel(int64_t T, const int32_t *__restrict__ part, int64_t *__restrict__ size)
{
    __shared__ int64_t counts[32];
    const int64_t routable = routable_of_image(T, part, counts);
    if (threadIdx.x == 0)
        size[blockIdx.x] = routable;
}

// factor[b] = dloss weight / |S|, over the number of images for "sequence"; 0 when S is empty
__global__ void __launch_bounds__(THREADS)
    factor_kernel(int64_t B, bool sequence, double weight, const float *__restrict__ dloss,
                  const int64_t *__restrict__ size, double *__restrict__ factor)
{
    __shared__ int64_t all_parts[32], image_parts[32];
    int64_t all = 0, images = 0;
    for (int64_t b = threadIdx.x; b < B; b += THREADS) {
        all += size[b];
        images += size[b] > 0;
    }
    all = pm_block_sum(all, all_parts);
    images = pm_block_sum(images, image_parts);
    const double scale = *dloss * weight;
    for (int64_t b = threadIdx.x; b < B; b += THREADS)
        factor[b] = !size[b]   ? 0
                    : sequence ? scale / (double)images / (double)size[b]
                               : scale / (double)all;
}

// dp[n, i] = factor f_i
__global__ void dp_kernel(int64_t count, int64_t T, int64_t E, const int32_t *__restrict__ part,
                          const float *__restrict__ frac, const double *__restrict__ factor,
                          float *__restrict__ dp)
{
    for (int64_t k = pm_thread(); k < count; k += pm_threads()) {
        const int64_t n = k / E, i = k % E, b = n / T;
        dp[k] = is_routable(part, n) ? (float)(factor[b] * frac[b * E + i]) : 0.0f;
    }
}

int64_t sets_of(const pm_load_balance_loss_args *g) { return g->per == PM_PER_SEQUENCE ? g->B : 1; }

struct room {
    int64_t *size, *slots, *set_size;
    double *sums, *set_loss, *factor;
};
size_t take(const pm_load_balance_loss_args *g, bool backward, void *scratch, room *r)
{
    char *const start = static_cast<char *>(scratch);
    r->size = pm_take<int64_t>(&scratch, g->B);
    if (backward) {
        r->factor = pm_take<double>(&scratch, g->B);
    } else {
        r->sums = pm_take<double>(&scratch, g->B * g->E);
        r->slots = pm_take<int64_t>(&scratch, g->B * g->E);
        r->set_loss = pm_take<double>(&scratch, sets_of(g));
        r->set_size = pm_take<int64_t>(&scratch, sets_of(g));
    }
    return (size_t)(static_cast<char *>(scratch) - start);
}

} // namespace

template <class T>
size_t load_balance_loss_workspace(const pm_ctx *, const pm_load_balance_loss_args *g,
                                   bool backward)
{
    static char anywhere; // no address is looked at
    room r;
    return take(g, backward, &anywhere, &r);
}

template <class T>
pm_status load_balance_loss_forward(pm_ctx *ctx, const pm_load_balance_loss_args *g, void *scratch)
{
    const int lanes = pm_row_lanes(g->E);
    const int64_t sets = sets_of(g);
    room r;
    take(g, false, scratch, &r);
    PM_RUN(ctx, image_kernel, (unsigned)g->B, THREADS, 0, g->T, g->E, g->A, lanes, g->p, g->choice,
           g->part, r.sums, r.slots, r.size);
    PM_RUN(ctx, set_kernel, (unsigned)sets, THREADS, 0, g->per == PM_PER_SEQUENCE ? 1 : g->B, g->E,
           g->A, r.sums, r.slots, r.size, g->frac, r.set_loss, r.set_size);
    PM_RUN(ctx, loss_kernel, 1, THREADS, 0, sets, g->weight, r.set_loss, r.set_size, g->loss);
    return PM_OK;
}

template <class T>
pm_status load_balance_loss_backward(pm_ctx *ctx, const pm_load_balance_loss_args *g,
                                     const pm_load_balance_loss_grads *d, void *scratch)
{
    const int64_t count = g->B * g->T * g->E;
    room r;
    take(g, true, scratch, &r);
    if (!d->dp || !count)
        return PM_OK;
    PM_RUN(ctx, size_kernel, (unsigned)g->B, THREADS, 0, g->T, g->part, r.size);
    PM_RUN(ctx, factor_kernel, 1, THREADS, 0, g->B, g->per == PM_PER_SEQUENCE, g->weight, d->dloss,
           r.size, r.factor);
    PM_RUN(ctx, dp_kernel, pm_blocks(count, 1024), 256, 0, count, g->T, g->E, g->part, g->frac,
           r.factor, d->dp);
    return PM_OK;
}

PM_INSTANTIATE_BOTH(load_balance_loss)
