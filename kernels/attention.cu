// attention.cu: contract in csrc/ops/attention.h. The kernels are in attention_mma.cuh (bf16, heads of up
// to 128: tensor cores) and attention_fma.cuh (float, and any head); here is what goes before and after.
//
// forward   [norm_kernel: q and k through their LayerNorms to scratch, where there is qk-norm;] attention.
// backward  [norm_kernel again;] delta_kernel: delta = sum over channels of dy y, which is the sum over
//           keys of p dp; attention; [norm_backward_kernel: dq and dk back through the LayerNorms, with the
//           sums for their parameters in a slot per block; norm_sum_kernel adds the slots].
// qk-norm is an option that the published models leave off, and a pass of its own: it costs 4 a H K bytes
// of a token in forward (a: bytes of an activation), and leaves the attention kernels as they are.
// No atomics; every sum has one owner and an order that depends on dims only.
#include <cmath>

#include "attention_fma.cuh"
#include "attention_mma.cuh"

namespace {

constexpr int WARPS = 4; // of a block of the kernels below

// ---------------------------------------------------------------- delta

template <class T> constexpr int DELTA_LANES = std::is_same<T, float>::value ? 1 : 8;

// In bf16 eight lanes per head of a token: a head of 64 is 16 bytes of each. In float one, which adds
// channel by channel, as the products of attention_fma.cuh do: where a token sees one key alone, and y is
// its v, delta is dp to the bit, and ds is 0.
template <class T>
__global__ void __launch_bounds__(32 * WARPS)
    delta_kernel(attention_shape g, int64_t count, const T *__restrict__ y,
                 const T *__restrict__ dy, float *__restrict__ delta)
{
    constexpr int V = pm_pack<T>::SIZE, LANES = DELTA_LANES<T>;
    const int64_t item = pm_thread() / LANES; // token * H + head
    const int lane = threadIdx.x % LANES;
    float sum = 0;
    if (item < count) {
        y += item * g.K, dy += item * g.K;
        if (g.aligned) {
            for (int i = lane * V; i < g.K; i += LANES * V) {
                const pm_pack<T> a = *reinterpret_cast<const pm_pack<T> *>(y + i);
                const pm_pack<T> b = *reinterpret_cast<const pm_pack<T> *>(dy + i);
#pragma unroll
                for (int j = 0; j < V; j++)
                    sum = fmaf(pm_float(a.v[j]), pm_float(b.v[j]), sum);
            }
        } else {
            for (int i = lane; i < g.K; i += LANES)
                sum = fmaf(pm_float(y[i]), pm_float(dy[i]), sum);
        }
    }
#pragma unroll
    for (int lanes = LANES / 2; lanes > 0; lanes /= 2)
        sum += __shfl_xor_sync(PM_ALL, sum, lanes);
    if (lane == 0 && item < count) {
        const int64_t token = item / g.H, head = item % g.H;
        delta[(token / g.T * g.H + head) * g.T + token % g.T] = sum;
    }
}

// ---------------------------------------------------------------- qk-norm

struct norm_weights {
    const float *q_weight, *q_bias, *k_weight, *k_bias;
    float eps;
};

// Mean and 1 / standard deviation of a row of K, by a warp.
template <class T> PM_DEVICE float2 mean_rstd(int K, float eps, const T *x)
{
    float sum = 0, squares = 0;
    for (int i = threadIdx.x % 32; i < K; i += 32)
        sum += pm_float(x[i]);
    const float mean = pm_warp_sum(sum) / (float)K;
    for (int i = threadIdx.x % 32; i < K; i += 32) {
        const float v = pm_float(x[i]) - mean;
        squares = fmaf(v, v, squares);
    }
    return make_float2(mean, 1.0f / sqrtf(pm_warp_sum(squares) / (float)K + eps));
}

// A warp per head of q or k of a token: rows [q | k] of 2 H K from rows of 3 H K.
template <class T>
__global__ void __launch_bounds__(32 * WARPS)
    norm_kernel(attention_shape g, int64_t tokens, norm_weights w, const T *__restrict__ qkv,
                T *__restrict__ qk)
{
    const int64_t item = (int64_t)blockIdx.x * WARPS + threadIdx.x / 32;
    if (item >= tokens * 2 * g.H)
        return; // the whole warp
    const int64_t token = item / (2 * g.H), head = item % (2 * g.H);
    const float *const weight = head < g.H ? w.q_weight : w.k_weight;
    const float *const bias = head < g.H ? w.q_bias : w.k_bias;
    const T *const x = qkv + (token * 3 * g.H + head) * g.K;
    const float2 s = mean_rstd(g.K, w.eps, x);
    for (int i = threadIdx.x % 32; i < g.K; i += 32)
        qk[item * g.K + i] = pm_to<T>(fmaf((pm_float(x[i]) - s.x) * s.y, weight[i], bias[i]));
}

// Heads of q or k of a block: few enough for every SM to have some of XL at 1 image (4096 heads of tokens),
// and enough that the slots weigh little (2 % of what is read, at 72 channels of bf16).
constexpr int64_t NORM_ROWS = 128;
constexpr int CHANNELS = 128; // of a pass: 4 of each lane

// dqkv's q and k from dqk, the gradients after the LayerNorms: with u = dqk weight,
//   dx = rstd (u - mean(u) - xhat mean(u xhat)).
// blockIdx: (rows, q or k). Warps take rows in turn; lane l has channels l, l + 32, ... of CHANNELS in a
// pass and sums dqk xhat and dqk of its warp's rows; then the warps are added, in order:
// slots[block][q, k][dweight, dbias][K]. In bf16 ptxas keeps 16 bytes of addresses in local memory on
// sm_80, once per block: the kernel waits for memory, and only with qk-norm.
template <class T>
__global__ void __launch_bounds__(32 * WARPS)
    norm_backward_kernel(attention_shape g, int64_t tokens, norm_weights w,
                         const T *__restrict__ qkv, const T *__restrict__ dqk, T *__restrict__ dqkv,
                         float *__restrict__ slots)
{
    __shared__ float part[WARPS][2][CHANNELS];
    const int which = blockIdx.y, warp = threadIdx.x / 32, lane = threadIdx.x % 32;
    const float *const weight = which == 0 ? w.q_weight : w.k_weight;
    const int64_t begin = blockIdx.x * NORM_ROWS, end = min(begin + NORM_ROWS, tokens * g.H);
    for (int first = 0; first < g.K; first += CHANNELS) {
        float dweight[CHANNELS / 32] = {}, dbias[CHANNELS / 32] = {};
        for (int64_t row = begin + warp; row < end; row += WARPS) {
            const int64_t token = row / g.H, head = row % g.H + which * g.H;
            const T *const x = qkv + (token * 3 * g.H + head) * g.K;
            const T *const up = dqk + (token * 2 * g.H + head) * g.K;
            const float2 s = mean_rstd(g.K, w.eps, x);
            float sum = 0, dot = 0;
            for (int i = lane; i < g.K; i += 32) {
                const float u = pm_float(up[i]) * weight[i];
                sum += u;
                dot = fmaf(u, (pm_float(x[i]) - s.x) * s.y, dot);
            }
            const float a = pm_warp_sum(sum) / (float)g.K, e = -pm_warp_sum(dot) / (float)g.K;
#pragma unroll
            for (int j = 0; j < CHANNELS / 32; j++) {
                const int i = first + lane + 32 * j;
                if (i >= g.K)
                    continue;
                const float u = pm_float(up[i]), xhat = (pm_float(x[i]) - s.x) * s.y;
                dweight[j] = fmaf(u, xhat, dweight[j]);
                dbias[j] += u;
                if (dqkv)
                    dqkv[(token * 3 * g.H + head) * g.K + i] =
                        pm_to<T>(s.y * fmaf(xhat, e, fmaf(u, weight[i], -a)));
            }
        }
#pragma unroll
        for (int j = 0; j < CHANNELS / 32; j++) {
            part[warp][0][lane + 32 * j] = dweight[j];
            part[warp][1][lane + 32 * j] = dbias[j];
        }
        __syncthreads();
        for (int i = threadIdx.x; i < 2 * CHANNELS; i += 32 * WARPS) {
            const int c = i % CHANNELS, kind = i / CHANNELS;
            float sum = 0;
#pragma unroll
            for (int k = 0; k < WARPS; k++)
                sum += part[k][kind][c];
            if (first + c < g.K)
                slots[(((int64_t)blockIdx.x * 2 + which) * 2 + kind) * g.K + first + c] = sum;
        }
        __syncthreads();
    }
}

// A block per parameter adds its slots: a thread every 128th, then a tree.
__global__ void __launch_bounds__(128)
    norm_sum_kernel(int K, int64_t blocks, const float *__restrict__ slots, float *dq_weight,
                    float *dq_bias, float *dk_weight, float *dk_bias)
{
    __shared__ float part[32];
    const int i = blockIdx.x, which = blockIdx.y;
    float *const out = which == 0   ? dq_weight
                       : which == 1 ? dq_bias
                       : which == 2 ? dk_weight
                                    : dk_bias;
    if (!out)
        return; // the whole block
    float sum = 0;
    for (int64_t block = threadIdx.x; block < blocks; block += 128)
        sum += slots[(block * 4 + which) * K + i];
    sum = pm_block_sum(sum, part);
    if (threadIdx.x == 0)
        out[i] += sum;
}

// ---------------------------------------------------------------- launches

template <class T>
attention_shape shape_of(const pm_attention_args *g, const void *dy, const void *dqkv)
{
    const void *const pointers[] = {g->qkv, g->y, dy, dqkv};
    bool aligned = g->K % pm_pack<T>::SIZE == 0;
    for (const void *p : pointers)
        aligned = aligned && (uintptr_t)p % 16 == 0;
    return {(int)g->T, (int)g->H, (int)g->K, (float)(1.0 / sqrt((double)g->K)), aligned};
}

template <class T> bool tensor_cores(const pm_attention_args *g)
{
    return std::is_same<T, bf16>::value && mma_head(g->K);
}
// Keys that a block of the backward pass has at once; beyond, dq is summed in scratch.
int64_t mma_keys(int64_t K)
{
    return mma_head(K) == 128 ? backward_plan<128>::KEYS : backward_plan<72>::KEYS;
}
bool has_sums(const pm_attention_args *g) { return g->T > mma_keys(g->K); }

int64_t norm_blocks(const pm_attention_args *g) { return pm_blocks(g->B * g->T * g->H, NORM_ROWS); }

// Calls run with the number of channels that a kernel is made for.
template <class F> pm_status for_mma(int64_t K, F run)
{
    switch (mma_head(K)) {
    case 32:
        return run(std::integral_constant<int, 32>());
    case 64:
        return run(std::integral_constant<int, 64>());
    case 72:
        return run(std::integral_constant<int, 72>());
    default:
        return run(std::integral_constant<int, 128>());
    }
}
template <class T, class F> pm_status for_fma(int64_t K, F run)
{
    if constexpr (std::is_same<T, float>::value) { // bf16: heads that for_mma has no room for
        if (K <= 16)
            return run(fma_plan<4, 16>());
        if (K > 64 && K <= 72)
            return run(fma_plan<6, 72>());
    }
    return run(fma_plan<8, 64>());
}

// q, k, v as the attention kernels read them; with qk-norm, q and k from scratch.
template <class T>
pm_status inputs_of(pm_ctx *ctx, const pm_attention_args *g, const attention_shape &shape,
                    void **scratch, attention_inputs<T> *in)
{
    const int64_t HK = g->H * g->K, tokens = g->B * g->T;
    const T *const qkv = static_cast<const T *>(g->qkv);
    in->q = {qkv, 3 * HK};
    in->k = {qkv + HK, 3 * HK};
    in->v = {qkv + 2 * HK, 3 * HK};
    if (!g->q_weight)
        return PM_OK;
    T *const qk = pm_take<T>(scratch, tokens * 2 * HK);
    const norm_weights w = {g->q_weight, g->q_bias, g->k_weight, g->k_bias, (float)g->eps};
    in->q = {qk, 2 * HK};
    in->k = {qk + HK, 2 * HK};
    PM_RUN(ctx, norm_kernel<T>, pm_blocks(tokens * 2 * g->H, WARPS), 32 * WARPS, 0, shape, tokens,
           w, qkv, qk);
    return PM_OK;
}

template <class T>
pm_status gradients(pm_ctx *ctx, const pm_attention_args *g, const attention_shape &shape,
                    const attention_inputs<T> &in, const attention_gradients<T> &out,
                    void **scratch)
{
    const int64_t heads = g->B * g->H;
    if constexpr (std::is_same<T, bf16>::value)
        if (tensor_cores<T>(g)) {
            float *const sums = has_sums(g) ? pm_take<float>(scratch, heads * g->T * mma_head(g->K))
                                            : nullptr;
            return for_mma(g->K, [&](auto head) -> pm_status {
                constexpr int HEAD = decltype(head)::value;
                PM_RUN(ctx, backward_mma_kernel<HEAD>, (unsigned)heads,
                       backward_plan<HEAD>::THREADS, backward_plan<HEAD>::SHARED, shape, in, out,
                       sums);
                return PM_OK;
            });
        }
    return for_fma<T>(g->K, [&](auto plan) -> pm_status {
        using P = decltype(plan);
        const unsigned parts = pm_blocks(g->T, P::ROWS), chunks = pm_blocks(g->K, P::WIDTH);
        const dim3 grid((unsigned)(heads * parts), chunks);
        PM_RUN(ctx, (dq_fma_kernel<T, P>), grid, P::THREADS, P::SHARED, shape, in, out.dq,
               (int)parts);
        PM_RUN(ctx, (dkdv_fma_kernel<T, P>), grid, P::THREADS, P::SHARED, shape, in, out,
               (int)parts);
        return PM_OK;
    });
}

} // namespace

template <class T>
size_t attention_workspace(const pm_ctx *, const pm_attention_args *g, bool backward)
{
    const int64_t heads = g->B * g->H, qk = g->B * g->T * 2 * g->H * g->K;
    size_t bytes = g->q_weight ? pm_room(qk, sizeof(T)) : 0; // q and k after their LayerNorms
    if (!backward)
        return bytes;
    bytes += 2 * pm_room(heads * g->T, sizeof(float)); // delta, inverse
    if (g->q_weight)                                   // gradients before the LayerNorms, slots
        bytes += pm_room(qk, sizeof(T)) + pm_room(norm_blocks(g) * 4 * g->K, sizeof(float));
    if (tensor_cores<T>(g) && has_sums(g))
        bytes += pm_room(heads * g->T * mma_head(g->K), sizeof(float));
    return bytes;
}

template <class T>
pm_status attention_forward(pm_ctx *ctx, const pm_attention_args *g, void *scratch)
{
    const int64_t heads = g->B * g->H;
    if (!heads || !g->T || !g->K)
        return PM_OK;
    const attention_shape shape = shape_of<T>(g, nullptr, nullptr);
    attention_inputs<T> in = {};
    PM_TRY(inputs_of(ctx, g, shape, &scratch, &in));
    const attention_rows<T> y = {static_cast<T *>(g->y), g->H * g->K};
    if constexpr (std::is_same<T, bf16>::value)
        if (tensor_cores<T>(g))
            return for_mma(g->K, [&](auto head) -> pm_status {
                constexpr int HEAD = decltype(head)::value;
                using P = forward_plan<HEAD>;
                const unsigned parts = pm_blocks(g->T, P::ROWS);
                PM_RUN(ctx, forward_mma_kernel<HEAD>, (unsigned)heads * parts, P::THREADS,
                       P::SHARED, shape, in, y, (int)parts, g->lse);
                return PM_OK;
            });
    return for_fma<T>(g->K, [&](auto plan) -> pm_status {
        using P = decltype(plan);
        const unsigned parts = pm_blocks(g->T, P::ROWS);
        PM_RUN(ctx, (forward_fma_kernel<T, P>),
               dim3((unsigned)heads * parts, pm_blocks(g->K, P::WIDTH)), P::THREADS, P::SHARED,
               shape, in, y, (int)parts, g->lse);
        return PM_OK;
    });
}

template <class T>
pm_status attention_backward(pm_ctx *ctx, const pm_attention_args *g, const pm_attention_grads *d,
                             void *scratch)
{
    const int64_t heads = g->B * g->H, HK = g->H * g->K, tokens = g->B * g->T;
    if (!heads || !g->T || !g->K || (!d->dqkv && !g->q_weight))
        return PM_OK;
    const attention_shape shape = shape_of<T>(g, d->dy, d->dqkv);
    const T *const y = static_cast<const T *>(g->y), *const dy = static_cast<const T *>(d->dy);
    T *const dqkv = static_cast<T *>(d->dqkv);
    float *const delta = pm_take<float>(&scratch, heads * g->T);
    attention_inputs<T> in = {};
    PM_TRY(inputs_of(ctx, g, shape, &scratch, &in));
    in.dy = {dy, HK};
    in.lse = g->lse, in.delta = delta, in.inverse = pm_take<float>(&scratch, heads * g->T);
    PM_RUN(ctx, delta_kernel<T>, pm_blocks(tokens * g->H, 32 * WARPS / DELTA_LANES<T>), 32 * WARPS,
           0, shape, tokens * g->H, y, dy, delta);

    attention_gradients<T> out = {{dqkv, 3 * HK}, {dqkv + HK, 3 * HK}, {dqkv + 2 * HK, 3 * HK}};
    if (!dqkv)
        out.dv.p = nullptr;
    if (!g->q_weight)
        return gradients(ctx, g, shape, in, out, &scratch);

    T *const dqk = pm_take<T>(&scratch, tokens * 2 * HK);
    float *const slots = pm_take<float>(&scratch, norm_blocks(g) * 4 * g->K);
    out.dq = {dqk, 2 * HK};
    out.dk = {dqk + HK, 2 * HK};
    PM_TRY(gradients(ctx, g, shape, in, out, &scratch));
    const norm_weights w = {g->q_weight, g->q_bias, g->k_weight, g->k_bias, (float)g->eps};
    PM_RUN(ctx, norm_backward_kernel<T>, dim3((unsigned)norm_blocks(g), 2), 32 * WARPS, 0, shape,
           tokens, w, static_cast<const T *>(g->qkv), dqk, dqkv, slots);
    PM_RUN(ctx, norm_sum_kernel, dim3((unsigned)g->K, 4), 128, 0, (int)g->K, norm_blocks(g), slots,
           d->dq_weight, d->dq_bias, d->dk_weight, d->dk_bias);
    return PM_OK;
}

PM_INSTANTIATE_BOTH(attention)
