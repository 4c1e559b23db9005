// linear.cu: every dense product. The contract is csrc/ops/linear.h.
//
// forward  y = x weight^T + bias is one product of cuBLASLt with the bias in its epilogue; GELU, too.
//          Bytes: x, weight, y (and pre) once each, plus what a tile reads again.
// backward g = dy act'(pre), one pass, in scratch where there is an activation;
//          dx = g weight; dweight += g^T x with the sums of g's columns in the same product (dbias).
// SiLU (the time embedding, a few rows) has a pass of its own: cuBLASLt has no such epilogue.
#include "dense.cuh"

namespace {

// y = silu(pre), in place where pre is NULL. 256 threads, 4 numbers each.
template <class T>
__global__ void silu_kernel(int64_t count, const T *__restrict__ pre, T *__restrict__ y)
{
    for (int64_t i = pm_thread(); i < count; i += pm_threads()) {
        const float x = pm_float(pre ? pre[i] : y[i]);
        y[i] = pm_to<T>(x * pm_sigmoid_of(x));
    }
}

// g = dy act'(pre)
template <class T>
__global__ void dactivation_kernel(int64_t count, bool silu, const T *__restrict__ pre,
                                   const T *__restrict__ dy, T *__restrict__ g)
{
    for (int64_t i = pm_thread(); i < count; i += pm_threads()) {
        const float x = pm_float(pre[i]), s = pm_sigmoid_of(x);
        g[i] = pm_to<T>(pm_float(dy[i]) * (silu ? s * (1.0f + x * (1.0f - s)) : pm_dgelu(x)));
    }
}

template <class T> pm_dense forward_product(const pm_linear_args *g, const T *weight)
{
    const bool gelu = g->activation == PM_ACT_GELU_TANH, silu = g->activation == PM_ACT_SILU;
    pm_dense p = {};
    p.rows = g->N, p.columns = g->F, p.depth = g->D;
    p.a = g->x;
    p.b = weight, p.bt = true;
    p.c = silu && g->pre ? g->pre : g->y;
    p.epilogue = gelu ? PM_EPILOGUE_BIAS_GELU : g->bias ? PM_EPILOGUE_BIAS : PM_EPILOGUE_NONE;
    p.bias = g->bias;
    p.pre = gelu ? g->pre : nullptr;
    return p;
}

// dx (+)= gy weight
template <class T>
pm_dense dx_product(const pm_linear_args *g, const void *gy, const T *weight, void *dx)
{
    pm_dense p = {};
    p.rows = g->N, p.columns = g->D, p.depth = g->F;
    p.a = gy;
    p.b = weight;
    p.c = dx, p.add = g->dx_add != 0;
    return p;
}

// dweight += gy^T x;  dbias += the sums of gy's columns
pm_dense dweight_product(const pm_linear_args *g, const void *gy, float *dweight, float *dbias)
{
    pm_dense p = {};
    p.rows = g->F, p.columns = g->D, p.depth = g->N;
    p.a = gy, p.at = true;
    p.b = g->x;
    p.c = dweight, p.add = true;
    p.epilogue = dbias ? PM_EPILOGUE_SUM_A : PM_EPILOGUE_NONE;
    p.sums = dbias;
    return p;
}

} // namespace

template <class T> size_t linear_workspace(const pm_ctx *, const pm_linear_args *g, bool backward)
{
    const size_t weight = pm_weight_room<T>(g->weight, g->F * g->D);
    if (!backward)
        return weight + pm_dense_room<T, T>(forward_product<T>(g, nullptr));
    float any; // dbias may be wanted
    return weight + (g->activation != PM_ACT_NONE ? pm_room(g->N * g->F, sizeof(T)) : 0) +
           pm_dense_room<T, float>(dweight_product(g, nullptr, nullptr, &any));
}

template <class T> pm_status linear_forward(pm_ctx *ctx, const pm_linear_args *g, void *scratch)
{
    const T *weight;
    PM_TRY(pm_weight_as<T>(ctx, g->weight, g->F * g->D, &scratch, &weight));
    PM_TRY(pm_dense_run<T, T>(ctx, forward_product(g, weight), &scratch));
    if (g->activation == PM_ACT_SILU)
        PM_RUN(ctx, silu_kernel<T>, pm_blocks(g->N * g->F, 1024), 256, 0, g->N * g->F,
               static_cast<const T *>(g->pre), static_cast<T *>(g->y));
    return PM_OK;
}

template <class T>
pm_status linear_backward(pm_ctx *ctx, const pm_linear_args *g, const pm_linear_grads *d,
                          void *scratch)
{
    const void *gy = d->dy;
    if (g->activation != PM_ACT_NONE) {
        T *const product = pm_take<T>(&scratch, g->N * g->F);
        PM_RUN(ctx, dactivation_kernel<T>, pm_blocks(g->N * g->F, 1024), 256, 0, g->N * g->F,
               g->activation == PM_ACT_SILU, static_cast<const T *>(g->pre),
               static_cast<const T *>(d->dy), product);
        gy = product;
    }
    if (d->dx) {
        const T *weight;
        PM_TRY(pm_weight_as<T>(ctx, g->weight, g->F * g->D, &scratch, &weight));
        PM_TRY(pm_dense_run<T, T>(ctx, dx_product(g, gy, weight, d->dx), &scratch));
    }
    if (d->dweight)
        return pm_dense_run<T, float>(ctx, dweight_product(g, gy, d->dweight, d->dbias), &scratch);
    return d->dbias
               ? pm_column_sums<T>(ctx, g->N, g->F, static_cast<const T *>(gy), d->dbias, &scratch)
               : PM_OK;
}

PM_INSTANTIATE_BOTH(linear)
