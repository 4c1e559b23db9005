// residual_layernorm_modulate.cu: contract in csrc/ops/residual_layernorm_modulate.h. Bound by memory:
// everything of a token's row is read once and written once, and stays in registers between the
// reductions. What matters is how much is under way: 4 TB/s times 0.7 us are 21 KB per SM.
//
// A block has a chunk of tokens of one image, a thread four channels of each: a warp reads 512
// consecutive bytes of floats, 256 of bf16, and 384, 768, 1024 and 1152 channels are whole warps. Gate,
// shift and scale, one row for all tokens of the image, and the sums over tokens stay in registers for
// the chunk. ROWS tokens go at once: all that is read of them is asked for before the first is used, and
// the sums of all their rows take one exchange through shared memory, and one barrier (there are two
// sets of partial sums, so that the next rows need none before they write theirs).
//
// forward   Bytes of an element: x 4, branch a, xo 4, y a (a: 4 or 2, the size of an activation). Under
//           way: 96 bytes a thread, 81 KB per SM.
// backward  Bytes: xo 4, dxo 4, dy a, branch a, dx 4, dbranch a. Under way: 192 bytes a thread, 108 KB per
//           SM. The sums over tokens (dgate, dshift, dscale) go into a slot of the chunk.
// sums      a thread per channel of a condition adds the slots of its images, image by image, each
//           in order. Bytes: 12 / 16 an element, written and read again (4 % of the above, each, and
//           the slots of 64 images, 14 MB, stay in the L2 cache).
//
// Order of sums: over D, four channels in order, a tree over the lanes, then one over the warps. A row's
// do not depend on its place among the ROWS.
//
// Rows wider than 2048, or not aligned to 16 bytes, take a second path: forward is a warp per row,
// reading it three times; backward one pass for the sums over a row, then a thread per channel.
#include <initializer_list>

#include "quads.cuh"

namespace {

typedef pm_residual_layernorm_modulate_args arguments;
typedef pm_residual_layernorm_modulate_grads gradients;

constexpr int WARPS = 4; // of a block of the second path
// Tokens of a block. Forward: few, so that a batch of a few images has enough blocks; backward: its slots
// are 12 bytes per channel and chunk, and 64 images of 256 tokens are 1024 blocks, four per place.
constexpr int64_t FORWARD_CHUNK = 8, CHUNK = 16;

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

// ---------------------------------------------------------------- four channels of a thread

constexpr int V = PM_QUAD;
// Of a row that all tokens of an image share; 0 where there is none.
template <class T> PM_DEVICE pm_quad<T> load_shared(const void *rows, int64_t at, bool here)
{
    return rows && here ? pm_load_quad(act<T>(rows, at)) : pm_quad<T>{};
}

// Rows at a time, and the warps of an SM that the registers are for: 72 of a thread, and 96. With both
// streams and both activations four rows are 48 of them in bf16, as two are in float.
template <class T> constexpr int ROWS = std::is_same<T, bf16>::value ? 4 : 2;
constexpr int FORWARD_WARPS = 28, BACKWARD_WARPS = 20;
// Kernels are compiled for the widths of DiT-S, B, L and XL, whose rows lie at distances that the
// instructions name, and for any other (0).
constexpr int MOST = 2048;
__host__ __device__ constexpr int threads_of(int width)
{
    return ((width ? width : MOST) / V + 31) / 32 * 32;
}
constexpr int blocks_of(int warps, int threads)
{
    return threads < 32 * warps ? 32 * warps / threads : 1;
}

// ---------------------------------------------------------------- sums over a row

// The sum of each of N numbers over the warp; lane l gets that of number l / (32 / N). At each step a lane gives
// half of its numbers to the other half of the warp, so it takes about N shuffles, not 5 N.
template <int N, int HALF = 16> PM_DEVICE float warp_sums(const float (&x)[N])
{
    if constexpr (N == 1) {
        float sum = x[0];
#pragma unroll
        for (int lanes = HALF; lanes > 0; lanes /= 2)
            sum += __shfl_xor_sync(PM_ALL, sum, lanes);
        return sum;
    } else {
        const bool upper = threadIdx.x & HALF;
        float kept[N / 2];
#pragma unroll
        for (int i = 0; i < N / 2; i++) {
            const float low = x[i], high = x[i + N / 2];
            kept[i] = (upper ? high : low) + __shfl_xor_sync(PM_ALL, upper ? low : high, HALF);
        }
        return warp_sums<N / 2, HALF / 2>(kept);
    }
}
// x over the 32 / N lanes that have the same of N numbers
template <int N> PM_DEVICE float lanes_sum(float x)
{
#pragma unroll
    for (int lanes = 16 / N; lanes > 0; lanes /= 2)
        x += __shfl_xor_sync(PM_ALL, x, lanes);
    return x;
}
// To every lane: number i of N, which the lanes i * 32 / N and on have.
template <int N> PM_DEVICE void spread(float x, float (&all)[N])
{
#pragma unroll
    for (int i = 0; i < N; i++)
        all[i] = __shfl_sync(PM_ALL, x, i * (32 / N));
}

// The partial sums of N numbers that the warps exchange. Rows of 20: the lanes of a warp, which read
// some warps' sums of each number, are in different banks.
template <int N> struct partial_sums {
    float of[N][MOST / (32 * V) + 4];
};

// ---------------------------------------------------------------- rows in registers

template <class T, int WIDTH>
__global__ void __launch_bounds__(threads_of(WIDTH), blocks_of(FORWARD_WARPS, threads_of(WIDTH)))
    forward_kernel(arguments g, unsigned chunks, unsigned long long *fault)
{
    constexpr int R = ROWS<T>, OF_ROW = 32 / R; // lanes
    __shared__ partial_sums<2 * R> parts[2];    // of each row the sum, and the squares below
    const int warp = threadIdx.x / 32, lane = threadIdx.x % 32;
    const int D = WIDTH ? WIDTH : (int)g.D, at = V * threadIdx.x;
    const bool here = WIDTH || at < D;
    const int warps = threads_of(D) / 32;
    const int64_t b = blockIdx.x / chunks, c = condition(g, b, fault);
    // Everything of the block lies at 32-bit distances from its first row.
    const int64_t begin = b * g.T + blockIdx.x % chunks * FORWARD_CHUNK, base = begin * D;
    const int count = (int)min(FORWARD_CHUNK, (b + 1) * g.T - begin); // rows
    const pm_quad<T> gate = load_shared<T>(g.gate, c * g.gate_ld + at, here);
    const pm_quad<T> scale = load_shared<T>(g.scale, c * g.mod_ld + at, here);
    const pm_quad<T> shift = load_shared<T>(g.shift, c * g.mod_ld + at, here);
    const float channels = (float)min(32 * V, D - 32 * V * warp); // of the warp

    for (int t = 0; t < count; t += R) {
        const int set = t / R % 2; // of the partial sums
        const int first = t * D + at, rows = here ? min(R, count - t) : 0;
        pm_quad<float> x[R];
        pm_quad<T> branch[R];
#pragma unroll
        for (int r = 0; r < R; r++)
            x[r] = r < rows ? pm_load_quad(g.x + base + (first + r * D)) : pm_quad<float>{};
#pragma unroll
        for (int r = 0; r < R; r++)
            branch[r] = g.branch && r < rows
                            ? pm_load_quad(act<T>(g.branch, base) + (first + r * D))
                            : pm_quad<T>{};

        // xo = x + gate * branch
        float sums[R];
#pragma unroll
        for (int r = 0; r < R; r++) {
            float(&v)[V] = x[r].v;
            if (g.branch)
#pragma unroll
                for (int j = 0; j < V; j++)
                    v[j] = g.gate ? fmaf(gate[j], branch[r][j], v[j]) : v[j] + branch[r][j];
            if (g.xo && r < rows)
                pm_store_quad(g.xo + base + (first + r * D), v);
            sums[r] = (v[0] + v[1]) + (v[2] + v[3]);
        }

        // The variance is a second pass, so that nothing cancels: the squares about the mean of the warp's
        // channels, which become those about the row's by what lies between the means.
        const float sum = warp_sums<R>(sums);
        float means[R], squares[R];
        spread<R>(sum / channels, means);
#pragma unroll
        for (int r = 0; r < R; r++) {
            squares[r] = 0;
            if (here)
#pragma unroll
                for (int j = 0; j < V; j++) {
                    const float off = x[r].v[j] - means[r];
                    squares[r] = fmaf(off, off, squares[r]);
                }
        }
        const float square = warp_sums<R>(squares);
        const int own = lane / OF_ROW; // the row whose sums this lane has
        if (lane % OF_ROW == 0) {
            parts[set].of[own][warp] = sum;
            parts[set].of[R + own][warp] = square;
        }
        __syncthreads();
        float all = 0, apart = 0;
#pragma unroll
        for (int w = lane % OF_ROW; w < threads_of(WIDTH) / 32; w += OF_ROW)
            all += w < warps ? parts[set].of[own][w] : 0.0f;
        const float mean = lanes_sum<R>(all) / (float)D;
#pragma unroll
        for (int w = lane % OF_ROW; w < threads_of(WIDTH) / 32; w += OF_ROW)
            if (w < warps) {
                const float count = (float)min(32 * V, D - 32 * V * w);
                const float off = parts[set].of[own][w] / count - mean;
                apart += fmaf(count * off, off, parts[set].of[R + own][w]);
            }
        const float rstd = 1.0f / sqrtf(lanes_sum<R>(apart) / (float)D + (float)g.eps);
        if (warp == 0 && lane % OF_ROW == 0 && t + own < count) {
            if (g.mean)
                g.mean[begin + (t + own)] = mean;
            if (g.rstd)
                g.rstd[begin + (t + own)] = rstd;
        }

        // xhat = (xo - mean) * rstd;  y = xhat * (1 + scale) + shift
        float rstds[R];
        spread<R>(mean, means);
        spread<R>(rstd, rstds);
#pragma unroll
        for (int r = 0; r < R; r++) {
            if (r >= rows)
                continue;
            float y[V];
#pragma unroll
            for (int j = 0; j < V; j++) {
                const float xhat = (x[r].v[j] - means[r]) * rstds[r];
                y[j] = fmaf(xhat, scale[j], xhat) + shift[j];
            }
            pm_store_quad(act<T>(g.y, base) + (first + r * D), y);
        }
    }
}

// d.dgate, d.dshift, d.dscale: NULL where there is no such sum. slots: [3][chunks of all images][D].
// For sm_80 ptxas spills 16 bytes of bf16 at widths of 384, 768 and 1152: the bound of registers is
// what BACKWARD_WARPS on an SM leave, and those are worth more.
template <class T, int WIDTH>
__global__ void __launch_bounds__(threads_of(WIDTH), blocks_of(BACKWARD_WARPS, threads_of(WIDTH)))
    backward_kernel(arguments g, gradients d, unsigned chunks, float *__restrict__ slots,
                    unsigned long long *fault)
{
    constexpr int R = ROWS<T>, OF_SUM = 32 / (2 * R); // lanes
    __shared__ partial_sums<2 * R> parts[2];          // of dxhat and of dxhat * xhat of each row
    const int warp = threadIdx.x / 32, lane = threadIdx.x % 32;
    const int D = WIDTH ? WIDTH : (int)g.D, at = V * threadIdx.x;
    const bool here = WIDTH || at < D;
    const int warps = threads_of(D) / 32;
    const int64_t b = blockIdx.x / chunks, c = condition(g, b, fault);
    // Everything of the block lies at 32-bit distances from its first row.
    const int64_t begin = b * g.T + blockIdx.x % chunks * CHUNK, base = begin * D;
    const int count = (int)min(CHUNK, (b + 1) * g.T - begin); // rows
    const pm_quad<T> gate = load_shared<T>(g.gate, c * g.gate_ld + at, here);
    const pm_quad<T> scale = load_shared<T>(g.scale, c * g.mod_ld + at, here);
    const bool further = d.dx || d.dbranch || d.dgate;
    float dgate[V] = {}, dshift[V] = {}, dscale[V] = {};

    for (int t = 0; t < count; t += R) {
        const int set = t / R % 2; // of the partial sums
        const int first = t * D + at, rows = here ? min(R, count - t) : 0;
        const bool add = !g.xo && g.branch; // xo was not kept
        pm_quad<float> x[R], dxo[R];
        pm_quad<T> dy[R], branch[R];
        float mean[R], rstd[R];
#pragma unroll
        for (int r = 0; r < R; r++) {
            const bool there = r < rows;
            x[r] = there ? pm_load_quad((g.xo ? g.xo : g.x) + base + (first + r * D))
                         : pm_quad<float>{};
            dy[r] = there ? pm_load_quad(act<T>(d.dy, base) + (first + r * D)) : pm_quad<T>{};
            mean[r] = there ? g.mean[begin + (t + r)] : 0;
            rstd[r] = there ? g.rstd[begin + (t + r)] : 0;
        }
#pragma unroll
        for (int r = 0; r < R; r++) {
            const bool there = r < rows;
            dxo[r] = d.dxo && there ? pm_load_quad(d.dxo + base + (first + r * D))
                                    : pm_quad<float>{};
            branch[r] = (add || d.dgate) && g.branch && there
                            ? pm_load_quad(act<T>(g.branch, base) + (first + r * D))
                            : pm_quad<T>{};
        }

        // y = xhat * (1 + scale) + shift; dxhat = dy * (1 + scale)
        float sums[2 * R];
#pragma unroll
        for (int r = 0; r < R; r++) {
            float sum = 0, dot = 0;
#pragma unroll
            for (int j = 0; j < V; j++) {
                float &xhat = x[r].v[j];
                const float more = branch[r][j], up = dy[r][j];
                if (add)
                    xhat = g.gate ? fmaf(gate[j], more, xhat) : xhat + more;
                xhat = (xhat - mean[r]) * rstd[r];
                const float term = up * xhat;
                sum += fmaf(up, scale[j], up);
                dot += fmaf(term, scale[j], term);
                dshift[j] += up;
                dscale[j] += term;
            }
            sums[r] = sum, sums[R + r] = dot;
        }
        if (!further)
            continue;
        const float part = warp_sums<2 * R>(sums);
        const int own = lane / OF_SUM; // the sum that this lane has
        if (lane % OF_SUM == 0)
            parts[set].of[own][warp] = part;
        __syncthreads();
        float all = 0;
#pragma unroll
        for (int w = lane % OF_SUM; w < threads_of(WIDTH) / 32; w += OF_SUM)
            all += w < warps ? parts[set].of[own][w] : 0.0f;
        spread<2 * R>(lanes_sum<2 * R>(all) / (float)D, sums);

        // dx = dxo + rstd * (dxhat - mean(dxhat) - xhat * mean(dxhat * xhat));
        // dbranch = gate * dx; dgate += branch * dx
#pragma unroll
        for (int r = 0; r < R; r++) {
            if (r >= rows)
                continue;
            float v[V];
#pragma unroll
            for (int j = 0; j < V; j++) {
                const float up = dy[r][j];
                const float dxhat = fmaf(up, scale[j], up);
                v[j] = rstd[r] * fmaf(x[r].v[j], -sums[R + r], dxhat - sums[r]) + dxo[r].v[j];
                dgate[j] = fmaf(branch[r][j], v[j], dgate[j]);
            }
            if (d.dx)
                pm_store_quad(d.dx + base + (first + r * D), v);
            if (d.dbranch) {
                if (g.gate)
#pragma unroll
                    for (int j = 0; j < V; j++)
                        v[j] *= gate[j];
                pm_store_quad(act<T>(d.dbranch, base) + (first + r * D), v);
            }
        }
    }

    if (!here)
        return;
    const int64_t slot = (int64_t)blockIdx.x * D + at, all = (int64_t)gridDim.x * D;
    if (d.dgate)
        pm_store_quad(slots + slot, dgate);
    if (d.dshift)
        pm_store_quad(slots + all + slot, dshift);
    if (d.dscale)
        pm_store_quad(slots + 2 * all + slot, dscale);
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
#pragma unroll 8
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

// Rows fit into a block, by fours.
bool fits(const arguments *g)
{
    return g->D <= MOST && g->D % V == 0 && (!g->gate || g->gate_ld % V == 0) &&
           ((!g->shift && !g->scale) || g->mod_ld % V == 0) &&
           aligned({g->x, g->branch, g->gate, g->shift, g->scale, g->xo, g->y});
}

// Calls run with the width as a constant: D, or 0.
template <class F> pm_status for_width(int64_t D, F run)
{
    return D == 384    ? run(std::integral_constant<int, 384>())
           : D == 768  ? run(std::integral_constant<int, 768>())
           : D == 1024 ? run(std::integral_constant<int, 1024>())
           : D == 1152 ? run(std::integral_constant<int, 1152>())
                       : run(std::integral_constant<int, 0>());
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
    if (!fits(g)) {
        PM_RUN(ctx, forward_any_kernel<T>, g->D ? pm_blocks(g->B * g->T, WARPS) : 0, 32 * WARPS, 0,
               *g, pm_device().fault);
        return PM_OK;
    }
    const unsigned chunks = pm_blocks(g->T, FORWARD_CHUNK);
    const int64_t blocks = g->D ? g->B * chunks : 0;
    return for_width(g->D, [&](auto width) -> pm_status {
        PM_RUN(ctx, (forward_kernel<T, decltype(width)::value>), (unsigned)blocks,
               threads_of((int)g->D), 0, *g, chunks, pm_device().fault);
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
    if (fits(g) && aligned({d.dxo, d.dy, d.dx, d.dbranch})) {
        PM_TRY(for_width(g->D, [&](auto width) -> pm_status {
            PM_RUN(ctx, (backward_kernel<T, decltype(width)::value>), (unsigned)blocks,
                   threads_of((int)g->D), 0, *g, d, (unsigned)chunks, slots, pm_device().fault);
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
