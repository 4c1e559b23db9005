// experts.cu: the feed-forward layer over a routing plan. The contract is csrc/ops/experts.h; one
// tile of a product, its pipeline and its shared memory are product.cuh; who has which rows is
// experts.cuh; the gradients of matrices and biases are experts_gradients.cuh.
//
// Launches, with a block per tile (N tokens, R rows, f: the width of a group, W: of the widest):
//   forward   up       h = w act(x up^T + bias), and pre          rows x W,  K = D
//             out      y = h down^T + w bias                      rows x D,  K = f
//   backward  hidden   dpre, w h; parts of dup_bias, drow_weight  rows x W,  K = D
//             dy       drow_weight, and parts of ddown_bias       one pass over the rows of dy
//             out      dx = dpre up                               rows x D,  K = f
//             weights  dup += dpre^T x, ddown += dy^T (w h)       each group's W x D,  K = its rows
//             parts    of dup and ddown, where a group's rows are split
//             sums     of the parts of the biases
// act is gelu, or swiglu: then up is two matrices, up's and before it the gate's, W is 2 f in the
// launches of up and of dup, and dx = dpre up is over K = 2 f. A bias that is NULL is not read.
//
// The row's weight w goes into h where h is made: so down and ddown have no pass of their own for
// it, and dy is read where it lies. Rows are gathered through row_token by the copies into shared
// memory; neither x nor dy is copied.
//
// A launch may only depend on dims, so there is a slot for every tile of rows that any plan can
// have (experts.cuh), R / BM + G of them, and for the shared groups N / BM each. A block finds its
// group by a vote over row_off, and returns at once where the plan has no rows. Slots are the slow
// index of a grid, columns the fast one: the blocks that run at a time have few rows, and one
// group's matrix, which is then in L2.
//
// out is one product for all that a token gets. Where each token has one row, the row's tile sums
// over K = f + Z, [w h, h_shared] [down_g, down_shared]^T, and writes y (or dx) once. The dims tell
// only whether that can be (R = N). Then `single` looks whether it is (one block, 4 N bytes), both
// ways are launched, and the blocks of one return at once. The other way, and the only one for R !=
// N: the plan's rows go to scratch as floats, and the tiles of tokens add them in the order of
// tok_row.
//
// Bytes per token, bf16, R = N, one shared group as wide as the others, without the matrices:
//   forward   6 D + 12 W: up 2 (2 D + 4 W), out 4 W + 2 D
//   backward 18 D + 24 W: hidden 2 (2 D + 6 W), dy 4 D, out 4 W + 2 D, weights 2 * 2 (2 D + 2 W)
// With a gate, W units wide: 6 D + 16 W, and without biases, so without dy, 14 D + 36 W: hidden
// 2 (2 D + 10 W), out 8 W + 2 D, weights 2 (2 D + 4 W) + 2 (2 D + 2 W).
// Tiles that share rows or columns read them again from L2: product.cuh has how often. R != N adds
// 8 D per row for the rows in scratch (written and read as floats), each time.
//
// Order of sums: along K upwards, a row's own group before the shared ones. Gradients of matrices:
// chunks of a group's rows, in order. Biases: the rows of a slot in 8 or 16 runs (dup_bias: threads
// of a block by chunks of a row) or 8 (ddown_bias), then the slots in 8 runs. drow_weight: chunks of
// 8 columns, the chunks of a tile, the tiles, then <dy, bias>. All of it depends on dims, the plan
// and the number of SMs, never on time.
//
// Indices of the plan are taken as they are: routing_plan, or promoe.ops, has checked them.
#include "experts.cuh"
#include "experts_gradients.cuh"
#include "experts_loop.cuh"

namespace {

// ---------------------------------------------------------------- sizes

// Depths up to a few thousand (up, hidden: K = D): 128 x 128, four warps of 64 x 64 and two blocks
// per SM, as what a tile does before and after its product, a quarter of its time at D = 1152 by
// count, then has the other block's product beside it. Per 32 mma of a warp 8 ldmatrix.x4 (4 KB),
// half of what shared memory gives an A100 in that time. 128 sums and 2 * 32 words of fragments per
// thread: all of the 255 registers. 4 stages of 32 numbers are 80 KB: an SM of sm_80 has 164.
//
// Long ones (out: K = 2 f; weights: K = rows): 128 x 192, as the way through L2 is what limits then:
// per number that is fetched a tile of 128 x 128 does 64 multiply-adds, this one 77; at 300e12 of
// them a second, which mma.sync may reach on an H100, that is 9.4 and 7.8 TB/s. Eight warps of
// 64 x 48, one block per SM, 64 numbers deep: a barrier every 96 mma of a warp; 3 stages are 135 KB.
// Widths of S, B and XL are multiples of 384; for L (D = 1024) 192 would leave 11 % empty, so there
// it is 128 x 128 in eight warps of 64 x 32 (the registers of 64 x 64 do not suffice).
//
// Floats: 128 x 128 in eight warps, 64 x 32 for tf32; 32 x 64 for FMA, 8 x 8 sums per thread: 16
// loads of 16 bytes for 256 FMA.
//
// Small: few rows per group (sampling one image: 20 rows) and narrow layers. Two blocks or three and
// more per SM, four to six times the tiles.
using bf16_short = pm_shape<bf16, true, 128, 128, 32, 4, 2, 2, 2>;
using bf16_long = pm_shape<bf16, true, 128, 192, 64, 3, 2, 4, 1>;
using bf16_long_128 = pm_shape<bf16, true, 128, 128, 64, 3, 2, 4, 1>;
using bf16_small = pm_shape<bf16, true, 64, 64, 32, 3, 2, 2, 3>;
// On Hopper wgmma reads both operands from shared memory. 128 x 128: two warpgroups, 3 stages of 64
// numbers in 99 KB and 64 sums a thread, so that two blocks fit an SM, and one stores (a third of
// up's time at D = 1152 if it waited) while the other multiplies. 128 x 192 for the long ones, in 4
// stages of 40 KB, one block per SM. On an H200, ProMoE-XL at 64 images: forward 246 (mma) -> 455
// TFLOP/s, and 128 x 256 is no better.
using bf16_wgmma = pm_shape_wgmma<128, 128, 3, 2>;
using bf16_wgmma_long = pm_shape_wgmma<128, 192, 4, 1>;
using tf32_large = pm_shape<float, true, 128, 128, 32, 3, 2, 4, 1>;
using tf32_small = pm_shape<float, true, 64, 64, 16, 3, 2, 2, 3>;
using fp32_large = pm_shape<float, false, 128, 128, 16, 3, 4, 2, 1>;
using fp32_small = pm_shape<float, false, 64, 64, 16, 3, 2, 2, 2>;

// Rows per group and widths from which the large shapes pay: a tile that is three quarters full.
constexpr int64_t LARGE_ROWS = 96, LARGE_WIDTH = 96;

// Of the matrices' gradients (chunk_rows): what a part costs, 8 bytes a number at 4e12 a second, in
// rows of a product at 600e12 a second; and a chunk is no shorter than that.
constexpr int64_t PART_ROWS = 600, CHUNK_ROWS = 512;

// Tiles over a length.
int tiles(int64_t length, int tile) { return (int)((length + tile - 1) / tile); }

int halves_of(const pm_experts_args *g) { return g->activation == PM_EXPERTS_SWIGLU ? 2 : 1; }

bool is_large(const pm_experts_args *g)
{
    const int64_t width = (g->W > g->Z ? g->W : g->Z) / halves_of(g);
    return (g->G ? g->R >= LARGE_ROWS * g->G : g->N >= LARGE_ROWS) && width >= LARGE_WIDTH &&
           g->D >= LARGE_WIDTH;
}

// Tiles of 192 columns cover no more than those of 128 would.
bool fits_192(int64_t D) { return tiles(D, 192) * 192 <= tiles(D, 128) * 128; }

// ---------------------------------------------------------------- up

// pre = x up^T + bias;  h = w act(pre). grid: slots * (columns of tiles). With a gate a tile has
// BN / 2 hidden units: the gate's columns in its left half, up's in its right one, two matrices as
// one operand. So it takes the same registers, x is read once for both, and h is made where they
// meet.
template <class S, int HALVES, class T = typename S::T>
__global__ void __launch_bounds__(S::THREADS, S::BLOCKS)
    up_kernel(layer<T> l, int across, hidden_rows<T> pre, hidden_rows<T> h)
{
    constexpr int UNITS = S::BN / HALVES, CHUNKS = S::CHUNKS / HALVES;
    const place p = find(l, S::BM, (int)(blockIdx.x / across));
    const int unit0 = (int)(blockIdx.x % across) * UNITS;
    if (p.rows <= 0 || unit0 >= width_of(l, p.group))
        return;
    const int units = width_of(l, p.group) - unit0;
    one_segment<T> product = {token_lines(l, p, l.x),
                              {matrix_of(l, l.up, p.group) + unit0 * l.D, l.D, nullptr},
                              (int)l.D};
    if (HALVES == 2)
        product.b_lines.partner = distance(l, l.up, p.group);
    const float *const tile =
        pm_product<S, false, false, HALVES == 2>(pm_shared, product, p.rows, units);

    // A thread has the same columns of every row it has, RUNS apart.
    constexpr int RUNS = S::THREADS / CHUNKS;
    static_assert(S::THREADS % CHUNKS == 0, "whole rows");
    const int width = width_of(l, p.group), chunk = threadIdx.x % CHUNKS, unit = chunk * 8;
    const int left = units - unit;
    if (left <= 0)
        return;
    float bias[HALVES][8] = {};
    if (l.up_bias)
#pragma unroll
        for (int half = 0; half < HALVES; half++)
            pm_read8(l.up_bias + HALVES * l.foff[p.group] + half * width + unit0 + unit, left,
                     bias[half]);
    T *const pre0 = rows_of(pre, l, p), *const h0 = rows_of(h, l, p);
    for (int row = threadIdx.x / CHUNKS; row < p.rows; row += RUNS) {
        float v[HALVES][8];
#pragma unroll
        for (int half = 0; half < HALVES; half++) {
            pm_tile_read(tile + row * S::TILE_LD + half * UNITS + unit, chunk, v[half]);
#pragma unroll
            for (int e = 0; e < 8; e++)
                v[half][e] += bias[half][e];
            if (pre0)
                pm_write8(pre0 + row * ld_of(pre, p) + half * width + unit0 + unit, left, v[half]);
        }
        const float weight = p.shared ? 1.0f : l.row_weight[p.first + row];
        float w[8];
#pragma unroll
        for (int e = 0; e < 8; e++) {
            float of_unit[HALVES];
#pragma unroll
            for (int half = 0; half < HALVES; half++)
                of_unit[half] = v[half][e];
            w[e] = weight * activate<T>(of_unit);
        }
        pm_write8(h0 + row * ld_of(h, p) + unit0 + unit, left, w);
    }
}

// ---------------------------------------------------------------- out: y and dx

// *single: every token has one row.
constexpr int SINGLE_THREADS = 1024;
__global__ void __launch_bounds__(SINGLE_THREADS)
    single_kernel(int64_t N, const int32_t *__restrict__ tok_off, int *single)
{
    int good = 1;
#pragma unroll 8
    for (int64_t n = threadIdx.x; n <= N; n += SINGLE_THREADS)
        good &= tok_off[n] == n;
    good = __syncthreads_and(good);
    if (threadIdx.x == 0)
        *single = good;
}

enum out_way {
    OUT_ROWS,   // a plan row each, to `part`
    OUT_TOKENS, // a token each: the shared groups, and its rows of part
    OUT_SINGLE, // a plan row each, and the shared groups of its token
};

// What an out product reads: hidden rows, and the matrices that take them to D: down (D, f), or,
// back, up (f, D), of a group with a gate first the gate.
template <class T, bool BACKWARD> struct out_segments {
    const layer<T> &l;
    const hidden_rows<T> &hidden;
    const place &p; // in OUT_TOKENS: of tokens, without a group
    out_way way;
    int column0;
    // Of a group; and half of segment i.
    __device__ __forceinline__ int halves() const { return BACKWARD ? l.halves : 1; }
    __device__ __forceinline__ int half(int i) const { return i % halves(); }
    __device__ __forceinline__ int count() const
    {
        return halves() * (way == OUT_ROWS ? 1 : way == OUT_TOKENS ? l.S : 1 + l.S);
    }
    __device__ __forceinline__ int group(int i) const
    {
        const int k = i / halves();
        return way == OUT_TOKENS ? l.G + k : k == 0 ? p.group : l.G + k - 1;
    }
    __device__ __forceinline__ int depth(int i) const { return width_of(l, group(i)); }
    __device__ __forceinline__ pm_lines<T> a(int i) const
    {
        const int64_t ld = hidden.shared_ld;
        if (way != OUT_TOKENS && i < halves())
            return {hidden.plan + p.first * hidden.plan_ld + half(i) * (hidden.plan_ld / 2),
                    hidden.plan_ld, nullptr};
        const T *const of = hidden.shared + (group(i) - l.G) * l.N * ld + half(i) * (ld / 2);
        return way == OUT_TOKENS ? pm_lines<T>{of + p.first * ld, ld, nullptr}
                                 : pm_lines<T>{of, ld, l.row_token + p.first};
    }
    __device__ __forceinline__ pm_lines<T> b(int i) const
    {
        if (BACKWARD)
            return {matrix_of(l, l.up, group(i)) + half(i) * distance(l, l.up, group(i)) + column0,
                    l.D, nullptr};
        const int width = depth(i);
        return {matrix_of(l, l.down, group(i)) + (int64_t)column0 * width, width, nullptr};
    }
};

// v += the biases of down: the row's own times its weight, and those of the shared groups.
template <class T>
PM_DEVICE void add_biases(const layer<T> &l, const place &p, out_way way, int row, int column,
                          float (&v)[8])
{
    float b[8];
    if (way != OUT_TOKENS) {
        const float weight = l.row_weight[p.first + row];
        pm_read8(l.down_bias + p.group * l.D + column, l.D - column, b);
#pragma unroll
        for (int e = 0; e < 8; e++)
            v[e] = fmaf(weight, b[e], v[e]);
    }
    if (way != OUT_ROWS)
        for (int s = l.G; s < l.G + l.S; s++) {
            pm_read8(l.down_bias + s * l.D + column, l.D - column, b);
#pragma unroll
            for (int e = 0; e < 8; e++)
                v[e] += b[e];
        }
}

// grid: slots of the plan, or of tokens, * (columns of tiles). single: NULL, or whether OUT_SINGLE
// is the way to go. part: (R, D).
template <class S, bool BACKWARD, class T = typename S::T>
__global__ void __launch_bounds__(S::THREADS, S::BLOCKS)
    out_kernel(layer<T> l, int across, out_way way, const int *single, hidden_rows<T> hidden,
               float *part, T *out)
{
    if (single && (*single != 0) != (way == OUT_SINGLE))
        return;
    const int slot = (int)(blockIdx.x / across);
    const int column0 = (int)(blockIdx.x % across) * S::BN;
    place p;
    if (way == OUT_TOKENS) {
        p = {l.G, true, (int64_t)slot * S::BM, 0};
        p.rows = (int)(l.N - p.first < S::BM ? l.N - p.first : S::BM);
    } else {
        p = find(l, S::BM, slot);
    }
    if (p.rows <= 0)
        return;
    const int columns = (int)l.D - column0;
    const out_segments<T, BACKWARD> segments = {l, hidden, p, way, column0};
    const float *const tile = pm_product<S, false, BACKWARD>(pm_shared, segments, p.rows, columns);

    for (int i = threadIdx.x; i < p.rows * S::CHUNKS; i += S::THREADS) {
        const int row = i / S::CHUNKS, chunk = i % S::CHUNKS, column = column0 + chunk * 8;
        const int64_t left = l.D - column;
        if (left <= 0)
            continue;
        float v[8];
        pm_tile_read(tile + row * S::TILE_LD + chunk * 8, chunk, v);
        if (!BACKWARD && l.down_bias)
            add_biases(l, p, way, row, column, v);
        const int64_t n = way == OUT_SINGLE ? l.row_token[p.first + row] : p.first + row;
        if (way == OUT_ROWS) {
            pm_write8(part + n * l.D + column, left, v);
            continue;
        }
        if (way == OUT_TOKENS && l.G)
            for (int k = l.tok_off[n]; k < l.tok_off[n + 1]; k++) {
                float r[8];
                pm_read8(part + l.tok_row[k] * l.D + column, left, r);
#pragma unroll
                for (int e = 0; e < 8; e++)
                    v[e] += r[e];
            }
        pm_write8(out + n * l.D + column, left, v);
    }
}

// ---------------------------------------------------------------- hidden: dpre

// dh = dy down;  dpre = w dh act'(pre);  wh = w h. Per tile: dots (columns of tiles, R): these
// columns' part of <dh, h>, which is drow_weight but for the bias: down need not be multiplied
// again. sums (slots, HALVES * l's widest), or NULL: the sums of dpre over the rows, of a group's
// first half and then of its second.
template <class S, int HALVES, class T = typename S::T>
__global__ void __launch_bounds__(S::THREADS, S::BLOCKS)
    hidden_kernel(layer<T> l, int across, const T *dy, hidden_rows<T> pre, hidden_rows<T> dpre,
                  hidden_rows<T> wh, float *dots, float *sums, int64_t sums_ld)
{
    // A thread has the same columns of every row it has, RUNS apart.
    constexpr int RUNS = S::THREADS / S::CHUNKS;
    static_assert(S::THREADS % S::CHUNKS == 0 && RUNS * HALVES <= S::BM, "sums fit into the tile");
    const int slot = (int)(blockIdx.x / across);
    const place p = find(l, S::BM, slot);
    const int column0 = (int)(blockIdx.x % across) * S::BN;
    if (p.rows <= 0 || column0 >= width_of(l, p.group))
        return;
    const int width = width_of(l, p.group), columns = width - column0;
    const one_segment<T> product = {
        token_lines(l, p, dy), {matrix_of(l, l.down, p.group) + column0, width, nullptr}, (int)l.D};
    float *const tile = pm_product<S, false, true>(pm_shared, product, p.rows, columns);
    float *const dot = tile + S::BM * S::TILE_LD; // (BM, CHUNKS)

    const T *const pre0 = rows_of(pre, l, p);
    T *const dpre0 = rows_of(dpre, l, p), *const wh0 = rows_of(wh, l, p);
    const int chunk = threadIdx.x % S::CHUNKS, run = threadIdx.x / S::CHUNKS, column = chunk * 8;
    const int left = columns - column;
    float sum[HALVES][8] = {};
    // Rows are read AT_ONCE: what is stored may be where they lie, for all that the compiler knows,
    // so it would wait for one before it reads the next.
    constexpr int AT_ONCE = sizeof(T) == 2 ? 4 / HALVES : 1;
    for (int row0 = run; row0 < p.rows; row0 += AT_ONCE * RUNS) {
        pm_raw8<T> raw[AT_ONCE][HALVES];
        float weights[AT_ONCE];
#pragma unroll
        for (int i = 0; i < AT_ONCE; i++) {
            const int row = row0 + i * RUNS;
            if (row >= p.rows)
                continue;
            weights[i] = p.shared ? 1.0f : l.row_weight[p.first + row];
#pragma unroll
            for (int half = 0; half < HALVES; half++)
                pm_read8(pre0 + row * ld_of(pre, p) + half * width + column0 + column, left,
                         raw[i][half]);
        }
#pragma unroll
        for (int i = 0; i < AT_ONCE; i++) {
            const int row = row0 + i * RUNS;
            if (row >= p.rows)
                continue;
            float product_of = 0;
            if (left > 0) {
                float v[8], x[HALVES][8], h[8];
                pm_tile_read(tile + row * S::TILE_LD + column, chunk, v);
#pragma unroll
                for (int half = 0; half < HALVES; half++)
                    pm_open8(raw[i][half], x[half]);
#pragma unroll
                for (int e = 0; e < 8;
                     e++) { // beyond the width v and x are 0, and so is all of this
                    float of_unit[HALVES], slope[HALVES];
#pragma unroll
                    for (int half = 0; half < HALVES; half++)
                        of_unit[half] = x[half][e];
                    h[e] = activate_back<T>(of_unit, slope);
                    product_of = fmaf(v[e], h[e], product_of);
#pragma unroll
                    for (int half = 0; half < HALVES; half++) {
                        x[half][e] = v[e] * slope[half] * weights[i];
                        sum[half][e] += x[half][e];
                    }
                    h[e] *= weights[i];
                }
                T *const to = dpre0 + row * ld_of(dpre, p) + column0 + column;
#pragma unroll
                for (int half = 0; half < HALVES; half++)
                    pm_write8(to + half * (ld_of(dpre, p) / 2), left, x[half]);
                pm_write8(wh0 + row * ld_of(wh, p) + column0 + column, left, h);
            }
            dot[row * S::CHUNKS + chunk] = product_of;
        }
    }
    __syncthreads();
    if (!p.shared)
        for (int row = threadIdx.x; row < p.rows; row += S::THREADS) {
            float total = 0;
            for (int i = 0; i < S::CHUNKS; i++)
                total += dot[row * S::CHUNKS + i];
            dots[blockIdx.x % across * l.R + p.first + row] = total;
        }
    if (!sums)
        return;
        // (RUNS, HALVES, BN), where the tile was
#pragma unroll
    for (int half = 0; half < HALVES; half++)
        pm_write8(tile + (run * HALVES + half) * S::BN + column, 8, sum[half]);
    __syncthreads();
    for (int i = threadIdx.x; i < HALVES * S::BN; i += S::THREADS) {
        const int half = i / S::BN, of = i % S::BN;
        if (of >= columns)
            continue;
        float total = 0;
        for (int k = 0; k < RUNS; k++)
            total += tile[(k * HALVES + half) * S::BN + of];
        sums[(int64_t)slot * sums_ld + half * width + column0 + of] = total;
    }
}

// ---------------------------------------------------------------- launches

// Rows of h (halves 1), or of dpre.
template <class T> size_t hidden_room(const pm_experts_args *g, int halves)
{
    return pm_room((g->G ? g->R : 0) * halves * padded(g->W / halves_of(g)), sizeof(T)) +
           pm_room(g->S * g->N * halves * padded(g->Z / halves_of(g)), sizeof(T));
}
template <class T> hidden_rows<T> take_hidden(const pm_experts_args *g, int halves, void **scratch)
{
    hidden_rows<T> h = {nullptr, nullptr, halves * padded(g->W / halves_of(g)),
                        halves * padded(g->Z / halves_of(g))};
    h.plan = pm_take<T>(scratch, (g->G ? g->R : 0) * h.plan_ld);
    h.shared = pm_take<T>(scratch, g->S * g->N * h.shared_ld);
    return h;
}
template <class T> hidden_rows<T> saved_pre(const pm_experts_args *g)
{
    return {static_cast<T *>(g->pre), static_cast<T *>(g->pre_shared), g->W, g->Z};
}

// The out product's own: part, and single.
size_t out_room(const pm_experts_args *g)
{
    return g->G ? pm_room(g->R * g->D, sizeof(float)) + pm_room(1, sizeof(int)) : 0;
}

template <class T>
pm_status take_matrix(pm_ctx *ctx, const pm_experts_args *g, const pm_weight &weight, int halves,
                      void **scratch, matrices<T> *out)
{
    out->halves = halves;
    // D times a width is a multiple of 64 bytes when D is
    out->apart = std::is_same<T, bf16>::value && weight.derived && g->D * sizeof(T) % 64 != 0;
    return pm_weight_as<T>(ctx, weight, halves * g->F * g->D, scratch, &out->at);
}

template <class T> void set_dims(const pm_experts_args *g, layer<T> *l)
{
    *l = {};
    l->halves = halves_of(g);
    l->N = g->N, l->D = g->D, l->R = g->G ? g->R : 0;
    l->W = g->W / l->halves, l->Z = g->Z / l->halves;
    l->G = (int)g->G, l->S = (int)g->S;
}
template <class T>
pm_status make_layer(pm_ctx *ctx, const pm_experts_args *g, void **scratch, layer<T> *l)
{
    set_dims(g, l);
    l->row_off = g->row_off, l->row_token = g->row_token;
    l->tok_off = g->tok_off, l->tok_row = g->tok_row, l->foff = g->foff;
    l->row_weight = g->row_weight;
    l->x = static_cast<const T *>(g->x);
    l->up_bias = g->up_bias, l->down_bias = g->down_bias;
    PM_TRY(take_matrix(ctx, g, g->up, l->halves, scratch, &l->up));
    return take_matrix(ctx, g, g->down, 1, scratch, &l->down);
}

// The launches, with shapes for short and for long depths.
template <class S, class L = S> struct path {
    using T = typename S::T;
    static_assert(S::BM == L::BM && S::BM <= DY_ROWS, "one tile of rows is what a slot means");
    static int64_t widest(const layer<T> &l) { return l.W > l.Z ? l.W : l.Z; }

    template <int HALVES>
    static pm_status up(pm_ctx *ctx, const layer<T> &l, const hidden_rows<T> &pre,
                        const hidden_rows<T> &h)
    {
        const int across = tiles(widest(l), S::BN / HALVES);
        PM_RUN(ctx, (up_kernel<S, HALVES>), (unsigned)(all_slots(l, S::BM) * across), S::THREADS,
               (pm_product_shared<S, false, false>()), l, across, pre, h);
        return PM_OK;
    }

    template <int HALVES>
    static pm_status hidden(pm_ctx *ctx, const layer<T> &l, const T *dy, const hidden_rows<T> &pre,
                            const hidden_rows<T> &dpre, const hidden_rows<T> &wh, float *dots,
                            float *sums)
    {
        const int across = tiles(widest(l), S::BN);
        PM_RUN(ctx, (hidden_kernel<S, HALVES>), (unsigned)(all_slots(l, S::BM) * across),
               S::THREADS, (pm_product_shared<S, false, true>()), l, across, dy, pre, dpre, wh,
               dots, sums, HALVES * widest(l));
        return PM_OK;
    }

    template <bool BACKWARD>
    static pm_status out(pm_ctx *ctx, const layer<T> &l, const hidden_rows<T> &hidden, T *out,
                         void **scratch)
    {
        constexpr size_t bytes = pm_product_shared<L, false, BACKWARD>();
        const int across = tiles(l.D, L::BN);
        const unsigned plan = (unsigned)(plan_slots(l, L::BM) * across),
                       tokens = (unsigned)(token_slots(l, L::BM) * across);
        float *const part = l.G ? pm_take<float>(scratch, l.R * l.D) : nullptr;
        int *single = nullptr;
        if (l.G && l.R == l.N && l.N > 0) {
            single = pm_take<int>(scratch, 1);
            PM_RUN(ctx, single_kernel, 1, SINGLE_THREADS, 0, l.N, l.tok_off, single);
            PM_RUN(ctx, (out_kernel<L, BACKWARD>), plan, L::THREADS, bytes, l, across, OUT_SINGLE,
                   single, hidden, part, out);
        }
        PM_RUN(ctx, (out_kernel<L, BACKWARD>), plan, L::THREADS, bytes, l, across, OUT_ROWS, single,
               hidden, part, out);
        PM_RUN(ctx, (out_kernel<L, BACKWARD>), tokens, L::THREADS, bytes, l, across, OUT_TOKENS,
               single, hidden, part, out);
        return PM_OK;
    }

    static pm_status forward(pm_ctx *ctx, const pm_experts_args *g, void *scratch)
    {
        layer<T> l;
        PM_TRY(make_layer(ctx, g, &scratch, &l));
        const hidden_rows<T> pre = saved_pre<T>(g), h = take_hidden<T>(g, 1, &scratch);
        PM_TRY(l.halves == 2 ? up<2>(ctx, l, pre, h) : up<1>(ctx, l, pre, h));
        return out<false>(ctx, l, h, static_cast<T *>(g->y), &scratch);
    }

    // Partial sums of backward.
    static size_t sums_room(const pm_experts_args *g)
    {
        layer<T> l;
        set_dims(g, &l);
        const int64_t slots = all_slots(l, S::BM), width = widest(l);
        return pm_room(slots * l.halves * width, sizeof(float)) +
               pm_room(slots * g->D, sizeof(float)) +
               pm_room(tiles(width, S::BN) * l.R, sizeof(float)) +
               pm_room(parts_count(l), sizeof(float));
    }

    // Rows of a chunk of the matrices' gradients. The shared group has as many rows as the others
    // together, and a layer without routing one group of few tiles (36 in S): the last blocks would
    // be alone for long. So rows are split, into up to 16 chunks, where all should end earlier: after
    // an even share of all rows for each of the blocks that run at a time, and one chunk. A part that
    // is written and read counts as PART_ROWS.
    static int chunk_rows(const layer<T> &l)
    {
        const int64_t blocks = (int64_t)tiles(l.D, L::BM) * tiles(widest(l), L::BN),
                      at_once = (int64_t)pm_device().processors * L::BLOCKS,
                      most = l.R > l.N ? l.R : l.N, in_group = l.G ? l.R / l.G : 0;
        int64_t best = most > 0 ? most : 1, least = INT64_MAX;
        for (int pieces = 1; pieces <= 16; pieces++) {
            const int64_t rows = tiles(most, pieces * L::BK) * L::BK;
            if (pieces > 1 && rows < CHUNK_ROWS)
                break;
            const int64_t parts = (l.N > rows ? l.S * ((l.N + rows - 1) / rows) : 0) +
                                  (in_group > rows ? l.G * ((in_group + rows - 1) / rows) : 0);
            const int64_t end = (l.R + l.S * l.N + parts * PART_ROWS) * blocks / at_once +
                                (rows < most ? rows + PART_ROWS : most);
            if (end < least)
                least = end, best = rows < most ? rows : best;
        }
        return (int)best;
    }
    static bool is_split(const layer<T> &l)
    {
        const int chunk = chunk_rows(l);
        return chunk < l.R || chunk < l.N;
    }
    static int64_t parts_count(const layer<T> &l)
    {
        return is_split(l) ? all_slots(l, chunk_rows(l)) * part_numbers(l) : 0;
    }
    static int64_t part_numbers(const layer<T> &l) { return padded(l.halves * widest(l) * l.D); }

    static pm_status weights(pm_ctx *ctx, const layer<T> &l, bool up, const T *tokens,
                             const hidden_rows<T> &hidden, float *parts, float *gradient)
    {
        const int down = tiles(up ? widest(l) : l.D, L::BM),
                  across = tiles(up ? l.D : widest(l), L::BN), chunk = chunk_rows(l),
                  halves = up ? l.halves : 1;
        const int64_t most = part_numbers(l);
        if (!gradient)
            return PM_OK;
        const dim3 grid((unsigned)(all_slots(l, chunk) * down * across), (unsigned)halves);
        PM_RUN(ctx, (weights_kernel<L>), grid, L::THREADS, (pm_product_shared<L, true, true>()), l,
               chunk, down, across, up, tokens, hidden, parts, most, gradient);
        const int pieces = tiles(halves * widest(l) * l.D, 256 * 8);
        if (is_split(l))
            PM_RUN(ctx, (parts_kernel<T>), (unsigned)((l.G + l.S) * pieces), 256, 0, l, chunk,
                   pieces, halves, parts, most, gradient);
        return PM_OK;
    }

    static pm_status bias(pm_ctx *ctx, const layer<T> &l, bool by_width, const float *sums,
                          int64_t ld, float *gradient)
    {
        const int across = tiles(ld, 32);
        if (gradient)
            PM_RUN(ctx, (sums_kernel<T>), (unsigned)((l.G + l.S) * across), 256, 0, l, across,
                   S::BM, by_width, sums, ld, gradient);
        return PM_OK;
    }

    static pm_status backward(pm_ctx *ctx, const pm_experts_args *g, const pm_experts_grads *d,
                              void *scratch)
    {
        layer<T> l;
        PM_TRY(make_layer(ctx, g, &scratch, &l));
        const hidden_rows<T> pre = saved_pre<T>(g), dpre = take_hidden<T>(g, l.halves, &scratch),
                             wh = take_hidden<T>(g, 1, &scratch);
        const int64_t slots = all_slots(l, S::BM), width = widest(l);
        float *const dpre_sums = pm_take<float>(&scratch, slots * l.halves * width);
        float *const dy_sums = pm_take<float>(&scratch, slots * l.D);
        float *const dots = pm_take<float>(&scratch, tiles(width, S::BN) * l.R);
        float *const parts = pm_take<float>(&scratch, parts_count(l));
        const T *const dy = static_cast<const T *>(d->dy);

        float *const sums = d->dup_bias ? dpre_sums : nullptr;
        PM_TRY(l.halves == 2 ? hidden<2>(ctx, l, dy, pre, dpre, wh, dots, sums)
                             : hidden<1>(ctx, l, dy, pre, dpre, wh, dots, sums));
        if (d->drow_weight && l.R > 0) // rows beyond the plan
            PM_TRY(pm_cuda(ctx, "cudaMemsetAsync",
                           cudaMemsetAsync(d->drow_weight, 0, (size_t)l.R * sizeof(float),
                                           pm_device().stream)));
        if (d->drow_weight || d->ddown_bias)
            PM_RUN(ctx, (dy_kernel<T>), (unsigned)slots, 32 * DY_WARPS, 0, l, S::BM, S::BN, dy,
                   dots, d->drow_weight, d->ddown_bias ? dy_sums : nullptr);
        if (d->dx)
            PM_TRY(out<true>(ctx, l, dpre, static_cast<T *>(d->dx), &scratch));
        PM_TRY(weights(ctx, l, true, l.x, dpre, parts, d->dup));
        PM_TRY(weights(ctx, l, false, dy, wh, parts, d->ddown));
        PM_TRY(bias(ctx, l, true, dpre_sums, l.halves * width, d->dup_bias));
        return bias(ctx, l, false, dy_sums, l.D, d->ddown_bias);
    }
};

// Calls what(shape) for the shape of this call.
template <class T, class What>
auto with_shape(const pm_ctx *ctx, const pm_experts_args *g, What what)
{
    if constexpr (std::is_same<T, bf16>::value)
        return !is_large(g)                           ? what(path<bf16_small>())
               : pm_device().hopper && fits_192(g->D) ? what(path<bf16_wgmma, bf16_wgmma_long>())
               : pm_device().hopper                   ? what(path<bf16_wgmma>())
               : fits_192(g->D)                       ? what(path<bf16_short, bf16_long>())
                                                      : what(path<bf16_short, bf16_long_128>());
    else if (ctx->backend->compute == PM_TF32)
        return is_large(g) ? what(path<tf32_large>()) : what(path<tf32_small>());
    else
        return is_large(g) ? what(path<fp32_large>()) : what(path<fp32_small>());
}

} // namespace

// ---------------------------------------------------------------- the op

// For tests: does the op by experts_loop.cu from now on.
static bool by_loop;
extern "C" __attribute__((visibility("default"))) void pm_experts_by_loop(bool on) { by_loop = on; }

template <class T>
size_t experts_workspace(const pm_ctx *ctx, const pm_experts_args *g, bool backward)
{
    if (by_loop)
        return pm_experts_loop_room<T>(g);
    const size_t common = pm_weight_room<T>(g->up, g->P * g->D) +
                          pm_weight_room<T>(g->down, g->F * g->D) + out_room(g);
    if (!backward)
        return common + hidden_room<T>(g, 1);
    return common + hidden_room<T>(g, 1) + hidden_room<T>(g, halves_of(g)) +
           with_shape<T>(ctx, g, [&](auto p) { return decltype(p)::sums_room(g); });
}

template <class T> pm_status experts_forward(pm_ctx *ctx, const pm_experts_args *g, void *scratch)
{
    if (by_loop)
        return pm_experts_loop_forward<T>(ctx, g, scratch);
    return with_shape<T>(ctx, g, [&](auto p) { return decltype(p)::forward(ctx, g, scratch); });
}

template <class T>
pm_status experts_backward(pm_ctx *ctx, const pm_experts_args *g, const pm_experts_grads *d,
                           void *scratch)
{
    if (by_loop)
        return pm_experts_loop_backward<T>(ctx, g, d, scratch);
    return with_shape<T>(ctx, g, [&](auto p) { return decltype(p)::backward(ctx, g, d, scratch); });
}

PM_INSTANTIATE_BOTH(experts)
