// internal.h: between the engine, the runtime stand-in and the race detector.
#pragma once
#include <string>
#include <vector>

#include "engine.h"

namespace pm_host {

// ------------------------------------------------------------------ settings (pm_host_set)
enum class Order { FORWARD, REVERSE, SHUFFLED };
struct Settings {
    Order order = Order::FORWARD;
    uint64_t seed = 1;
    int arch = 90;           // 80: 163 KiB of shared memory per block; 90: 227 KiB
    double timeout = 300;    // seconds for one launch
    long fail_allocation = 0; // the n-th allocation from now fails (counted down), 0: none
    bool fail_capture = false; // the next cudaStreamEndCapture fails
    int heuristic = 2;       // cublasLtMatmulAlgoGetHeuristic offers 0: nothing, 1: products without
                             // an epilogue, 2: everything
    bool count = false; // race build: count what kernels move instead of watching for races
    bool eager = false;      // true: streams run at once, not at the next synchronisation
};
extern Settings settings;
size_t shared_limit(); // bytes of shared memory that a block may have

// ------------------------------------------------------------------ faults
// What went wrong first in a kernel or in a call; stays until pm_host_reset or cudaDeviceReset.
extern std::string fault;
// A message about a wrong call (not sticky): shown by cudaGetErrorString and cublasGetStatusString.
extern std::string complaint;
bool complain(const char *format, ...) __attribute__((format(printf, 1, 2))); // returns false

// ------------------------------------------------------------------ running a kernel
// A kernel's static shared memory, found by its symbols.
struct SharedVariable {
    std::string name;
    size_t offset, bytes; // in the block of thread-local storage
};
struct KernelSymbols {
    std::string name; // "product<64, 32>"
    std::vector<SharedVariable> variables;
    size_t static_bytes = 0;
    size_t dynamic_limit = 48 * 1024; // cudaFuncAttributeMaxDynamicSharedMemorySize
};
struct Kernel {
    const KernelSymbols *symbols;
    dim3 grid, block;
    size_t dynamic_bytes;
    std::function<void()> thread;
};
void run(const Kernel &kernel); // when it failed, fault says why

KernelSymbols &symbols(const void *function);
size_t dynamic_offset(); // of pm_shared in the block of thread-local storage
size_t storage_bytes();  // of that block

// Of the running block, for messages and checks.
std::string here();                           // "kernel f, block (0, 0, 0), thread (1, 0, 0)"
std::string thread_name(int thread);          // "(1, 0, 0)"
std::string describe(const void *p);          // "tile[3] + 8 bytes", "dynamic shared memory + 64", "0x..."
bool in_shared(const void *p, size_t bytes);  // within one shared variable of the running kernel
const char *base_name(const char *file); // without its folders
bool in_shared_storage(const void *p);        // anywhere in the storage of shared memory
extern int self_index;                        // thread of the block that runs; -1: none

// wgmma.cpp: a block begins; copies of the running thread have arrived; it returns.
void wgmma_block();
void wgmma_copies_arrived();
void wgmma_returned(); // fails when its warp has not waited for a product

// Device memory (runtime.cpp).
bool in_device(const void *p, size_t bytes); // within one allocation
std::string describe_device(const void *p);  // "device memory + 8 bytes (of 256)"; empty when it is none

// For pm_host_moved: operations of products by tensor cores, and what cuBLASLt moves (race build only).
#ifdef PM_HOST_RACE
void count_operations(double operations);
void count_product(const char *name, double read, double write, double operations);
#else
inline void count_operations(double) {}
inline void count_product(const char *, double, double, double) {}
#endif

#ifdef PM_HOST_RACE
void race_launch(const Kernel &kernel, char *shared, size_t shared_bytes);
void race_block(unsigned number);               // a block begins
void race_barrier();                            // every thread of the block has met
void race_collective(int warp, uint32_t lanes); // these lanes have met
char *race_allocate(size_t bytes);              // device memory; null when there is no more
void race_release(char *p);
#endif

} // namespace pm_host
