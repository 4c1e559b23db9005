// attention_mma.cuh: attention in bf16 by tensor cores (mma m16n8k16, operands by ldmatrix), for head
// sizes up to HEAD, a multiple of 8. The contraction over a head takes steps of 16 channels; where 8 are
// left (HEAD = 72) the other half of both operands is zero registers. As columns, 72 are 9 tiles of 8.
//
// Shared memory has rows of LD numbers, an odd number of 16-byte units (72: 9), so that the 8 rows of an
// ldmatrix, and the 8 x 4 words that a fragment stores, fall into different banks without a swizzle.
//
// What a lane holds: g = lane / 4, t = lane % 4; d[0], d[1] of a 16 x 8 tile are row g, columns 2t and
// 2t + 1, d[2], d[3] row g + 8. Two such tiles side by side, rounded to bf16, are the left operand of
// the next product as they are: probabilities never leave the registers.
#pragma once
#include "attention.cuh"

namespace {

constexpr float LOG2E = 1.44269504f;

PM_DEVICE uint32_t pack(float low, float high)
{
    const __nv_bfloat162 pair = __floats2bfloat162_rn(low, high);
    uint32_t bits;
    memcpy(&bits, &pair, sizeof bits);
    return bits;
}
PM_DEVICE float2 unpack(uint32_t bits)
{
    __nv_bfloat162 pair;
    memcpy(&pair, &bits, sizeof bits);
    return __bfloat1622float2(pair);
}

template <int HEAD> struct tiles {
    static_assert(HEAD % 8 == 0, "rows are whole units of 16 bytes");
    static constexpr int LD = HEAD / 8 % 2 ? HEAD : HEAD + 8;
    static constexpr int STEPS = (HEAD + 15) / 16; // of the contraction over a head
    static constexpr int COLUMNS = HEAD / 8;       // tiles of 8
};

// rows [first, first + ROWS) of a head to shared memory, by THREADS threads: rows from T on and channels
// from K on become zero. The copies are the caller's to commit. (Not unrolled: what is the same in all rounds
// would be kept in registers that the products need.)
template <int HEAD, int ROWS, int THREADS>
PM_DEVICE void load_rows(const attention_shape &g, const bf16 *from, int64_t ld, int first,
                         bf16 *to)
{
    constexpr int LD = tiles<HEAD>::LD, UNITS = HEAD / 8;
    if (g.aligned) {
#pragma unroll 1
        for (int i = threadIdx.x; i < ROWS * UNITS; i += THREADS) {
            const int row = i / UNITS, c = i % UNITS * 8;
            const bool there = first + row < g.T && c < g.K;
            cp_async_zfill<16>(to + row * LD + c, there ? from + (first + row) * ld + c : from,
                               there ? 16 : 0);
        }
    } else {
#pragma unroll 1
        for (int i = threadIdx.x; i < ROWS * HEAD; i += THREADS) {
            const int row = i / HEAD, c = i % HEAD;
            const bool there = first + row < g.T && c < g.K;
            to[row * LD + c] = there ? from[(first + row) * ld + c] : pm_to<bf16>(0.0f);
        }
    }
}

// rows of shared memory, units [0, UNITS) of them, that this warp wrote, to [first, ...) of a head.
// from and to begin at the same channel, `at`.
template <int ROWS, int UNITS, int LD>
PM_DEVICE void store_rows(const attention_shape &g, const bf16 *from, bf16 *to, int64_t ld,
                          int first, int at)
{
    const int lane = threadIdx.x % 32;
    __syncwarp();
    if (g.aligned) {
#pragma unroll 1
        for (int i = lane; i < ROWS * UNITS; i += 32) {
            const int row = i / UNITS, c = i % UNITS * 8;
            if (first + row < g.T && at + c < g.K)
                *reinterpret_cast<pm_pack<bf16> *>(to + (first + row) * ld + c) =
                    *reinterpret_cast<const pm_pack<bf16> *>(from + row * LD + c);
        }
    } else {
#pragma unroll 1
        for (int i = lane; i < ROWS * UNITS * 8; i += 32) {
            const int row = i / (UNITS * 8), c = i % (UNITS * 8);
            if (first + row < g.T && at + c < g.K)
                to[(first + row) * ld + c] = from[row * LD + c];
        }
    }
}

// Left operand: 16 rows, channels [16 step, + 16).
template <int HEAD> PM_DEVICE void load_left(const bf16 *rows, int step, uint32_t (&a)[4])
{
    const int lane = threadIdx.x % 32;
    const bf16 *row = rows + lane % 16 * tiles<HEAD>::LD + step * 16;
    if (step * 16 + 8 < HEAD) {
        ldmatrix_x4(a, row + lane / 16 * 8);
    } else {
        uint32_t half[2];
        ldmatrix_x2(half, row);
        a[0] = half[0], a[1] = half[1], a[2] = a[3] = 0;
    }
}

// Right operand of a product with the transposed: 8 N rows are its columns; channels [16 step, + 16).
template <int HEAD, int N>
PM_DEVICE void load_right_transposed(const bf16 *rows, int step, uint32_t (&b)[N][2])
{
    static_assert(N == 2 || N % 4 == 0, "two or four matrices at a time");
    constexpr int LD = tiles<HEAD>::LD;
    const int lane = threadIdx.x % 32;
    uint32_t r[4];
    if (step * 16 + 8 < HEAD) {
        const bf16 *row = rows + (lane / 16 * 8 + lane % 8) * LD + step * 16 + lane / 8 % 2 * 8;
#pragma unroll
        for (int n = 0; n < N; n += 2) {
            ldmatrix_x4(r, row + n * 8 * LD);
            b[n][0] = r[0], b[n][1] = r[1], b[n + 1][0] = r[2], b[n + 1][1] = r[3];
        }
    } else if (N == 2) {
        uint32_t half[2];
        ldmatrix_x2(half, rows + lane % 16 * LD + step * 16);
        b[0][0] = half[0], b[1][0] = half[1], b[0][1] = b[1][1] = 0;
    } else {
#pragma unroll
        for (int n = 0; n < N; n += 4) {
            ldmatrix_x4(r, rows + (n * 8 + lane) * LD + step * 16);
#pragma unroll
            for (int i = 0; i < 4; i++)
                b[n + i][0] = r[i], b[n + i][1] = 0;
        }
    }
}

// Right operand as it lies: 16 rows are the contraction; N tiles of 8 channels.
template <int LD, int N> PM_DEVICE void load_right(const bf16 *rows, uint32_t (&b)[N][2])
{
    const int lane = threadIdx.x % 32;
    const bf16 *row = rows + lane % 16 * LD + lane / 16 * 8;
#pragma unroll
    for (int n = 0; n + 1 < N; n += 2) {
        uint32_t r[4];
        ldmatrix_x4_trans(r, row + n * 8);
        b[n][0] = r[0], b[n][1] = r[1], b[n + 1][0] = r[2], b[n + 1][1] = r[3];
    }
    if (N % 2)
        ldmatrix_x2_trans(b[N - 1], rows + lane % 16 * LD + (N - 1) * 8);
}

// ---------------------------------------------------------------- forward
//
// A block of 4 warps has 64 M query rows of a head, 16 M of a warp, and passes over the keys 64 at a time;
// the next 64 arrive by cp.async meanwhile. The softmax is online, 32 keys at a time: maximum and sum of
// a row so far, and the output rescaled when a maximum of the warp grew.
//
// M = 2 up to 72 channels: each fragment of K and V serves two tiles of rows. For 32 keys at 72 channels a
// warp then reads 20 ldmatrix_x4 for 40 mma of scores and 9 for 36 of the output: 116 clocks of shared
// memory beside 152 (sm_80) or about 120 (sm_90) of the tensor cores. A lane holds 72 numbers of output
// and 32 scores; q is read again from shared memory. 168 registers, so three blocks to an SM (two on
// sm_80, by shared memory): one's exponentials, as many clocks as its products, run under another's mma.
// At 128 channels M is 1.
// Bytes: q and y once; k and v once for each 64 M rows (twice at T = 256, from L2); lse.

constexpr int FORWARD_KEYS = 64, FORWARD_PASS = 32;
template <int HEAD> struct forward_plan {
    static constexpr int M = HEAD > 72 ? 1 : 2, ROWS = 64 * M, THREADS = 128;
    static constexpr size_t SHARED = (ROWS + 4 * FORWARD_KEYS) * tiles<HEAD>::LD * sizeof(bf16);
};

template <int HEAD>
__global__ void __launch_bounds__(128, 3)
    forward_mma_kernel(attention_shape g, attention_inputs<bf16> in, attention_rows<bf16> out,
                       int parts, float *__restrict__ lse)
{
    using P = forward_plan<HEAD>;
    using X = tiles<HEAD>;
    constexpr int M = P::M, LD = X::LD, KEYS = FORWARD_KEYS, PASS = FORWARD_PASS, N = PASS / 8;
    bf16 *const qs = reinterpret_cast<bf16 *>(pm_shared), *const kvs = qs + P::ROWS * LD;
    const int head = (int)blockIdx.x / parts;
    const int warp = threadIdx.x / 32, lane = threadIdx.x % 32, t = lane % 4;
    const int first = (int)(blockIdx.x % parts) * P::ROWS, row0 = first + warp * 16 * M;
    const bf16 *const q = head_of(in.q, g, head), *const k = head_of(in.k, g, head),
                      *const v = head_of(in.v, g, head);
    const float c = g.scale * LOG2E;
    bf16 *const qw = qs + warp * 16 * M * LD; // this warp's rows

    load_rows<HEAD, P::ROWS, P::THREADS>(g, q, in.q.ld, first, qs);
    load_rows<HEAD, KEYS, P::THREADS>(g, k, in.k.ld, 0, kvs);
    load_rows<HEAD, KEYS, P::THREADS>(g, v, in.v.ld, 0, kvs + KEYS * LD);
    cp_async_commit();

    float o[M][X::COLUMNS][4] = {}, top[M][2], sum[M][2] = {};
#pragma unroll
    for (int m = 0; m < M; m++)
        top[m][0] = top[m][1] = -INFINITY;

    const int rounds = (g.T + KEYS - 1) / KEYS;
    for (int round = 0; round < rounds; round++) {
        bf16 *const ks = kvs + round % 2 * 2 * KEYS * LD, *const vs = ks + KEYS * LD;
        cp_async_wait<0>();
        __syncthreads(); // these keys are there, and the others are read
        if (round + 1 < rounds) {
            bf16 *const next = kvs + (round + 1) % 2 * 2 * KEYS * LD;
            load_rows<HEAD, KEYS, P::THREADS>(g, k, in.k.ld, (round + 1) * KEYS, next);
            load_rows<HEAD, KEYS, P::THREADS>(g, v, in.v.ld, (round + 1) * KEYS, next + KEYS * LD);
            cp_async_commit();
        }
        if (row0 >= g.T)
            continue; // the whole warp; it goes on copying

#pragma unroll 1
        for (int pass = 0; pass < KEYS; pass += PASS) {
            const int left = g.T - round * KEYS - pass; // keys from here on
            if (left <= 0)
                break;

            // s = q k^T
            float s[M][N][4] = {};
#pragma unroll
            for (int step = 0; step < X::STEPS; step++) {
                uint32_t a[M][4], b[N][2];
#pragma unroll
                for (int m = 0; m < M; m++)
                    load_left<HEAD>(qw + m * 16 * LD, step, a[m]);
                load_right_transposed<HEAD>(ks + pass * LD, step, b);
                mma_m16n8k16(s, a, b);
            }
            if (left < PASS)
#pragma unroll
                for (int n = 0; n < N; n++)
#pragma unroll
                    for (int i = 0; i < 2; i++)
                        if (n * 8 + 2 * t + i >= left)
#pragma unroll
                            for (int m = 0; m < M; m++)
                                s[m][n][i] = s[m][n][i + 2] = -INFINITY;

            // The maximum of each row. (Scaled later: the difference to it, which is exactly 0 at it.)
            float shrink[M][2];
            bool grew = false;
#pragma unroll
            for (int m = 0; m < M; m++)
#pragma unroll
                for (int r = 0; r < 2; r++) {
                    float most = top[m][r];
#pragma unroll
                    for (int n = 0; n < N; n++)
                        most = fmaxf(most, fmaxf(s[m][n][2 * r], s[m][n][2 * r + 1]));
                    most = fmaxf(most, __shfl_xor_sync(PM_ALL, most, 1));
                    most = fmaxf(most, __shfl_xor_sync(PM_ALL, most, 2));
                    grew |= most > top[m][r];
                    shrink[m][r] = pm_exp2((top[m][r] - most) * c);
                    sum[m][r] *= shrink[m][r];
                    top[m][r] = most;
                }
            if (__any_sync(PM_ALL, grew))
#pragma unroll
                for (int m = 0; m < M; m++)
#pragma unroll
                    for (int n = 0; n < X::COLUMNS; n++)
#pragma unroll
                        for (int i = 0; i < 4; i++)
                            o[m][n][i] *= shrink[m][i / 2];

                            // p = exp(s - max), a lane's share of the sum of each row, and o += p v, 16 keys at a time
#pragma unroll
            for (int step = 0; step < PASS / 16; step++) {
                uint32_t p[M][4], b[X::COLUMNS][2];
#pragma unroll
                for (int m = 0; m < M; m++)
#pragma unroll
                    for (int j = 0; j < 4; j++) {
                        const float *const pair = &s[m][2 * step + j / 2][j % 2 * 2];
                        const float p0 = pm_exp2((pair[0] - top[m][j % 2]) * c);
                        const float p1 = pm_exp2((pair[1] - top[m][j % 2]) * c);
                        sum[m][j % 2] += p0 + p1;
                        p[m][j] = pack(p0, p1);
                    }
                load_right<LD>(vs + (pass + step * 16) * LD, b);
                mma_m16n8k16(o, p, b);
            }
        }
    }
    if (row0 >= g.T)
        return; // the whole warp

    // y = o / sum, through the shared memory of q's rows, which only this warp reads
    __syncwarp();
#pragma unroll
    for (int m = 0; m < M; m++)
#pragma unroll
        for (int r = 0; r < 2; r++) {
            float all = sum[m][r];
            all += __shfl_xor_sync(PM_ALL, all, 1);
            all += __shfl_xor_sync(PM_ALL, all, 2);
            const float inverse = 1.0f / all;
            const int row = m * 16 + r * 8 + lane / 4;
#pragma unroll
            for (int n = 0; n < X::COLUMNS; n++)
                *reinterpret_cast<uint32_t *>(qw + row * LD + n * 8 + 2 * t) =
                    pack(o[m][n][2 * r] * inverse, o[m][n][2 * r + 1] * inverse);
            if (lse && t == 0 && row0 + row < g.T)
                lse[(int64_t)head * g.T + row0 + row] = top[m][r] * g.scale + logf(all);
        }
    store_rows<16 * M, X::COLUMNS, LD>(g, qw, head_of(out, g, head), out.ld, row0, 0);
}

// ---------------------------------------------------------------- backward
//
// A block of 8 warps owns a head: nobody else adds to its gradients. Each warp has 16 M keys, with dk and
// dv in its registers; K and V of all 128 M keys are in shared memory, and query rows pass by 64 at a
// time (the next arrive by cp.async), worked on 32 at a time:
//   s^T = k q^T;  p = exp(s - lse);  dv += p^T dy;  dp^T = v dy^T;  ds = p (dp - delta);  dk += ds^T q
// ds^T goes to shared memory, and after a barrier the warps make dq = ds k of the 64 rows, 16 rows and
// half the channels each, over all keys. So each product is done once (5 for the 2 of forward), and
// dq is written once while T <= 128 M. With more keys the block goes on with the next 128 M, and dq is
// summed in scratch (`sums`, float), every number by the same thread.
//
// M = 2 up to 72 channels (256 keys): 144 numbers of dk and dv in a lane, and 32 of s, then 16 of dp (32
// do not fit into 255 registers); 148 KB of shared memory, one block of 8 warps to an SM. At 128 channels M
// is 1.
// 255 registers, of which 64 channels need no more; with 72 and 128 ptxas spills 8 to 16 bytes (a pointer or
// two that are kept across the products), which is less than what 16 queries instead of 32 would read again.
// Bytes: q, k, v, dy, lse, delta read once, dq, dk, dv written once, at T <= 256.

constexpr int BACKWARD_ROWS = 64;
template <int HEAD> struct backward_plan {
    static constexpr int M = HEAD > 72 ? 1 : 2, WARPS = 8, THREADS = 32 * WARPS;
    static constexpr int KEYS = 16 * M * WARPS;
    static constexpr int DS_LD = BACKWARD_ROWS + 8; // of ds^T: 9 units of 16 bytes
    static constexpr size_t SHARED =
        (2 * KEYS + 4 * BACKWARD_ROWS) * tiles<HEAD>::LD * sizeof(bf16) +
        KEYS * DS_LD * sizeof(bf16) + 4 * BACKWARD_ROWS * sizeof(float);
};

// The 64 query rows from `first` on: q, dy, and lse and delta of them (0 past T: then p is 1, and both
// dy and ds are 0).
template <int HEAD>
PM_DEVICE void load_queries(const attention_shape &g, const attention_inputs<bf16> &in, int head,
                            int first, bf16 *tile, float *stats)
{
    constexpr int ROWS = BACKWARD_ROWS, THREADS = backward_plan<HEAD>::THREADS;
    load_rows<HEAD, ROWS, THREADS>(g, head_of(in.q, g, head), in.q.ld, first, tile);
    load_rows<HEAD, ROWS, THREADS>(g, head_of(in.dy, g, head), in.dy.ld, first,
                                   tile + ROWS * tiles<HEAD>::LD);
    if (threadIdx.x < 2 * ROWS) {
        const int row = first + threadIdx.x % ROWS;
        const float *const from = (threadIdx.x < ROWS ? in.lse : in.delta) + (int64_t)head * g.T;
        cp_async_zfill<4>(stats + threadIdx.x, row < g.T ? from + row : from, row < g.T ? 4 : 0);
    }
    cp_async_commit();
}

template <int HEAD>
__global__ void __launch_bounds__(256)
    backward_mma_kernel(attention_shape g, attention_inputs<bf16> in, attention_gradients<bf16> out,
                        float *__restrict__ sums)
{
    using P = backward_plan<HEAD>;
    using X = tiles<HEAD>;
    constexpr int M = P::M, LD = X::LD, ROWS = BACKWARD_ROWS, KEYS = P::KEYS, DS_LD = P::DS_LD;
    constexpr int QUERIES = 32, N = QUERIES / 8; // of a pass
    constexpr int PART = (X::COLUMNS + 1) / 2;   // tiles of dq's columns of a warp
    bf16 *const ks = reinterpret_cast<bf16 *>(pm_shared), *const vs = ks + KEYS * LD;
    bf16 *const qdys = vs + KEYS * LD, *const dss = qdys + 4 * ROWS * LD;
    float *const stats = reinterpret_cast<float *>(dss + KEYS * DS_LD);
    const int head = (int)blockIdx.x;
    const int warp = threadIdx.x / 32, lane = threadIdx.x % 32, t = lane % 4;
    bf16 *const kw = ks + warp * 16 * M * LD, *const vw = vs + warp * 16 * M * LD; // this warp's
    const int rounds = (g.T + ROWS - 1) / ROWS;

    for (int key0 = 0; key0 < g.T; key0 += KEYS) {
        const int mine = key0 + warp * 16 * M; // the first of the warp's keys
        if (key0 > 0)
            __syncthreads(); // shared memory is read
        load_rows<HEAD, KEYS, P::THREADS>(g, head_of(in.k, g, head), in.k.ld, key0, ks);
        load_rows<HEAD, KEYS, P::THREADS>(g, head_of(in.v, g, head), in.v.ld, key0, vs);
        load_queries<HEAD>(g, in, head, 0, qdys, stats);
        float dk[M][X::COLUMNS][4] = {}, dv[M][X::COLUMNS][4] = {};

        for (int round = 0; round < rounds; round++) {
            bf16 *const qs = qdys + round % 2 * 2 * ROWS * LD;
            const bf16 *const dys = qs + ROWS * LD;
            const float *const stat = stats + round % 2 * 2 * ROWS;
            cp_async_wait<0>();
            __syncthreads(); // these rows are there; dq of those before is made
            if (round + 1 < rounds)
                load_queries<HEAD>(g, in, head, (round + 1) * ROWS,
                                   qdys + (round + 1) % 2 * 2 * ROWS * LD,
                                   stats + (round + 1) % 2 * 2 * ROWS);

#pragma unroll 1
            for (int half = 0; half < ROWS; half += QUERIES) {
                if (mine >= g.T || round * ROWS + half >= g.T)
                    break; // the whole warp; nobody reads its ds
                const bf16 *const qh = qs + half * LD, *const dyh = dys + half * LD;
                uint32_t p[M][N][2]; // p^T, rounded: rows g and g + 8 of each tile
                {
                    float s[M][N][4] = {};
#pragma unroll
                    for (int step = 0; step < X::STEPS; step++) {
                        uint32_t a[M][4], b[N][2];
#pragma unroll
                        for (int m = 0; m < M; m++)
                            load_left<HEAD>(kw + m * 16 * LD, step, a[m]);
                        load_right_transposed<HEAD>(qh, step, b);
                        mma_m16n8k16(s, a, b);
                    }
#pragma unroll
                    for (int n = 0; n < N; n++) {
                        const float2 l =
                            *reinterpret_cast<const float2 *>(stat + half + n * 8 + 2 * t);
#pragma unroll
                        for (int m = 0; m < M; m++)
#pragma unroll
                            for (int r = 0; r < 2; r++) {
                                const bool there = mine + m * 16 + r * 8 + lane / 4 < g.T;
                                float *const pair = &s[m][n][2 * r];
                                const float p0 =
                                    pm_exp2((__fmul_rn(pair[0], g.scale) - l.x) * LOG2E);
                                const float p1 =
                                    pm_exp2((__fmul_rn(pair[1], g.scale) - l.y) * LOG2E);
                                p[m][n][r] = there ? pack(p0, p1) : 0;
                            }
                    }
                }
#pragma unroll
                for (int step = 0; step < QUERIES / 16; step++) {
                    uint32_t a[M][4], b[X::COLUMNS][2];
#pragma unroll
                    for (int m = 0; m < M; m++)
#pragma unroll
                        for (int j = 0; j < 4; j++)
                            a[m][j] = p[m][2 * step + j / 2][j % 2];
                    load_right<LD>(dyh + step * 16 * LD, b);
                    mma_m16n8k16(dv, a, b);
                }
                bf16 *const dsw = dss + (warp * 16 * M + lane / 4) * DS_LD + half + 2 * t;
#pragma unroll
                for (int part = 0; part < QUERIES / 16; part++) {
                    const bf16 *const qp = qh + part * 16 * LD, *const dyp = dyh + part * 16 * LD;
                    float dp[M][2][4] = {};
#pragma unroll
                    for (int step = 0; step < X::STEPS; step++) {
                        uint32_t a[M][4], b[2][2];
#pragma unroll
                        for (int m = 0; m < M; m++)
                            load_left<HEAD>(vw + m * 16 * LD, step, a[m]);
                        load_right_transposed<HEAD>(dyp, step, b);
                        mma_m16n8k16(dp, a, b);
                    }
                    uint32_t ds[M][4], b[X::COLUMNS][2];
#pragma unroll
                    for (int i = 0; i < 2; i++) {
                        const int n = 2 * part + i;
                        const float2 d =
                            *reinterpret_cast<const float2 *>(stat + ROWS + half + n * 8 + 2 * t);
#pragma unroll
                        for (int m = 0; m < M; m++)
#pragma unroll
                            for (int r = 0; r < 2; r++) {
                                const float2 of = unpack(p[m][n][r]);
                                const uint32_t pair = pack(of.x * (dp[m][i][2 * r] - d.x),
                                                           of.y * (dp[m][i][2 * r + 1] - d.y));
                                ds[m][2 * i + r] = pair;
                                *reinterpret_cast<uint32_t *>(dsw + (m * 16 + r * 8) * DS_LD +
                                                              n * 8) = pair;
                            }
                    }
                    load_right<LD>(qp, b);
                    mma_m16n8k16(dk, ds, b);
                }
            }
            __syncthreads(); // ds is there; q and dy are read

            // dq of rows [16 (warp / 2), + 16), tiles [from, from + PART) of columns. With 9 tiles the
            // two warps share the middle one, and the first of them keeps it.
            const int row = warp / 2 * 16, from = warp % 2 * (X::COLUMNS - PART);
            if (round * ROWS + row >= g.T)
                continue; // the whole warp
            float dq[1][PART][4] = {};
            const int keys = min(g.T - key0, KEYS);
#pragma unroll 2
            for (int key = 0; key < keys; key += 16) { // all 16 are those of a warp that has keys
                uint32_t a[1][4], b[PART][2];
                ldmatrix_x4_trans(a[0], dss + (key + lane / 16 * 8 + lane % 8) * DS_LD + row +
                                            lane / 8 % 2 * 8);
                load_right<LD>(ks + key * LD + from * 8, b);
                mma_m16n8k16(dq, a, b);
            }
            const int kept = warp % 2 ? 2 * PART - X::COLUMNS : 0;
            bf16 *const dqs = qs + row * LD + from * 8; // q was read
#pragma unroll
            for (int n = 0; n < PART; n++)
#pragma unroll
                for (int r = 0; r < 2; r++) {
                    float x = dq[0][n][2 * r] * g.scale, y = dq[0][n][2 * r + 1] * g.scale;
                    const int at = row + r * 8 + lane / 4, column = (from + n) * 8 + 2 * t;
                    if (n < kept || round * ROWS + at >= g.T)
                        continue;
                    if (sums) {
                        float2 *const sum = reinterpret_cast<float2 *>(
                            sums + ((int64_t)head * g.T + round * ROWS + at) * HEAD + column);
                        if (key0 > 0)
                            x += sum->x, y += sum->y;
                        *sum = make_float2(x, y);
                    }
                    *reinterpret_cast<uint32_t *>(qs + at * LD + column) = pack(x, y);
                }
            if (key0 + KEYS >= g.T) {
                bf16 *const to = head_of(out.dq, g, head) + from * 8;
                if (warp % 2)
                    store_rows<16, X::COLUMNS - PART, LD>(g, dqs + kept * 8, to + kept * 8,
                                                          out.dq.ld, round * ROWS + row,
                                                          (from + kept) * 8);
                else
                    store_rows<16, PART, LD>(g, dqs, to, out.dq.ld, round * ROWS + row, 0);
            }
        }

        __syncthreads(); // dq is made: K and V have room for dk and dv
        if (mine >= g.T)
            continue; // the whole warp
#pragma unroll
        for (int m = 0; m < M; m++)
#pragma unroll
            for (int n = 0; n < X::COLUMNS; n++)
#pragma unroll
                for (int r = 0; r < 2; r++) {
                    const int at = (m * 16 + r * 8 + lane / 4) * LD + n * 8 + 2 * t;
                    *reinterpret_cast<uint32_t *>(kw + at) =
                        pack(dk[m][n][2 * r] * g.scale, dk[m][n][2 * r + 1] * g.scale);
                    *reinterpret_cast<uint32_t *>(vw + at) =
                        pack(dv[m][n][2 * r], dv[m][n][2 * r + 1]);
                }
        store_rows<16 * M, X::COLUMNS, LD>(g, kw, head_of(out.dk, g, head), out.dk.ld, mine, 0);
        if (out.dv.p)
            store_rows<16 * M, X::COLUMNS, LD>(g, vw, head_of(out.dv, g, head), out.dv.ld, mine, 0);
    }
}

// The smallest of the instances that has room for K channels; 0: none.
inline int mma_head(int64_t K)
{
    return K <= 32 ? 32 : K <= 64 ? 64 : K <= 72 ? 72 : K <= 128 ? 128 : 0;
}

} // namespace
