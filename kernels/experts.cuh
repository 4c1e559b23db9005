// experts.cuh: what the kernels of experts.cu share: the layer as they see it, who has which rows,
// and the activation. It is a part of that file, in its unnamed namespace.
#pragma once
#include "product.cuh"

namespace {

// ---------------------------------------------------------------- the layer

// Numbers between the rows of hidden activations in scratch: 16-byte aligned whatever the width.
__host__ __device__ inline int64_t padded(int64_t width) { return (width + 7) / 8 * 8; }

// The groups' matrices of F_g D numbers, one after another, or (apart) each at a multiple of 64
// bytes, as derived twins are. A group has `halves` of them: 1, or 2 where up has a gate before it.
template <class T> struct matrices {
    const T *at;
    bool apart;
    int halves;
};

template <class T> struct layer {
    int64_t N, D, R, W, Z; // W, Z: hidden units, half of the contract's with a gate
    int G, S;
    int halves; // pre-activations of a hidden unit: 1; swiglu: 2, of the gate and of up
    const int32_t *row_off, *row_token, *tok_off, *tok_row, *foff;
    const float *row_weight;
    const T *x;
    matrices<T> up, down;
    const float *up_bias, *down_bias; // or NULL: zero
};

template <class T> PM_DEVICE int width_of(const layer<T> &l, int group)
{
    return l.foff[group + 1] - l.foff[group];
}

// From a matrix of a group to the next one.
template <class T> PM_DEVICE int64_t distance(const layer<T> &l, const matrices<T> &m, int group)
{
    constexpr int64_t UNIT = 64 / sizeof(T);
    const int64_t numbers = width_of(l, group) * l.D;
    return m.apart ? (numbers + UNIT - 1) / UNIT * UNIT : numbers;
}
// A group's first matrix.
template <class T> PM_DEVICE const T *matrix_of(const layer<T> &l, const matrices<T> &m, int group)
{
    if (!m.apart)
        return m.at + m.halves * l.foff[group] * l.D;
    int64_t at = 0;
    for (int g = 0; g < group; g++)
        at += m.halves * distance(l, m, g);
    return m.at + at;
}

template <class T> PM_DEVICE int64_t rows_in(const layer<T> &l, int group)
{
    return group < l.G ? l.row_off[group + 1] - l.row_off[group] : l.N;
}

// A slot for every `tile` rows that a group can have. Plan groups: group g's begin at row_off[g] /
// tile + g, so there are R / tile + G, whatever the plan: a group from row a to row b has b / tile
// - a / tile + 1 of them, which is at least (b - a) / tile, rounded up. Then, for each shared
// group, those of the tokens.
template <class T> __host__ __device__ int plan_slots(const layer<T> &l, int tile)
{
    return l.G ? (int)(l.R / tile) + l.G : 0;
}
template <class T> __host__ __device__ int token_slots(const layer<T> &l, int tile)
{
    return (int)((l.N + tile - 1) / tile);
}
template <class T> int all_slots(const layer<T> &l, int tile)
{
    return plan_slots(l, tile) + l.S * token_slots(l, tile);
}
template <class T> PM_DEVICE int first_slot(const layer<T> &l, int tile, int group)
{
    return group < l.G ? l.row_off[group] / tile + group
                       : plan_slots(l, tile) + (group - l.G) * token_slots(l, tile);
}

// The rows of a slot: first .. first + rows - 1 of the plan, or of the tokens (shared).
struct place {
    int group;
    bool shared;
    int64_t first;
    int rows;
};

// Every lane of the warp has to be here. rows is 0, or less, in a slot that the plan does not use.
template <class T> PM_DEVICE place find(const layer<T> &l, int tile, int slot)
{
    const int plan = plan_slots(l, tile);
    place p;
    p.shared = slot >= plan;
    if (p.shared) {
        p.group = l.G + (slot - plan) / token_slots(l, tile);
    } else {
        int begun = 0; // groups whose slots begin here or before
        for (int g0 = 0; g0 < l.G; g0 += 32) {
            const int g = g0 + (int)threadIdx.x % 32;
            begun += __popc(__ballot_sync(PM_ALL, g < l.G && first_slot(l, tile, g) <= slot));
        }
        p.group = begun - 1;
    }
    const int64_t before = (int64_t)(slot - first_slot(l, tile, p.group)) * tile,
                  left = rows_in(l, p.group) - before;
    p.first = (p.shared ? 0 : l.row_off[p.group]) + before;
    p.rows = left < tile ? (int)left : tile;
    return p;
}

// Arrays that have a row for each row of the plan, and others for each shared group and token. In
// scratch, a row's two halves (the gate's, and up's) are ld / 2 apart; in pre, F_g.
template <class T> struct hidden_rows {
    T *plan, *shared;
    int64_t plan_ld, shared_ld;
};
template <class T> PM_DEVICE int64_t ld_of(const hidden_rows<T> &a, const place &p)
{
    return p.shared ? a.shared_ld : a.plan_ld;
}
// The first row of a place, or NULL.
template <class T, class L>
PM_DEVICE T *rows_of(const hidden_rows<T> &a, const L &l, const place &p)
{
    T *const at = p.shared ? a.shared : a.plan;
    const int64_t before = p.shared ? (p.group - l.G) * l.N + p.first : p.first;
    return at ? at + before * ld_of(a, p) : nullptr;
}
// The rows of tokens, x or dy, that belong to a place.
template <class T>
PM_DEVICE pm_lines<T> token_lines(const layer<T> &l, const place &p, const T *tokens)
{
    return p.shared ? pm_lines<T>{tokens + p.first * l.D, l.D, nullptr}
                    : pm_lines<T>{tokens, l.D, l.row_token + p.first};
}

// One product, not a sum of several.
template <class T> struct one_segment {
    pm_lines<T> a_lines, b_lines;
    int depth_;
    __device__ __forceinline__ int count() const { return 1; }
    __device__ __forceinline__ int depth(int) const { return depth_; }
    __device__ __forceinline__ pm_lines<T> a(int) const { return a_lines; }
    __device__ __forceinline__ pm_lines<T> b(int) const { return b_lines; }
};

// ---------------------------------------------------------------- the activation

// gelu_tanh(x) = x sigmoid(v), v = sqrt(8/pi) (x + 0.044715 x^3): nothing cancels where tanh is
// near -1. For bf16 by the approximations, which are right to 1e-6: two operations of the special
// function unit, 2048 clocks of an SM for a tile of 128 x 128; tanhf, with its branches, would take
// twice that. silu(x) = x sigmoid(x), and swiglu is silu(gate) up.
template <class T> PM_DEVICE float sigmoid_of(float v)
{
    if (std::is_same<T, bf16>::value)
        return __fdividef(1.0f, 1.0f + __expf(-v));
    return 1.0f / (1.0f + expf(-v));
}
constexpr float GELU_1 = 1.5957691216f, GELU_3 = GELU_1 * 0.044715f;

// h of a hidden unit's pre-activations: pre[0], or the gate's and up's.
template <class T> PM_DEVICE float activate(const float (&pre)[1])
{
    const float x = pre[0];
    return x * sigmoid_of<T>(x * fmaf(GELU_3 * x, x, GELU_1));
}
template <class T> PM_DEVICE float activate(const float (&pre)[2])
{
    return pre[0] * sigmoid_of<T>(pre[0]) * pre[1];
}
// h, and dh/dpre: for gelu s + x s (1 - s) dv/dx; for silu that with v = x.
template <class T> PM_DEVICE float activate_back(const float (&pre)[1], float (&slope)[1])
{
    const float x = pre[0], s = sigmoid_of<T>(x * fmaf(GELU_3 * x, x, GELU_1)), h = x * s;
    slope[0] = fmaf(h * (1.0f - s), fmaf(3.0f * GELU_3 * x, x, GELU_1), s);
    return h;
}
template <class T> PM_DEVICE float activate_back(const float (&pre)[2], float (&slope)[2])
{
    const float s = sigmoid_of<T>(pre[0]), silu = pre[0] * s;
    slope[0] = fmaf(silu, 1.0f - s, s) * pre[1];
    slope[1] = silu;
    return silu * pre[1];
}

} // namespace
