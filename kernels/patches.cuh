// patches.cuh: the grid of patches of patch_embed and unpatchify.
#pragma once
#include "common.cuh"

struct pm_patches {
    int64_t size[3], patch[3], count[3]; // voxels, voxels per patch, patches along each axis
    int64_t tokens, voxels, inside;      // products of the three: count, size, patch
};

static inline pm_status pm_patches_make(pm_ctx *ctx, const char *op, const int64_t (&size)[3],
                                        const int64_t (&patch)[3], int64_t C, int64_t V, int64_t T,
                                        int64_t P, pm_patches *grid)
{
    grid->tokens = grid->voxels = grid->inside = 1;
    for (int i = 0; i < 3; i++) {
        if (size[i] < 1 || size[i] > V || patch[i] < 1 || size[i] % patch[i])
            return pm_fail(ctx, PM_EINVAL,
                           "%s: s%d=%lld must be a positive multiple of p%d=%lld, at most V=%lld",
                           op, i, (long long)size[i], i, (long long)patch[i], (long long)V);
        if (grid->voxels > V / size[i])
            return pm_fail(ctx, PM_EINVAL, "%s: s0*s1*s2 must be V=%lld", op, (long long)V);
        grid->size[i] = size[i];
        grid->patch[i] = patch[i];
        grid->count[i] = size[i] / patch[i];
        grid->voxels *= size[i];
        grid->tokens *= grid->count[i];
        grid->inside *= patch[i];
    }
    if (grid->voxels != V || grid->tokens != T || C * grid->inside != P)
        return pm_fail(ctx, PM_EINVAL,
                       "%s: s0*s1*s2=%lld must be V=%lld, the patches %lld must be T=%lld, and "
                       "C*p0*p1*p2=%lld must be P=%lld",
                       op, (long long)grid->voxels, (long long)V, (long long)grid->tokens,
                       (long long)T, (long long)(C * grid->inside), (long long)P);
    return PM_OK;
}

// The voxel q of patch i of an image, and the place of its channel c in the image (C, V).
PM_DEVICE int64_t pm_patch_place(const pm_patches &g, int64_t i, int64_t c, int64_t q)
{
    const int64_t i2 = i % g.count[2], i1 = i / g.count[2] % g.count[1],
                  i0 = i / g.count[2] / g.count[1];
    const int64_t q2 = q % g.patch[2], q1 = q / g.patch[2] % g.patch[1],
                  q0 = q / g.patch[2] / g.patch[1];
    const int64_t x0 = i0 * g.patch[0] + q0, x1 = i1 * g.patch[1] + q1, x2 = i2 * g.patch[2] + q2;
    return c * g.voxels + (x0 * g.size[1] + x1) * g.size[2] + x2;
}
