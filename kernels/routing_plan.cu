// routing_plan.cu: contract in csrc/ops/routing_plan.h. A stable counting sort of the N A slots by group, in
// three launches whose shape is that of N:
//
//   count   a block per chunk of 256 tokens: how many rows each group, and all, get from the chunk
//   scan    one block: counts of a group in the order of chunks, then row_off over the groups
//   place   a block per chunk again: every row at row_off[group] + rows of chunks before + rank in the
//           chunk; and the lists of the tokens
//
// A warp takes a group, and its lanes 32 tokens at a time: the vote "my token names the group" has
// both the count and each token's rank, tokens ascending. A token votes once, whatever it repeats,
// which is how duplicates merge. So nothing is exchanged between threads but votes, the order is
// that of the tokens by construction, and each number has one writer. Votes: N A G / 32 for each of two
// launches, with choice in the cache; for 65536 tokens, top-1 and 14 groups 29 thousand.
// Bytes: choice (twice) and weight read, the plan written: 28 N A + 4 N.
#include "common.cuh"

namespace {

constexpr int CHUNK = 256; // tokens of a block, and its threads
constexpr int WARPS = CHUNK / 32;
constexpr int SCAN = 512; // threads: 16 groups at a time

// The choices of one token. What is not a group is an empty slot.
struct slots {
    const int32_t *choice; // NULL: beyond the last token
    int64_t A, G;
    __device__ int32_t group(int64_t a) const
    {
        return choice[a] >= 0 && choice[a] < G ? choice[a] : -1;
    }
    __device__ bool names(int64_t g) const
    {
        for (int64_t a = 0; choice && a < A; a++)
            if (choice[a] == g)
                return true;
        return false;
    }
    // The groups named before slot a, each once.
    __device__ int32_t distinct(int64_t a) const
    {
        int32_t count = 0;
        for (int64_t k = 0; choice && k < a; k++) {
            bool fresh = group(k) >= 0;
            for (int64_t before = 0; fresh && before < k; before++)
                fresh = choice[before] != choice[k];
            count += fresh;
        }
        return count;
    }
};
PM_DEVICE slots slots_of(int64_t n, int64_t N, int64_t A, int64_t G, const int32_t *choice)
{
    return {n < N ? choice + n * A : nullptr, A, G};
}

// counts[g * chunks + chunk]: rows of group g; g = G: rows of all groups
__global__ void __launch_bounds__(CHUNK)
    count_kernel(int64_t N, int64_t A, int64_t G, const int32_t *__restrict__ choice,
                 int32_t *__restrict__ counts, unsigned long long *fault)
{
    __shared__ int32_t part[32];
    const int64_t chunks = gridDim.x, first = (int64_t)blockIdx.x * CHUNK;
    const int warp = threadIdx.x / 32, lane = threadIdx.x % 32;
    const slots own = slots_of(first + threadIdx.x, N, A, G, choice);
    for (int64_t a = 0; own.choice && a < A; a++)
        if (own.choice[a] < -1 || own.choice[a] >= G)
            pm_fault(fault, PM_FAULT_PLAN_CHOICE, (first + threadIdx.x) * A + a);
    const int32_t rows = pm_block_sum(own.distinct(A), part);
    if (threadIdx.x == 0)
        counts[G * chunks + blockIdx.x] = rows;
    for (int64_t g = warp; g < G; g += WARPS) {
        int32_t count = 0;
        for (int step = 0; step < CHUNK; step += 32)
            count += __popc(
                __ballot_sync(PM_ALL, slots_of(first + step + lane, N, A, G, choice).names(g)));
        if (lane == 0)
            counts[g * chunks + blockIdx.x] = count;
    }
}

// x[i] becomes the sum of x[0] .. x[i-1], by one warp; returns the sum of all n.
PM_DEVICE int32_t warp_scan(int64_t n, int32_t *x)
{
    const int lane = threadIdx.x % 32;
    int32_t before = 0;
    for (int64_t first = 0; first < n; first += 32) {
        const int32_t own = first + lane < n ? x[first + lane] : 0;
        int32_t sum = own;
        for (int other = 1; other < 32; other *= 2) {
            const int32_t lower = __shfl_up_sync(PM_ALL, sum, other);
            sum += lane >= other ? lower : 0;
        }
        if (first + lane < n)
            x[first + lane] = before + sum - own;
        before += __shfl_sync(PM_ALL, sum, 31);
    }
    return before;
}

// counts[g, chunk] become the rows of g in the chunks before; row_off; tok_off[N], the rows in use
__global__ void __launch_bounds__(SCAN)
    scan_kernel(int64_t N, int64_t G, int64_t chunks, int32_t *counts, int32_t *row_off,
                int32_t *__restrict__ tok_off)
{
    const int warp = threadIdx.x / 32, lane = threadIdx.x % 32;
    for (int64_t g = warp; g <= G; g += SCAN / 32) {
        const int32_t rows = warp_scan(chunks, counts + g * chunks);
        if (lane == 0)
            (g < G ? row_off[g] : tok_off[N]) = rows;
    }
    __syncthreads();
    if (warp != 0)
        return;
    const int32_t used = warp_scan(G, row_off);
    if (lane == 0)
        row_off[G] = used;
}

// x over the threads before this one; part: WARPS numbers of shared memory
PM_DEVICE int32_t block_scan(int32_t x, int32_t *part)
{
    const int warp = threadIdx.x / 32, lane = threadIdx.x % 32;
    int32_t sum = x;
    for (int other = 1; other < 32; other *= 2) {
        const int32_t lower = __shfl_up_sync(PM_ALL, sum, other);
        sum += lane >= other ? lower : 0;
    }
    if (lane == 31)
        part[warp] = sum;
    __syncthreads();
    for (int before = 0; before < warp; before++)
        sum += part[before];
    return sum - x;
}

struct plan {
    int32_t *row_off, *row_token;
    float *row_weight;
    int32_t *tok_off, *tok_row, *choice_row;
};

// Row `row` is that of token n in group g; its entry in the token's list is where the first of its slots
// is among the distinct ones.
PM_DEVICE void place(const plan &p, const slots &token, int64_t n, int64_t g, int32_t row,
                     int32_t list, const float *weight)
{
    float sum = 0;
    bool fresh = true;
    for (int64_t a = 0; a < token.A; a++) {
        if (token.choice[a] != g)
            continue;
        if (fresh)
            p.tok_row[list + token.distinct(a)] = row;
        sum = fresh ? weight[a] : sum + weight[a];
        fresh = false;
        if (p.choice_row)
            p.choice_row[n * token.A + a] = row;
    }
    p.row_token[row] = (int32_t)n;
    p.row_weight[row] = sum;
}

__global__ void __launch_bounds__(CHUNK)
    place_kernel(int64_t N, int64_t A, int64_t G, const int32_t *__restrict__ choice,
                 const float *__restrict__ weight, const int32_t *__restrict__ counts, plan p)
{
    __shared__ int32_t part[WARPS], list[CHUNK]; // list: where each token's list begins
    const int64_t chunks = gridDim.x, first = (int64_t)blockIdx.x * CHUNK;
    const int warp = threadIdx.x / 32, lane = threadIdx.x % 32;
    const int64_t own_n = first + threadIdx.x;
    const slots own = slots_of(own_n, N, A, G, choice);
    list[threadIdx.x] = counts[G * chunks + blockIdx.x] + block_scan(own.distinct(A), part);
    if (own.choice) {
        p.tok_off[own_n] = list[threadIdx.x];
        const int32_t used = p.row_off[G];
        for (int64_t r = own_n * A; r < (own_n + 1) * A; r++) {
            if (p.choice_row && own.group(r - own_n * A) < 0)
                p.choice_row[r] = -1;
            if (r < used) // a row: its token writes it
                continue;
            p.row_token[r] = p.tok_row[r] = -1;
            p.row_weight[r] = 0;
        }
    }
    __syncthreads();
    for (int64_t g = warp; g < G; g += WARPS) {
        int32_t next = p.row_off[g] + counts[g * chunks + blockIdx.x];
        for (int step = 0; step < CHUNK; step += 32) {
            const int64_t n = first + step + lane;
            const slots token = slots_of(n, N, A, G, choice);
            const bool named = token.names(g);
            const unsigned votes = __ballot_sync(PM_ALL, named);
            if (named)
                place(p, token, n, g, next + __popc(votes & ((1u << lane) - 1)), list[step + lane],
                      weight + n * A);
            next += __popc(votes);
        }
    }
}

// dweight[n, a] = drow_weight[choice_row[n, a]]
__global__ void backward_kernel(int64_t count, const int32_t *__restrict__ choice_row,
                                const float *__restrict__ drow_weight, float *__restrict__ dweight,
                                unsigned long long *fault)
{
    const int64_t i = pm_thread();
    if (i >= count)
        return;
    const int32_t row = choice_row[i];
    if (row < -1 || row >= count)
        pm_fault(fault, PM_FAULT_PLAN_ROW, i);
    dweight[i] = row >= 0 && row < count ? drow_weight[row] : 0.0f;
}

} // namespace

template <class T>
size_t routing_plan_workspace(const pm_ctx *, const pm_routing_plan_args *g, bool backward)
{
    return backward ? 0 : pm_room((g->G + 1) * pm_blocks(g->N, CHUNK), sizeof(int32_t));
}

template <class T>
pm_status routing_plan_forward(pm_ctx *ctx, const pm_routing_plan_args *g, void *scratch)
{
    if (g->N && g->A > INT32_MAX / g->N)
        return pm_fail(ctx, PM_EINVAL,
                       "routing_plan: %lld tokens with %lld slots, at most 2^31 - 1 rows",
                       (long long)g->N, (long long)g->A);
    const unsigned chunks = pm_blocks(g->N, CHUNK);
    int32_t *const counts = pm_take<int32_t>(&scratch, (g->G + 1) * chunks);
    const plan p = {g->row_off, g->row_token, g->row_weight, g->tok_off, g->tok_row, g->choice_row};
    PM_RUN(ctx, count_kernel, chunks, CHUNK, 0, g->N, g->A, g->G, g->choice, counts,
           pm_device().fault);
    PM_RUN(ctx, scan_kernel, 1, SCAN, 0, g->N, g->G, (int64_t)chunks, counts, g->row_off,
           g->tok_off);
    PM_RUN(ctx, place_kernel, chunks, CHUNK, 0, g->N, g->A, g->G, g->choice, g->weight, counts, p);
    return PM_OK;
}

template <class T>
pm_status routing_plan_backward(pm_ctx *ctx, const pm_routing_plan_args *g,
                                const pm_routing_plan_grads *d, void *)
{
    const int64_t count = d->dweight ? g->N * g->A : 0;
    PM_RUN(ctx, backward_kernel, pm_blocks(count, 256), 256, 0, count, g->choice_row,
           d->drow_weight, d->dweight, pm_device().fault);
    return PM_OK;
}

PM_INSTANTIATE_BOTH(routing_plan)
