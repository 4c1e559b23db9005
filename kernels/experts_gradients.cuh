// experts_gradients.cuh: gradients of the matrices, the biases and the rows' weights, from what
// hidden_kernel (experts.cu) leaves. A part of that file, in its unnamed namespace.
#pragma once
#include "experts.cuh"

namespace {

// ---------------------------------------------------------------- dy: what its rows give alone

// Per slot: sums (slots, D), or NULL, = the sum of w dy over the rows; drow_weight = the dots + <dy,
// down_bias>. A warp per row, 256 columns at a time, 8 to a lane. Without a bias there is nothing
// to read dy for.
constexpr int DY_WARPS = 8, DY_COLUMNS = 256, DY_ROWS = 128;

template <class T>
__global__ void __launch_bounds__(32 * DY_WARPS, 4)
    dy_kernel(layer<T> l, int tile, int tile_columns, const T *__restrict__ dy,
              const float *__restrict__ dots, float *__restrict__ drow_weight,
              float *__restrict__ sums)
{
    __shared__ float part[DY_WARPS][DY_COLUMNS];
    __shared__ float dot[DY_ROWS];
    const place p = find(l, tile, (int)blockIdx.x);
    if (p.rows <= 0)
        return;
    const int warp = threadIdx.x / 32, lane = threadIdx.x % 32;
    const pm_lines<T> lines = token_lines(l, p, dy);
    const int64_t end = l.down_bias || sums ? l.D : 0;
    for (int column0 = 0; column0 < end; column0 += DY_COLUMNS) {
        const int64_t left = l.D - column0 - lane * 8;
        float sum[8] = {}, bias[8] = {};
        if (l.down_bias)
            pm_read8(l.down_bias + p.group * l.D + column0 + lane * 8, left, bias);
#pragma unroll 4
        for (int row = warp; row < p.rows; row += DY_WARPS) {
            const int64_t line = lines.index ? lines.index[row] : row;
            const float weight = p.shared ? 1.0f : l.row_weight[p.first + row];
            float v[8], d = 0;
            pm_read8(lines.at + line * lines.ld + column0 + lane * 8, left, v);
#pragma unroll
            for (int e = 0; e < 8; e++) {
                d = fmaf(v[e], bias[e], d);
                sum[e] = fmaf(weight, v[e], sum[e]);
            }
            d = pm_warp_sum(d);
            if (lane == 0) // the same lane every time
                dot[row] = column0 ? dot[row] + d : d;
        }
#pragma unroll
        for (int e = 0; e < 8; e++)
            part[warp][lane * 8 + e] = sum[e];
        __syncthreads();
        if (sums && column0 + (int)threadIdx.x < l.D) {
            float total = 0;
            for (int i = 0; i < DY_WARPS; i++)
                total += part[i][threadIdx.x];
            sums[(int64_t)blockIdx.x * l.D + column0 + threadIdx.x] = total;
        }
        __syncthreads();
    }
    if (p.shared || !drow_weight)
        return;
    const int tiles = (width_of(l, p.group) + tile_columns - 1) / tile_columns;
    for (int row = threadIdx.x; row < p.rows; row += 32 * DY_WARPS) {
        float sum = 0;
        for (int i = 0; i < tiles; i++)
            sum += dots[i * l.R + p.first + row];
        drow_weight[p.first + row] = l.down_bias ? sum + dot[row] : sum;
    }
}

// ---------------------------------------------------------------- sums of the biases

// bias[group, column] += the sum over the group's slots of sums (slots, ld): 32 columns of a group
// per block, 8 runs of slots. by_width: a group has its pre-activations; else D columns.
template <class T>
__global__ void __launch_bounds__(256)
    sums_kernel(layer<T> l, int across, int tile, bool by_width, const float *__restrict__ sums,
                int64_t ld, float *__restrict__ bias)
{
    __shared__ float part[8][32];
    const int group = (int)(blockIdx.x / across), run = threadIdx.x / 32;
    const int64_t column = blockIdx.x % across * 32 + threadIdx.x % 32;
    const int64_t width = by_width ? l.halves * width_of(l, group) : l.D;
    const int64_t slot = first_slot(l, tile, group), slots = (rows_in(l, group) + tile - 1) / tile;
    float sum = 0;
    if (column < width)
        for (int64_t i = run; i < slots; i += 8)
            sum += sums[(slot + i) * ld + column];
    part[run][threadIdx.x % 32] = sum;
    __syncthreads();
    if (run > 0 || column >= width)
        return;
    for (int i = 1; i < 8; i++)
        sum += part[i][threadIdx.x];
    bias[(by_width ? l.halves * l.foff[group] : group * l.D) + column] += sum;
}

// ---------------------------------------------------------------- gradients of the weights

// up: dup (f, D) += dpre^T x, of each half;  else ddown (D, f) += dy^T (w h). hidden: dpre, or w h;
// tokens: x, or dy. grid: slots of `chunk` rows * rows of tiles * columns of tiles, y: halves; the
// shared groups, which have the most rows, first. A group of one chunk is added to the gradient; one
// of more leaves its products in parts (slots, most).
template <class S, class T = typename S::T>
__global__ void __launch_bounds__(S::THREADS, S::BLOCKS)
    weights_kernel(layer<T> l, int chunk, int down, int across, bool up, const T *tokens,
                   hidden_rows<T> hidden, float *parts, int64_t most, float *gradient)
{
    const int halves = (int)gridDim.y, half = (int)blockIdx.y;
    const int slot = (int)(gridDim.x / (down * across) - 1 - blockIdx.x / (down * across));
    const place p = find(l, chunk, slot);
    const int row0 = (int)(blockIdx.x / across) % down * S::BM,
              column0 = (int)(blockIdx.x % across) * S::BN;
    const int width = width_of(l, p.group), D = (int)l.D;
    const int rows = (up ? width : D) - row0, ld = up ? D : width, columns = ld - column0;
    if (p.rows <= 0 || rows <= 0 || columns <= 0)
        return;
    const pm_lines<T> of_hidden = {rows_of(hidden, l, p), ld_of(hidden, p), nullptr},
                      of_tokens = token_lines(l, p, tokens);
    one_segment<T> product = {up ? of_hidden : of_tokens, up ? of_tokens : of_hidden, p.rows};
    product.a_lines.at += row0 + half * (ld_of(hidden, p) / 2);
    product.b_lines.at += column0;
    const float *const tile = pm_product<S, true, true>(pm_shared, product, rows, columns);

    const bool whole = rows_in(l, p.group) <= chunk;
    float *const out = (whole ? gradient + halves * l.foff[p.group] * l.D : parts + slot * most) +
                       half * width * l.D + (int64_t)row0 * ld + column0;
    for (int i = threadIdx.x; i < S::BM * S::CHUNKS; i += S::THREADS) {
        const int row = i / S::CHUNKS, part = i % S::CHUNKS, column = part * 8;
        if (row >= rows || column >= columns)
            continue;
        float v[8], old[8];
        pm_tile_read(tile + row * S::TILE_LD + column, part, v);
        if (whole) {
            pm_read8(out + (int64_t)row * ld + column, columns - column, old);
#pragma unroll
            for (int e = 0; e < 8; e++)
                v[e] += old[e];
        }
        pm_write8(out + (int64_t)row * ld + column, columns - column, v);
    }
}

// The gradient of every group of several chunks, of `halves` matrices, += its parts, in their order.
// grid: groups * across.
template <class T>
__global__ void __launch_bounds__(256)
    parts_kernel(layer<T> l, int chunk, int across, int halves, const float *__restrict__ parts,
                 int64_t most, float *__restrict__ gradient)
{
    const int group = (int)(blockIdx.x / across);
    const int64_t chunks = (rows_in(l, group) + chunk - 1) / chunk;
    const int64_t at = ((int64_t)(blockIdx.x % across) * 256 + threadIdx.x) * 8,
                  left = halves * width_of(l, group) * l.D - at;
    if (chunks < 2 || left <= 0)
        return;
    const float *part = parts + first_slot(l, chunk, group) * most + at;
    float *const out = gradient + halves * l.foff[group] * l.D + at;
    float sum[8], v[8];
    pm_read8(part, left, sum);
    for (int64_t i = 1; i < chunks; i++) {
        part += most;
        pm_read8(part, left, v);
#pragma unroll
        for (int e = 0; e < 8; e++)
            sum[e] += v[e];
    }
    pm_read8(out, left, v);
#pragma unroll
    for (int e = 0; e < 8; e++)
        v[e] += sum[e];
    pm_write8(out, left, v);
}

} // namespace
