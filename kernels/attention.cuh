// attention.cuh: what the two families of attention kernels share.
#pragma once
#include "common.cuh"

extern __shared__ __align__(16) unsigned char pm_shared[];

namespace {

struct attention_shape {
    int T, H, K;
    float scale;  // 1 / sqrt(K)
    bool aligned; // rows of a head may be read and written 16 bytes at a time
};

// q, k, v, y or a gradient: row t of head h of image b begins at p[(b T + t) ld + h K].
template <class T> struct attention_rows {
    T *p;
    int64_t ld;
};
template <class T>
PM_DEVICE T *head_of(const attention_rows<T> &rows, const attention_shape &g, int head)
{
    return rows.p + (int64_t)(head / g.H) * g.T * rows.ld + head % g.H * g.K;
}

template <class T> struct attention_inputs {
    attention_rows<const T> q, k, v, dy; // dy: backward
    const float *lse, *delta;            // (B, H, T); backward
    float *inverse; // (B, H, T), written and read by attention_fma.cuh's backward
};
template <class T> struct attention_gradients {
    attention_rows<T> dq, dk, dv;
};

} // namespace
