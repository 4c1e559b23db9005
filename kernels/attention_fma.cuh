// attention_fma.cuh: attention in float, by FMA, for any head size: fp32, and head sizes that the tensor
// cores' kernels have no room for. Under "tf32", too: that is an option for the products of cuBLASLt, 96 % of
// XL's at 256 tokens; tf32 fragments differ from bf16's in every layout (no ldmatrix of transposed
// 4-byte numbers), so these products would be a third family of kernels, for those who do not take bf16.
//
// A block of 16 COLS threads owns 64 rows of a head and passes over the others 8 COLS at a time. Thread
// (ty, tx) has rows ty + 16 i (i < 4): of scores, columns tx + COLS j (j < 8); of an output, groups of 4
// channels (tx + COLS j) 4. Channels come in chunks of WIDTH: (COLS, WIDTH) is (8, 64), (6, 72), so
// that 72 channels are 6 x 3 groups of 4, and (4, 16) for small heads. A wider head takes a block for
// each 64 channels of output, and each of them sums the scores over all channels.
//
// Per 4 channels a thread reads 12 x 16 bytes of shared memory for 128 FMA of scores, and 4 + 4 WIDTH /
// (4 COLS) for 16 WIDTH / COLS of an output: both below the time of the FMA. Rows have WIDTH + 4 numbers,
// an odd number of 16-byte units: the 4 to 8 rows that a warp reads at once are in different banks.
//
// The order of a sum is that of channels or keys, so scores are the same bits in forward and backward
// (__fmul_rn: scaled before lse is subtracted), and exp(score - lse) is 1 where one score is all, however
// large.
// Backward divides p by its sum, which is 1 but for the rounding of lse (4e-6 where scores are 60): dq at
// its end, and the kernel of dk and dv reads the sums that dq's left in `inverse`.
// Bytes: own rows once, the others once for each 64 rows of the head (from L2), outputs once. Backward
// is two kernels, each of which recomputes the probabilities (7 products for 5): rows of queries own dq,
// rows of keys own dk and dv, and no sum is shared.
#pragma once
#include "attention.cuh"

namespace {

template <int COLS_, int WIDTH_> struct fma_plan {
    static constexpr int COLS = COLS_, WIDTH = WIDTH_;
    static constexpr int THREADS = 16 * COLS, ROWS = 64, OTHERS = 8 * COLS;
    static constexpr int LD = WIDTH + 4, P_LD = OTHERS + 4;
    static constexpr int GROUPS = WIDTH / (4 * COLS); // of 4 channels, of a thread
    static constexpr size_t SHARED = (ROWS * LD + OTHERS * LD + ROWS * P_LD + 3 * ROWS) *
                                     sizeof(float);
};

template <class T> struct alignas(4 * sizeof(T)) four {
    T v[4];
};

// ROWS rows from `first` on, channels [chunk, chunk + WIDTH), to shared memory; zero past T and K.
template <class P, int ROWS, class T>
PM_DEVICE void load_floats(const attention_shape &g, const T *from, int64_t ld, int first,
                           int chunk, float *to)
{
    constexpr int UNITS = P::WIDTH / 4;
    for (int i = threadIdx.x; i < ROWS * UNITS; i += P::THREADS) {
        const int row = first + i / UNITS, c = chunk + i % UNITS * 4;
        float4 x = make_float4(0, 0, 0, 0);
        if (row < g.T && c < g.K) {
            const T *const at = from + row * ld + c;
            if (g.aligned) {
                const four<T> v = *reinterpret_cast<const four<T> *>(at);
                x = make_float4(pm_float(v.v[0]), pm_float(v.v[1]), pm_float(v.v[2]),
                                pm_float(v.v[3]));
            } else {
                x.x = pm_float(at[0]);
                x.y = c + 1 < g.K ? pm_float(at[1]) : 0.0f;
                x.z = c + 2 < g.K ? pm_float(at[2]) : 0.0f;
                x.w = c + 3 < g.K ? pm_float(at[3]) : 0.0f;
            }
        }
        *reinterpret_cast<float4 *>(to + i / UNITS * P::LD + i % UNITS * 4) = x;
    }
}

template <class P, class T>
PM_DEVICE void store_floats(const attention_shape &g, const float (&x)[4][P::GROUPS][4], T *to,
                            int64_t ld, int first, int chunk)
{
    const int tx = threadIdx.x % P::COLS, ty = threadIdx.x / P::COLS;
#pragma unroll
    for (int i = 0; i < 4; i++) {
        const int row = first + ty + 16 * i;
        if (row >= g.T)
            continue;
#pragma unroll
        for (int j = 0; j < P::GROUPS; j++) {
            const int c = chunk + (tx + P::COLS * j) * 4;
            T *const at = to + row * ld + c;
            if (g.aligned && c < g.K) {
                four<T> v;
#pragma unroll
                for (int l = 0; l < 4; l++)
                    v.v[l] = pm_to<T>(x[i][j][l]);
                *reinterpret_cast<four<T> *>(at) = v;
            } else {
#pragma unroll
                for (int l = 0; l < 4; l++)
                    if (c + l < g.K)
                        at[l] = pm_to<T>(x[i][j][l]);
            }
        }
    }
}

PM_DEVICE float4 at4(const float *p) { return *reinterpret_cast<const float4 *>(p); }

// s[i][j] += a[row i] . b[column j], over the channels of a chunk in order
template <class P> PM_DEVICE void dot_chunk(const float *a, const float *b, float (&s)[4][8])
{
    const int tx = threadIdx.x % P::COLS, ty = threadIdx.x / P::COLS;
#pragma unroll 2
    for (int c = 0; c < P::WIDTH; c += 4) {
        float4 x[4];
#pragma unroll
        for (int i = 0; i < 4; i++)
            x[i] = at4(a + (ty + 16 * i) * P::LD + c);
#pragma unroll
        for (int j = 0; j < 8; j++) {
            const float4 y = at4(b + (tx + P::COLS * j) * P::LD + c);
#pragma unroll
            for (int i = 0; i < 4; i++) {
                s[i][j] = fmaf(x[i].x, y.x, s[i][j]);
                s[i][j] = fmaf(x[i].y, y.y, s[i][j]);
                s[i][j] = fmaf(x[i].z, y.z, s[i][j]);
                s[i][j] = fmaf(x[i].w, y.w, s[i][j]);
            }
        }
    }
}

// s = a b^T over all channels: a, own rows from `first` on, in as, which has it already where there is
// one chunk and `loaded`; b, others, in bs. The last chunk of both stays there.
template <class P, class T>
PM_DEVICE void dot(const attention_shape &g, const T *a, int64_t lda, int first, bool loaded,
                   const T *b, int64_t ldb, int others, float *as, float *bs, float (&s)[4][8])
{
#pragma unroll
    for (int i = 0; i < 4; i++)
#pragma unroll
        for (int j = 0; j < 8; j++)
            s[i][j] = 0;
    for (int chunk = 0; chunk < g.K; chunk += P::WIDTH) {
        __syncthreads(); // what was in as and bs is read
        if (!loaded || g.K > P::WIDTH)
            load_floats<P, P::ROWS>(g, a, lda, first, chunk, as);
        load_floats<P, P::OTHERS>(g, b, ldb, others, chunk, bs);
        __syncthreads();
        dot_chunk<P>(as, bs, s);
    }
}

// out[row][c] += sum over others, in order, of p[row][other] b[other][c]
template <class P>
PM_DEVICE void outer(const float *p, const float *b, float (&out)[4][P::GROUPS][4])
{
    const int tx = threadIdx.x % P::COLS, ty = threadIdx.x / P::COLS;
#pragma unroll 2
    for (int k = 0; k < P::OTHERS; k += 4) {
        float x[4][4];
#pragma unroll
        for (int i = 0; i < 4; i++) {
            const float4 v = at4(p + (ty + 16 * i) * P::P_LD + k);
            x[i][0] = v.x, x[i][1] = v.y, x[i][2] = v.z, x[i][3] = v.w;
        }
#pragma unroll
        for (int l = 0; l < 4; l++)
#pragma unroll
            for (int j = 0; j < P::GROUPS; j++) {
                const float4 y = at4(b + (k + l) * P::LD + (tx + P::COLS * j) * 4);
#pragma unroll
                for (int i = 0; i < 4; i++) {
                    out[i][j][0] = fmaf(x[i][l], y.x, out[i][j][0]);
                    out[i][j][1] = fmaf(x[i][l], y.y, out[i][j][1]);
                    out[i][j][2] = fmaf(x[i][l], y.z, out[i][j][2]);
                    out[i][j][3] = fmaf(x[i][l], y.w, out[i][j][3]);
                }
            }
    }
}

template <class P> PM_DEVICE void store_scores(const float (&s)[4][8], float *p)
{
    const int tx = threadIdx.x % P::COLS, ty = threadIdx.x / P::COLS;
#pragma unroll
    for (int i = 0; i < 4; i++)
#pragma unroll
        for (int j = 0; j < 8; j++)
            p[(ty + 16 * i) * P::P_LD + tx + P::COLS * j] = s[i][j];
}

// blockIdx.x: (head, 64 rows), blockIdx.y: chunk of the output's channels.
template <class T, class P>
__global__ void __launch_bounds__(P::THREADS, 2)
    forward_fma_kernel(attention_shape g, attention_inputs<T> in, attention_rows<T> out, int parts,
                       float *__restrict__ lse)
{
    float *const as = reinterpret_cast<float *>(pm_shared), *const bs = as + P::ROWS * P::LD;
    float *const p = bs + P::OTHERS * P::LD;
    float *const top = p + P::ROWS * P::P_LD, *const sum = top + P::ROWS,
                 *const shrink = sum + P::ROWS;
    const int head = (int)blockIdx.x / parts;
    const int first = (int)(blockIdx.x % parts) * P::ROWS, chunk = blockIdx.y * P::WIDTH;
    const int tx = threadIdx.x % P::COLS, ty = threadIdx.x / P::COLS;
    const int warp = threadIdx.x / 32, lane = threadIdx.x % 32;
    const T *const q = head_of(in.q, g, head), *const k = head_of(in.k, g, head),
                   *const v = head_of(in.v, g, head);
    for (int i = threadIdx.x; i < P::ROWS; i += P::THREADS)
        top[i] = -INFINITY, sum[i] = 0;

    float o[4][P::GROUPS][4] = {};
    for (int key = 0; key < g.T; key += P::OTHERS) {
        float s[4][8];
        dot<P>(g, q, in.q.ld, first, key > 0, k, in.k.ld, key, as, bs, s);
#pragma unroll
        for (int i = 0; i < 4; i++)
#pragma unroll
            for (int j = 0; j < 8; j++)
                s[i][j] = key + tx + P::COLS * j < g.T ? s[i][j] * g.scale : -INFINITY;
        store_scores<P>(s, p);
        __syncthreads(); // scores are there, and the keys are read
        load_floats<P, P::OTHERS>(g, v, in.v.ld, key, chunk, bs);

        // A warp per row: its maximum and sum so far, p = exp(s - max)
        for (int row = warp; row < P::ROWS; row += P::THREADS / 32) {
            float *const pr = p + row * P::P_LD;
            const bool two = lane + 32 < P::OTHERS;
            const float s0 = pr[lane], s1 = two ? pr[lane + 32] : -INFINITY, before = top[row];
            const float most = fmaxf(before, pm_warp_max(fmaxf(s0, s1)));
            const float p0 = expf(s0 - most), p1 = two ? expf(s1 - most) : 0.0f;
            const float more = pm_warp_sum(p0 + p1), less = expf(before - most);
            pr[lane] = p0;
            if (two)
                pr[lane + 32] = p1;
            if (lane == 0) {
                top[row] = most;
                sum[row] = sum[row] * less + more;
                shrink[row] = less;
            }
        }
        __syncthreads();
#pragma unroll
        for (int i = 0; i < 4; i++)
#pragma unroll
            for (int j = 0; j < P::GROUPS; j++)
#pragma unroll
                for (int l = 0; l < 4; l++)
                    o[i][j][l] *= shrink[ty + 16 * i];
        outer<P>(p, bs, o);
    }
#pragma unroll
    for (int i = 0; i < 4; i++) {
        const int row = ty + 16 * i;
        const float inverse = 1.0f / sum[row];
#pragma unroll
        for (int j = 0; j < P::GROUPS; j++)
#pragma unroll
            for (int l = 0; l < 4; l++)
                o[i][j][l] *= inverse;
        if (lse && tx == 0 && chunk == 0 && first + row < g.T)
            lse[(int64_t)head * g.T + first + row] = top[row] + logf(sum[row]);
    }
    store_floats<P>(g, o, head_of(out, g, head), out.ld, first, chunk);
}

// dq = sum over keys of ds k. blockIdx as above.
template <class T, class P>
__global__ void __launch_bounds__(P::THREADS, 2)
    dq_fma_kernel(attention_shape g, attention_inputs<T> in, attention_rows<T> out, int parts)
{
    float *const as = reinterpret_cast<float *>(pm_shared), *const bs = as + P::ROWS * P::LD;
    float *const p = bs + P::OTHERS * P::LD;
    const int head = (int)blockIdx.x / parts;
    const int first = (int)(blockIdx.x % parts) * P::ROWS, chunk = blockIdx.y * P::WIDTH;
    const int tx = threadIdx.x % P::COLS, ty = threadIdx.x / P::COLS;
    const T *const q = head_of(in.q, g, head), *const k = head_of(in.k, g, head),
                   *const v = head_of(in.v, g, head), *const dy = head_of(in.dy, g, head);
    float lse[4], delta[4];
#pragma unroll
    for (int i = 0; i < 4; i++) {
        const int row = first + ty + 16 * i;
        lse[i] = row < g.T ? in.lse[(int64_t)head * g.T + row] : 0.0f;
        delta[i] = row < g.T ? in.delta[(int64_t)head * g.T + row] : 0.0f;
    }

    float dq[4][P::GROUPS][4] = {}, sum[4] = {};
    for (int key = 0; key < g.T; key += P::OTHERS) {
        float s[4][8], dp[4][8];
        dot<P>(g, dy, in.dy.ld, first, false, v, in.v.ld, key, as, bs, dp);
        dot<P>(g, q, in.q.ld, first, false, k, in.k.ld, key, as, bs, s);
#pragma unroll
        for (int i = 0; i < 4; i++)
#pragma unroll
            for (int j = 0; j < 8; j++) {
                s[i][j] = key + tx + P::COLS * j < g.T ? expf(__fmul_rn(s[i][j], g.scale) - lse[i])
                                                       : 0.0f;
                sum[i] += s[i][j];
                s[i][j] *= dp[i][j] - delta[i];
            }
        store_scores<P>(s, p);
        if (g.K > P::WIDTH) { // else k is there
            __syncthreads();
            load_floats<P, P::OTHERS>(g, k, in.k.ld, key, chunk, bs);
        }
        __syncthreads();
        outer<P>(p, bs, dq);
    }
    __syncthreads(); // p is read, and has room for each thread's sums
#pragma unroll
    for (int i = 0; i < 4; i++)
        p[(ty + 16 * i) * P::COLS + tx] = sum[i];
    __syncthreads();
#pragma unroll
    for (int i = 0; i < 4; i++) {
        const int row = ty + 16 * i;
        float all = 0;
#pragma unroll
        for (int j = 0; j < P::COLS; j++)
            all += p[row * P::COLS + j];
        const float inverse = 1.0f / all;
        if (tx == 0 && chunk == 0 && first + row < g.T)
            in.inverse[(int64_t)head * g.T + first + row] = inverse;
#pragma unroll
        for (int j = 0; j < P::GROUPS; j++)
#pragma unroll
            for (int l = 0; l < 4; l++)
                dq[i][j][l] *= inverse * g.scale;
    }
    store_floats<P>(g, dq, head_of(out, g, head), out.ld, first, chunk);
}

// dv = sum over queries of p^T dy, dk = of ds^T q; the rows of the block are keys.
template <class T, class P>
__global__ void __launch_bounds__(P::THREADS, 2)
    dkdv_fma_kernel(attention_shape g, attention_inputs<T> in, attention_gradients<T> out,
                    int parts)
{
    float *const as = reinterpret_cast<float *>(pm_shared), *const bs = as + P::ROWS * P::LD;
    float *const p = bs + P::OTHERS * P::LD;
    const int head = (int)blockIdx.x / parts;
    const int first = (int)(blockIdx.x % parts) * P::ROWS, chunk = blockIdx.y * P::WIDTH;
    const int tx = threadIdx.x % P::COLS;
    const T *const q = head_of(in.q, g, head), *const k = head_of(in.k, g, head),
                   *const v = head_of(in.v, g, head), *const dy = head_of(in.dy, g, head);

    float dk[4][P::GROUPS][4] = {}, dv[4][P::GROUPS][4] = {};
    for (int row = 0; row < g.T; row += P::OTHERS) {
        float s[4][8], dp[4][8];
        dot<P>(g, k, in.k.ld, first, false, q, in.q.ld, row, as, bs, s);
        dot<P>(g, v, in.v.ld, first, false, dy, in.dy.ld, row, as, bs, dp);
#pragma unroll
        for (int j = 0; j < 8; j++) {
            const int at = row + tx + P::COLS * j;
            const float lse = at < g.T ? in.lse[(int64_t)head * g.T + at] : 0.0f;
            const float delta = at < g.T ? in.delta[(int64_t)head * g.T + at] : 0.0f;
            const float inverse = at < g.T ? in.inverse[(int64_t)head * g.T + at] : 0.0f;
#pragma unroll
            for (int i = 0; i < 4; i++) {
                s[i][j] = at < g.T ? expf(__fmul_rn(s[i][j], g.scale) - lse) * inverse : 0.0f;
                dp[i][j] = s[i][j] * (dp[i][j] - delta);
            }
        }
        store_scores<P>(s, p);
        if (g.K > P::WIDTH) { // else dy is there
            __syncthreads();
            load_floats<P, P::OTHERS>(g, dy, in.dy.ld, row, chunk, bs);
        }
        __syncthreads();
        outer<P>(p, bs, dv);
        __syncthreads(); // p and dy are read
        store_scores<P>(dp, p);
        load_floats<P, P::OTHERS>(g, q, in.q.ld, row, chunk, bs);
        __syncthreads();
        outer<P>(p, bs, dk);
    }
#pragma unroll
    for (int i = 0; i < 4; i++)
#pragma unroll
        for (int j = 0; j < P::GROUPS; j++)
#pragma unroll
            for (int l = 0; l < 4; l++)
                dk[i][j][l] *= g.scale;
    store_floats<P>(g, dk, head_of(out.dk, g, head), out.dk.ld, first, chunk);
    if (out.dv.p)
        store_floats<P>(g, dv, head_of(out.dv, g, head), out.dv.ld, first, chunk);
}

} // namespace
