// Block barriers: missing ones, divergent ones, threads that leave, deadlocks; shared memory.
#include "cases.h"

// y[t] = sum over rounds of the two neighbours of x[t], which everybody passes on through shared memory.
__global__ void neighbours(const float *x, float *y, int rounds, int sabotage)
{
    __shared__ float s[64];
    const int t = threadIdx.x, n = blockDim.x;
    float sum = 0, mine = x[t];
    for (int i = 0; i < rounds; i++) {
        s[t] = mine;
        if (sabotage != 1)
            __syncthreads();
        sum += s[(t + 1) % n] + s[(t + n - 1) % n];
        mine += 1;
        if (sabotage != 2)
            __syncthreads();
    }
    y[t] = sum;
}

CASE(barrier_missing)
{
    const std::vector<float> x = numbers(64);
    Array<float> in(x), out(64);
    LAUNCH(neighbours, 1, 64, 0, nullptr, in, out, 3, sabotage);
    std::vector<float> want(64);
    for (int t = 0; t < 64; t++)
        want[t] = 3 * (x[(t + 1) % 64] + x[(t + 63) % 64]) + 6;
    return compare(out.get(), want, 1e-5);
}

// The threads of the second half are at another barrier, or at none.
__global__ void divergent(float *y, int sabotage)
{
    __shared__ float s[64];
    const int t = threadIdx.x;
    s[t] = (float)t;
    if (sabotage == 1) {
        if (t < 32)
            __syncthreads();
        else
            __syncthreads();
    } else if (sabotage == 2) {
        if (t % 2)
            __syncwarp();
        else
            __syncthreads();
    } else {
        __syncthreads();
    }
    y[blockIdx.x * 64 + t] = s[63 - t];
}

CASE(barrier_divergent)
{
    Array<float> out(6 * 64);
    LAUNCH(divergent, 6, 64, 0, nullptr, out, sabotage);
    std::vector<float> want(64);
    for (int t = 0; t < 64; t++)
        want[t] = (float)(63 - t);
    return compare(out.get(), want);
}

// Threads that return are not waited for.
__global__ void leaves_early(float *y)
{
    __shared__ float s[64];
    const int t = threadIdx.x;
    if (t >= 50)
        return;
    s[t] = (float)t;
    __syncthreads();
    y[t] = s[49 - t];
    const int count = __syncthreads_count(t % 5 == 0);
    if (t == 7)
        y[50] = (float)count;
}

CASE(barrier_after_return)
{
    Array<float> out(51);
    LAUNCH(leaves_early, 1, 64, 0, nullptr, out);
    std::vector<float> want(51);
    for (int t = 0; t < 50; t++)
        want[t] = (float)(49 - t);
    want[50] = 10;
    return compare(out.get(), want);
}

__global__ void predicates(int *y, int round)
{
    const int t = threadIdx.x;
    y[t * 3] = __syncthreads_count(t < round);
    y[t * 3 + 1] = __syncthreads_or(t == round);
    y[t * 3 + 2] = __syncthreads_and(t < round);
}

CASE(barrier_predicates)
{
    for (int round : {0, 17, 96, 100}) {
        Array<int> out(96 * 3);
        LAUNCH(predicates, 1, 96, 0, nullptr, out, round);
        std::vector<int> want;
        for (int t = 0; t < 96; t++)
            for (int v : {round < 96 ? round : 96, round < 96 ? 1 : 0, round >= 96 ? 1 : 0})
                want.push_back(v);
        if (compare(out.get(), want))
            return 1;
    }
    return 0;
}

// Sums 64 numbers of shared memory, of which the last, or one behind the last, was never written.
__global__ void total(const float *x, float *y, int sabotage)
{
    __shared__ float s[64];
    const int t = threadIdx.x;
    if (sabotage != 1 || t != 63)
        s[t] = x[t];
    __syncthreads();
    if (t == 0) {
        float sum = 0;
        for (int i = 0; i < 64; i++)
            sum += s[sabotage == 2 ? i + 1 : i];
        y[blockIdx.x] = sum;
    }
}

CASE(shared_unwritten)
{
    Array<float> in(std::vector<float>(64, 0.5f)), out(3);
    LAUNCH(total, 3, 64, 0, nullptr, in, out, sabotage);
    return compare(out.get(), std::vector<float>(3, 32.0f));
}

// The same in dynamic shared memory, behind whose end somebody writes or reads.
__global__ void dynamic_total(const float *x, float *y, int sabotage)
{
    extern __shared__ __align__(16) unsigned char pm_shared[];
    float *s = reinterpret_cast<float *>(pm_shared);
    const int t = threadIdx.x;
    s[sabotage == 1 ? t + 1 : t] = x[t];
    __syncthreads();
    if (t == 0) {
        float sum = 0;
        for (int i = 0; i < 64; i++)
            sum += s[sabotage == 1 || (sabotage == 2 && i == 0) ? i + 1 : i];
        y[0] = sabotage == 2 ? sum + s[64] : sum;
    }
}

CASE(dynamic_shared_overrun)
{
    Array<float> in(std::vector<float>(64, 0.5f)), out(1);
    LAUNCH(dynamic_total, 1, 64, 64 * sizeof(float), nullptr, in, out, sabotage);
    return compare(out.get(), std::vector<float>(1, 32.0f));
}

// In which order the threads ran between barriers, and the blocks.
__global__ void order(int *count, int *ran)
{
    __shared__ int turn;
    if (threadIdx.x == 0)
        turn = 0;
    __syncthreads();
    const int at = atomicAdd(&turn, 1);
    ran[blockIdx.x * 64 + at] = (int)threadIdx.x;
    __syncthreads();
    if (threadIdx.x == 0)
        ran[gridDim.x * 64 + atomicAdd(count, 1)] = (int)blockIdx.x;
}

CASE(orders)
{
    std::vector<int> ran[4];
    const char *names[4] = {"forward", "reverse", "shuffled", "shuffled"};
    for (int i = 0; i < 4; i++) {
        CHECK(pm_host_set("order", names[i]) && pm_host_set("seed", "7"));
        Array<int> count(std::vector<int>(1, 0)), out(4 * 64 + 4);
        LAUNCH(order, 4, 64, 0, nullptr, count, out);
        ran[i] = out.get();
        std::vector<int> seen(64, 0);
        for (int t = 0; t < 4 * 64; t++)
            seen[ran[i][t]]++;
        if (compare(seen, std::vector<int>(64, 4)))
            return 1;
    }
    for (int t = 0; t < 64; t++)
        CHECK(ran[0][t] == t && ran[1][t] == 63 - t);
    for (int b = 0; b < 4; b++)
        CHECK(ran[0][4 * 64 + b] == b && ran[1][4 * 64 + b] == 3 - b);
    CHECK(ran[2] != ran[0] && ran[2] != ran[1] && ran[2] == ran[3]);
    CHECK(!std::equal(ran[2].begin(), ran[2].begin() + 64, ran[2].begin() + 64));
    return 0;
}

// ------------------------------------------------------------------ global memory
// Two threads, or two blocks, and one word.
__global__ void one_word(int *y, int sabotage)
{
    const int t = threadIdx.x;
    if (sabotage == 1)
        y[t / 2] = 5;
    else if (sabotage == 2)
        y[t] = (int)blockIdx.x;
    else if (sabotage == 3)
        y[blockIdx.x * 64 + t] = (int)atomicAdd(&y[128], 1) + y[128];
    else
        y[blockIdx.x * 64 + t] = 5;
}

CASE(race_in_global_memory)
{
    Array<int> out(std::vector<int>(129, 0));
    LAUNCH(one_word, 2, 64, 0, nullptr, out, sabotage);
    std::vector<int> want(128, 5);
    return compare(out.get(), want);
}

__global__ void overrun(const float *x, float *y, int n, int sabotage)
{
    const int i = blockIdx.x * blockDim.x + threadIdx.x;
    if (sabotage == 1 ? i <= n : i < n)
        y[i] = x[sabotage == 2 ? i + 1 : i];
}

CASE(global_overrun)
{
    const std::vector<float> x = numbers(100);
    Array<float> in(x), out(100);
    LAUNCH(overrun, 4, 32, 0, nullptr, in, out, 100, sabotage);
    return sabotage ? 0 : compare(out.get(), x);
}

// ------------------------------------------------------------------ other ends
__device__ __noinline__ int much_stack(int i)
{
    volatile char big[1 << 20];
    big[i] = 0;
    return big[i];
}

__global__ void faulty(int *y, int sabotage, volatile int *never, int zero)
{
    const int t = threadIdx.x;
    y += blockIdx.y * 64;
    if (sabotage == 1 && t == 40)
        while (never[0] == 0) {
        }
    if (sabotage == 2 && t == 41)
        y = nullptr;
    if (sabotage == 3 && t == 42)
        y[t] = 7 / zero;
    if (sabotage == 4 && t == 43)
        zero += much_stack(zero);
    if (sabotage == 5 && t == 44)
        __trap();
    if (sabotage == 6 && t == 45)
        zero = 1 << (zero + 40);
    y[t] = zero;
}

CASE(faults)
{
    CHECK(pm_host_set("timeout", "0.5"));
    Array<int> out(128), never(std::vector<int>(1, 0));
    LAUNCH(faulty, dim3(1, 2), 64, 0, nullptr, out, sabotage, never, 0);
    return compare(out.get(), std::vector<int>(128, 0));
}

// A fault stays until the device is reset; the next kernel then runs on fresh stacks.
CASE(after_a_fault)
{
    for (int i = 0; i < 20; i++) {
        Array<float> out(4 * 64);
        PM_LAUNCH(divergent, 4, 64, 0, nullptr, out, 1);
        CHECK(cudaGetLastError() == cudaSuccess);
        CHECK(cudaDeviceSynchronize() == cudaErrorLaunchFailure);
        CHECK(cudaGetLastError() == cudaErrorLaunchFailure);
        CHECK(cudaGetLastError() == cudaErrorLaunchFailure);
        CHECK(cudaMemset(out, 0, 4) == cudaErrorLaunchFailure);
        CHECK(strstr(cudaGetErrorString(cudaErrorLaunchFailure), "divergent barrier"));
        pm_host_reset();
        LAUNCH(divergent, 1, 64, 0, nullptr, out, 0);
        CHECK(out.get()[0] == 63);
    }
    return 0;
}
