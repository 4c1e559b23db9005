// label_embedding.cu: contract in csrc/ops/label_embedding.h. grid (columns / 256, B), a thread per number.
// backward: the first image of a class adds up all of its class, in the order of b; the others have
// nothing to do. No two threads write the same row.
#include "common.cuh"

namespace {

template <class T>
__global__ void forward_kernel(int64_t Y, int64_t D, const int64_t *__restrict__ y,
                               const float *__restrict__ table, const T *__restrict__ add,
                               T *__restrict__ c, unsigned long long *fault)
{
    const int64_t b = blockIdx.y, i = pm_thread(), label = y[b];
    if (i >= D)
        return;
    const bool known = label >= 0 && label < Y;
    if (!known && i == 0)
        pm_fault(fault, PM_FAULT_LABEL, b);
    const float row = known ? table[label * D + i] : 0.0f;
    c[b * D + i] = pm_to<T>(add ? pm_float(add[b * D + i]) + row : row);
}

template <class T>
__global__ void backward_kernel(int64_t B, int64_t Y, int64_t D, const int64_t *__restrict__ y,
                                const T *dc, float *__restrict__ dtable, T *dadd,
                                unsigned long long *fault)
{
    const int64_t b = blockIdx.y, i = pm_thread(), label = y[b];
    if (i >= D)
        return;
    if (dadd)
        dadd[b * D + i] = dc[b * D + i];
    if (label < 0 || label >= Y) {
        if (i == 0)
            pm_fault(fault, PM_FAULT_LABEL, b);
        return;
    }
    if (!dtable)
        return;
    for (int64_t before = 0; before < b; before++)
        if (y[before] == label)
            return;
    float sum = dtable[label * D + i];
    for (int64_t k = b; k < B; k++)
        if (y[k] == label)
            sum += pm_float(dc[k * D + i]);
    dtable[label * D + i] = sum;
}

dim3 grid_of(const pm_label_embedding_args *g)
{
    return dim3(pm_blocks(g->D, 256), (unsigned)g->B);
}

// The second axis of a grid ends at 65535.
pm_status check(pm_ctx *ctx, const pm_label_embedding_args *g)
{
    return g->B < 65536
               ? PM_OK
               : pm_fail(ctx, PM_EINVAL, "label_embedding: B is %lld, at most 65535 on a GPU",
                         (long long)g->B);
}

} // namespace

template <class T>
size_t label_embedding_workspace(const pm_ctx *, const pm_label_embedding_args *, bool)
{
    return 0;
}

template <class T>
pm_status label_embedding_forward(pm_ctx *ctx, const pm_label_embedding_args *g, void *)
{
    PM_TRY(check(ctx, g));
    PM_RUN(ctx, forward_kernel<T>, grid_of(g), 256, 0, g->Y, g->D, g->y, g->table,
           static_cast<const T *>(g->add), static_cast<T *>(g->c), pm_device().fault);
    return PM_OK;
}

template <class T>
pm_status label_embedding_backward(pm_ctx *ctx, const pm_label_embedding_args *g,
                                   const pm_label_embedding_grads *d, void *)
{
    PM_TRY(check(ctx, g));
    PM_RUN(ctx, backward_kernel<T>, grid_of(g), 256, 0, g->B, g->Y, g->D, g->y,
           static_cast<const T *>(d->dc), d->dtable, static_cast<T *>(d->dadd), pm_device().fault);
    return PM_OK;
}

PM_INSTANTIATE_BOTH(label_embedding)
