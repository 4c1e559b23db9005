// product.cuh: one tile of a product of matrices, for kernels that choose their own rows: gathered
// by an index, of several matrices one after another, of a group found on the device.
//
//   c (BM x BN) = sum over segments of a b,   a: rows x depth, b: depth x columns
//
// A block computes one tile. Its warps have WM x WN of it each, in registers, and step through the
// depth, BK at a time, while cp.async fetches STAGES - 1 steps ahead into shared memory. Then the
// sums go to shared memory as floats, row by row (pm_tile): what follows (biases, activations, sums
// over rows or columns) is written once, with 8 neighbours of a row per thread, whatever
// multiplied.
//
// What multiplies depends on the shape (pm_shape): bf16 by mma.m16n8k16, float by mma.m16n8k8 of
// tf32, or float by FMA; or (pm_shape_wgmma, Hopper) bf16 by wgmma, which reads both operands from
// shared memory. All run over the depth upwards, and a step's zeros beyond the end of a segment add
// nothing, so an element's bits depend neither on the size of the tile nor on its place.
//
// Memory. An operand is lines of consecutive numbers: along the depth (a row of a, a column of b),
// or across it (MINOR: a line is one k). 16 bytes travel at a time, 8 lanes or more to a line,
// where the line's start allows it; other widths go number by number, which is slow and right. What
// is beyond the end of a line, or of the lines, is filled with zeros.
//
// Shared memory has no bank conflicts: a line is padded by 16 bytes, which makes it an odd number
// of 16-byte units for bf16 (72, 40, 136, 200 numbers): the 8 rows of an ldmatrix are then in 8
// different units of 128 bytes. Floats along the depth: 36 or 20 to a line, and 4 g + t or 20 g + t
// (g < 8, t < 4) are 32 different banks; across it: 8 more than a multiple of 32, and 8 t + g are.
// For wgmma lines are cut into 128 bytes, whose 16-byte units are swizzled (pm_stage).
#pragma once
#include "common.cuh"

// Declared here, for all: in a function of an unnamed namespace it would be another one.
extern __shared__ __align__(16) unsigned char pm_shared[];

// ---------------------------------------------------------------- shapes

template <class T_, bool TENSOR_, int BM_, int BN_, int BK_, int STAGES_, int WARPS_M_,
          int WARPS_N_, int BLOCKS_>
struct pm_shape {
    using T = T_;
    static constexpr bool TENSOR = TENSOR_; // false: FMA
    static constexpr bool WGMMA = false;
    static constexpr int BM = BM_, BN = BN_, BK = BK_, STAGES = STAGES_;
    static constexpr int WARPS_N = WARPS_N_, THREADS = 32 * WARPS_M_ * WARPS_N_;
    static constexpr int BLOCKS = BLOCKS_; // of an SM at a time, for __launch_bounds__
    static constexpr int WM = BM / WARPS_M_, WN = BN / WARPS_N_; // of a warp
    static constexpr int VECTOR = 16 / sizeof(T);
    // Per thread: tiles of an mma (16 x 8), or single sums: the lanes are 4 x 8, and a has TM rows
    // of each, b TN columns.
    static constexpr int MI = WM / 16, NJ = WN / 8, TM = WM / 4, TN = WN / 8;
    static constexpr int TILE_LD = BN + 8; // 8 g + 2 t: no conflicts when a warp stores its sums
    static constexpr int CHUNKS = BN / 8;  // of a row of the tile, 8 numbers each

    static_assert(TENSOR || std::is_same<T, float>::value, "bf16 is multiplied by mma");
    static_assert(WM % 16 == 0 && WN % 16 == 0 && BK % 16 == 0, "whole fragments");
};

// bf16 by wgmma: a warpgroup (128 threads) for every 64 rows, which has all columns of them.
template <int BM_, int BN_, int STAGES_, int BLOCKS_> struct pm_shape_wgmma {
    using T = bf16;
    static constexpr bool TENSOR = true, WGMMA = true;
    static constexpr int BM = BM_, BN = BN_, BK = 64, STAGES = STAGES_;
    static constexpr int THREADS = BM / 64 * 128, BLOCKS = BLOCKS_;
    static constexpr int VECTOR = 8, TILE_LD = BN + 8, CHUNKS = BN / 8;
    // Products that may be unfinished when the next one is begun: with one block to an SM one, so
    // that the tensor cores do not wait for the barrier; else the other block's fill the gap.
    static constexpr int BEHIND = BLOCKS == 1 ? 1 : 0;
    static_assert(BM % 64 == 0 && BN % 64 == 0 && STAGES >= 2 + BEHIND, "whole instructions");
};

constexpr int pm_gcd(int a, int b) { return b ? pm_gcd(b, a % b) : a; }

// Lines of an operand in shared memory. EXTENT: BM or BN.
template <class S, int EXTENT, bool MINOR> struct pm_stage {
    static constexpr int LINES = MINOR ? S::BK : EXTENT, LENGTH = MINOR ? EXTENT : S::BK;
    static constexpr int PAD = S::WGMMA                                              ? 0
                               : std::is_same<typename S::T, float>::value && !MINOR ? 4
                                                                                     : 8;
    static constexpr int LD = LENGTH + PAD, NUMBERS = LINES * LD;
    // Copies, of 16 bytes: ACROSS threads have neighbouring ones of a line, and so take ROWS lines,
    // ROUNDS times each. All that is a constant beyond the first place.
    static constexpr int CHUNKS = LENGTH / S::VECTOR, ACROSS = pm_gcd(CHUNKS, S::THREADS);
    static constexpr int ROUNDS = CHUNKS / ACROSS, APART = S::THREADS / ACROSS;
    static constexpr int ROWS = LINES / APART;
    static_assert(LINES % APART == 0, "every thread copies the same number of times");

    // Where a line's number is. wgmma (PTX ISA, "Shared Memory Matrix Layout", 128-byte swizzle): the
    // lines' first 64 numbers one after another, then their next 64; unit u of the 8 of line l is
    // in place u ^ l % 8, so that 8 lines' units are in different banks.
    static __device__ __forceinline__ int place(int line, int column)
    {
        if (S::WGMMA)
            return (column / 64 * LINES + line) * 64 + ((column / 8 ^ line) & 7) * 8 + column % 8;
        return line * LD + column;
    }
    // From the place of a thread's first copy to that of its (i, j)th, the same for every thread.
    static constexpr __device__ int step(int i, int j)
    {
        return S::WGMMA ? i * APART * 64 + j * (ACROSS * S::VECTOR / 64) * LINES * 64
                        : i * APART * LD + j * ACROSS * S::VECTOR;
    }
    static_assert(!S::WGMMA || (APART % 8 == 0 && ACROSS * S::VECTOR % 64 == 0),
                  "the swizzle of a thread's copies is the same");
    // Where number (i of the extent, k) is.
    static __device__ __forceinline__ int at(int i, int k)
    {
        return MINOR ? place(k, i) : place(i, k);
    }
};

// wgmma's 8 lines of 128 bytes begin at a multiple of this.
constexpr size_t PM_SWIZZLED = 1024;

// Bytes of dynamic shared memory: the stages, and afterwards the tile with one float per chunk.
template <class S, bool A_MINOR, bool B_MINOR> constexpr size_t pm_product_shared()
{
    const size_t stages = (S::WGMMA ? PM_SWIZZLED : 0) + S::STAGES * sizeof(typename S::T) *
                                                             (pm_stage<S, S::BM, A_MINOR>::NUMBERS +
                                                              pm_stage<S, S::BN, B_MINOR>::NUMBERS);
    const size_t tile = sizeof(float) * S::BM * (S::TILE_LD + S::CHUNKS);
    return stages > tile ? stages : tile;
}

// ---------------------------------------------------------------- operands

// Line i begins at `at` + (index ? index[i] : i) * ld. In pairs (pm_loader) its partner begins
// `partner` numbers behind it.
template <class T> struct pm_lines {
    const T *at;
    int64_t ld;
    const int32_t *index;
    int64_t partner = 0;
};

template <class T> PM_DEVICE bool pm_aligned(const T *p, int64_t ld)
{
    return ((reinterpret_cast<uintptr_t>(p) | (uintptr_t)(ld * (int64_t)sizeof(T))) & 15) == 0;
}

// What a thread copies of an operand. extent: rows of a, or columns of b, that are there. PAIRED:
// lines of two matrices side by side, the first half of EXTENT lines 0, 1, .. and the second half
// their partners; extent counts pairs.
//
// Copies compete with the products for the issue of instructions: at some 225 of them a warp and step
// the tensor cores of an H200 were busy 37 % of the time. So where a step is whole (all but the last
// one, or the tiles at the edge) a copy is three: an address by one multiply-add of 32 x 32 bits,
// whether its line is there, and the copy, to a place that is a constant beyond the first one.
template <class S, int EXTENT, bool MINOR, bool PAIRED = false> struct pm_loader {
    using T = typename S::T;
    using stage = pm_stage<S, EXTENT, MINOR>;
    static constexpr int PAIRS = EXTENT / 2;
    static_assert(!PAIRED || (!MINOR && PAIRS % stage::APART == 0),
                  "which half a copy is of does not depend on the thread");
    pm_lines<T> lines;
    bool aligned;
    int extent, depth, stride; // stride: bytes from a line to the next
    // What lines the thread has, and (bits) whether they are there: of all steps, or (MINOR) of the
    // next one, read a step early because the copy needs it at once.
    int32_t row[stage::ROWS];
    uint32_t there;
    int origin; // where the first copy goes in a stage

    static __device__ __forceinline__ int line_of(int i)
    {
        return (int)threadIdx.x / stage::ACROSS + i * stage::APART;
    }
    static constexpr __device__ bool is_partner(int i)
    {
        return PAIRED && i * stage::APART >= PAIRS;
    }
    static __device__ __forceinline__ int column_of(int j)
    {
        return ((int)threadIdx.x % stage::ACROSS + j * stage::ACROSS) * S::VECTOR;
    }
    __device__ __forceinline__ void look(int first, int end)
    {
        const int line = first + line_of(0);
        if (!PAIRED && first + stage::LINES <= end) {
            there = ~0u;
#pragma unroll
            for (int i = 0; i < stage::ROWS; i++)
                row[i] = line + i * stage::APART;
            if (lines.index)
#pragma unroll
                for (int i = 0; i < stage::ROWS; i++)
                    row[i] = lines.index[line + i * stage::APART];
            return;
        }
        there = 0;
#pragma unroll
        for (int i = 0; i < stage::ROWS; i++) {
            const int at = line + i * stage::APART - (is_partner(i) ? PAIRS : 0);
            row[i] = 0;
            if (at < end) {
                row[i] = lines.index ? lines.index[at] : at;
                there |= 1u << i;
            }
        }
    }
    __device__ __forceinline__ void begin(const pm_lines<T> &of, int extent_, int depth_)
    {
        lines = of;
        extent = extent_, depth = depth_;
        stride = (int)(of.ld * (int64_t)sizeof(T));
        aligned = pm_aligned(of.at, of.ld) && pm_aligned(of.at, of.partner);
        look(0, MINOR ? depth : extent);
        origin = stage::place(line_of(0), column_of(0));
        if (S::WGMMA)
            pm_keep(origin);
    }
    __device__ __forceinline__ const T *source(int i, const T *first) const
    {
        return reinterpret_cast<const T *>(
            reinterpret_cast<const char *>(first + (is_partner(i) ? lines.partner : 0)) +
            (int64_t)row[i] * stride);
    }
    // Step k0 .. k0 + BK - 1 of the depth.
    __device__ __forceinline__ void fetch(T *to, int k0)
    {
        const int left = MINOR ? extent : depth - k0; // of a line
        const T *const first = lines.at + (MINOR ? 0 : k0) + column_of(0);
        if (aligned && left >= stage::LENGTH)
            fetch_whole(to + origin, first);
        else
            fetch_part(to + origin, first, left);
        if (MINOR)
            look(k0 + S::BK, depth);
    }
    __device__ __forceinline__ void fetch_whole(T *to, const T *first)
    {
#pragma unroll
        for (int j = 0; j < stage::ROUNDS; j++)
#pragma unroll
            for (int i = 0; i < stage::ROWS; i++)
                cp_async_zfill<16>(to + stage::step(i, j),
                                   source(i, first) + j * stage::ACROSS * S::VECTOR,
                                   there >> i & 1 ? 16 : 0);
    }
    __device__ __forceinline__ void fetch_part(T *to, const T *first, int left)
    {
#pragma unroll
        for (int j = 0; j < stage::ROUNDS; j++) {
            const int most = min(max(left - column_of(j), 0), S::VECTOR);
#pragma unroll
            for (int i = 0; i < stage::ROWS; i++) {
                const int count = there >> i & 1 ? most : 0;
                const T *const from = source(i, first) + j * stage::ACROSS * S::VECTOR;
                T *const place = to + stage::step(i, j);
                if (aligned) {
                    cp_async_zfill<16>(place, count ? from : lines.at, count * (int)sizeof(T));
                } else {
#pragma unroll 1 // one at a time: registers are for the other way
                    for (int e = 0; e < S::VECTOR; e++)
                        place[e] = e < count ? from[e] : pm_to<T>(0.0f);
                }
            }
        }
    }
};

// ---------------------------------------------------------------- sums in registers

template <class S, bool A_MINOR, bool B_MINOR, class = void> struct pm_sums; // FMA, then mma

template <class S, bool A_MINOR, bool B_MINOR>
struct pm_sums<S, A_MINOR, B_MINOR, std::enable_if_t<!S::TENSOR>> {
    using sa = pm_stage<S, S::BM, A_MINOR>;
    using sb = pm_stage<S, S::BN, B_MINOR>;
    float d[S::TM][S::TN] = {};
    static_assert(S::TM % 4 == 0 && S::TN % 4 == 0, "16 bytes at a time");

    // The i-th row (column) of a lane's share, LANES apart: the lanes read neighbours.
    template <bool MINOR, int LANES> static __device__ __forceinline__ int place(int lane, int i)
    {
        return MINOR ? 4 * (lane + i / 4 * LANES) + i % 4 : lane + i * LANES;
    }
    // x[k][i] for four k: 16 bytes along whatever is contiguous.
    template <class ST, bool MINOR, int COUNT, int LANES>
    static __device__ __forceinline__ void load(float (&x)[4][COUNT], const float *from, int base,
                                                int lane, int k)
    {
#pragma unroll
        for (int i = 0; i < (MINOR ? COUNT / 4 : COUNT); i++)
#pragma unroll
            for (int j = 0; j < (MINOR ? 4 : 1); j++) {
                const pm_pack<float> pack = *reinterpret_cast<const pm_pack<float> *>(
                    from + ST::at(base + place<MINOR, LANES>(lane, MINOR ? 4 * i : i), k + j));
#pragma unroll
                for (int e = 0; e < 4; e++)
                    x[MINOR ? j : e][MINOR ? 4 * i + e : i] = pack.v[e];
            }
    }
    static constexpr int K = 4;
    struct fragments {
        float x[K][S::TM], y[K][S::TN];
    };
    __device__ __forceinline__ void load(fragments &f, const float *a, const float *b, int k) const
    {
        const int lane = threadIdx.x % 32, warp = threadIdx.x / 32;
        load<sa, A_MINOR, S::TM, 4>(f.x, a, warp / S::WARPS_N * S::WM, lane / 8, k);
        load<sb, B_MINOR, S::TN, 8>(f.y, b, warp % S::WARPS_N * S::WN, lane % 8, k);
    }
    __device__ __forceinline__ void multiply(const fragments &f)
    {
#pragma unroll
        for (int k = 0; k < K; k++)
#pragma unroll
            for (int i = 0; i < S::TM; i++)
#pragma unroll
                for (int j = 0; j < S::TN; j++)
                    d[i][j] = fmaf(f.x[k][i], f.y[k][j], d[i][j]);
    }
    __device__ __forceinline__ void store(float *tile) const
    {
        const int lane = threadIdx.x % 32, warp = threadIdx.x / 32;
        const int row = warp / S::WARPS_N * S::WM, column = warp % S::WARPS_N * S::WN;
#pragma unroll
        for (int i = 0; i < S::TM; i++)
#pragma unroll
            for (int j = 0; j < S::TN; j++)
                tile[(row + place<A_MINOR, 4>(lane / 8, i)) * S::TILE_LD + column +
                     place<B_MINOR, 8>(lane % 8, j)] = d[i][j];
    }
};

template <class S, bool A_MINOR, bool B_MINOR>
struct pm_sums<S, A_MINOR, B_MINOR, std::enable_if_t<S::TENSOR>> {
    using T = typename S::T;
    using sa = pm_stage<S, S::BM, A_MINOR>;
    using sb = pm_stage<S, S::BN, B_MINOR>;
    float d[S::MI][S::NJ][4] = {};

    static constexpr int K = std::is_same<T, bf16>::value ? 16 : 8;
    struct fragments {
        uint32_t x[S::MI][4], y[S::NJ][2];
    };
    __device__ __forceinline__ void load(fragments &f, const T *a, const T *b, int k) const
    {
        const int warp = threadIdx.x / 32;
        load(f, a, b, warp / S::WARPS_N * S::WM, warp % S::WARPS_N * S::WN, k);
    }
    // bf16: four 8 x 8 matrices by one ldmatrix. Matrix i is rows i % 2, depth i / 2 of a's 16 x
    // 16; depth i % 2, columns i / 2 of b's 16 x 16, which is two fragments.
    static __device__ __forceinline__ void load(fragments &f, const bf16 *a, const bf16 *b, int row,
                                                int column, int k)
    {
        const int lane = threadIdx.x % 32, in = lane % 8, odd = lane / 8 % 2 * 8,
                  high = lane / 16 * 8;
#pragma unroll
        for (int i = 0; i < S::MI; i++) {
            if (A_MINOR)
                ldmatrix_x4_trans(f.x[i], a + sa::at(row + i * 16 + odd, k + high + in));
            else
                ldmatrix_x4(f.x[i], a + sa::at(row + i * 16 + odd + in, k + high));
        }
#pragma unroll
        for (int j = 0; j < S::NJ; j += 2) {
            uint32_t two[4];
            if (B_MINOR)
                ldmatrix_x4_trans(two, b + sb::at(column + j * 8 + high, k + odd + in));
            else
                ldmatrix_x4(two, b + sb::at(column + j * 8 + high + in, k + odd));
            f.y[j][0] = two[0], f.y[j][1] = two[1], f.y[j + 1][0] = two[2], f.y[j + 1][1] = two[3];
        }
    }
    // tf32: rounded to nearest on the way.
    static __device__ __forceinline__ void load(fragments &f, const float *a, const float *b,
                                                int row, int column, int k)
    {
        const int g = threadIdx.x % 32 / 4, t = threadIdx.x % 4;
#pragma unroll
        for (int i = 0; i < S::MI; i++)
#pragma unroll
            for (int e = 0; e < 4; e++)
                f.x[i][e] = pm_tf32(a[sa::at(row + i * 16 + g + e % 2 * 8, k + t + e / 2 * 4)]);
#pragma unroll
        for (int j = 0; j < S::NJ; j++)
#pragma unroll
            for (int e = 0; e < 2; e++)
                f.y[j][e] = pm_tf32(b[sb::at(column + j * 8 + g, k + t + e * 4)]);
    }
    __device__ __forceinline__ void multiply(const fragments &f)
    {
        if constexpr (K == 16)
            mma_m16n8k16(d, f.x, f.y);
        else
            mma_m16n8k8_tf32(d, f.x, f.y);
    }
    __device__ __forceinline__ void store(float *tile) const
    {
        const int warp = threadIdx.x / 32, g = threadIdx.x % 32 / 4, t = threadIdx.x % 4;
        const int row = warp / S::WARPS_N * S::WM, column = warp % S::WARPS_N * S::WN;
#pragma unroll
        for (int i = 0; i < S::MI; i++)
#pragma unroll
            for (int j = 0; j < S::NJ; j++)
#pragma unroll
                for (int e = 0; e < 2; e++)
                    *reinterpret_cast<float2 *>(tile + (row + i * 16 + g + e * 8) * S::TILE_LD +
                                                column + j * 8 + 2 * t) =
                        make_float2(d[i][j][2 * e], d[i][j][2 * e + 1]);
    }
};

// A warpgroup's 64 rows. Thread: rows 16 (warp % 4) + lane / 4 and 8 below it, of every 8 columns
// 2 (lane % 4) and the next: d[4 j ..] of columns 8 j.
template <class S> struct pm_sums_wgmma {
    float d[S::BN / 2] = {};

    template <bool A_MINOR, bool B_MINOR>
    __device__ __forceinline__ void multiply(const bf16 *a, const bf16 *b)
    {
        // The same in all lanes, and the compiler is to know it: descriptors are uniform.
        const int group = __shfl_sync(PM_ALL, (int)threadIdx.x / 128, 0);
        const wgmma_operand of_a = describe<A_MINOR>(a + group * 64 * S::BK),
                            of_b = describe<B_MINOR>(b);
        wgmma_begin();
#pragma unroll
        for (int k = 0; k < S::BK; k += 16)
            wgmma_m64k16<S::BN, A_MINOR, B_MINOR>(d, wgmma_advance(of_a, k * (A_MINOR ? 128 : 2)),
                                                  wgmma_advance(of_b, k * (B_MINOR ? 128 : 2)));
        wgmma_commit();
    }
    __device__ __forceinline__ void store(float *tile) const
    {
        const int warp = threadIdx.x / 32, g = threadIdx.x % 32 / 4, t = threadIdx.x % 4;
#pragma unroll
        for (int j = 0; j < S::BN / 8; j++)
#pragma unroll
            for (int e = 0; e < 2; e++)
                *reinterpret_cast<float2 *>(tile + (warp * 16 + g + e * 8) * S::TILE_LD + j * 8 +
                                            2 * t) =
                    make_float2(d[4 * j + 2 * e], d[4 * j + 2 * e + 1]);
    }
    // Groups of 8 lines are 1024 bytes apart; across the depth, the next 64 numbers of the lines
    // follow them.
    template <bool MINOR> static __device__ __forceinline__ wgmma_operand describe(const bf16 *at)
    {
        return wgmma_describe(at, MINOR ? S::BK * 128 : 16, 1024);
    }
};

// ---------------------------------------------------------------- the product

// Fetches steps into the stages, one after another: a's stages, and b's behind them.
template <class S, bool A_MINOR, bool B_MINOR, bool B_PAIRED, class Segments> struct pm_feed {
    using T = typename S::T;
    using sa = pm_stage<S, S::BM, A_MINOR>;
    using sb = pm_stage<S, S::BN, B_MINOR>;
    const Segments &segments;
    int rows, columns;
    T *stages;
    pm_loader<S, S::BM, A_MINOR> from_a;
    pm_loader<S, S::BN, B_MINOR, B_PAIRED> from_b;
    int segment = -1, k0 = 0, depth = 0, fill = 0; // what is fetched next, and into which stage

    __device__ __forceinline__ pm_feed(const Segments &segments_, int rows_, int columns_,
                                       void *shared)
        : segments(segments_), rows(rows_), columns(columns_), stages(static_cast<T *>(shared))
    {
        if (S::WGMMA)
            pm_keep(stages);
    }
    __device__ __forceinline__ T *a(int stage) const { return stages + stage * sa::NUMBERS; }
    __device__ __forceinline__ T *b(int stage) const
    {
        return stages + S::STAGES * sa::NUMBERS + stage * sb::NUMBERS;
    }
    __device__ __forceinline__ int steps() const
    {
        int sum = 0;
        for (int i = 0; i < segments.count(); i++)
            sum += (segments.depth(i) + S::BK - 1) / S::BK;
        return sum;
    }
    // more: false at the end, where a group of nothing makes the waits count the same.
    __device__ __forceinline__ void fetch(bool more)
    {
        if (more) {
            while (k0 >= depth) {
                depth = segments.depth(++segment);
                k0 = 0;
                if (depth > 0) {
                    from_a.begin(segments.a(segment), rows, depth);
                    from_b.begin(segments.b(segment), columns, depth);
                }
            }
            from_a.fetch(a(fill), k0);
            from_b.fetch(b(fill), k0);
            k0 += S::BK;
            fill = next(fill);
        }
        cp_async_commit();
    }
    static __device__ __forceinline__ int next(int stage)
    {
        return stage + 1 == S::STAGES ? 0 : stage + 1;
    }
};

// The sums of a thread, by fragments that are loaded into registers.
template <class S, bool A_MINOR, bool B_MINOR, class Feed>
PM_DEVICE pm_sums<S, A_MINOR, B_MINOR> pm_multiply(Feed &feed)
{
    using sums_of = pm_sums<S, A_MINOR, B_MINOR>;
    constexpr int PARTS = S::BK / sums_of::K; // of a step
    static_assert(PARTS % 2 == 0, "a step begins with the first fragments");
    sums_of sums;
    typename sums_of::fragments f[2]; // one is multiplied while the other comes from shared memory
    int use = 0;                      // the stage that is multiplied
    const int steps = feed.steps();
    for (int i = 0; i < S::STAGES - 1; i++)
        feed.fetch(i < steps);
    cp_async_wait<S::STAGES - 2>();
    __syncthreads();
    if (steps > 0)
        sums.load(f[0], feed.a(0), feed.b(0), 0);
#pragma unroll 1
    for (int i = 0; i < steps; i++)
#pragma unroll
        for (int part = 0; part < PARTS; part++) {
            if (part + 1 < PARTS) {
                sums.load(f[(part + 1) % 2], feed.a(use), feed.b(use), (part + 1) * sums_of::K);
            } else {
                // The next stage is there for all, and all have read this one: it may be filled.
                cp_async_wait<S::STAGES - 2>();
                __syncthreads();
                use = Feed::next(use);
                if (i + 1 < steps)
                    sums.load(f[0], feed.a(use), feed.b(use), 0);
            }
            if (part == 0)
                feed.fetch(i + S::STAGES - 1 < steps);
            sums.multiply(f[part % 2]);
        }
    return sums;
}

// The same by wgmma, which reads the stages itself, behind the program's back: a stage is filled
// again when all warpgroups have waited for the product that read it, BEHIND steps ago.
template <class S, bool A_MINOR, bool B_MINOR, class Feed>
PM_DEVICE pm_sums_wgmma<S> pm_multiply_wgmma(Feed &feed)
{
    constexpr int AHEAD = S::STAGES - 1 - S::BEHIND; // steps that are fetched before they are used
    pm_sums_wgmma<S> sums;
    int use = 0;
    const int steps = feed.steps();
    for (int i = 0; i < AHEAD; i++)
        feed.fetch(i < steps);
#pragma unroll 1
    for (int i = 0; i < steps; i++) {
        cp_async_wait<AHEAD - 1>();
        wgmma_wait<S::BEHIND>(sums.d);
        fence_proxy_async();
        __syncthreads();
        sums.template multiply<A_MINOR, B_MINOR>(feed.a(use), feed.b(use));
        feed.fetch(i + AHEAD < steps);
        use = Feed::next(use);
    }
    wgmma_wait<0>(sums.d);
    return sums;
}

// The tile, in shared memory, for the whole block (a barrier has passed), with one float per chunk
// (BM x CHUNKS) behind it that is free to use. segments: count(), and for each depth(i), a(i),
// b(i): pm_lines from the tile's first row and column on. rows, columns: how many of the tile's
// there are. B_PAIRED: b's columns are lines and their partners (pm_loader), and columns counts
// pairs.
template <class S, bool A_MINOR, bool B_MINOR, bool B_PAIRED = false, class Segments>
PM_DEVICE float *pm_product(unsigned char *shared, const Segments &segments, int rows, int columns)
{
    using feed_of = pm_feed<S, A_MINOR, B_MINOR, B_PAIRED, Segments>;
    float *const tile = reinterpret_cast<float *>(shared);
    const auto store = [&](const auto &sums) {
        cp_async_wait_all();
        __syncthreads(); // all have read the stages
        sums.store(tile);
        __syncthreads();
    };
    if constexpr (S::WGMMA) {
        const uintptr_t at = reinterpret_cast<uintptr_t>(shared);
        feed_of feed(segments, rows, columns,
                     shared + (PM_SWIZZLED - at % PM_SWIZZLED) % PM_SWIZZLED);
        store(pm_multiply_wgmma<S, A_MINOR, B_MINOR>(feed));
    } else {
        feed_of feed(segments, rows, columns, shared);
        store(pm_multiply<S, A_MINOR, B_MINOR>(feed));
    }
    return tile;
}

// ---------------------------------------------------------------- 8 neighbours at a time

// v = to 8 numbers of a tile's row, those of chunk i of all that the block reads. A quarter of a
// warp reads 16 bytes a lane at once: every other group of four lanes begins with its second half,
// so that all banks are used.
PM_DEVICE void pm_tile_read(const float *from, int i, float (&v)[8])
{
    const int flip = i / 4 % 2 * 4;
    const pm_pack<float> p = *reinterpret_cast<const pm_pack<float> *>(from + flip);
    const pm_pack<float> q = *reinterpret_cast<const pm_pack<float> *>(from + 4 - flip);
#pragma unroll
    for (int e = 0; e < 4; e++) {
        v[e] = flip ? q.v[e] : p.v[e];
        v[4 + e] = flip ? p.v[e] : q.v[e];
    }
}

// The first `left` of 8 numbers, zeros behind; as they are in memory, when what is loaded is used
// much later.
template <class T> struct pm_raw8 {
    pm_pack<T> pack[8 / pm_pack<T>::SIZE];
};
template <class T> PM_DEVICE void pm_read8(const T *from, int64_t left, pm_raw8<T> &raw)
{
    constexpr int SIZE = pm_pack<T>::SIZE;
    if (left >= 8 && pm_aligned(from, 0)) {
#pragma unroll
        for (int i = 0; i < 8 / SIZE; i++)
            raw.pack[i] = reinterpret_cast<const pm_pack<T> *>(from)[i];
        return;
    }
#pragma unroll
    for (int e = 0; e < 8; e++)
        raw.pack[e / SIZE].v[e % SIZE] = e < left ? from[e] : pm_to<T>(0.0f);
}
template <class T> PM_DEVICE void pm_open8(const pm_raw8<T> &raw, float (&v)[8])
{
    constexpr int SIZE = pm_pack<T>::SIZE;
#pragma unroll
    for (int e = 0; e < 8; e++)
        v[e] = pm_float(raw.pack[e / SIZE].v[e % SIZE]);
}

template <class T> PM_DEVICE void pm_read8(const T *from, int64_t left, float (&v)[8])
{
    pm_raw8<T> raw;
    pm_read8(from, left, raw);
    pm_open8(raw, v);
}

template <class T> PM_DEVICE void pm_write8(T *to, int64_t left, const float (&v)[8])
{
    constexpr int SIZE = pm_pack<T>::SIZE;
    if (left >= 8 && pm_aligned(to, 0)) {
#pragma unroll
        for (int i = 0; i < 8; i += SIZE) {
            pm_pack<T> pack;
#pragma unroll
            for (int e = 0; e < SIZE; e++)
                pack.v[e] = pm_to<T>(v[i + e]);
            *reinterpret_cast<pm_pack<T> *>(to + i) = pack;
        }
        return;
    }
#pragma unroll
    for (int e = 0; e < 8; e++)
        if (e < left)
            to[e] = pm_to<T>(v[e]);
}
