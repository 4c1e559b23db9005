// rows.cuh: short rows (a token's scores, one per expert) by parts of a warp. A row has the smallest power
// of two of lanes that covers it, at most 32, so that 12 scores take half a warp and neighbours in
// memory are read by neighbours. Lane `lane` of a row has its elements lane, lane + lanes, ...
#pragma once
#include "common.cuh"

constexpr int PM_ROW_THREADS = 256; // of a block

static inline int pm_row_lanes(int64_t width)
{
    int lanes = 1;
    while (lanes < 32 && lanes < width)
        lanes *= 2;
    return lanes;
}
static inline unsigned pm_row_blocks(int64_t rows, int lanes)
{
    return pm_blocks(rows, PM_ROW_THREADS / lanes);
}

// This thread's row and lane. Threads of rows beyond the last stay for the sums.
struct pm_row {
    int64_t row;
    int lane;
};
PM_DEVICE pm_row pm_row_of(int lanes)
{
    const int64_t thread = pm_thread();
    return {thread / lanes, (int)(thread % lanes)};
}

// Over the lanes of a row; every lane gets the result. A fixed tree.
PM_DEVICE float pm_row_sum(float x, int lanes)
{
    for (int other = lanes / 2; other > 0; other /= 2)
        x += __shfl_xor_sync(PM_ALL, x, other);
    return x;
}
template <class V> PM_DEVICE V pm_row_max(V x, int lanes)
{
    for (int other = lanes / 2; other > 0; other /= 2)
        x = max(x, __shfl_xor_sync(PM_ALL, x, other));
    return x;
}
