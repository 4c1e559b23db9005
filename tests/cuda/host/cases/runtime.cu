// The runtime's stand-in: launches, memory, streams, events, graphs.
#include "cases.h"

__global__ void small(int *y)
{
    if (threadIdx.x + threadIdx.y + threadIdx.z + blockIdx.y == 0)
        y[0] = 3;
}
__global__ void uses_dynamic(int *y)
{
    extern __shared__ __align__(16) unsigned char pm_shared[];
    pm_shared[threadIdx.x] = 3;
    y[threadIdx.x] = pm_shared[threadIdx.x];
}
__global__ void big_static(int *y)
{
    __shared__ int s[40 * 256]; // 40 KiB
    s[threadIdx.x] = 3;
    __syncthreads();
    y[threadIdx.x] = s[threadIdx.x ^ 1];
}
__global__ void add(int *y, const int *x, int by) { y[threadIdx.x] = x[threadIdx.x] + by; }

CASE(launch_limits)
{
    Array<int> y(1024);
    switch (sabotage) {
    case 0:
        LAUNCH(small, dim3(1, 65535), dim3(1, 1, 64), 0, nullptr, y);
        LAUNCH(uses_dynamic, 1, 1024, 48 * 1024, nullptr, y);
        TRY(cudaFuncSetAttribute(uses_dynamic, cudaFuncAttributeMaxDynamicSharedMemorySize, 227 * 1024));
        LAUNCH(uses_dynamic, 1, 1024, 227 * 1024, nullptr, y);
        return compare(y.get(), std::vector<int>(1024, 3));
    case 1:
        LAUNCH(small, 1, 1025, 0, nullptr, y);
        break;
    case 2:
        LAUNCH(small, 1, dim3(1, 1, 65), 0, nullptr, y);
        break;
    case 3:
        LAUNCH(small, dim3(1, 65536), 32, 0, nullptr, y);
        break;
    case 4:
        LAUNCH(small, 0, 32, 0, nullptr, y);
        break;
    case 5:
        LAUNCH(uses_dynamic, 1, 32, 48 * 1024 + 1, nullptr, y);
        break;
    case 6:
        CHECK(pm_host_set("arch", "80"));
        TRY(cudaFuncSetAttribute(uses_dynamic, cudaFuncAttributeMaxDynamicSharedMemorySize, 164 * 1024));
        break;
    case 7:
        TRY(cudaFuncSetAttribute(big_static, cudaFuncAttributeMaxDynamicSharedMemorySize, 187 * 1024));
        LAUNCH(big_static, 1, 32, 187 * 1024, nullptr, y);
        TRY(cudaFuncSetAttribute(big_static, cudaFuncAttributeMaxDynamicSharedMemorySize, 188 * 1024));
        break;
    case 8:
        PM_LAUNCH(small, 1, 1, 0, (cudaStream_t)&y, y);
        TRY(cudaGetLastError());
        break;
    }
    return 0;
}

// An error of a launch is kept until it is asked for, and then forgotten.
CASE(launch_errors)
{
    Array<int> y(1);
    PM_LAUNCH(small, 1, 2000, 0, nullptr, y);
    CHECK(cudaPeekAtLastError() == cudaErrorInvalidConfiguration);
    CHECK(cudaGetLastError() == cudaErrorInvalidConfiguration);
    CHECK(cudaGetLastError() == cudaSuccess);
    return 0;
}

CASE(memory)
{
    Array<int> y(8);
    std::vector<int> host(9, 4);
    switch (sabotage) {
    case 0: {
        TRY(cudaMemcpy(y, host.data(), 32, cudaMemcpyHostToDevice));
        TRY(cudaMemset(y + 1, 0, 4));
        Array<int> z(8);
        CHECK(z.get()[0] == -1); // fresh memory is poisoned
        TRY(cudaMemcpy2DAsync(z, 16, y, 12, 12, 2, cudaMemcpyDeviceToDevice));
        TRY(cudaMemcpy(host.data(), z, 32, cudaMemcpyDefault));
        return compare(host, std::vector<int>{4, 0, 4, -1, 4, 4, 4, -1, 4});
    }
    case 1:
        TRY(cudaMemcpy(y, host.data(), 36, cudaMemcpyHostToDevice));
        break;
    case 2:
        TRY(cudaMemcpy(y, host.data(), 32, cudaMemcpyDeviceToHost));
        break;
    case 3:
        TRY(cudaMemset(y + 1, 0, 32));
        break;
    case 4:
        TRY(cudaFree(y + 1));
        break;
    case 5: {
        int *z;
        TRY(cudaMalloc(&z, 4));
        TRY(cudaFree(z));
        TRY(cudaFree(z));
        break;
    }
    case 6: {
        CHECK(pm_host_set("fail_allocation", "3"));
        int *z;
        TRY(cudaMalloc(&z, 4));
        TRY(cudaMallocHost(&z, 4));
        TRY(cudaMalloc(&z, 4));
        break;
    }
    case 7:
        TRY(cudaMemcpy(host.data(), host.data() + 1, 4, cudaMemcpyDeviceToDevice));
        break;
    }
    return 0;
}

// Work in a stream is done when somebody waited for it, and not before.
CASE(streams)
{
    cudaStream_t a, b;
    cudaEvent_t e;
    TRY(cudaStreamCreateWithFlags(&a, cudaStreamNonBlocking));
    TRY(cudaStreamCreateWithFlags(&b, cudaStreamNonBlocking));
    TRY(cudaEventCreateWithFlags(&e, cudaEventDisableTiming));
    int *host;
    TRY(cudaMallocHost(&host, 4));
    *host = 1;
    Array<int> x(std::vector<int>(1, 10)), y(std::vector<int>(1, 0)), z(std::vector<int>(1, 0));
    PM_LAUNCH(add, 1, 1, 0, a, y, x, 5);
    TRY(cudaEventRecord(e, a));
    if (sabotage != 1)
        TRY(cudaStreamWaitEvent(b, e));
    PM_LAUNCH(add, 1, 1, 0, b, z, y, 100);
    TRY(cudaMemcpyAsync(host, z, 4, cudaMemcpyDeviceToHost, b));
    TRY(cudaGetLastError());
    if (sabotage != 2)
        TRY(cudaStreamSynchronize(b));
    CHECK(*host == 115);
    if (sabotage == 3)
        TRY(cudaStreamSynchronize((cudaStream_t)host));
    TRY(cudaEventDestroy(e));
    TRY(cudaStreamDestroy(a));
    TRY(cudaStreamDestroy(b));
    TRY(cudaFreeHost(host));
    return 0;
}

// Host memory that is pinned is read when the copy runs, other memory when it is asked for.
CASE(staging)
{
    cudaStream_t s;
    TRY(cudaStreamCreate(&s));
    int *pinned, plain = 5;
    TRY(cudaMallocHost(&pinned, 4));
    *pinned = 5;
    Array<int> x(1), y(1);
    TRY(cudaMemcpyAsync(x, pinned, 4, cudaMemcpyHostToDevice, s));
    TRY(cudaMemcpyAsync(y, &plain, 4, cudaMemcpyHostToDevice, s));
    if (sabotage == 0)
        TRY(cudaStreamSynchronize(s));
    *pinned = plain = 6;
    TRY(cudaStreamSynchronize(s));
    CHECK(x.get()[0] == 5);
    CHECK(y.get()[0] == 5);
    return 0;
}

// Two branches and a join, recorded once and replayed with other contents.
CASE(graphs)
{
    cudaStream_t a, b;
    cudaEvent_t fork, join;
    cudaGraph_t graph;
    cudaGraphExec_t exec;
    TRY(cudaStreamCreate(&a));
    TRY(cudaStreamCreate(&b));
    TRY(cudaEventCreate(&fork));
    TRY(cudaEventCreate(&join));
    Array<int> x(std::vector<int>(1, 1)), l(std::vector<int>(1, 0)), r(std::vector<int>(1, 0)), y(1);
    TRY(cudaStreamBeginCapture(a, cudaStreamCaptureModeGlobal));
    PM_LAUNCH(add, 1, 1, 0, a, y, x, 1);
    TRY(cudaEventRecord(fork, a));
    TRY(cudaStreamWaitEvent(b, fork));
    PM_LAUNCH(add, 1, 1, 0, b, l, y, 10);
    TRY(cudaEventRecord(join, b));
    PM_LAUNCH(add, 1, 1, 0, a, r, y, 100);
    if (sabotage == 2)
        TRY(cudaStreamSynchronize(a));
    if (sabotage == 3)
        TRY(cudaMemcpy(y, x, 4, cudaMemcpyDeviceToDevice));
    if (sabotage == 4) {
        void *more;
        TRY(cudaMalloc(&more, 4));
    }
    if (sabotage == 5)
        TRY(cudaStreamBeginCapture(a, cudaStreamCaptureModeGlobal));
    if (sabotage != 1)
        TRY(cudaStreamWaitEvent(a, join));
    TRY(cudaMemcpyAsync(y, l, 4, cudaMemcpyDeviceToDevice, a));
    TRY(cudaStreamEndCapture(a, &graph));
    TRY(cudaDeviceSynchronize());
    CHECK(l.get()[0] == 0); // recorded, not run
    TRY(cudaGraphInstantiate(&exec, graph, 0));
    TRY(cudaGraphDestroy(graph));
    for (int v : {1, 7}) {
        TRY(cudaMemcpy(x, &v, 4, cudaMemcpyHostToDevice));
        TRY(cudaGraphLaunch(exec, a));
        TRY(cudaStreamSynchronize(a));
        CHECK(y.get()[0] == v + 11 && l.get()[0] == v + 11 && r.get()[0] == v + 101);
    }
    TRY(cudaGraphExecDestroy(exec));
    return 0;
}
