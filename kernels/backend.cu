// backend.cu: the device, its memory, and the table of ops: the plugin that csrc/backends.c loads.
#include <cmath>
#include <cstdio>
#include <cstdlib>
#include <cstring>

#include "common.cuh"
extern "C" {
#include "../csrc/plugin.h"
}
#include "dense.cuh"

namespace {

constexpr unsigned long long NO_FAULT = ~0ull;

// Host memory travels through two page-locked halves in turn, so that write() returns at once and
// may be given anything: the copy out of a half is finished before it is filled again.
constexpr size_t HALF = (size_t)4 << 20;

struct device {
    bool open;
    int number, capability; // 80, 90
    char name[320];         // "NVIDIA H200, 150.1 GB, driver for CUDA 13.0"
    pm_gpu gpu;
    char *staging; // 2 HALFs
    cudaEvent_t done[2];
    cudaEvent_t theirs; // what another stream has come to
    int half;
    size_t filled;                   // bytes of the half in use
    bool capturing;                  // between begin_capture and end_capture
    unsigned long long *fault_found; // page-locked: where read and sync look
};
device self;

const struct {
    pm_status status;
    const char *text;
} faults[] = {
#define PM_FAULT(name, status, text) {status, text},
#include "faults.def"
#undef PM_FAULT
};

// ---------------------------------------------------------------- memory

double megabytes(size_t bytes) { return (double)bytes / 1e6; }

// What the host asks for while a graph is recorded would happen once and never again.
pm_status not_recorded(pm_ctx *ctx, const char *what)
{
    return self.capturing
               ? pm_fail(ctx, PM_EINTERNAL, "CUDA: %s while a graph is being recorded", what)
               : PM_OK;
}

void *gpu_alloc(pm_ctx *ctx, size_t bytes)
{
    void *memory = nullptr;
    if (not_recorded(ctx, "alloc") != PM_OK)
        return nullptr;
    cudaError_t error = cudaMalloc(&memory, bytes ? bytes : 1);
    if (error == cudaSuccess)
        error = cudaMemsetAsync(memory, 0, bytes, self.gpu.stream);
    if (error == cudaSuccess)
        return memory;
    (void)cudaGetLastError(); // so that the next launch does not report it
    if (memory)
        (void)cudaFree(memory);
    size_t left = 0, total = 0;
    if (error != cudaErrorMemoryAllocation)
        (void)pm_cuda(ctx, "cudaMalloc", error);
    else if (cudaMemGetInfo(&left, &total) == cudaSuccess)
        (void)pm_fail(ctx, PM_ENOMEM,
                      "%.1f MB of GPU memory were asked for, and %.1f MB of %.1f MB are free",
                      megabytes(bytes), megabytes(left), megabytes(total));
    return nullptr;
}

void gpu_free(pm_ctx *, void *memory, size_t) { (void)cudaFree(memory); }

pm_status gpu_write(pm_ctx *ctx, void *to, const void *host, size_t bytes)
{
    PM_TRY(not_recorded(ctx, "write"));
    while (bytes > 0) {
        if (self.filled == HALF) {
            PM_TRY(pm_cuda(ctx, "cudaEventRecord",
                           cudaEventRecord(self.done[self.half], self.gpu.stream)));
            self.half ^= 1;
            self.filled = 0;
            PM_TRY(pm_cuda(ctx, "write", cudaEventSynchronize(self.done[self.half])));
        }
        const size_t room = HALF - self.filled, piece = bytes < room ? bytes : room;
        char *const staged = self.staging + (size_t)self.half * HALF + self.filled;
        memcpy(staged, host, piece);
        PM_TRY(
            pm_cuda(ctx, "write",
                    cudaMemcpyAsync(to, staged, piece, cudaMemcpyHostToDevice, self.gpu.stream)));
        const size_t used = (piece + 15) & ~(size_t)15; // stays aligned
        self.filled = used < room ? self.filled + used : HALF;
        to = static_cast<char *>(to) + piece;
        host = static_cast<const char *>(host) + piece;
        bytes -= piece;
    }
    return PM_OK;
}

// Waits for all work; then the fault that it found, if any.
pm_status gpu_sync(pm_ctx *ctx)
{
    PM_TRY(not_recorded(ctx, "sync"));
    PM_TRY(pm_cuda(ctx, "sync",
                   cudaMemcpyAsync(self.fault_found, self.gpu.fault, sizeof *self.fault_found,
                                   cudaMemcpyDeviceToHost, self.gpu.stream)));
    PM_TRY(pm_cuda(ctx, "sync", cudaStreamSynchronize(self.gpu.stream)));
    const unsigned long long found = *self.fault_found;
    if (found == NO_FAULT)
        return PM_OK;
    PM_TRY(
        pm_cuda(ctx, "sync", cudaMemsetAsync(self.gpu.fault, 0xff, sizeof found, self.gpu.stream)));
    const unsigned long long code = found >> 48,
                             index = found & (((unsigned long long)1 << 48) - 1);
    if (code >= sizeof faults / sizeof *faults)
        return pm_fail(ctx, PM_EINTERNAL, "the GPU reports a fault that there is not: %llx", found);
        // The messages are our own, and have one %lld each.
#pragma GCC diagnostic push
#pragma GCC diagnostic ignored "-Wformat-nonliteral"
    return pm_fail(ctx, faults[code].status, faults[code].text, (long long)index);
#pragma GCC diagnostic pop
}

pm_status gpu_read(pm_ctx *ctx, void *host, const void *from, size_t bytes)
{
    PM_TRY(not_recorded(ctx, "read"));
    if (bytes > 0)
        PM_TRY(
            pm_cuda(ctx, "read",
                    cudaMemcpyAsync(host, from, bytes, cudaMemcpyDeviceToHost, self.gpu.stream)));
    return gpu_sync(ctx);
}

pm_status gpu_copy(pm_ctx *ctx, void *to, const void *from, size_t bytes)
{
    if (!bytes)
        return PM_OK;
    return pm_cuda(ctx, "copy",
                   cudaMemcpyAsync(to, from, bytes, cudaMemcpyDeviceToDevice, self.gpu.stream));
}

pm_status gpu_zero(pm_ctx *ctx, void *memory, size_t bytes)
{
    if (!bytes)
        return PM_OK;
    return pm_cuda(ctx, "zero", cudaMemsetAsync(memory, 0, bytes, self.gpu.stream));
}

// ---------------------------------------------------------------- graphs

pm_status gpu_begin_capture(pm_ctx *ctx)
{
    PM_TRY(not_recorded(ctx, "begin_capture"));
    // Of this thread: what other libraries do in other threads is their affair.
    PM_TRY(pm_cuda(ctx, "cudaStreamBeginCapture",
                   cudaStreamBeginCapture(self.gpu.stream, cudaStreamCaptureModeThreadLocal)));
    self.capturing = true;
    return PM_OK;
}

pm_status gpu_end_capture(pm_ctx *ctx, void **out)
{
    *out = nullptr;
    cudaGraph_t graph = nullptr;
    cudaGraphExec_t ready = nullptr;
    self.capturing = false;
    PM_TRY(pm_cuda(ctx, "cudaStreamEndCapture", cudaStreamEndCapture(self.gpu.stream, &graph)));
    const cudaError_t error = cudaGraphInstantiate(&ready, graph, 0);
    (void)cudaGraphDestroy(graph);
    PM_TRY(pm_cuda(ctx, "cudaGraphInstantiate", error));
    *out = ready;
    return PM_OK;
}

pm_status gpu_launch(pm_ctx *ctx, void *graph)
{
    PM_TRY(not_recorded(ctx, "launch"));
    return pm_cuda(ctx, "cudaGraphLaunch",
                   cudaGraphLaunch(static_cast<cudaGraphExec_t>(graph), self.gpu.stream));
}

// A launch that is under way keeps what it needs.
void gpu_free_graph(pm_ctx *, void *graph)
{
    (void)cudaGraphExecDestroy(static_cast<cudaGraphExec_t>(graph));
}

// ---------------------------------------------------------------- memory of others

pm_status gpu_adopt(pm_ctx *ctx, const void *memory, size_t bytes, uintptr_t stream)
{
    cudaPointerAttributes found = {};
    PM_TRY(not_recorded(ctx, "adopt"));
    if (bytes > 0)
        PM_TRY(pm_cuda(ctx, "cudaPointerGetAttributes", cudaPointerGetAttributes(&found, memory)));
    if (bytes > 0 && found.type != cudaMemoryTypeDevice && found.type != cudaMemoryTypeManaged)
        return pm_fail(ctx, PM_EINVAL, "%p is not memory of a GPU", memory);
    if (bytes > 0 && found.device != self.number)
        return pm_fail(ctx, PM_EINVAL, "it is in the memory of GPU %d; promoe computes on GPU %d",
                       found.device, self.number);
    const cudaStream_t theirs = stream > 2    ? reinterpret_cast<cudaStream_t>(stream)
                                : stream == 2 ? cudaStreamPerThread
                                              : cudaStreamLegacy;
    PM_TRY(pm_cuda(ctx, "the stream of the array", cudaEventRecord(self.theirs, theirs)));
    return pm_cuda(ctx, "cudaStreamWaitEvent",
                   cudaStreamWaitEvent(self.gpu.stream, self.theirs, 0));
}

// ---------------------------------------------------------------- derived weights: bf16 shadows

size_t shadow_bytes(const pm_ctx *ctx, int64_t F, int64_t D)
{
    return ctx->backend->compute == PM_BF16 ? ((size_t)(F * D) * sizeof(bf16) + 63) & ~(size_t)63
                                            : 0;
}

pm_status shadow(pm_ctx *ctx, int64_t F, int64_t D, const float *w, void *derived)
{
    return ctx->backend->compute == PM_BF16 ? pm_round(ctx, F * D, w, static_cast<bf16 *>(derived))
                                            : PM_OK;
}

__global__ void round_kernel(int64_t n, const float *__restrict__ from, bf16 *__restrict__ to)
{
    for (int64_t i = pm_thread(); i < n; i += pm_threads())
        to[i] = pm_to<bf16>(from[i]);
}

__global__ void add_kernel(int64_t n, const float *__restrict__ from, float *__restrict__ to)
{
    for (int64_t i = pm_thread(); i < n; i += pm_threads())
        to[i] += from[i];
}

} // namespace

pm_status pm_round(pm_ctx *ctx, int64_t count, const float *from, bf16 *to)
{
    PM_RUN(ctx, round_kernel, pm_blocks(count, 1024), 256, 0, count, from, to);
    return PM_OK;
}

pm_status pm_add(pm_ctx *ctx, int64_t count, const float *from, float *to)
{
    PM_RUN(ctx, add_kernel, pm_blocks(count, 1024), 256, 0, count, from, to);
    return PM_OK;
}

template <>
pm_status pm_weight_as<float>(pm_ctx *, const pm_weight &weight, int64_t, void **,
                              const float **out)
{
    *out = weight.w;
    return PM_OK;
}

template <>
pm_status pm_weight_as<bf16>(pm_ctx *ctx, const pm_weight &weight, int64_t count, void **scratch,
                             const bf16 **out)
{
    *out = static_cast<const bf16 *>(weight.derived);
    if (*out)
        return PM_OK;
    bf16 *const rounded = pm_take<bf16>(scratch, count);
    *out = rounded;
    return pm_round(ctx, count, weight.w, rounded);
}

// ---------------------------------------------------------------- launches and errors

const pm_gpu &pm_device() { return self.gpu; }

pm_status pm_cuda(pm_ctx *ctx, const char *what, cudaError_t error)
{
    if (error == cudaSuccess)
        return PM_OK;
    (void)cudaGetLastError();
    return pm_fail(ctx, error == cudaErrorMemoryAllocation ? PM_ENOMEM : PM_EINTERNAL,
                   "CUDA: %s: %s", what, cudaGetErrorString(error));
}

pm_status pm_prepare(pm_ctx *ctx, const char *kernel, const void *function, size_t shared_bytes)
{
    if (shared_bytes <= 48 * 1024)
        return PM_OK;
    return pm_cuda(ctx, kernel,
                   cudaFuncSetAttribute(function, cudaFuncAttributeMaxDynamicSharedMemorySize,
                                        (int)shared_bytes));
}

pm_status pm_launched(pm_ctx *ctx, const char *kernel)
{
    return pm_cuda(ctx, kernel, cudaGetLastError());
}

// ---------------------------------------------------------------- opening the device

namespace {

bool refuse(char *message, size_t bytes, const char *what, cudaError_t error)
{
    (void)cudaGetLastError();
    snprintf(message, bytes, "device 'cuda': %s: %s", what, cudaGetErrorString(error));
    return false;
}

#define PM_OPEN(what, call)                                                                        \
    do {                                                                                           \
        const cudaError_t pm_error = (call);                                                       \
        if (pm_error != cudaSuccess)                                                               \
            return refuse(message, bytes, what, pm_error);                                         \
    } while (0)

// A GPU that these kernels run on is there.
bool find_device(char *message, size_t bytes)
{
    int driver = 0, runtime = 0, count = 0, major = 0, minor = 0;
    PM_OPEN("cudaDriverGetVersion", cudaDriverGetVersion(&driver));
    PM_OPEN("cudaRuntimeGetVersion", cudaRuntimeGetVersion(&runtime));
    if (driver == 0) {
        snprintf(message, bytes,
                 "device 'cuda': this machine has no NVIDIA driver (libcuda.so.1): install one, or "
                 "use device 'cpu'");
        return false;
    }
    if (driver / 1000 < runtime / 1000) {
        snprintf(message, bytes,
                 "device 'cuda': the NVIDIA driver supports CUDA %d.%d, and promoe was built with "
                 "%d.%d: install a newer driver, or build promoe with an older toolkit",
                 driver / 1000, driver % 100 / 10, runtime / 1000, runtime % 100 / 10);
        return false;
    }
    const cudaError_t error = cudaGetDeviceCount(&count);
    if (error == cudaErrorNoDevice || (error == cudaSuccess && count == 0)) {
        (void)cudaGetLastError();
        snprintf(message, bytes,
                 "device 'cuda': the driver sees no GPU (CUDA_VISIBLE_DEVICES chooses which it "
                 "shows): use device 'cpu'");
        return false;
    }
    PM_OPEN("cudaGetDeviceCount", error);
    PM_OPEN("cudaDeviceGetAttribute",
            cudaDeviceGetAttribute(&major, cudaDevAttrComputeCapabilityMajor, 0));
    PM_OPEN("cudaDeviceGetAttribute",
            cudaDeviceGetAttribute(&minor, cudaDevAttrComputeCapabilityMinor, 0));
    self.capability = 10 * major + minor;
    self.gpu.hopper = self.capability == 90;
    cudaDeviceProp properties;
    PM_OPEN("cudaGetDeviceProperties", cudaGetDeviceProperties(&properties, 0));
    snprintf(self.name, sizeof self.name, "%s, %.1f GB, driver for CUDA %d.%d", properties.name,
             (double)properties.totalGlobalMem / 1e9, driver / 1000, driver % 100 / 10);
    if (self.capability < 80) {
        snprintf(message, bytes,
                 "device 'cuda': %s has compute capability %d.%d; these kernels need 8.0 (Ampere) "
                 "or later",
                 properties.name, major, minor);
        return false;
    }
    return true;
}

// Everything that lives as long as the process. What an attempt that failed has made is released by
// close_device, so that the next one finds nothing.
bool make_device(char *message, size_t bytes)
{
    int shared = 0;
    PM_OPEN("cudaSetDevice", cudaSetDevice(self.number));
    PM_OPEN(
        "cudaDeviceGetAttribute",
        cudaDeviceGetAttribute(&self.gpu.processors, cudaDevAttrMultiProcessorCount, self.number));
    PM_OPEN("cudaDeviceGetAttribute",
            cudaDeviceGetAttribute(&shared, cudaDevAttrMaxSharedMemoryPerBlockOptin, self.number));
    self.gpu.shared_most = (size_t)shared;
    PM_OPEN("cudaStreamCreate", cudaStreamCreateWithFlags(&self.gpu.stream, cudaStreamNonBlocking));
    PM_OPEN("cudaHostAlloc", cudaHostAlloc((void **)&self.staging, 2 * HALF, 0));
    PM_OPEN("cudaHostAlloc",
            cudaHostAlloc((void **)&self.fault_found, sizeof *self.fault_found, 0));
    for (cudaEvent_t *event : {&self.done[0], &self.done[1], &self.theirs})
        PM_OPEN("cudaEventCreate", cudaEventCreateWithFlags(event, cudaEventDisableTiming));
    PM_OPEN("cudaMalloc", cudaMalloc((void **)&self.gpu.fault, sizeof *self.gpu.fault));
    PM_OPEN("cudaMemset",
            cudaMemsetAsync(self.gpu.fault, 0xff, sizeof *self.gpu.fault, self.gpu.stream));
    char why[256];
    if (!pm_dense_open(why, sizeof why)) {
        snprintf(message, bytes, "device 'cuda': %s", why);
        return false;
    }
    return true;
}

void close_device()
{
    (void)cudaFree(self.gpu.fault);
    for (cudaEvent_t event : {self.done[0], self.done[1], self.theirs})
        if (event)
            (void)cudaEventDestroy(event);
    (void)cudaFreeHost(self.fault_found);
    (void)cudaFreeHost(self.staging);
    if (self.gpu.stream)
        (void)cudaStreamDestroy(self.gpu.stream);
    self = {};
}

bool open_device(char *message, size_t bytes)
{
    if (!find_device(message, bytes))
        return false;
    if (make_device(message, bytes))
        return true;
    close_device();
    return false;
}

// ---------------------------------------------------------------- the tables

#define PM_TABLE_FORWARD(op) table->op.backward = nullptr;
#define PM_TABLE_BOTH(op) table->op.backward = op##_backward<T>;

template <class T> void fill(pm_backend *table, pm_compute compute, bool graphs)
{
    static char level[16]; // "sm_90"
    snprintf(level, sizeof level, "sm_%d", self.capability);
    table->name = "cuda";
    table->level = level;
    table->model = self.name;
    table->compute = compute;
    table->host = false;
    table->act_bytes = sizeof(T);
    table->alloc = gpu_alloc;
    table->free = gpu_free;
    table->write = gpu_write;
    table->read = gpu_read;
    table->copy = gpu_copy;
    table->zero = gpu_zero;
    table->sync = gpu_sync;
    if (graphs) {
        table->begin_capture = gpu_begin_capture;
        table->end_capture = gpu_end_capture;
        table->launch = gpu_launch;
        table->free_graph = gpu_free_graph;
    }
    table->adopt = gpu_adopt;
    table->derived_bytes = shadow_bytes;
    table->derive = shadow;
#define PM_OP(op, OP, direction)                                                                   \
    table->op.forward = op##_forward<T>;                                                           \
    table->op.workspace = op##_workspace<T>;                                                       \
    PM_TABLE_##direction(op)
#include "../csrc/ops.def"
#undef PM_OP
}

// PROMOE_CUDA_GRAPHS=0 runs every op by itself, to find out which one is wrong.
bool want_graphs(bool *graphs, char *message, size_t bytes)
{
    const char *const word = getenv("PROMOE_CUDA_GRAPHS");
    *graphs = !word || !*word || !strcmp(word, "1");
    if (*graphs || !strcmp(word, "0"))
        return true;
    snprintf(message, bytes, "PROMOE_CUDA_GRAPHS=%s: one of 0, 1", word);
    return false;
}

const pm_backend *open_backend(pm_compute compute, char *message, size_t bytes)
{
    static pm_backend tables[2][PM_COMPUTES];
    bool graphs;
    if (compute == PM_BF16_EMULATED) {
        snprintf(message, bytes, "compute = 'bf16-emulated' is for a CPU: a GPU has 'bf16'");
        return nullptr;
    }
    if (!want_graphs(&graphs, message, bytes))
        return nullptr;
    if (!self.open && !(self.open = open_device(message, bytes)))
        return nullptr;
    pm_backend *const table = &tables[graphs][compute];
    if (table->name)
        return table; // which may be in use
    if (compute == PM_BF16)
        fill<bf16>(table, compute, graphs);
    else
        fill<float>(table, compute, graphs);
    return table;
}

} // namespace

extern "C" __attribute__((visibility("default"))) const pm_plugin *pm_plugin_entry(void)
{
    static const pm_plugin plugin = {pm_plugin_own_shape, pm_plugin_ops, open_backend};
    return &plugin;
}
