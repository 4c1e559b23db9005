// prototypical_routing.cu: contract in csrc/ops/prototypical_routing.h. Nothing is normalised in memory. With
// a_n = 1/max(|x_n|, eps) and b_i = 1/max(|p_i|, eps):
//
//   forward    z_ni = a_n b_i <x_n, p_i>
//   backward   c_ni = dz_ni a_n b_i
//              dx_n += tangent of sum_i c_ni p_i at x_n          (cosine.cuh)
//              dp_i += tangent of sum_n c_ni x_n at p_i
//
// All in fp32 FMA, whatever T is: 2 N D E operations per product, for 12 prototypes as long as reading x
// takes in bf16. So nothing else may come on top of the FMAs: a warp has four tokens, and a
// number of a prototype, read from the L1 cache (12 prototypes of 1152 numbers: 55 KB), serves
// all four from a register. No shared memory, no barriers, any D and E.
//
// Bytes: forward x once, z and xnorm written. backward: c (4 N E) written and read; dx: x read, dx read
// and written; dproto: x read, the slots written and read. Tokens that are not routable are not read.
//
// Order of sums: over D, a lane adds its columns (four in a row of every 128), then a tree; so a
// token's result does not depend on its place. Over experts, ascending. Over tokens, ascending in an
// eighth of a slot, then a tree over the eighths, then the slots (cosine.cuh).
#include "cosine.cuh"

namespace {

constexpr int TOKENS = 4;  // of a warp: 4 * 12 sums in registers, with 16 FMA per 16 bytes of L1
constexpr int WARPS = 4;   // of a block
constexpr int BLOCKS = 4;  // of an SM, at least: 128 registers
constexpr int SHARES = 8;  // warps of a block that sums over tokens
constexpr int PROTOS = 12; // of a pass: the experts of the published models; more take more passes

PM_DEVICE bool is_routable(const int32_t *part, int64_t n, int64_t N)
{
    return n < N && (!part || part[n] == -1);
}

// ---------------------------------------------------------------- forward

// Sums each of COUNT numbers over the warp. They are spread over the lanes on the way, so that it takes
// about COUNT shuffles and not 5 COUNT: at each step a lane gives half of its numbers to the other
// half of the warp. Afterwards v[j], j < LEFT, is the sum of number first + j, in the lanes with `own`.
template <int COUNT, int HALF = 16> struct spread {
    static constexpr bool EVEN = COUNT % 2 == 0;
    using next = spread<EVEN ? COUNT / 2 : COUNT, HALF / 2>;
    static constexpr int LEFT = next::LEFT;
    static __device__ __forceinline__ void sum(float *v, int lane, int *first, bool *own)
    {
        const bool upper = lane & HALF;
        if constexpr (EVEN) {
#pragma unroll
            for (int j = 0; j < COUNT / 2; j++) {
                const float low = v[j], high = v[j + COUNT / 2];
                v[j] = (upper ? high : low) + __shfl_xor_sync(PM_ALL, upper ? low : high, HALF);
            }
            *first += upper ? COUNT / 2 : 0;
        } else {
#pragma unroll
            for (int j = 0; j < COUNT; j++)
                v[j] += __shfl_xor_sync(PM_ALL, v[j], HALF);
            *own = *own && !upper;
        }
        next::sum(v, lane, first, own);
    }
};
template <int COUNT> struct spread<COUNT, 0> {
    static constexpr int LEFT = COUNT;
    static __device__ __forceinline__ void sum(float *, int, int *, bool *) {}
};

// blockIdx.y is the pass over the prototypes. A loop over passes would hold what follows from the lane alone
// through the columns, and spill.
template <class T, bool WIDE>
__global__ void __launch_bounds__(32 * WARPS, BLOCKS)
    forward_kernel(int64_t N, int64_t D, int64_t E, const T *__restrict__ x,
                   const float *__restrict__ proto, const int32_t *__restrict__ part,
                   const float *__restrict__ pnorm, float *__restrict__ z,
                   float *__restrict__ xnorm)
{
    const int lane = threadIdx.x % 32;
    const int64_t n0 = pm_thread() / 32 * TOKENS;
    if (n0 >= N)
        return;
    unsigned routable = 0; // a bit per token
#pragma unroll
    for (int r = 0; r < TOKENS; r++)
        routable |= (unsigned)is_routable(part, n0 + r, N) << r;
    const int columns = routable ? (int)D : 0;
    const T *const tokens = x + n0 * D;
    const int64_t i0 = (int64_t)blockIdx.y * PROTOS;
    const int here = (int)min(E - i0, (int64_t)PROTOS);
    const float *const rows = proto + i0 * D;
    float dot[TOKENS * PROTOS] = {}, square[TOKENS] = {}, a[TOKENS];
    pm_quad<T> next[TOKENS]; // under way while those before are multiplied
#pragma unroll
    for (int r = 0; r < TOKENS; r++)
        next[r] = load_quad<WIDE>(tokens + r * (int)D, 4 * lane, columns, routable >> r & 1);
    for (int d0 = 0; d0 < columns; d0 += COLUMNS) {
        const int d = d0 + 4 * lane;
        four u[TOKENS];
#pragma unroll
        for (int r = 0; r < TOKENS; r++) {
#pragma unroll
            for (int k = 0; k < 4; k++) {
                u[r].v[k] = next[r][k];
                square[r] = fmaf(u[r].v[k], u[r].v[k], square[r]);
            }
            next[r] = load_quad<WIDE>(tokens + r * (int)D, d + COLUMNS, columns, routable >> r & 1);
        }
#pragma unroll
        for (int i = 0; i < PROTOS; i++) {
            const pm_quad<float> p = load_quad<WIDE>(rows + i * (int)D, d, columns, i < here);
#pragma unroll
            for (int r = 0; r < TOKENS; r++)
#pragma unroll
                for (int k = 0; k < 4; k++)
                    dot[r * PROTOS + i] = fmaf(u[r].v[k], p[k], dot[r * PROTOS + i]);
        }
    }
#pragma unroll
    for (int r = 0; r < TOKENS; r++) {
        const float norm = sqrtf(pm_warp_sum(square[r]));
        a[r] = cosine_inverse(norm);
        if (i0 == 0 && xnorm && lane == 0 && n0 + r < N)
            xnorm[n0 + r] = norm;
    }
    using sums = spread<TOKENS * PROTOS>;
    int first = 0;
    bool own = true;
    sums::sum(dot, lane, &first, &own);
#pragma unroll
    for (int j = 0; j < sums::LEFT; j++) {
        const int r = (first + j) / PROTOS;
        const int64_t i = i0 + (first + j) % PROTOS;
        if (!own || n0 + r >= N || i >= E)
            continue;
        float inverse = a[0];
#pragma unroll
        for (int q = 1; q < TOKENS; q++)
            inverse = r == q ? a[q] : inverse;
        z[(n0 + r) * E + i] = routable >> r & 1 ? dot[j] * (inverse * cosine_inverse(pnorm[i]))
                                                : 0.0f;
    }
}

template <class T, bool WIDE>
pm_status forward(pm_ctx *ctx, const pm_prototypical_routing_args *g, const float *pnorm)
{
    const dim3 grid(pm_blocks(g->N, TOKENS * WARPS), pm_blocks(g->E, PROTOS));
    PM_RUN(ctx, (forward_kernel<T, WIDE>), grid, 32 * WARPS, 0, g->N, g->D, g->E,
           static_cast<const T *>(g->x), g->proto, g->part, pnorm, g->z, g->xnorm);
    return PM_OK;
}

// ---------------------------------------------------------------- backward

// c of the four tokens of a warp lie together: c[(n / 4 * E + i) * 4 + n % 4], 0 for tokens that are not
// routable. Who needs them reads 16 bytes for 16 FMAs per lane.
PM_DEVICE four load_c(const float *c, int64_t n0, int64_t E, int64_t i)
{
    return load_four<true>(c + (n0 / TOKENS * E + i) * TOKENS, 0, TOKENS);
}

// c, and along_n = <x_n, q_n> / |x_n|^2 for q_n = sum_i c_ni p_i, which is a_n^2 sum_i dz_ni z_ni. A warp
// has four tokens, a lane one of them and every eighth prototype.
__global__ void __launch_bounds__(32 * WARPS)
    c_kernel(int64_t N, int64_t E, const int32_t *__restrict__ part, const float *__restrict__ z,
             const float *__restrict__ dz, const float *__restrict__ xnorm,
             const float *__restrict__ pnorm, float *__restrict__ c, float *__restrict__ along)
{
    const int lane = threadIdx.x % 32, r = lane % TOKENS;
    const int64_t n0 = pm_thread() / 32 * TOKENS, n = n0 + r;
    if (n0 >= N)
        return;
    const bool routable = is_routable(part, n, N);
    const float norm = routable ? xnorm[n] : 0.0f, a = cosine_inverse(norm);
    float sum = 0;
    for (int64_t i = lane / TOKENS; i < E; i += 32 / TOKENS) {
        float own = 0;
        if (routable) {
            const float d = dz[n * E + i];
            own = d * (a * cosine_inverse(pnorm[i]));
            sum = fmaf(z[n * E + i], d, sum);
        }
        c[(n0 / TOKENS * E + i) * TOKENS + r] = own;
    }
#pragma unroll
    for (int other = TOKENS; other < 32; other *= 2)
        sum += __shfl_xor_sync(PM_ALL, sum, other);
    if (lane < TOKENS && n < N)
        along[n] = norm < COSINE_EPS ? 0.0f : sum * a * a;
}

// dx_n += q_n - along_n x_n. A warp per four tokens. What is read of them is asked for before the prototypes
// are multiplied: 2 KB of bf16 under way for a warp.
template <class T, bool WIDE>
__global__ void __launch_bounds__(32 * WARPS, BLOCKS)
    dx_kernel(int64_t N, int64_t D, int64_t E, const T *__restrict__ x,
              const float *__restrict__ proto, const int32_t *__restrict__ part,
              const float *__restrict__ c, const float *__restrict__ along, T *__restrict__ dx)
{
    const int lane = threadIdx.x % 32;
    const int64_t n0 = pm_thread() / 32 * TOKENS;
    if (n0 >= N)
        return;
    unsigned routable = 0; // a bit per token
    float back[TOKENS];
#pragma unroll
    for (int r = 0; r < TOKENS; r++) {
        routable |= (unsigned)is_routable(part, n0 + r, N) << r;
        back[r] = n0 + r < N ? -along[n0 + r] : 0.0f;
    }
    for (int64_t d = 4 * lane; routable && d < D; d += COLUMNS) {
        pm_quad<T> u[TOKENS], old[TOKENS];
        four q[TOKENS] = {};
#pragma unroll
        for (int r = 0; r < TOKENS; r++) {
            const bool there = routable >> r & 1;
            u[r] = load_quad<WIDE>(x + (n0 + r) * D, d, D, there);
            old[r] = load_quad<WIDE>(dx + (n0 + r) * D, d, D, there);
        }
#pragma unroll 4
        for (int64_t i = 0; i < E; i++) {
            const four p = load_four<WIDE>(proto + i * D, d, D), own = load_c(c, n0, E, i);
#pragma unroll
            for (int r = 0; r < TOKENS; r++)
#pragma unroll
                for (int k = 0; k < 4; k++)
                    q[r].v[k] = fmaf(own.v[r], p.v[k], q[r].v[k]);
        }
#pragma unroll
        for (int r = 0; r < TOKENS; r++) {
            if (!(routable >> r & 1))
                continue;
#pragma unroll
            for (int k = 0; k < 4; k++)
                q[r].v[k] = old[r][k] + fmaf(back[r], u[r][k], q[r].v[k]);
            store_four<WIDE>(dx + (n0 + r) * D, d, D, q[r]);
        }
    }
}

// partial[slot, i, :] = sum of c_ni x_n over the tokens of the slot. A block has PROTOS prototypes and 128
// columns of one slot, each of its warps every eighth run of 32 tokens; the sums are in registers, and at
// last in shared memory, where the upper half of the warps hands its sums to the lower one, and so on.
// c of 32 tokens lies in shared memory, and four tokens are under way while four are multiplied.
template <class T, bool WIDE>
__global__ void __launch_bounds__(32 * SHARES, 2)
    partial_kernel(int64_t N, int64_t D, int64_t E, int64_t tokens, const T *__restrict__ x,
                   const int32_t *__restrict__ part, const float *__restrict__ c,
                   float *__restrict__ partial)
{
    constexpr int RUN = 32; // tokens: a lane finds out about each
    __shared__ four factors[SHARES][RUN / TOKENS][PROTOS];
    __shared__ four handed[SHARES / 2][PROTOS][32];
    const int share = threadIdx.x / 32, lane = threadIdx.x % 32;
    const unsigned tiles = (unsigned)((D + COLUMNS - 1) / COLUMNS);
    const unsigned passes = (unsigned)((E + PROTOS - 1) / PROTOS);
    const int64_t slot = blockIdx.x / (tiles * passes), d = blockIdx.x % tiles * COLUMNS + 4 * lane;
    const int64_t i0 = blockIdx.x / tiles % passes * PROTOS;
    const int64_t end = min((slot + 1) * tokens, N);
    four sum[PROTOS] = {};
    for (int64_t first = slot * tokens + RUN * share; first < end; first += RUN * SHARES) {
        const unsigned routable = __ballot_sync(PM_ALL, is_routable(part, first + lane, end));
        for (int k = lane; k < RUN / TOKENS * PROTOS; k += 32) {
            const int64_t n = first + k / PROTOS * TOKENS, i = i0 + k % PROTOS;
            factors[share][k / PROTOS][k % PROTOS] = n < end && i < E ? load_c(c, n, E, i) : four{};
        }
        __syncwarp();
        pm_quad<T> next[TOKENS];
#pragma unroll
        for (int r = 0; r < TOKENS; r++)
            next[r] = load_quad<WIDE>(x + (first + r) * D, d, D, routable >> r & 1);
        for (int n = 0; n < RUN; n += TOKENS) {
            four u[TOKENS];
#pragma unroll
            for (int r = 0; r < TOKENS; r++)
#pragma unroll
                for (int k = 0; k < 4; k++)
                    u[r].v[k] = next[r][k];
#pragma unroll
            for (int r = 0; r < TOKENS; r++) {
                const int ahead = n + TOKENS + r;
                next[r] = load_quad<WIDE>(x + (first + ahead) * D, d, D,
                                          ahead < RUN && routable >> ahead & 1);
            }
#pragma unroll
            for (int i = 0; i < PROTOS; i++) {
                const four own = factors[share][n / TOKENS][i];
#pragma unroll
                for (int r = 0; r < TOKENS; r++)
#pragma unroll
                    for (int k = 0; k < 4; k++)
                        sum[i].v[k] = fmaf(own.v[r], u[r].v[k], sum[i].v[k]);
            }
        }
        __syncwarp();
    }
#pragma unroll
    for (int half = SHARES / 2; half > 0; half /= 2) {
        if (share >= half && share < 2 * half)
#pragma unroll
            for (int i = 0; i < PROTOS; i++)
                handed[share - half][i][lane] = sum[i];
        __syncthreads();
        if (share < half)
#pragma unroll
            for (int i = 0; i < PROTOS; i++) {
                const four other = handed[share][i][lane];
#pragma unroll
                for (int k = 0; k < 4; k++)
                    sum[i].v[k] += other.v[k];
            }
        __syncthreads();
    }
    if (share != 0)
        return;
#pragma unroll
    for (int i = 0; i < PROTOS; i++)
        if (i0 + i < E)
            store_four<WIDE>(partial + (slot * E + i0 + i) * D, d, D, sum[i]);
}

// dp_i += tangent of q_i at p_i. A block per prototype.
__global__ void __launch_bounds__(256)
    dproto_kernel(int64_t D, const float *__restrict__ proto, const float *__restrict__ pnorm,
                  const float *__restrict__ q, float *__restrict__ dproto)
{
    __shared__ float part[32];
    const int64_t first = blockIdx.x * D;
    float dot = 0;
    for (int64_t d = threadIdx.x; d < D; d += 256)
        dot = fmaf(proto[first + d], q[first + d], dot);
    const float along = tangent_along(pnorm[blockIdx.x], pm_block_sum(dot, part));
    for (int64_t d = threadIdx.x; d < D; d += 256)
        dproto[first + d] += fmaf(along, proto[first + d], q[first + d]);
}

template <class T, bool WIDE>
pm_status backward_dx(pm_ctx *ctx, const pm_prototypical_routing_args *g, const float *c,
                      const float *along, void *dx)
{
    PM_RUN(ctx, (dx_kernel<T, WIDE>), pm_blocks(g->N, TOKENS * WARPS), 32 * WARPS, 0, g->N, g->D,
           g->E, static_cast<const T *>(g->x), g->proto, g->part, c, along, static_cast<T *>(dx));
    return PM_OK;
}

template <class T, bool WIDE>
pm_status backward_partial(pm_ctx *ctx, const pm_prototypical_routing_args *g, const float *c,
                           float *partial)
{
    const int64_t tiles = (g->D + COLUMNS - 1) / COLUMNS, passes = (g->E + PROTOS - 1) / PROTOS;
    PM_RUN(ctx, (partial_kernel<T, WIDE>), (unsigned)(slot_count(g->N, g->E) * passes * tiles),
           32 * SHARES, 0, g->N, g->D, g->E, slot_tokens(g->N, g->E), static_cast<const T *>(g->x),
           g->part, c, partial);
    return PM_OK;
}

// The scratch of a backward.
struct room {
    float *c, *along, *partial, *q;
};
size_t take(const pm_prototypical_routing_args *g, void *scratch, room *r)
{
    char *const start = static_cast<char *>(scratch);
    r->c = pm_take<float>(&scratch, (g->N + TOKENS - 1) / TOKENS * TOKENS * g->E);
    r->along = pm_take<float>(&scratch, g->N);
    r->partial = pm_take<float>(&scratch, slot_count(g->N, g->E) * g->E * g->D);
    r->q = pm_take<float>(&scratch, g->E * g->D);
    return (size_t)(static_cast<char *>(scratch) - start);
}

} // namespace

template <class T>
size_t prototypical_routing_workspace(const pm_ctx *, const pm_prototypical_routing_args *g,
                                      bool backward)
{
    static char anywhere; // no address is looked at
    room r;
    return backward ? take(g, &anywhere, &r) : pm_room(g->E, sizeof(float));
}

template <class T>
pm_status prototypical_routing_forward(pm_ctx *ctx, const pm_prototypical_routing_args *g,
                                       void *scratch)
{
    if (g->N > INT32_MAX)
        return pm_fail(ctx, PM_EINVAL, "prototypical_routing: N is %lld, at most 2^31 - 1 tokens",
                       (long long)g->N);
    float *const pnorm = g->pnorm ? g->pnorm : pm_take<float>(&scratch, g->E);
    PM_RUN(ctx, norm_kernel, pm_blocks(g->E, 4), 128, 0, g->E, g->D, g->proto, nullptr, pnorm);
    return fours(g->D, g->x, g->proto, nullptr) ? forward<T, true>(ctx, g, pnorm)
                                                : forward<T, false>(ctx, g, pnorm);
}

template <class T>
pm_status prototypical_routing_backward(pm_ctx *ctx, const pm_prototypical_routing_args *g,
                                        const pm_prototypical_routing_grads *d, void *scratch)
{
    room r;
    take(g, scratch, &r);
    const bool wide = fours(g->D, g->x, g->proto, d->dx);
    PM_RUN(ctx, c_kernel, pm_blocks(g->N, TOKENS * WARPS), 32 * WARPS, 0, g->N, g->E, g->part, g->z,
           d->dz, g->xnorm, g->pnorm, r.c, r.along);
    if (d->dx)
        PM_TRY(wide ? backward_dx<T, true>(ctx, g, r.c, r.along, d->dx)
                    : backward_dx<T, false>(ctx, g, r.c, r.along, d->dx));
    if (!d->dproto || !g->N)
        return PM_OK;
    PM_TRY(wide ? backward_partial<T, true>(ctx, g, r.c, r.partial)
                : backward_partial<T, false>(ctx, g, r.c, r.partial));
    PM_RUN(ctx, slot_sum_kernel, pm_blocks(g->E * g->D, 32), 32 * SLOT_WARPS, 0,
           slot_count(g->N, g->E), g->E, g->D, r.partial, nullptr, r.q, nullptr);
    PM_RUN(ctx, dproto_kernel, (unsigned)g->E, 256, 0, g->D, g->proto, g->pnorm, r.q, d->dproto);
    return PM_OK;
}

PM_INSTANTIATE_BOTH(prototypical_routing)
