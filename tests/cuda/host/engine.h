// engine.h: what the stand-in headers and the engine share. Kernels never name anything of it.
//
// Every thread of a block is a fibre with its own stack. It runs, alone, until it waits: at a block
// barrier, at a warp collective (shuffle, vote, __syncwarp, mma, ldmatrix) or until it returns. Then
// the scheduler picks another one, in the order chosen (forward, reverse, shuffled). The last lane
// to reach a warp collective computes it for all lanes in one host function.
#pragma once
#include <cstddef>
#include <cstdint>
#include <functional>
#include <tuple>
#include <utility>

struct uint3 {
    unsigned x, y, z;
};
struct dim3 {
    unsigned x, y, z;
    constexpr dim3(unsigned a = 1, unsigned b = 1, unsigned c = 1) : x(a), y(b), z(c) {}
    constexpr dim3(uint3 v) : x(v.x), y(v.y), z(v.z) {}
};

extern uint3 threadIdx, blockIdx;
extern dim3 blockDim, gridDim;
constexpr int warpSize = 32;

// Dynamic shared memory, by the one name that kernels use:
//   extern __shared__ __align__(16) unsigned char pm_shared[];
extern thread_local unsigned char pm_shared[];

namespace pm_host {

// A kind of warp collective: run() computes it from the operands of the lanes that are present (bits of
// `present`; null for the others). whole: PTX's .aligned, every lane of the warp has to be there.
struct Collective {
    const char *name;
    void (*run)(void *const operand[32], uint32_t present, const char *file, int line);
    bool whole;
};

// Waits until every live lane of mask has come to the same collective at the same line with the same
// mask. The operand stays valid while the lane waits; run() leaves the lane's result in it.
void rendezvous(const Collective &what, uint32_t mask, void *operand, const char *file, int line);

// Waits until every live thread of the block has come to this line; returns how many came with a
// true predicate.
int block_barrier(bool predicate, const char *name, const char *file, int line);

// Ends the running kernel with a message, to which kernel, block and thread are added. From host
// code: only records the message.
[[noreturn]] void fail(const char *format, ...) __attribute__((format(printf, 1, 2)));

// cp.async: the bytes are undefined (poisoned) from the issue to the wait, and arrive at the wait.
void async_copy(void *shared, const void *global, int bytes, int source_bytes, const char *file,
                int line);
void async_commit();
void async_wait(int groups_left); // -1: all, committed or not

// wgmma (wgmma.cpp): fence_proxy_async of the running thread.
void wgmma_fence_copies();

// The race detector's view of atomics and fences (race build only; else empty).
enum class Kind { READ, WRITE, ATOMIC, ISSUE, ARRIVAL }; // the last two: of a cp.async's destination
#ifdef PM_HOST_RACE
void race_atomic(const void *p, size_t bytes, const void *pc);
void race_access(const void *p, size_t bytes, Kind kind, const char *file, int line);
#else
inline void race_atomic(const void *, size_t, const void *) {}
inline void race_access(const void *, size_t, Kind, const char *, int) {}
#endif

// Is this range in the shared memory of the running block? Fails, naming `what`, when not.
void check_shared(const void *p, size_t bytes, size_t alignment, const char *what);
void check_aligned(const void *p, size_t alignment, const char *what);

// A launch: arguments are copied now, the kernel runs when its stream does (runtime.cpp).
void enqueue(const void *kernel, dim3 grid, dim3 block, size_t dynamic_bytes,
             void *stream, size_t parameter_bytes, std::function<void()> thread);

template <class... P, class... A>
void launch(void (*kernel)(P...), dim3 grid, dim3 block, size_t dynamic_bytes,
            void *stream, A &&...arguments)
{
    static_assert(sizeof...(P) == sizeof...(A), "the launch gives another number of arguments");
    std::tuple<P...> copy(static_cast<P>(std::forward<A>(arguments))...);
    enqueue((const void *)kernel, grid, block, dynamic_bytes, stream,
            (size_t{0} + ... + sizeof(P)),
            [kernel, copy]() { std::apply(kernel, copy); });
}

} // namespace pm_host
