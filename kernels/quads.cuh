// quads.cuh: four numbers side by side of a row, as a thread reads and writes them: 16 bytes of float, 8 of
// bf16, so that 128 columns are a warp's and every width of the published models is a multiple.
//
// What is read stays as it lies in memory until it is used: bf16 in pairs (apart they would have a register
// each), and nothing that a load's own branch does with its result, since the next load would wait for that.
#pragma once
#include "common.cuh"

constexpr int PM_QUAD = 4;

template <class T> struct pm_quad; // [j]: number j, as a float
template <> struct alignas(16) pm_quad<float> {
    float v[PM_QUAD];
    __device__ float operator[](int j) const { return v[j]; }
    __device__ void set(int j, float x) { v[j] = x; }
};
template <> struct alignas(8) pm_quad<bf16> {
    uint32_t pair[PM_QUAD / 2];
    __device__ float operator[](int j) const
    {
        return __uint_as_float(j % 2 ? pair[j / 2] & 0xffff0000u : pair[j / 2] << 16);
    }
    __device__ void set(int j, bf16 x) // once, of zero
    {
        uint16_t bits;
        memcpy(&bits, &x, sizeof bits);
        pair[j / 2] |= (uint32_t)bits << 16 * (j % 2);
    }
};

// At an address aligned to the whole.
template <class T> PM_DEVICE pm_quad<T> pm_load_quad(const T *from)
{
    return *reinterpret_cast<const pm_quad<T> *>(from);
}
// By the instruction: of a struct nvcc stores one number at a time where it fails to see that they are
// neighbours, and four instructions of 4 bytes take four times as long to issue.
PM_DEVICE void pm_store_quad(float *to, const float (&from)[PM_QUAD])
{
    __stwb(reinterpret_cast<float4 *>(to), make_float4(from[0], from[1], from[2], from[3]));
}
PM_DEVICE void pm_store_quad(bf16 *to, const float (&from)[PM_QUAD])
{
    const __nv_bfloat162 pairs[PM_QUAD / 2] = {__floats2bfloat162_rn(from[0], from[1]),
                                               __floats2bfloat162_rn(from[2], from[3])};
    uint2 bits;
    memcpy(&bits, pairs, sizeof bits);
    __stwb(reinterpret_cast<uint2 *>(to), bits);
}
