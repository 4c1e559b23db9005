// cases.h: kernels that are right, and the same kernels sabotaged. A case is run as
//     cases NAME SABOTAGE
// where sabotage 0 is the right one; it ends with 0 when the result is right, 1 when it is wrong, 2 when
// an error was reported (its message is printed). tests/cuda/test_host.py says what is expected.
#pragma once
#include <cuda_bf16.h>
#include <cuda_runtime.h>

#include <cmath>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <vector>

#include "../../../../kernels/ptx.cuh"

struct Case {
    const char *name;
    int (*run)(int sabotage);
    Case *next;
    static Case *&first()
    {
        static Case *list = nullptr;
        return list;
    }
    Case(const char *n, int (*r)(int)) : name(n), run(r), next(first()) { first() = this; }
};
#define CASE(name)                                                                                 \
    static int name(int sabotage);                                                                 \
    static Case name##_case(#name, name);                                                          \
    static int name([[maybe_unused]] int sabotage)

// A call that has to succeed.
#define TRY(call)                                                                                  \
    do {                                                                                           \
        const cudaError_t error = (call);                                                          \
        if (error != cudaSuccess) {                                                                \
            printf("%s: %s\n", #call, cudaGetErrorString(error));                                  \
            exit(2);                                                                               \
        }                                                                                          \
    } while (0)
#define LAUNCH(...)                                                                                \
    do {                                                                                           \
        PM_LAUNCH(__VA_ARGS__);                                                                    \
        TRY(cudaGetLastError());                                                                   \
        TRY(cudaDeviceSynchronize());                                                              \
    } while (0)
// A condition that has to hold.
#define CHECK(condition)                                                                           \
    do {                                                                                           \
        if (!(condition)) {                                                                        \
            printf("wrong: %s\n", #condition);                                                     \
            return 1;                                                                              \
        }                                                                                          \
    } while (0)

// An array of device memory, and its contents.
template <class T> struct Array {
    T *p = nullptr;
    size_t n;
    explicit Array(size_t count) : n(count) { TRY(cudaMalloc(&p, n * sizeof(T))); }
    explicit Array(const std::vector<T> &v) : Array(v.size())
    {
        TRY(cudaMemcpy(p, v.data(), n * sizeof(T), cudaMemcpyHostToDevice));
    }
    Array(const Array &) = delete;
    ~Array() { (void)cudaFree(p); }
    operator T *() const { return p; }
    std::vector<T> get() const
    {
        std::vector<T> v(n);
        TRY(cudaMemcpy(v.data(), p, n * sizeof(T), cudaMemcpyDeviceToHost));
        return v;
    }
};

// Numbers in -1 .. 1, the same in every run, that bf16 and tf32 hold exactly.
inline std::vector<float> numbers(size_t n, unsigned seed = 1)
{
    std::vector<float> v(n);
    for (float &x : v) {
        seed = seed * 1664525u + 1013904223u;
        x = (float)((int)(seed >> 24) - 128) / 128;
    }
    return v;
}

// 0 when every number is within tolerance of what it should be.
template <class T, class U>
int compare(const std::vector<T> &got, const std::vector<U> &want, double tolerance = 0)
{
    for (size_t i = 0; i < want.size(); i++)
        if (!(std::fabs((double)got[i] - (double)want[i]) <= tolerance)) {
            printf("wrong: [%zu] is %g, should be %g\n", i, (double)got[i], (double)want[i]);
            return 1;
        }
    return 0;
}
