// patch_embed.cu: contract in csrc/ops/patch_embed.h. All of it in float, whatever T is: a patch has few
// numbers (16 in the published models), so that writing y, the stream, is what takes the time.
//
// forward  a block makes TOKENS tokens of 128 columns: it gathers the patches into shared memory, STEP
//          numbers at a time, and every thread keeps its column of the tokens in registers. x is
//          read once per 128 columns, y written once.
// backward the patches as rows (B*T, P) in scratch, then dweight and dbias in one dense product; dx by
//          a dense product and a permutation; dpos by a sum over the images, in their order.
#include "dense.cuh"
#include "patches.cuh"

namespace {

constexpr int TOKENS = 16, STEP = 16, COLUMNS = 128;

// Number p of patch n (of all images): the channel is the slowest index.
PM_DEVICE int64_t place_of(const pm_patches &grid, int64_t C, int64_t n, int64_t p)
{
    return n / grid.tokens * C * grid.voxels +
           pm_patch_place(grid, n % grid.tokens, p / grid.inside, p % grid.inside);
}

// grid: (blocks of columns) * (blocks of tokens)
__global__ void __launch_bounds__(COLUMNS)
    forward_kernel(pm_patches grid, int64_t C, int64_t N, int64_t P, int64_t D,
                   const float *__restrict__ x, const float *__restrict__ weight,
                   const float *__restrict__ bias, const float *__restrict__ pos,
                   float *__restrict__ y)
{
    __shared__ float patches[TOKENS][STEP];
    const int64_t across = (D + COLUMNS - 1) / COLUMNS;
    const int64_t n0 = blockIdx.x / across * TOKENS;
    const int64_t column = blockIdx.x % across * COLUMNS + threadIdx.x;
    float sum[TOKENS] = {};
    for (int64_t p0 = 0; p0 < P; p0 += STEP) {
        __syncthreads();
        for (int i = threadIdx.x; i < TOKENS * STEP; i += COLUMNS) {
            const int64_t n = n0 + i / STEP, p = p0 + i % STEP;
            patches[i / STEP][i % STEP] = n < N && p < P ? x[place_of(grid, C, n, p)] : 0.0f;
        }
        __syncthreads();
        if (column < D)
#pragma unroll
            for (int i = 0; i < STEP; i++) {
                const float w = p0 + i < P ? weight[column * P + p0 + i] : 0.0f;
#pragma unroll
                for (int t = 0; t < TOKENS; t++)
                    sum[t] = fmaf(w, patches[t][i], sum[t]);
            }
    }
    if (column >= D)
        return;
#pragma unroll
    for (int t = 0; t < TOKENS; t++) {
        const int64_t n = n0 + t;
        if (n < N)
            y[n * D + column] = sum[t] + bias[column] +
                                (pos ? pos[n % grid.tokens * D + column] : 0.0f);
    }
}

// rows (N, P) = the patches; or, with BACK, x = the rows, put back: every voxel is in one patch.
template <bool BACK>
__global__ void move_kernel(pm_patches grid, int64_t C, int64_t N, int64_t P, float *x, float *rows)
{
    for (int64_t k = pm_thread(); k < N * P; k += pm_threads()) {
        float *const voxel = x + place_of(grid, C, k / P, k % P);
        if (BACK)
            *voxel = rows[k];
        else
            rows[k] = *voxel;
    }
}

// dpos[i] += the sum over the images of dy[b, i]
__global__ void dpos_kernel(int64_t B, int64_t count, const float *__restrict__ dy,
                            float *__restrict__ dpos)
{
    const int64_t i = pm_thread();
    if (i >= count)
        return;
    float sum = 0;
    for (int64_t b = 0; b < B; b++)
        sum += dy[b * count + i];
    dpos[i] += sum;
}

pm_status grid_of(pm_ctx *ctx, const pm_patch_embed_args *g, pm_patches *grid)
{
    return pm_patches_make(ctx, "patch_embed", {g->s0, g->s1, g->s2}, {g->p0, g->p1, g->p2}, g->C,
                           g->V, g->T, g->P, grid);
}

// dweight (D, P) += dy^T rows;  dbias += the sums of dy's columns
pm_dense dweight_product(const pm_patch_embed_args *g, const float *dy, const float *rows,
                         float *dweight, float *dbias)
{
    pm_dense p = {};
    p.rows = g->D, p.columns = g->P, p.depth = g->B * g->T;
    p.a = dy, p.at = true;
    p.b = rows;
    p.c = dweight, p.add = true;
    p.epilogue = dbias ? PM_EPILOGUE_SUM_A : PM_EPILOGUE_NONE;
    p.sums = dbias;
    return p;
}

// rows (N, P) = dy weight
pm_dense dx_product(const pm_patch_embed_args *g, const float *dy, float *rows)
{
    pm_dense p = {};
    p.rows = g->B * g->T, p.columns = g->P, p.depth = g->D;
    p.a = dy;
    p.b = g->weight.w;
    p.c = rows;
    return p;
}

} // namespace

template <class T>
size_t patch_embed_workspace(const pm_ctx *, const pm_patch_embed_args *g, bool backward)
{
    float any; // dbias may be wanted
    return backward ? pm_room(g->B * g->T * g->P, sizeof(float)) +
                          pm_dense_room<float, float>(
                              dweight_product(g, nullptr, nullptr, nullptr, &any))
                    : 0;
}

template <class T> pm_status patch_embed_forward(pm_ctx *ctx, const pm_patch_embed_args *g, void *)
{
    pm_patches grid;
    PM_TRY(grid_of(ctx, g, &grid));
    const int64_t N = g->B * g->T;
    PM_RUN(ctx, forward_kernel, pm_blocks(N, TOKENS) * pm_blocks(g->D, COLUMNS), COLUMNS, 0, grid,
           g->C, N, g->P, g->D, g->x, g->weight.w, g->bias, g->pos, g->y);
    return PM_OK;
}

template <class T>
pm_status patch_embed_backward(pm_ctx *ctx, const pm_patch_embed_args *g,
                               const pm_patch_embed_grads *d, void *scratch)
{
    pm_patches grid;
    PM_TRY(grid_of(ctx, g, &grid));
    const int64_t N = g->B * g->T, numbers = N * g->P, places = g->T * g->D;
    float *const rows = pm_take<float>(&scratch, numbers);
    if (d->dx) {
        PM_TRY(pm_dense_run<float, float>(ctx, dx_product(g, d->dy, rows), &scratch));
        PM_RUN(ctx, move_kernel<true>, pm_blocks(numbers, 1024), 256, 0, grid, g->C, N, g->P, d->dx,
               rows);
    }
    if (d->dpos)
        PM_RUN(ctx, dpos_kernel, pm_blocks(places, 256), 256, 0, g->B, places, d->dy, d->dpos);
    if (!d->dweight)
        return d->dbias ? pm_column_sums<float>(ctx, N, g->D, d->dy, d->dbias, &scratch) : PM_OK;
    PM_RUN(ctx, move_kernel<false>, pm_blocks(numbers, 1024), 256, 0, grid, g->C, N, g->P,
           const_cast<float *>(g->x), rows);
    return pm_dense_run<float, float>(ctx, dweight_product(g, d->dy, rows, d->dweight, d->dbias),
                                      &scratch);
}

PM_INSTANTIATE_BOTH(patch_embed)
