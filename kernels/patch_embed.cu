// patch_embed.cu: contract in csrc/ops/patch_embed.h. All of it in float, whatever T is: a patch has few
// numbers (16 in the published models), so that writing y, the stream, is what takes the time.
//
// forward  a block makes TOKENS tokens of 384 columns, GROUP tokens at a time: a thread keeps four columns of
//          each in registers, so that a number of a patch (the same for all lanes) serves four FMAs and
//          four weights serve eight. The patches and the weights, turned so that a warp reads neighbours,
//          lie in shared memory, STEP numbers of each: once for a block where a patch has no more.
//          Bytes: y written once, 4 D a token; pos and the weights come from the L2 cache (at 1152
//          columns 4 D and 2 D a token), x is read once per 384 columns.
// backward the patches as rows (B*T, P) in scratch, then dweight and dbias in one dense product; dx by
//          a dense product and a permutation; dpos by a sum over the images, in their order.
#include "dense.cuh"
#include "patches.cuh"
#include "quads.cuh"

namespace {

constexpr int TOKENS = 32, GROUP = 8, STEP = 16;
// 384 columns are DiT-S, B and XL in one, two and three blocks. Five are on an SM: 15 warps of 128 registers.
constexpr int THREADS = 96, COLUMNS = PM_QUAD * THREADS, BLOCKS = 5;

// Number p of patch n (of all images): the channel is the slowest index. It is the place of number 0 of
// patch n, and that of number p of patch 0.
PM_DEVICE int64_t place_of(const pm_patches &grid, int64_t C, int64_t n, int64_t p)
{
    return n / grid.tokens * C * grid.voxels +
           pm_patch_place(grid, n % grid.tokens, p / grid.inside, p % grid.inside);
}

// grid: (blocks of columns) * (blocks of tokens). WIDE: y and pos may be accessed by fours.
template <bool WIDE>
__global__ void __launch_bounds__(THREADS, BLOCKS)
    forward_kernel(pm_patches grid, int64_t C, int64_t N, int64_t P, int64_t D,
                   const float *__restrict__ x, const float *__restrict__ weight,
                   const float *__restrict__ bias, const float *__restrict__ pos,
                   float *__restrict__ y)
{
    // Rows of 4 more: the threads that turn the weights write to different banks, but for two.
    __shared__ __align__(16) float weights[STEP][COLUMNS + 4];
    __shared__ __align__(16) float patches[TOKENS][STEP];
    __shared__ int64_t patch_at[TOKENS], number_at[STEP], pos_at[TOKENS];
    const unsigned across = (unsigned)((D + COLUMNS - 1) / COLUMNS);
    const int64_t n0 = (int64_t)(blockIdx.x / across) * TOKENS,
                  c0 = (int64_t)(blockIdx.x % across) * COLUMNS;
    const int64_t column = c0 + PM_QUAD * threadIdx.x;
    const int tokens = (int)min((int64_t)TOKENS, N - n0);
    if (threadIdx.x < TOKENS) {
        patch_at[threadIdx.x] = place_of(grid, C, n0 + threadIdx.x, 0);
        pos_at[threadIdx.x] = (n0 + threadIdx.x) % grid.tokens * D;
    }

    for (int t0 = 0; t0 < tokens; t0 += GROUP) {
        float sum[GROUP][PM_QUAD];
#pragma unroll
        for (int t = 0; t < GROUP; t++)
#pragma unroll
            for (int j = 0; j < PM_QUAD; j++)
                sum[t][j] = 0;
        for (int64_t p0 = 0; p0 < P; p0 += STEP) {
            if (t0 == 0 || P > STEP) {
                if (threadIdx.x < STEP)
                    number_at[threadIdx.x] =
                        p0 + threadIdx.x < P ? place_of(grid, C, 0, p0 + threadIdx.x) : 0;
                __syncthreads();
#pragma unroll 4
                for (int i = threadIdx.x; i < COLUMNS * STEP; i += THREADS) {
                    const int64_t c = c0 + i / STEP, p = p0 + i % STEP;
                    weights[i % STEP][i / STEP] = c < D && p < P ? weight[c * P + p] : 0.0f;
                }
                for (int i = threadIdx.x; i < TOKENS * STEP; i += THREADS) {
                    const int t = i / STEP, p = i % STEP;
                    patches[t][p] = t < tokens && p0 + p < P ? x[patch_at[t] + number_at[p]] : 0.0f;
                }
                __syncthreads();
            }
#pragma unroll 1 // or all of the patches would be in registers at once
            for (int p = 0; p < STEP; p += PM_QUAD) {
                pm_quad<float> w[PM_QUAD];
#pragma unroll
                for (int k = 0; k < PM_QUAD; k++)
                    w[k] = pm_load_quad(&weights[p + k][PM_QUAD * threadIdx.x]);
#pragma unroll
                for (int t = 0; t < GROUP; t++) {
                    const pm_quad<float> number = pm_load_quad(&patches[t0 + t][p]);
#pragma unroll
                    for (int k = 0; k < PM_QUAD; k++)
#pragma unroll
                        for (int j = 0; j < PM_QUAD; j++)
                            sum[t][j] = fmaf(w[k][j], number[k], sum[t][j]);
                }
            }
        }
#pragma unroll
        for (int t = 0; t < GROUP; t++) {
            if (t0 + t >= tokens)
                break;
            float *const to = y + (n0 + t0 + t) * D + column;
            const float *const from = pos ? pos + pos_at[t0 + t] + column : nullptr;
            if (WIDE && column < D) {
                const pm_quad<float> own = pm_load_quad(bias + column);
                const pm_quad<float> more = pos ? pm_load_quad(from) : pm_quad<float>{};
#pragma unroll
                for (int j = 0; j < PM_QUAD; j++)
                    sum[t][j] += own[j] + more[j];
                pm_store_quad(to, sum[t]);
            } else
                for (int j = 0; j < PM_QUAD; j++)
                    if (column + j < D)
                        to[j] = sum[t][j] + bias[column + j] + (pos ? from[j] : 0.0f);
        }
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
#pragma unroll 8 // loads under way
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
    const unsigned blocks = pm_blocks(N, TOKENS) * pm_blocks(g->D, COLUMNS);
    if (g->D % PM_QUAD == 0 && pm_aligned(g->y) && pm_aligned(g->bias) && pm_aligned(g->pos))
        PM_RUN(ctx, forward_kernel<true>, blocks, THREADS, 0, grid, g->C, N, g->P, g->D, g->x,
               g->weight.w, g->bias, g->pos, g->y);
    else
        PM_RUN(ctx, forward_kernel<false>, blocks, THREADS, 0, grid, g->C, N, g->P, g->D, g->x,
               g->weight.w, g->bias, g->pos, g->y);
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
