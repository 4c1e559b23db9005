// gaussian_noise.cu: contract in csrc/ops/gaussian_noise.h. A thread per Philox block: four draws.
#include "noise.cuh"

namespace {

__global__ void forward_kernel(int64_t B, int64_t M, const int64_t *__restrict__ key,
                               float *__restrict__ out)
{
    const int64_t blocks = (M + 3) / 4, k = pm_thread(), b = k / blocks, block = k % blocks;
    if (b >= B)
        return;
    float x[4];
    pm_normal_draws(key[0], PM_STREAM_SAMPLER, pm_position(key, b), (uint32_t)block, x);
#pragma unroll
    for (int i = 0; i < 4; i++)
        if (4 * block + i < M)
            out[b * M + 4 * block + i] = x[i];
}

} // namespace

template <class T>
size_t gaussian_noise_workspace(const pm_ctx *, const pm_gaussian_noise_args *, bool)
{
    return 0;
}

template <class T>
pm_status gaussian_noise_forward(pm_ctx *ctx, const pm_gaussian_noise_args *g, void *)
{
    PM_RUN(ctx, forward_kernel, pm_blocks(g->B * ((g->M + 3) / 4), 256), 256, 0, g->B, g->M, g->key,
           g->x);
    return PM_OK;
}

PM_INSTANTIATE_FORWARD(gaussian_noise)
