// unpatchify.cu: contract in csrc/ops/unpatchify.h. A permutation: a thread per number of x (or dx), which is
// read or written in order; its partner in y is at most P numbers away from the next one's.
#include "patches.cuh"

namespace {

// y = x, moved; or, with BACK, dx = dy, moved back. n counts the patches of all images.
template <class T, bool BACK>
__global__ void move_kernel(pm_patches grid, int64_t C, int64_t count, T *x, float *y)
{
    for (int64_t k = pm_thread(); k < count; k += pm_threads()) {
        const int64_t P = C * grid.inside, n = k / P, p = k % P;
        const int64_t at = n / grid.tokens * C * grid.voxels +
                           pm_patch_place(grid, n % grid.tokens, p % C, p / C);
        if (BACK)
            x[k] = pm_to<T>(y[at]);
        else
            y[at] = pm_float(x[k]);
    }
}

pm_status grid_of(pm_ctx *ctx, const pm_unpatchify_args *g, pm_patches *grid)
{
    return pm_patches_make(ctx, "unpatchify", {g->s0, g->s1, g->s2}, {g->p0, g->p1, g->p2}, g->C,
                           g->V, g->T, g->P, grid);
}

} // namespace

template <class T> size_t unpatchify_workspace(const pm_ctx *, const pm_unpatchify_args *, bool)
{
    return 0;
}

template <class T> pm_status unpatchify_forward(pm_ctx *ctx, const pm_unpatchify_args *g, void *)
{
    pm_patches grid;
    PM_TRY(grid_of(ctx, g, &grid));
    const int64_t count = g->B * g->T * g->P;
    PM_RUN(ctx, (move_kernel<T, false>), pm_blocks(count, 1024), 256, 0, grid, g->C, count,
           static_cast<T *>(const_cast<void *>(g->x)), g->y);
    return PM_OK;
}

template <class T>
pm_status unpatchify_backward(pm_ctx *ctx, const pm_unpatchify_args *g,
                              const pm_unpatchify_grads *d, void *)
{
    if (!d->dx)
        return PM_OK;
    pm_patches grid;
    PM_TRY(grid_of(ctx, g, &grid));
    const int64_t count = g->B * g->T * g->P;
    PM_RUN(ctx, (move_kernel<T, true>), pm_blocks(count, 1024), 256, 0, grid, g->C, count,
           static_cast<T *>(d->dx), const_cast<float *>(d->dy));
    return PM_OK;
}

PM_INSTANTIATE_BOTH(unpatchify)
