// residual_layernorm_modulate.cu: contract in csrc/ops/residual_layernorm_modulate.h. Bound by memory:
// everything of a token's row is read once and written once, 16 bytes at a time, and stays in
// registers between the reductions (over the lanes, by a fixed tree).
//
// forward   a warp per row, 4 rows per block. Bytes of an element: x 4, branch a, xo 4, y a (a: 4 or 2,
//           the size of an activation); gate, shift and scale, one row for all tokens of an image,
//           come from L1 and L2.
// backward  a block per CHUNK tokens of one image: its 4 warps take the rows in turn. Bytes: xo 4, dxo
//           4, dy a, branch a, dx 4, dbranch a. The sums over tokens (dgate, dshift, dscale) lie in
//           shared memory, a copy per warp, since 3 D numbers beside a row would not fit into
//           registers; the copies are added in the order of the warps into a slot of the chunk.
// sums      a thread per channel of a condition adds the slots of its images, image by image, each
//           in order. Bytes: 12 / CHUNK an element, written and read again (2 % of the above, each).
//
// Rows wider than 2048, or not aligned to 16 bytes, take a second path: forward is a warp per row,
// reading it three times; backward one pass for the sums over a row, then a thread per channel.
#include <initializer_list>

#include "common.cuh"

extern __shared__ __align__(16) unsigned char pm_shared[];

namespace {

typedef pm_residual_layernorm_modulate_args arguments;
typedef pm_residual_layernorm_modulate_grads gradients;

constexpr int WARPS =
    4; // of a block: 3 to 4 blocks of 1152 channels fit into an SM (55 KB, 153 registers)
// Tokens of a block of the backward pass: 64 images of 256 tokens are 512 blocks, what 132 SMs hold
// at once; with fewer tokens the slots would weigh more.
constexpr int64_t CHUNK = 32;

template <class T> PM_DEVICE const T *act(const void *matrix, int64_t at)
{
    return static_cast<const T *>(matrix) + at;
}
template <class T> PM_DEVICE T *act(void *matrix, int64_t at)
{
    return static_cast<T *>(matrix) + at;
}

// The row of gate, shift and scale that image b has.
PM_DEVICE int64_t condition(const arguments &g, int64_t b, unsigned long long *fault)
{
    if (!g.cond)
        return b;
    const int64_t c = g.cond[b];
    if (c >= 0 && c < g.C)
        return c;
    pm_fault(fault, PM_FAULT_CONDITION, b);
    return 0;
}

// ---------------------------------------------------------------- a unit: V numbers of a lane

// V numbers are 16 bytes of activations, and 16 or 32 of floats.
template <int V> PM_DEVICE void read(const float *from, float (&to)[V])
{
#pragma unroll
    for (int i = 0; i < V; i += 4) {
        const pm_pack<float> p = *reinterpret_cast<const pm_pack<float> *>(from + i);
#pragma unroll
        for (int j = 0; j < 4; j++)
            to[i + j] = p.v[j];
    }
}
template <int V> PM_DEVICE void read(const bf16 *from, float (&to)[V])
{
    const pm_pack<bf16> p = *reinterpret_cast<const pm_pack<bf16> *>(from);
#pragma unroll
    for (int j = 0; j < V; j++)
        to[j] = pm_float(p.v[j]);
}
template <int V> PM_DEVICE void write(const float (&from)[V], float *to)
{
#pragma unroll
    for (int i = 0; i < V; i += 4) {
        pm_pack<float> p;
#pragma unroll
        for (int j = 0; j < 4; j++)
            p.v[j] = from[i + j];
        *reinterpret_cast<pm_pack<float> *>(to + i) = p;
    }
}
template <int V> PM_DEVICE void write(const float (&from)[V], bf16 *to)
{
    pm_pack<bf16> p;
#pragma unroll
    for (int j = 0; j < V; j++)
        p.v[j] = pm_to<bf16>(from[j]);
    *reinterpret_cast<pm_pack<bf16> *>(to) = p;
}

// v += gate * branch
template <class T, int V>
PM_DEVICE void add_branch(const arguments &g, int64_t c, int64_t row, int at, float (&v)[V])
{
    float branch[V], gate[V];
    read(act<T>(g.branch, row * g.D + at), branch);
    if (g.gate)
        read(act<T>(g.gate, c * g.gate_ld + at), gate);
#pragma unroll
    for (int j = 0; j < V; j++)
        v[j] = g.gate ? fmaf(gate[j], branch[j], v[j]) : v[j] + branch[j];
}

// ---------------------------------------------------------------- rows in registers

// UNITS units of a lane hold a row: unit u of lane l is channels (32 u + l) V and on.
template <class T, int UNITS>
__global__ void __launch_bounds__(32 * WARPS) forward_kernel(arguments g, unsigned long long *fault)
{
    constexpr int V = pm_pack<T>::SIZE;
    const int64_t row = (int64_t)blockIdx.x * WARPS + threadIdx.x / 32;
    if (row >= g.B * g.T)
        return; // the whole warp
    const int lane = threadIdx.x % 32, D = (int)g.D;
    const int64_t c = condition(g, row / g.T, fault);

    // xo = x + gate * branch
    float v[UNITS][V], sum = 0;
#pragma unroll
    for (int u = 0; u < UNITS; u++) {
        const int at = (32 * u + lane) * V;
        if (at < D)
            read(g.x + row * D + at, v[u]);
    }
#pragma unroll
    for (int u = 0; u < UNITS; u++) {
        const int at = (32 * u + lane) * V;
        if (at >= D)
            continue;
        if (g.branch)
            add_branch<T>(g, c, row, at, v[u]);
        if (g.xo)
            write(v[u], g.xo + row * D + at);
#pragma unroll
        for (int j = 0; j < V; j++)
            sum += v[u][j];
    }

    // xhat = (xo - mean) * rstd. The variance is a second pass: no cancellation.
    const float mean = pm_warp_sum(sum) / (float)D;
    float squares = 0;
#pragma unroll
    for (int u = 0; u < UNITS; u++)
        if ((32 * u + lane) * V < D)
#pragma unroll
            for (int j = 0; j < V; j++) {
                v[u][j] -= mean;
                squares = fmaf(v[u][j], v[u][j], squares);
            }
    const float rstd = 1.0f / sqrtf(pm_warp_sum(squares) / (float)D + (float)g.eps);
    if (lane == 0) {
        if (g.mean)
            g.mean[row] = mean;
        if (g.rstd)
            g.rstd[row] = rstd;
    }

    // y = xhat * (1 + scale) + shift
#pragma unroll
    for (int u = 0; u < UNITS; u++) {
        const int at = (32 * u + lane) * V;
        if (at >= D)
            continue;
        float scale[V] = {}, shift[V] = {};
        if (g.scale)
            read(act<T>(g.scale, c * g.mod_ld + at), scale);
        if (g.shift)
            read(act<T>(g.shift, c * g.mod_ld + at), shift);
#pragma unroll
        for (int j = 0; j < V; j++) {
            const float xhat = v[u][j] * rstd;
            v[u][j] = fmaf(xhat, scale[j], xhat) + shift[j];
        }
        write(v[u], act<T>(g.y, row * D + at));
    }
}

// Shared memory: [warp][gate, shift, scale][D]. In the last, the first four numbers of each unit come
// first, then the other four, so that lanes access consecutive 16 bytes: no bank conflicts.
template <int V> PM_DEVICE int place(int D, int channel)
{
    return (channel % V / 4 * (D / V) + channel / V) * 4 + channel % 4;
}
template <int V> PM_DEVICE void accumulate(float *sums, int D, int at, const float (&term)[V])
{
#pragma unroll
    for (int i = 0; i < V; i += 4) {
        pm_pack<float> *const p =
            reinterpret_cast<pm_pack<float> *>(sums + (i / 4 * (D / V) + at / V) * 4);
        pm_pack<float> s = *p;
#pragma unroll
        for (int j = 0; j < 4; j++)
            s.v[j] += term[i + j];
        *p = s;
    }
}

// d.dgate, d.dshift, d.dscale: NULL where there is no such sum. slots: [3][chunks of all images][D].
template <class T, int UNITS>
__global__ void __launch_bounds__(32 * WARPS)
    backward_kernel(arguments g, gradients d, int64_t chunks, float *__restrict__ slots,
                    unsigned long long *fault)
{
    constexpr int V = pm_pack<T>::SIZE;
    const int warp = threadIdx.x / 32, lane = threadIdx.x % 32, D = (int)g.D;
    const int64_t b = blockIdx.x / chunks, c = condition(g, b, fault);
    const int64_t begin = blockIdx.x % chunks * CHUNK, end = min(begin + CHUNK, g.T);
    float *const shared = reinterpret_cast<float *>(pm_shared), *const sums = shared + warp * 3 * D;
    for (int i = lane; i < 3 * D; i += 32)
        sums[i] = 0;
    __syncwarp();

    for (int64_t t = begin + warp; t < end; t += WARPS) {
        const int64_t row = b * g.T + t;
        const float mean = g.mean[row], rstd = g.rstd[row];
        pm_pack<T> dy[UNITS];
        float xhat[UNITS][V], sum = 0, dot = 0;
#pragma unroll
        for (int u = 0; u < UNITS; u++) {
            const int at = (32 * u + lane) * V;
            if (at < D) {
                read((g.xo ? g.xo : g.x) + row * D + at, xhat[u]);
                dy[u] = *reinterpret_cast<const pm_pack<T> *>(act<T>(d.dy, row * D + at));
            }
        }
        // y = xhat * (1 + scale) + shift; dxhat = dy * (1 + scale)
#pragma unroll
        for (int u = 0; u < UNITS; u++) {
            const int at = (32 * u + lane) * V;
            if (at >= D)
                continue;
            if (!g.xo && g.branch) // xo was not kept
                add_branch<T>(g, c, row, at, xhat[u]);
            float scale[V] = {}, up[V], term[V];
            if (g.scale)
                read(act<T>(g.scale, c * g.mod_ld + at), scale);
#pragma unroll
            for (int j = 0; j < V; j++) {
                xhat[u][j] = (xhat[u][j] - mean) * rstd;
                up[j] = pm_float(dy[u].v[j]);
                term[j] = up[j] * xhat[u][j];
                sum += fmaf(up[j], scale[j], up[j]);
                dot += fmaf(term[j], scale[j], term[j]);
            }
            if (d.dshift)
                accumulate(sums + D, D, at, up);
            if (d.dscale)
                accumulate(sums + 2 * D, D, at, term);
        }
        const float a = pm_warp_sum(sum) / (float)D, e = -pm_warp_sum(dot) / (float)D;
        if (!d.dx && !d.dbranch && !d.dgate)
            continue;
            // dx = dxo + rstd * (dxhat - mean(dxhat) - xhat * mean(dxhat * xhat));
            // dbranch = gate * dx; dgate += branch * dx
#pragma unroll
        for (int u = 0; u < UNITS; u++) {
            const int at = (32 * u + lane) * V;
            if (at >= D)
                continue;
            float scale[V] = {}, v[V], other[V];
            if (g.scale)
                read(act<T>(g.scale, c * g.mod_ld + at), scale);
#pragma unroll
            for (int j = 0; j < V; j++) {
                const float up = pm_float(dy[u].v[j]), dxhat = fmaf(up, scale[j], up);
                v[j] = rstd * fmaf(xhat[u][j], e, dxhat - a);
            }
            if (d.dxo) {
                read(d.dxo + row * D + at, other);
#pragma unroll
                for (int j = 0; j < V; j++)
                    v[j] += other[j];
            }
            if (d.dx)
                write(v, d.dx + row * D + at);
            if (d.dgate && g.branch) {
                read(act<T>(g.branch, row * D + at), other);
#pragma unroll
                for (int j = 0; j < V; j++)
                    other[j] *= v[j];
                accumulate(sums, D, at, other);
            }
            if (d.dbranch) {
                if (g.gate) {
                    read(act<T>(g.gate, c * g.gate_ld + at), other);
#pragma unroll
                    for (int j = 0; j < V; j++)
                        v[j] *= other[j];
                }
                write(v, act<T>(d.dbranch, row * D + at));
            }
        }
    }

    __syncthreads();
    const bool wanted[3] = {d.dgate != nullptr, d.dshift != nullptr, d.dscale != nullptr};
    for (int i = threadIdx.x; i < D; i += 32 * WARPS)
#pragma unroll
        for (int s = 0; s < 3; s++)
            if (wanted[s]) {
                float sum = 0;
#pragma unroll
                for (int w = 0; w < WARPS; w++)
                    sum += shared[(w * 3 + s) * D + place<V>(D, i)];
                slots[((int64_t)s * gridDim.x + blockIdx.x) * D + i] = sum;
            }
}

// ---------------------------------------------------------------- any width, any alignment

// xo, where it may not have been kept
template <class T>
PM_DEVICE float stream(const arguments &g, const float *x, bool add, int64_t c, int64_t row,
                       int64_t i)
{
    const float v = x[row * g.D + i];
    if (!add)
        return v;
    const float branch = pm_float(act<T>(g.branch, row * g.D)[i]);
    return g.gate ? fmaf(pm_float(act<T>(g.gate, c * g.gate_ld)[i]), branch, v) : v + branch;
}

template <class T>
__global__ void __launch_bounds__(32 * WARPS)
    forward_any_kernel(arguments g, unsigned long long *fault)
{
    const int64_t row = (int64_t)blockIdx.x * WARPS + threadIdx.x / 32;
    if (row >= g.B * g.T)
        return; // the whole warp
    const int lane = threadIdx.x % 32;
    const int64_t D = g.D, c = condition(g, row / g.T, fault);
    const bool add = g.branch != nullptr;
    float sum = 0, squares = 0;
    for (int64_t i = lane; i < D; i += 32)
        sum += stream<T>(g, g.x, add, c, row, i);
    const float mean = pm_warp_sum(sum) / (float)D;
    for (int64_t i = lane; i < D; i += 32) {
        const float v = stream<T>(g, g.x, add, c, row, i) - mean;
        squares = fmaf(v, v, squares);
    }
    const float rstd = 1.0f / sqrtf(pm_warp_sum(squares) / (float)D + (float)g.eps);
    if (lane == 0) {
        if (g.mean)
            g.mean[row] = mean;
        if (g.rstd)
            g.rstd[row] = rstd;
    }
    for (int64_t i = lane; i < D; i += 32) {
        const float xo = stream<T>(g, g.x, add, c, row, i), xhat = (xo - mean) * rstd;
        const float scale = g.scale ? pm_float(act<T>(g.scale, c * g.mod_ld)[i]) : 0.0f;
        const float shift = g.shift ? pm_float(act<T>(g.shift, c * g.mod_ld)[i]) : 0.0f;
        if (g.xo) // which may be x: what was read is replaced by the one that read it, at last
            g.xo[row * D + i] = xo;
        act<T>(g.y, row * D)[i] = pm_to<T>(fmaf(xhat, scale, xhat) + shift);
    }
}

// means[row] = mean(dxhat), mean(dxhat * xhat). A warp per row.
template <class T>
__global__ void __launch_bounds__(32 * WARPS)
    means_kernel(arguments g, gradients d, float2 *__restrict__ means, unsigned long long *fault)
{
    const int64_t row = (int64_t)blockIdx.x * WARPS + threadIdx.x / 32;
    if (row >= g.B * g.T)
        return; // the whole warp
    const int64_t c = condition(g, row / g.T, fault);
    const float mean = g.mean[row], rstd = g.rstd[row];
    float sum = 0, dot = 0;
    for (int64_t i = threadIdx.x % 32; i < g.D; i += 32) {
        const float xo = stream<T>(g, g.xo ? g.xo : g.x, !g.xo && g.branch, c, row, i);
        const float up = pm_float(act<T>(d.dy, row * g.D)[i]);
        const float scale = g.scale ? pm_float(act<T>(g.scale, c * g.mod_ld)[i]) : 0.0f;
        const float dxhat = fmaf(up, scale, up);
        sum += dxhat;
        dot = fmaf(dxhat, (xo - mean) * rstd, dot);
    }
    sum = pm_warp_sum(sum), dot = pm_warp_sum(dot);
    if (threadIdx.x % 32 == 0)
        means[row] = make_float2(sum / (float)g.D, dot / (float)g.D);
}

// A thread per channel of a chunk: blockIdx.x is the chunk, blockIdx.y 128 channels.
template <class T>
__global__ void __launch_bounds__(32 * WARPS)
    backward_any_kernel(arguments g, gradients d, int64_t chunks, const float2 *__restrict__ means,
                        float *__restrict__ slots, unsigned long long *fault)
{
    const int64_t i = (int64_t)blockIdx.y * blockDim.x + threadIdx.x;
    if (i >= g.D)
        return;
    const int64_t b = blockIdx.x / chunks, c = condition(g, b, fault);
    const int64_t begin = blockIdx.x % chunks * CHUNK, end = min(begin + CHUNK, g.T);
    const float gate = g.gate ? pm_float(act<T>(g.gate, c * g.gate_ld)[i]) : 1.0f;
    const float scale = g.scale ? pm_float(act<T>(g.scale, c * g.mod_ld)[i]) : 0.0f;
    float dgate = 0, dshift = 0, dscale = 0;
    for (int64_t row = b * g.T + begin; row < b * g.T + end; row++) {
        const float xo = stream<T>(g, g.xo ? g.xo : g.x, !g.xo && g.branch, c, row, i);
        const float xhat = (xo - g.mean[row]) * g.rstd[row];
        const float up = pm_float(act<T>(d.dy, row * g.D)[i]), dxhat = fmaf(up, scale, up);
        float v = g.rstd[row] * fmaf(-xhat, means[row].y, dxhat - means[row].x);
        if (d.dxo)
            v += d.dxo[row * g.D + i];
        dshift += up;
        dscale = fmaf(up, xhat, dscale);
        if (d.dgate && g.branch)
            dgate = fmaf(v, pm_float(act<T>(g.branch, row * g.D)[i]), dgate);
        if (d.dx)
            d.dx[row * g.D + i] = v;
        if (d.dbranch)
            act<T>(d.dbranch, row * g.D)[i] = pm_to<T>(v * gate);
    }
    const float sums[3] = {dgate, dshift, dscale};
    const bool wanted[3] = {d.dgate != nullptr, d.dshift != nullptr, d.dscale != nullptr};
#pragma unroll
    for (int s = 0; s < 3; s++)
        if (wanted[s])
            slots[((int64_t)s * gridDim.x + blockIdx.x) * g.D + i] = sums[s];
}

// ---------------------------------------------------------------- sums over the tokens of a condition

// blockIdx: (condition, 128 channels, which of the three)
template <class T>
__global__ void __launch_bounds__(128)
    sum_kernel(arguments g, gradients d, int64_t chunks, const float *__restrict__ slots)
{
    const int64_t c = blockIdx.x, i = (int64_t)blockIdx.y * 128 + threadIdx.x;
    const int which = blockIdx.z;
    void *const out = which == 0 ? d.dgate : which == 1 ? d.dshift : d.dscale;
    if (i >= g.D || !out)
        return;
    slots += which * g.B * chunks * g.D + i;
    const int64_t begin = g.cond ? 0 : c, end = g.cond ? g.B : c + 1;
    float sum = 0;
    for (int64_t b = begin; b < end; b++)
        if (!g.cond || g.cond[b] == c)
            for (int64_t k = b * chunks; k < (b + 1) * chunks; k++)
                sum += slots[k * g.D];
    act<T>(out, c * (which == 0 ? g.gate_ld : g.mod_ld))[i] = pm_to<T>(sum);
}

// ---------------------------------------------------------------- launches

int64_t chunks_of(const arguments *g) { return pm_blocks(g->T, CHUNK); }

bool aligned(std::initializer_list<const void *> pointers)
{
    for (const void *p : pointers)
        if ((uintptr_t)p % 16)
            return false;
    return true;
}

// Rows fit into registers, in whole units.
template <class T> bool fits(const arguments *g)
{
    constexpr int64_t V = pm_pack<T>::SIZE;
    return g->D <= 2048 && g->D % V == 0 && (!g->gate || g->gate_ld % V == 0) &&
           ((!g->shift && !g->scale) || g->mod_ld % V == 0) &&
           aligned({g->x, g->branch, g->gate, g->shift, g->scale, g->xo, g->y});
}

// Calls run with the number of units for the width: those of DiT-S, B, L and XL, and the most.
template <class T, class F> pm_status for_width(int64_t D, F run)
{
    constexpr int OF_WARP = 32 * pm_pack<T>::SIZE;
    return D <= 384    ? run(std::integral_constant<int, (384 + OF_WARP - 1) / OF_WARP>())
           : D <= 768  ? run(std::integral_constant<int, 768 / OF_WARP>())
           : D <= 1152 ? run(std::integral_constant<int, (1152 + OF_WARP - 1) / OF_WARP>())
                       : run(std::integral_constant<int, 2048 / OF_WARP>());
}

} // namespace

template <class T>
size_t residual_layernorm_modulate_workspace(const pm_ctx *, const arguments *g, bool backward)
{
    return backward ? pm_room(3 * g->B * chunks_of(g) * g->D, sizeof(float)) +
                          pm_room(g->B * g->T, sizeof(float2))
                    : 0;
}

template <class T>
pm_status residual_layernorm_modulate_forward(pm_ctx *ctx, const arguments *g, void *)
{
    const unsigned blocks = g->D ? pm_blocks(g->B * g->T, WARPS) : 0;
    if (!fits<T>(g)) {
        PM_RUN(ctx, forward_any_kernel<T>, blocks, 32 * WARPS, 0, *g, pm_device().fault);
        return PM_OK;
    }
    return for_width<T>(g->D, [&](auto units) -> pm_status {
        PM_RUN(ctx, (forward_kernel<T, decltype(units)::value>), blocks, 32 * WARPS, 0, *g,
               pm_device().fault);
        return PM_OK;
    });
}

template <class T>
pm_status residual_layernorm_modulate_backward(pm_ctx *ctx, const arguments *g,
                                               const gradients *given, void *scratch)
{
    gradients d = *given; // with those sums alone that there are
    d.dgate = g->gate ? d.dgate : nullptr;
    d.dshift = g->shift ? d.dshift : nullptr;
    d.dscale = g->scale ? d.dscale : nullptr;
    const int64_t chunks = chunks_of(g), blocks = g->D ? g->B * chunks : 0;
    float *const slots = pm_take<float>(&scratch, 3 * g->B * chunks * g->D);
    if (fits<T>(g) && aligned({d.dxo, d.dy, d.dx, d.dbranch})) {
        PM_TRY(for_width<T>(g->D, [&](auto units) -> pm_status {
            PM_RUN(ctx, (backward_kernel<T, decltype(units)::value>), (unsigned)blocks, 32 * WARPS,
                   WARPS * 3 * (size_t)g->D * sizeof(float), *g, d, chunks, slots,
                   pm_device().fault);
            return PM_OK;
        }));
    } else {
        float2 *const means = pm_take<float2>(&scratch, g->B * g->T);
        PM_RUN(ctx, means_kernel<T>, g->D ? pm_blocks(g->B * g->T, WARPS) : 0, 32 * WARPS, 0, *g, d,
               means, pm_device().fault);
        PM_RUN(ctx, backward_any_kernel<T>, dim3((unsigned)blocks, pm_blocks(g->D, 32 * WARPS)),
               32 * WARPS, 0, *g, d, chunks, means, slots, pm_device().fault);
    }
    if (d.dgate || d.dshift || d.dscale)
        PM_RUN(ctx, sum_kernel<T>, dim3((unsigned)g->C, pm_blocks(g->D, 128), 3), 128, 0, *g, d,
               chunks, slots);
    return PM_OK;
}

PM_INSTANTIATE_BOTH(residual_layernorm_modulate)
