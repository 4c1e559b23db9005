// experts_loop.cu: see experts_loop.cuh. As plain as it can be: rows are gathered into a copy, a
// product of cuBLASLt (dense.cuh) follows another, results are added to floats in the order of the
// groups, and drow_weight is <dy, output of the row>, without the identity that experts.cu uses.
#include "experts_loop.cuh"

#include <algorithm>
#include <vector>

#include "dense.cuh"

namespace {

// One group of this call. rows: how many; first: of the plan; token: NULL when all tokens have a
// row.
struct group {
    int64_t index, width, before, first, rows; // before: the sum of the widths of the groups before
    bool shared;
    const int32_t *token;
    const float *weight; // NULL: 1
};

pm_status read_back(pm_ctx *ctx, const int32_t *from, int64_t count, std::vector<int32_t> *to)
{
    to->assign((size_t)count, 0);
    PM_TRY(pm_cuda(ctx, "experts_loop",
                   cudaMemcpyAsync(to->data(), from, (size_t)count * sizeof(int32_t),
                                   cudaMemcpyDeviceToHost, pm_device().stream)));
    return pm_cuda(ctx, "experts_loop", cudaStreamSynchronize(pm_device().stream));
}

pm_status groups_of(pm_ctx *ctx, const pm_experts_args *g, std::vector<group> *groups)
{
    std::vector<int32_t> foff, row_off;
    PM_TRY(read_back(ctx, g->foff, g->G + g->S + 1, &foff));
    if (g->G)
        PM_TRY(read_back(ctx, g->row_off, g->G + 1, &row_off));
    for (int64_t i = 0; i < g->G + g->S; i++) {
        group e = {i, foff[i + 1] - foff[i], foff[i], 0, g->N, i >= g->G, nullptr, nullptr};
        if (!e.shared) {
            e.first = row_off[i];
            e.rows = row_off[i + 1] - row_off[i];
            e.token = g->row_token + e.first;
            e.weight = g->row_weight + e.first;
        }
        groups->push_back(e);
    }
    return PM_OK;
}

// ---------------------------------------------------------------- small kernels

// to[i] = from[token[i]] (times weight[i])
template <class T>
__global__ void gather_kernel(int64_t rows, int64_t D, const int32_t *token, const float *weight,
                              const T *from, T *to)
{
    for (int64_t i = pm_thread(); i < rows * D; i += pm_threads()) {
        const int64_t row = i / D, n = token ? token[row] : row;
        to[i] = pm_to<T>(pm_float(from[n * D + i % D]) * (weight ? weight[row] : 1.0f));
    }
}

// to[token[i]] += from[i] (times weight[i]): a token has one row of a group
template <class T>
__global__ void scatter_kernel(int64_t rows, int64_t D, const int32_t *token, const float *weight,
                               const T *from, float *to)
{
    for (int64_t i = pm_thread(); i < rows * D; i += pm_threads()) {
        const int64_t row = i / D, n = token ? token[row] : row;
        to[n * D + i % D] += pm_float(from[i]) * (weight ? weight[row] : 1.0f);
    }
}

template <class T> __global__ void narrow_kernel(int64_t count, const float *from, T *to)
{
    for (int64_t i = pm_thread(); i < count; i += pm_threads())
        to[i] = pm_to<T>(from[i]);
}

// h = silu(gate) up
template <class T> __global__ void swiglu_kernel(int64_t count, const T *gate, const T *up, T *h)
{
    for (int64_t i = pm_thread(); i < count; i += pm_threads()) {
        const float x = pm_float(gate[i]);
        h[i] = pm_to<T>(x * pm_sigmoid_of(x) * pm_float(up[i]));
    }
}

// The gradients of gate and up from that of h; dgate may be where dh is.
template <class T>
__global__ void dswiglu_kernel(int64_t count, const T *gate, const T *up, const T *dh, T *dgate,
                               T *dup)
{
    for (int64_t i = pm_thread(); i < count; i += pm_threads()) {
        const float x = pm_float(gate[i]), s = pm_sigmoid_of(x), d = pm_float(dh[i]);
        dup[i] = pm_to<T>(d * x * s);
        dgate[i] = pm_to<T>(d * pm_float(up[i]) * (s + x * s * (1.0f - s)));
    }
}

template <class T> __global__ void gelu_kernel(int64_t count, const T *pre, T *h)
{
    for (int64_t i = pm_thread(); i < count; i += pm_threads())
        h[i] = pm_to<T>(pm_gelu(pm_float(pre[i])));
}

// dot[i] = <dy of row i's token, out[i]>, a thread each
template <class T>
__global__ void dot_kernel(int64_t rows, int64_t D, const int32_t *token, const T *dy, const T *out,
                           float *dot)
{
    const int64_t row = pm_thread();
    if (row >= rows)
        return;
    float sum = 0;
    for (int64_t j = 0; j < D; j++)
        sum += pm_float(dy[token[row] * D + j]) * pm_float(out[row * D + j]);
    dot[row] = sum;
}

template <class T>
pm_status gather(pm_ctx *ctx, const group &e, int64_t D, const float *weight, const void *from,
                 T *to)
{
    PM_RUN(ctx, gather_kernel<T>, pm_blocks(e.rows * D, 256), 256, 0, e.rows, D, e.token, weight,
           static_cast<const T *>(from), to);
    return PM_OK;
}
template <class T>
pm_status scatter(pm_ctx *ctx, const group &e, int64_t D, const float *weight, const T *from,
                  float *to)
{
    PM_RUN(ctx, scatter_kernel<T>, pm_blocks(e.rows * D, 256), 256, 0, e.rows, D, e.token, weight,
           from, to);
    return PM_OK;
}

// The saved rows of a group, of F_g numbers each (with a gate those of one half), and the same at a
// distance of W or Z.
template <class T>
pm_status move_pre(pm_ctx *ctx, const pm_experts_args *g, const group &e, int half, T *rows,
                   bool save)
{
    T *saved = static_cast<T *>(e.shared ? g->pre_shared : g->pre);
    const int64_t ld = e.shared ? g->Z : g->W;
    if (!saved || !e.rows || !e.width)
        return PM_OK;
    saved += (e.shared ? (e.index - g->G) * g->N : e.first) * ld + half * e.width;
    const size_t wide = (size_t)ld * sizeof(T), narrow = (size_t)e.width * sizeof(T);
    return pm_cuda(ctx, "cudaMemcpy2DAsync",
                   cudaMemcpy2DAsync(save ? saved : rows, save ? wide : narrow, save ? rows : saved,
                                     save ? narrow : wide, narrow, (size_t)e.rows,
                                     cudaMemcpyDeviceToDevice, pm_device().stream));
}

// ---------------------------------------------------------------- one group

int halves_of(const pm_experts_args *g) { return g->activation == PM_EXPERTS_SWIGLU ? 2 : 1; }

// up: of a group with a gate the gate, and up.
template <class T> struct matrices {
    const T *up[2], *down;
};
template <class T>
pm_status take_matrices(pm_ctx *ctx, const pm_experts_args *g, const group &e,
                        const std::vector<group> &groups, void **scratch, matrices<T> *m)
{
    const int halves = halves_of(g);
    const auto twin_bytes = [&](int64_t width) {
        return (int64_t)ctx->backend->derived_bytes(ctx, width, g->D);
    };
    int64_t twins = 0; // of the groups before, of a matrix each
    for (int64_t i = 0; i < e.index; i++)
        twins += twin_bytes(groups[(size_t)i].width);
    const auto of = [&](const pm_weight &w, int64_t numbers, int64_t bytes) {
        const char *const derived = static_cast<const char *>(w.derived);
        return pm_weight{w.w + numbers, derived ? derived + bytes : nullptr};
    };
    for (int half = 0; half < halves; half++)
        PM_TRY(pm_weight_as<T>(ctx,
                               of(g->up, (halves * e.before + half * e.width) * g->D,
                                  halves * twins + half * twin_bytes(e.width)),
                               e.width * g->D, scratch, &m->up[half]));
    return pm_weight_as<T>(ctx, of(g->down, e.before * g->D, twins), e.width * g->D, scratch,
                           &m->down);
}

// h (rows, F_g) -> (rows, D), with the bias
template <class T>
pm_dense down_product(const pm_experts_args *g, const group &e, const T *h, const T *down, T *out)
{
    pm_dense p = {};
    p.rows = e.rows, p.columns = g->D, p.depth = e.width;
    p.a = h;
    p.b = down, p.bt = true;
    p.c = out;
    p.epilogue = g->down_bias ? PM_EPILOGUE_BIAS : PM_EPILOGUE_NONE;
    p.bias = g->down_bias ? g->down_bias + e.index * g->D : nullptr;
    return p;
}

// What a group's hidden units are, from their pre-activations.
template <class T> struct hidden {
    T *pre[2], *h;
};
template <class T> hidden<T> take_hidden(const group &e, int halves, void **scratch)
{
    hidden<T> t = {};
    for (int half = 0; half < halves; half++)
        t.pre[half] = pm_take<T>(scratch, e.rows * e.width);
    t.h = pm_take<T>(scratch, e.rows * e.width);
    return t;
}
template <class T>
pm_status activate(pm_ctx *ctx, const pm_experts_args *g, const group &e, const hidden<T> &t)
{
    const int64_t count = e.rows * e.width;
    if (halves_of(g) == 2)
        PM_RUN(ctx, swiglu_kernel<T>, pm_blocks(count, 256), 256, 0, count, t.pre[0], t.pre[1],
               t.h);
    else
        PM_RUN(ctx, gelu_kernel<T>, pm_blocks(count, 256), 256, 0, count, t.pre[0], t.h);
    return PM_OK;
}

template <class T>
pm_status forward_group(pm_ctx *ctx, const pm_experts_args *g, const group &e, const matrices<T> &m,
                        void *scratch, float *y)
{
    const int halves = halves_of(g);
    T *const x = pm_take<T>(&scratch, e.rows * g->D);
    T *const out = pm_take<T>(&scratch, e.rows * g->D);
    const hidden<T> t = take_hidden<T>(e, halves, &scratch);
    PM_TRY(gather<T>(ctx, e, g->D, nullptr, g->x, x));
    for (int half = 0; half < halves; half++) {
        pm_dense p = {};
        p.rows = e.rows, p.columns = e.width, p.depth = g->D;
        p.a = x;
        p.b = m.up[half], p.bt = true;
        p.c = t.pre[half];
        p.epilogue = g->up_bias ? PM_EPILOGUE_BIAS : PM_EPILOGUE_NONE;
        p.bias = g->up_bias ? g->up_bias + halves * e.before + half * e.width : nullptr;
        PM_TRY(pm_dense_run<T, T>(ctx, p, &scratch));
        PM_TRY(move_pre(ctx, g, e, half, t.pre[half], true));
    }
    PM_TRY(activate(ctx, g, e, t));
    PM_TRY(pm_dense_run<T, T>(ctx, down_product(g, e, t.h, m.down, out), &scratch));
    return scatter<T>(ctx, e, g->D, e.weight, out, y);
}

// gradient += a^T b and sums += the columns of a, for a (rows, F) and b (rows, D)
template <class T>
pm_status weight_product(pm_ctx *ctx, int64_t rows, int64_t F, int64_t D, const T *a, const T *b,
                         float *gradient, float *sums, void **scratch)
{
    pm_dense p = {};
    p.rows = F, p.columns = D, p.depth = rows;
    p.a = a, p.at = true;
    p.b = b;
    p.c = gradient, p.add = true;
    p.epilogue = sums ? PM_EPILOGUE_SUM_A : PM_EPILOGUE_NONE;
    p.sums = sums;
    if (gradient && D > 0) // a product of nothing leaves the sums out
        return pm_dense_run<T, float>(ctx, p, scratch);
    return sums ? pm_column_sums<T>(ctx, rows, F, a, sums, scratch) : PM_OK;
}

template <class T>
pm_status backward_group(pm_ctx *ctx, const pm_experts_args *g, const pm_experts_grads *d,
                         const group &e, const matrices<T> &m, void *scratch, float *dx)
{
    const int64_t D = g->D, numbers = e.rows * D, hidden_count = e.rows * e.width;
    const int halves = halves_of(g);
    T *const x = pm_take<T>(&scratch, numbers), *const dy = pm_take<T>(&scratch, numbers),
             *const out = pm_take<T>(&scratch, numbers);
    const hidden<T> t = take_hidden<T>(e, halves, &scratch);
    T *const dpre[2] = {pm_take<T>(&scratch, hidden_count),
                        halves == 2 ? pm_take<T>(&scratch, hidden_count) : nullptr};
    PM_TRY(gather<T>(ctx, e, D, nullptr, g->x, x));
    PM_TRY(gather<T>(ctx, e, D, e.weight, d->dy, dy));
    for (int half = 0; half < halves; half++)
        PM_TRY(move_pre(ctx, g, e, half, t.pre[half], false));
    PM_TRY(activate(ctx, g, e, t));
    if (!e.shared && d->drow_weight) {
        PM_TRY(pm_dense_run<T, T>(ctx, down_product(g, e, t.h, m.down, out), &scratch));
        PM_RUN(ctx, dot_kernel<T>, pm_blocks(e.rows, 256), 256, 0, e.rows, D, e.token,
               static_cast<const T *>(d->dy), out, d->drow_weight + e.first);
    }
    pm_dense p = {}; // (w dy) down, of which dpre is made: gelu'(pre) by the product itself
    p.rows = e.rows, p.columns = e.width, p.depth = D;
    p.a = dy;
    p.b = m.down;
    p.c = dpre[0];
    p.epilogue = halves == 2 ? PM_EPILOGUE_NONE : PM_EPILOGUE_DGELU;
    p.pre = t.pre[0];
    PM_TRY(pm_dense_run<T, T>(ctx, p, &scratch));
    if (halves == 2)
        PM_RUN(ctx, dswiglu_kernel<T>, pm_blocks(hidden_count, 256), 256, 0, hidden_count, t.pre[0],
               t.pre[1], dpre[0], dpre[0], dpre[1]);
    for (int half = 0; half < halves; half++) {
        const int64_t before = halves * e.before + half * e.width;
        if (d->dx) {
            pm_dense q = {}; // dpre up
            q.rows = e.rows, q.columns = D, q.depth = e.width;
            q.a = dpre[half];
            q.b = m.up[half];
            q.c = out;
            PM_TRY(pm_dense_run<T, T>(ctx, q, &scratch));
            PM_TRY(scatter<T>(ctx, e, D, nullptr, out, dx));
        }
        PM_TRY(weight_product<T>(ctx, e.rows, e.width, D, dpre[half], x,
                                 d->dup ? d->dup + before * D : nullptr,
                                 d->dup_bias ? d->dup_bias + before : nullptr, &scratch));
    }
    return weight_product<T>(ctx, e.rows, D, e.width, dy, t.h,
                             d->ddown ? d->ddown + e.before * D : nullptr,
                             d->ddown_bias ? d->ddown_bias + e.index * D : nullptr, &scratch);
}

pm_status clear(pm_ctx *ctx, float *to, int64_t count)
{
    return count
               ? pm_cuda(ctx, "cudaMemsetAsync",
                         cudaMemsetAsync(to, 0, (size_t)count * sizeof(float), pm_device().stream))
               : PM_OK;
}

} // namespace

// ---------------------------------------------------------------- the op

// Room for the largest group that there can be.
template <class T> size_t pm_experts_loop_room(const pm_experts_args *g)
{
    const int halves = halves_of(g);
    const int64_t rows = std::max(g->R, g->N), width = std::max(g->W, g->Z) / halves,
                  longest = std::max(std::max(rows, width), g->D);
    return pm_room(g->N * g->D, sizeof(float)) + (1 + halves) * pm_room(width * g->D, sizeof(T)) +
           3 * pm_room(rows * g->D, sizeof(T)) +
           (2 * halves + 1) * pm_room(rows * width, sizeof(T)) +
           // what the products ask for: a bias, or sums and their parts, each
           (4 + 2 * halves) *
               (pm_room(longest, sizeof(float)) + pm_column_sums_room(rows, std::max(width, g->D)));
}

template <class T>
pm_status pm_experts_loop_forward(pm_ctx *ctx, const pm_experts_args *g, void *scratch)
{
    std::vector<group> groups;
    PM_TRY(groups_of(ctx, g, &groups));
    float *const y = pm_take<float>(&scratch, g->N * g->D);
    PM_TRY(clear(ctx, y, g->N * g->D));
    for (const group &e : groups) {
        void *left = scratch;
        matrices<T> m;
        if (e.rows == 0)
            continue;
        PM_TRY(take_matrices<T>(ctx, g, e, groups, &left, &m));
        PM_TRY(forward_group<T>(ctx, g, e, m, left, y));
    }
    PM_RUN(ctx, narrow_kernel<T>, pm_blocks(g->N * g->D, 256), 256, 0, g->N * g->D, y,
           static_cast<T *>(g->y));
    return PM_OK;
}

template <class T>
pm_status pm_experts_loop_backward(pm_ctx *ctx, const pm_experts_args *g, const pm_experts_grads *d,
                                   void *scratch)
{
    std::vector<group> groups;
    PM_TRY(groups_of(ctx, g, &groups));
    float *const dx = pm_take<float>(&scratch, g->N * g->D);
    PM_TRY(clear(ctx, dx, g->N * g->D));
    if (d->drow_weight)
        PM_TRY(clear(ctx, d->drow_weight, g->R));
    for (const group &e : groups) {
        void *left = scratch;
        matrices<T> m;
        if (e.rows == 0)
            continue;
        PM_TRY(take_matrices<T>(ctx, g, e, groups, &left, &m));
        PM_TRY(backward_group<T>(ctx, g, d, e, m, left, dx));
    }
    if (d->dx)
        PM_RUN(ctx, narrow_kernel<T>, pm_blocks(g->N * g->D, 256), 256, 0, g->N * g->D, dx,
               static_cast<T *>(d->dx));
    return PM_OK;
}

#define PM_EXPERTS_LOOP(T)                                                                         \
    template size_t pm_experts_loop_room<T>(const pm_experts_args *);                              \
    template pm_status pm_experts_loop_forward<T>(pm_ctx *, const pm_experts_args *, void *);      \
    template pm_status pm_experts_loop_backward<T>(pm_ctx *, const pm_experts_args *,              \
                                                   const pm_experts_grads *, void *);
PM_EXPERTS_LOOP(float)
PM_EXPERTS_LOOP(bf16)
