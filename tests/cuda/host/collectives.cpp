// collectives.cpp: what the last lane computes for its warp: shuffles, votes, mma, ldmatrix.
#include <cstring>

#include "device.h"
#include "internal.h"
#include "ptx_on_cpu.h"

namespace pm_host {

// The last lane computes for all: what it finds wrong is said of the lane that gave it.
struct OnBehalf {
    const int self = self_index;
    void lane(int l) { self_index = self / 32 * 32 + l; }
    ~OnBehalf() { self_index = self; }
};

// ------------------------------------------------------------------ shuffles and votes

// source(lane, argument, width): the lane to read from.
template <class Source>
static void shuffle_lanes(const char *name, void *const operand[32], uint32_t present, Source source)
{
    OnBehalf of;
    uint64_t given[32];
    for (int l = 0; l < 32; l++)
        given[l] = present >> l & 1 ? ((Exchange *)operand[l])->value : 0;
    for (int l = 0; l < 32; l++) {
        if (!(present >> l & 1))
            continue;
        of.lane(l);
        Exchange *e = (Exchange *)operand[l];
        if (e->width < 1 || e->width > 32 || (e->width & (e->width - 1)))
            fail("%s: width %d is not a power of two up to 32", name, e->width);
        const int from = source(l, e->lane, e->width);
        if (!(present >> from & 1))
            fail("%s: lane %d reads lane %d, which is not in the mask or has returned", name, l, from);
        e->value = given[from];
    }
}

static void shfl(void *const o[32], uint32_t present, const char *, int)
{
    shuffle_lanes("__shfl_sync", o, present, [](int l, int lane, int width) {
        return (l & ~(width - 1)) | (lane & (width - 1));
    });
}
static void shfl_up(void *const o[32], uint32_t present, const char *, int)
{
    shuffle_lanes("__shfl_up_sync", o, present, [](int l, int delta, int width) {
        return (l & (width - 1)) - delta < 0 ? l : l - delta;
    });
}
static void shfl_down(void *const o[32], uint32_t present, const char *, int)
{
    shuffle_lanes("__shfl_down_sync", o, present, [](int l, int delta, int width) {
        return (l & (width - 1)) + delta >= width ? l : l + delta;
    });
}
static void shfl_xor(void *const o[32], uint32_t present, const char *, int)
{
    shuffle_lanes("__shfl_xor_sync", o, present, [](int l, int lanes, int width) {
        const int from = l ^ (lanes & 31);
        return from / width > l / width ? l : from; // of a later group: the own value
    });
}

template <class Combine>
static void reduce_lanes(void *const operand[32], uint32_t present, Combine combine)
{
    uint32_t all = 0;
    bool first = true;
    for (int l = 0; l < 32; l++)
        if (present >> l & 1) {
            const uint32_t v = (uint32_t)((Exchange *)operand[l])->value;
            all = first ? v : combine(all, v);
            first = false;
        }
    for (int l = 0; l < 32; l++)
        if (present >> l & 1)
            ((Exchange *)operand[l])->value = all;
}

template <class T, bool GREATEST> static void reduce_order(void *const o[32], uint32_t present, const char *, int)
{
    reduce_lanes(o, present, [](uint32_t a, uint32_t b) {
        return ((T)a < (T)b) == GREATEST ? b : a;
    });
}
static void reduce_add(void *const o[32], uint32_t present, const char *, int)
{
    reduce_lanes(o, present, [](uint32_t a, uint32_t b) { return a + b; });
}
static void reduce_and(void *const o[32], uint32_t present, const char *, int)
{
    reduce_lanes(o, present, [](uint32_t a, uint32_t b) { return a & b; });
}
static void reduce_or(void *const o[32], uint32_t present, const char *, int)
{
    reduce_lanes(o, present, [](uint32_t a, uint32_t b) { return a | b; });
}
static void reduce_xor(void *const o[32], uint32_t present, const char *, int)
{
    reduce_lanes(o, present, [](uint32_t a, uint32_t b) { return a ^ b; });
}

static void ballot(void *const operand[32], uint32_t present, const char *, int)
{
    uint32_t votes = 0;
    for (int l = 0; l < 32; l++)
        if (present >> l & 1)
            votes |= (uint32_t)(((Exchange *)operand[l])->value != 0) << l;
    for (int l = 0; l < 32; l++)
        if (present >> l & 1)
            ((Exchange *)operand[l])->value = votes;
}

static void match_any(void *const operand[32], uint32_t present, const char *, int)
{
    uint64_t given[32] = {};
    for (int l = 0; l < 32; l++)
        if (present >> l & 1)
            given[l] = ((Exchange *)operand[l])->value;
    for (int l = 0; l < 32; l++) {
        if (!(present >> l & 1))
            continue;
        uint32_t same = 0;
        for (int m = 0; m < 32; m++)
            same |= (uint32_t)((present >> m & 1) && given[m] == given[l]) << m;
        ((Exchange *)operand[l])->value = same;
    }
}

const Collective SYNCWARP = {"__syncwarp", nullptr, false};
const Collective SHFL = {"__shfl_sync", shfl, false};
const Collective SHFL_UP = {"__shfl_up_sync", shfl_up, false};
const Collective SHFL_DOWN = {"__shfl_down_sync", shfl_down, false};
const Collective SHFL_XOR = {"__shfl_xor_sync", shfl_xor, false};
const Collective BALLOT = {"a vote", ballot, false};
const Collective MATCH_ANY = {"__match_any_sync", match_any, false};
const Collective REDUCE_ADD = {"__reduce_add_sync", reduce_add, false};
const Collective REDUCE_MIN = {"__reduce_min_sync", reduce_order<int32_t, false>, false};
const Collective REDUCE_MAX = {"__reduce_max_sync", reduce_order<int32_t, true>, false};
const Collective REDUCE_UMIN = {"__reduce_min_sync", reduce_order<uint32_t, false>, false};
const Collective REDUCE_UMAX = {"__reduce_max_sync", reduce_order<uint32_t, true>, false};
const Collective REDUCE_AND = {"__reduce_and_sync", reduce_and, false};
const Collective REDUCE_OR = {"__reduce_or_sync", reduce_or, false};
const Collective REDUCE_XOR = {"__reduce_xor_sync", reduce_xor, false};

// ------------------------------------------------------------------ mma
static inline float low_half(uint32_t u) { return bits<float>(u << 16); }
static inline float high_half(uint32_t u) { return bits<float>(u & 0xffff0000u); }
static inline float tf32_part(uint32_t u) { return bits<float>(u & 0xffffe000u); } // the rest is not read

// The warp's M x N tiles of 16 x 8 at once: A is taken apart a row of tiles at a time, B whole. Sums
// run over k upwards, from d, in float. K: 16 (bf16) or 8 (tf32).
constexpr int MOST_N = 32;

template <int K> static void mma(const char *name, void *const operand[32])
{
    static float A[16][K], B[K][MOST_N * 8], D[16][MOST_N * 8];
    const Mma *o[32];
    for (int l = 0; l < 32; l++)
        o[l] = (const Mma *)operand[l];
    const int m = o[0]->m, n = o[0]->n, columns = n * 8;
    if (n > MOST_N)
        fail("%s: %d tiles in a row; the most is %d", name, n, MOST_N);
    count_operations(2.0 * 16 * 8 * K * m * n);
    for (int l = 0; l < 32; l++) {
        const int g = l >> 2, t = l & 3;
        for (int j = 0; j < n; j++) {
            const uint32_t *b = o[l]->b + j * 2;
            for (int i = 0; i < 2; i++)
                if (K == 16) {
                    B[t * 2 + i * 8][j * 8 + g] = low_half(b[i]);
                    B[t * 2 + i * 8 + 1][j * 8 + g] = high_half(b[i]);
                } else {
                    B[t + i * 4][j * 8 + g] = tf32_part(b[i]);
                }
        }
    }
    for (int tile = 0; tile < m; tile++) {
        for (int l = 0; l < 32; l++) {
            const int g = l >> 2, t = l & 3;
            const uint32_t *a = o[l]->a + tile * 4;
            for (int i = 0; i < 4; i++)
                if (K == 16) {
                    A[g + (i & 1) * 8][t * 2 + (i >> 1) * 8] = low_half(a[i]);
                    A[g + (i & 1) * 8][t * 2 + (i >> 1) * 8 + 1] = high_half(a[i]);
                } else {
                    A[g + (i & 1) * 8][t + (i >> 1) * 4] = tf32_part(a[i]);
                }
            for (int j = 0; j < n; j++) {
                const float *d = o[l]->d + (tile * n + j) * 4;
                memcpy(&D[g][j * 8 + t * 2], d, 8);
                memcpy(&D[g + 8][j * 8 + t * 2], d + 2, 8);
            }
        }
        for (int r = 0; r < 16; r++)
            for (int c = 0; c < columns; c += 8) {
                float sum[8];
                memcpy(sum, &D[r][c], sizeof sum);
                for (int k = 0; k < K; k++)
                    for (int i = 0; i < 8; i++)
                        sum[i] += A[r][k] * B[k][c + i];
                memcpy(&D[r][c], sum, sizeof sum);
            }
        for (int l = 0; l < 32; l++) {
            const int g = l >> 2, t = l & 3;
            for (int j = 0; j < n; j++) {
                float *d = o[l]->d + (tile * n + j) * 4;
                memcpy(d, &D[g][j * 8 + t * 2], 8);
                memcpy(d + 2, &D[g + 8][j * 8 + t * 2], 8);
            }
        }
    }
}

static void mma_bf16(void *const o[32], uint32_t, const char *, int)
{
    mma<16>("mma_m16n8k16", o);
}
static void mma_tf32(void *const o[32], uint32_t, const char *, int)
{
    mma<8>("mma_m16n8k8_tf32", o);
}
const Collective MMA_BF16 = {"mma_m16n8k16", mma_bf16, true};
const Collective MMA_TF32 = {"mma_m16n8k8_tf32", mma_tf32, true};

// ------------------------------------------------------------------ ldmatrix
template <bool TRANSPOSED> static void load_matrices(void *const operand[32], uint32_t, const char *file, int line)
{
    const char *name = TRANSPOSED ? "a row of ldmatrix.trans" : "a row of ldmatrix";
    OnBehalf of;
    uint16_t matrix[8][8];
    const int count = ((const Ldmatrix *)operand[0])->count;
    for (int i = 0; i < count; i++) {
        for (int r = 0; r < 8; r++) {
            of.lane(i * 8 + r);
            const void *row = ((const Ldmatrix *)operand[i * 8 + r])->row;
            check_shared(row, 16, 16, name);
            race_access(row, 16, Kind::READ, file, line);
            memcpy(matrix[r], row, 16);
        }
        for (int l = 0; l < 32; l++) {
            const int g = l >> 2, t = l & 3;
            uint32_t pair;
            if (TRANSPOSED)
                pair = matrix[t * 2][g] | (uint32_t)matrix[t * 2 + 1][g] << 16;
            else
                memcpy(&pair, &matrix[g][t * 2], 4);
            ((const Ldmatrix *)operand[l])->r[i] = pair;
        }
    }
}
const Collective LDMATRIX = {"ldmatrix", load_matrices<false>, true};
const Collective LDMATRIX_TRANS = {"ldmatrix.trans", load_matrices<true>, true};

} // namespace pm_host
