// cosine.cuh: what prototypical_routing.cu and routing_contrastive_loss.cu share: rows of D numbers, their
// norms, tangents, and sums over tokens in slots.
//
// A lane has four numbers of a row side by side, so a warp has 128: every width of the published models
// is a multiple, and no lane idles (packs of 16 bytes of bf16 would make it 256, and 1152 is none).
#pragma once
#include "quads.cuh"

constexpr float COSINE_EPS = 1e-12f; // as in PyTorch's normalize
constexpr int COLUMNS = 128;         // of a warp, at a time

PM_DEVICE float cosine_inverse(float norm)
{
    return 1.0f / (norm < COSINE_EPS ? COSINE_EPS : norm); // a NaN stays one
}

// ---------------------------------------------------------------- four numbers

struct four {
    float v[4];
};
// Whether rows of `width` numbers may be read by fours. The arrays are aligned as an allocation is, or not.
static inline bool fours(int64_t width, const void *a, const void *b, const void *c)
{
    return width % 4 == 0 && pm_aligned(a) && pm_aligned(b) && pm_aligned(c);
}

// Numbers d .. d+3 of a row of D, as they lie in memory; 0 beyond it, and of a row that is not `there`.
// WIDE: fours() says yes.
template <bool WIDE, class T>
PM_DEVICE pm_quad<T> load_quad(const T *row, int64_t d, int64_t D, bool there = true)
{
    pm_quad<T> q = {};
    if constexpr (WIDE) {
        if (there && d < D)
            q = pm_load_quad(row + d);
    } else {
#pragma unroll
        for (int k = 0; k < 4; k++)
            if (there && d + k < D)
                q.set(k, row[d + k]);
    }
    return q;
}
template <bool WIDE, class T> PM_DEVICE four load_four(const T *row, int64_t d, int64_t D)
{
    const pm_quad<T> q = load_quad<WIDE>(row, d, D);
    return {{q[0], q[1], q[2], q[3]}};
}
template <bool WIDE, class T> PM_DEVICE void store_four(T *row, int64_t d, int64_t D, const four &x)
{
    if constexpr (WIDE) {
        if (d < D)
            pm_store_quad(row + d, x.v);
    } else {
#pragma unroll
        for (int k = 0; k < 4; k++)
            if (d + k < D)
                row[d + k] = pm_to<T>(x.v[k]);
    }
}

// ---------------------------------------------------------------- norms and tangents

namespace {

// <a, b> by a warp: a lane adds every 32nd product, then a tree.
PM_DEVICE float cosine_dot(int64_t D, const float *a, const float *b)
{
    float sum = 0;
#pragma unroll 8 // 8 loads of each row under way
    for (int64_t d = threadIdx.x % 32; d < D; d += 32)
        sum = fmaf(a[d], b[d], sum);
    return pm_warp_sum(sum);
}

// norms[i] = |row i| of `rows` rows of a, then those of b (NULL: none). A warp per row.
__global__ void __launch_bounds__(128)
    norm_kernel(int64_t rows, int64_t D, const float *__restrict__ a, const float *__restrict__ b,
                float *__restrict__ norms)
{
    const int64_t i = pm_thread() / 32;
    if (i >= (b ? 2 : 1) * rows)
        return;
    const float *const row = i < rows ? a + i * D : b + (i - rows) * D;
    const float square = cosine_dot(D, row, row);
    if (threadIdx.x % 32 == 0)
        norms[i] = sqrtf(square);
}

// Moving u along itself does not change its direction: what of q is along u goes. The tangent is
// q + tangent_along u, given <u, q>. Below EPS the norm is a constant, and the tangent is q.
PM_DEVICE float tangent_along(float norm, float dot)
{
    return norm < COSINE_EPS ? 0.0f : (float)(-(double)dot / ((double)norm * norm));
}

// ---------------------------------------------------------------- sums over tokens

// A sum over tokens has a slot per so many tokens: (E, D) partial sums in float. At most 256 slots, and at
// least 256 tokens, and 4 E of them, so that the slots take no more than a quarter of x as floats. The
// tokens of a slot are shared by the warps of a block (16384 tokens are 64 slots: one warp for each and 128
// columns would be 1.5 to 4 per SM). A multiple of 32.
int64_t slot_tokens(int64_t N, int64_t E)
{
    int64_t tokens = (N + 255) / 256;
    tokens = tokens > 256 ? tokens : 256;
    tokens = tokens > 4 * E ? tokens : 4 * E;
    return (tokens + 31) / 32 * 32;
}
int64_t slot_count(int64_t N, int64_t E)
{
    const int64_t tokens = slot_tokens(N, E);
    return (N + tokens - 1) / tokens;
}

// out (E, D) = the sum of the slots, in double; with counts (slots, E), divided by the sum of those, which
// goes to `count`; 0 where that is 0. A lane per number: 32 for a block, whose warps take the slots in
// turn, each eighth one; then the warps' sums in order.
constexpr int SLOT_WARPS = 8;

__global__ void __launch_bounds__(32 * SLOT_WARPS)
    slot_sum_kernel(int64_t slots, int64_t E, int64_t D, const float *__restrict__ partial,
                    const int32_t *__restrict__ counts, float *__restrict__ out,
                    int32_t *__restrict__ count)
{
    __shared__ double sums[SLOT_WARPS][32];
    __shared__ int32_t parts[SLOT_WARPS][32];
    const int warp = threadIdx.x / 32, lane = threadIdx.x % 32;
    const int64_t at = (int64_t)blockIdx.x * 32 + lane, i = at / (D > 0 ? D : 1);
    double sum = 0;
    int32_t members = 0;
    if (at < E * D) {
#pragma unroll 8
        for (int64_t s = warp; s < slots; s += SLOT_WARPS)
            sum += partial[s * E * D + at];
        for (int64_t s = warp; counts && s < slots; s += SLOT_WARPS)
            members += counts[s * E + i];
    }
    sums[warp][lane] = sum;
    parts[warp][lane] = members;
    __syncthreads();
    if (warp != 0 || at >= E * D)
        return;
    for (int w = 1; w < SLOT_WARPS; w++) {
        sum += sums[w][lane];
        members += parts[w][lane];
    }
    if (counts) {
        if (at % D == 0)
            count[i] = members;
        sum = members ? sum * (1.0 / members) : 0;
    }
    out[at] = (float)sum;
}

} // namespace
