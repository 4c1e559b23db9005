// Warp collectives: what they give, masks, lanes that left, missing __syncwarp.
#include "cases.h"

constexpr unsigned ALL = 0xffffffffu;

// The sum over a warp; a lane leaves before, or the mask is of others.
__global__ void warp_sum(const float *x, float *y, int sabotage)
{
    const int lane = threadIdx.x % 32;
    if (sabotage == 1 && lane == 5)
        return;
    if (sabotage == 2 && lane >= 16) {
        y[threadIdx.x] = __shfl_xor_sync(ALL, x[threadIdx.x], 16);
        return;
    }
    const unsigned mask = sabotage == 3 ? ALL & ~32u : ALL;
    float sum = x[threadIdx.x];
    for (int lanes = 16; lanes; lanes /= 2)
        sum += __shfl_xor_sync(mask, sum, lanes);
    y[threadIdx.x] = sum;
}

CASE(shuffle_masks)
{
    const std::vector<float> x = numbers(64);
    Array<float> in(x), out(64);
    LAUNCH(warp_sum, 1, 64, 0, nullptr, in, out, sabotage);
    std::vector<float> want(64, 0);
    for (int t = 0; t < 64; t++)
        for (int i = 0; i < 32; i++)
            want[t] += x[t / 32 * 32 + i];
    return compare(out.get(), want, 1e-5);
}

// Half warps apart, each with its own mask, at its own pace; and a warp of 20.
__global__ void half_warps(int *y)
{
    const int lane = threadIdx.x % 32;
    const unsigned mask = lane < 16 ? 0xffffu : 0xffff0000u;
    int v = lane;
    for (int i = 0; i < (lane < 16 ? 3 : 7); i++)
        v = __shfl_sync(mask, v, (lane + 1) % 16, 16);
    y[lane] = v;
    if (lane < 20)
        y[32 + lane] = (int)__reduce_add_sync(0xfffffu, lane) + __popc(__ballot_sync(0xfffffu, lane % 2));
}

CASE(shuffle_in_groups)
{
    Array<int> out(52);
    LAUNCH(half_warps, 1, 32, 0, nullptr, out);
    std::vector<int> want(52, 190 + 10);
    for (int l = 0; l < 32; l++)
        want[l] = l / 16 * 16 + (l % 16 + (l < 16 ? 3 : 7)) % 16;
    return compare(out.get(), want);
}

__global__ void all_shuffles(int *y, int width, int by)
{
    const int lane = threadIdx.x;
    y[lane] = __shfl_sync(ALL, 100 + lane, by, width);
    y[32 + lane] = __shfl_up_sync(ALL, 100 + lane, (unsigned)by, width);
    y[64 + lane] = (int)__shfl_down_sync(ALL, 100.0 + lane, (unsigned)by, width);
    y[96 + lane] = (int)__shfl_xor_sync(ALL, 100LL + lane, by, width);
}

CASE(shuffles)
{
    for (int width : {1, 2, 4, 8, 16, 32})
        for (int by = 0; by < width; by++) {
            Array<int> out(128);
            LAUNCH(all_shuffles, 1, 32, 0, nullptr, out, width, by);
            std::vector<int> want(128);
            for (int l = 0; l < 32; l++) {
                const int begin = l / width * width, at = l % width;
                want[l] = 100 + begin + by;
                want[32 + l] = 100 + (at >= by ? l - by : l);
                want[64 + l] = 100 + (at + by < width ? l + by : l);
                want[96 + l] = 100 + (l ^ by);
            }
            if (compare(out.get(), want))
                return 1;
        }
    return 0;
}

__global__ void all_votes(unsigned *y, unsigned mask, int split)
{
    const unsigned lane = threadIdx.x;
    if (!(mask >> lane & 1))
        return;
    unsigned *r = y + lane * 12;
    r[0] = __ballot_sync(mask, (int)lane < split);
    r[1] = (unsigned)__any_sync(mask, (int)lane == split);
    r[2] = (unsigned)__all_sync(mask, (int)lane < split);
    r[3] = __reduce_add_sync(mask, lane * 3);
    r[4] = (unsigned)__reduce_min_sync(mask, split - (int)lane);
    r[5] = __reduce_min_sync(mask, lane * 0x9e3779b9u);
    r[6] = (unsigned)__reduce_max_sync(mask, split - (int)lane);
    r[7] = __reduce_max_sync(mask, lane * 0x9e3779b9u);
    r[8] = __reduce_and_sync(mask, ~lane);
    r[9] = __reduce_or_sync(mask, lane);
    r[10] = __reduce_xor_sync(mask, lane * 7);
    r[11] = __match_any_sync(mask, lane / 3);
}

CASE(votes)
{
    for (unsigned mask : {ALL, 0x1u, 0x80000000u, 0x00ff1234u})
        for (int split : {0, 1, 17, 31, 40}) {
            Array<unsigned> out(std::vector<unsigned>(32 * 12, 0));
            LAUNCH(all_votes, 1, 32, 0, nullptr, out, mask, split);
            std::vector<unsigned> want(32 * 12, 0);
            unsigned r[12] = {0, 0, 1, 0, 0x7fffffff, ~0u, 0x80000000u, 0, ~0u, 0, 0, 0};
            for (unsigned l = 0; l < 32; l++) {
                if (!(mask >> l & 1))
                    continue;
                const unsigned mixed = l * 0x9e3779b9u;
                r[0] |= (unsigned)((int)l < split) << l;
                r[1] |= (int)l == split;
                r[2] &= (int)l < split;
                r[3] += l * 3;
                r[4] = (unsigned)min((int)r[4], split - (int)l);
                r[5] = min(r[5], mixed);
                r[6] = (unsigned)max((int)r[6], split - (int)l);
                r[7] = max(r[7], mixed);
                r[8] &= ~l, r[9] |= l, r[10] ^= l * 7;
            }
            for (unsigned l = 0; l < 32; l++) {
                if (!(mask >> l & 1))
                    continue;
                r[11] = 0;
                for (unsigned m = 0; m < 32; m++)
                    r[11] |= (unsigned)((mask >> m & 1) && m / 3 == l / 3) << m;
                memcpy(&want[l * 12], r, sizeof r);
            }
            if (compare(out.get(), want))
                return 1;
        }
    return 0;
}

// Neighbours of a warp exchange through shared memory.
__global__ void warp_exchange(const float *x, float *y, int sabotage)
{
    __shared__ float s[2][32];
    const int lane = threadIdx.x % 32, warp = threadIdx.x / 32;
    s[warp][lane] = x[threadIdx.x];
    if (sabotage != 1)
        __syncwarp();
    float sum = s[warp][(lane + 1) % 32] + s[warp][(lane + 31) % 32];
    if (sabotage == 2)
        __syncwarp(lane < 16 ? 0xffffu : 0xffff0000u);
    else
        __syncwarp();
    s[warp][(lane + 16) % 32] = sum;
    __syncwarp();
    y[threadIdx.x] = s[warp][lane];
}

CASE(syncwarp_missing)
{
    const std::vector<float> x = numbers(64);
    Array<float> in(x), out(64);
    LAUNCH(warp_exchange, 1, 64, 0, nullptr, in, out, sabotage);
    std::vector<float> want(64);
    for (int t = 0; t < 64; t++) {
        const int w = t / 32 * 32, l = (t % 32 + 16) % 32;
        want[t] = x[w + (l + 1) % 32] + x[w + (l + 31) % 32];
    }
    return compare(out.get(), want, 1e-6);
}

// A shuffle orders its lanes, and lanes of other warps not at all.
__global__ void ordered_by_shuffle(const int *x, int *y, int sabotage)
{
    __shared__ int s[64];
    const int t = threadIdx.x;
    s[t] = x[t];
    const int other = __shfl_xor_sync(ALL, t, 1);
    y[t] = s[sabotage == 1 ? 63 - t : other];
}

CASE(shuffle_is_no_block_barrier)
{
    std::vector<int> x(64), want(64);
    for (int t = 0; t < 64; t++)
        x[t] = t * t, want[t] = sabotage == 1 ? (63 - t) * (63 - t) : (t ^ 1) * (t ^ 1);
    Array<int> in(x), out(64);
    LAUNCH(ordered_by_shuffle, 1, 64, 0, nullptr, in, out, sabotage);
    return compare(out.get(), want);
}

// ------------------------------------------------------------------ atomics
__global__ void atomics(int *y, unsigned *u, unsigned long long *big)
{
    const int t = (int)threadIdx.x;
    atomicAdd(&y[0], t), atomicSub(&y[1], t), atomicMax(&y[2], t - 40), atomicMin(&y[3], 40 - t);
    atomicAnd(&u[0], ~(1u << t % 32)), atomicOr(&u[1], 1u << t % 31), atomicXor(&u[2], 3u << t % 5);
    atomicInc(&u[3], 10), atomicDec(&u[4], 10), atomicAdd(&big[0], 1ull << 33);
    if (atomicCAS(&y[4], 0, t + 1) == 0)
        atomicExch(&y[5], 77);
}

CASE(integer_atomics)
{
    Array<int> y(std::vector<int>(6, 0));
    Array<unsigned> u(std::vector<unsigned>{~0u, 0, 0, 0, 0});
    Array<unsigned long long> big(std::vector<unsigned long long>(1, 0));
    LAUNCH(atomics, 1, 96, 0, nullptr, y, u, big);
    unsigned x = 0, up = 0, down = 0;
    for (int t = 0; t < 96; t++) {
        x ^= 3u << t % 5;
        up = up >= 10 ? 0 : up + 1;
        down = down == 0 || down > 10 ? 10 : down - 1;
    }
    const std::vector<int> got = y.get();
    CHECK(got[0] == 95 * 48 && got[1] == -95 * 48 && got[2] == 55 && got[3] == -55 && got[5] == 77);
    CHECK(got[4] >= 1 && got[4] <= 96);
    CHECK(big.get()[0] == 96ull << 33);
    return compare(u.get(), std::vector<unsigned>{0, 0x7fffffffu, x, up, down});
}
