// runtime.cpp: memory, streams, events, graphs.
#include <algorithm>
#include <cstdarg>
#include <cstdlib>
#include <cstring>
#include <deque>
#include <map>
#include <memory>
#include <mutex>
#include <set>

#include "runtime.h"

using namespace pm_host;

// ------------------------------------------------------------------ streams, events, graphs
// Work of a stream waits in its queue until something asks for it: a synchronisation, an event that
// another stream waits for. So a result that is read too early is not there yet.
struct pm_host_event {
    pm_host_stream *stream = nullptr;  // where it was recorded last
    long recorded = 0, reached = 0;    // how often; up to which record the stream has come
    double time = 0;                   // of the last one reached
    bool timing = true;
    pm_host_graph *graph = nullptr;    // recorded while this one was captured
    std::vector<int> after;            // then: the nodes it stands for
};
struct pm_host_node {
    std::function<void()> work;
    std::vector<int> after; // nodes that come before it
};
struct pm_host_graph {
    std::vector<pm_host_node> nodes;
    std::set<pm_host_stream *> streams; // being captured into it
    pm_host_stream *origin = nullptr;
    bool broken = false;
};
struct pm_host_graph_exec {
    std::vector<pm_host_node> nodes;
};
struct pm_host_stream {
    bool blocking = true; // waits for the legacy stream, and it for this one
    std::deque<std::function<void()>> queue;
    pm_host_graph *capture = nullptr;
    std::vector<int> after; // while it captures: the nodes that its next one waits for
};

static std::recursive_mutex mutex;
static pm_host_stream legacy;
static std::set<pm_host_stream *> streams;
static std::set<pm_host_event *> events;
static std::set<pm_host_graph *> graphs;
static std::set<pm_host_graph_exec *> executables;
static cudaError_t last_error = cudaSuccess, sticky = cudaSuccess;

struct Memory {
    size_t bytes;
};
static std::map<char *, Memory> device_memory, pinned_memory;

#define LOCK std::lock_guard<std::recursive_mutex> lock(mutex)

static cudaError_t result(cudaError_t error)
{
    if (sticky != cudaSuccess)
        error = sticky;
    if (error != cudaSuccess)
        last_error = error;
    return error;
}

static cudaError_t wrong(cudaError_t error, const char *text, ...)
    __attribute__((format(printf, 2, 3)));
static cudaError_t wrong(cudaError_t error, const char *text, ...)
{
    char buffer[1024];
    va_list list;
    va_start(list, text);
    vsnprintf(buffer, sizeof buffer, text, list);
    va_end(list);
    complain("%s", buffer);
    return result(error);
}

static void check_fault()
{
    if (!fault.empty() && sticky == cudaSuccess)
        sticky = last_error = cudaErrorLaunchFailure;
}

static bool run_one(pm_host_stream *s)
{
    if (s->queue.empty())
        return false;
    auto work = std::move(s->queue.front());
    s->queue.pop_front();
    if (fault.empty())
        work();
    check_fault();
    return true;
}

static void run_all(pm_host_stream *s)
{
    while (run_one(s)) {
    }
}

static void run_everything()
{
    run_all(&legacy);
    for (pm_host_stream *s : streams)
        run_all(s);
}

static pm_host_stream *real(cudaStream_t stream)
{
    if (!stream || stream == cudaStreamLegacy || stream == cudaStreamPerThread)
        return &legacy;
    return streams.count(stream) ? stream : nullptr;
}

static void push(pm_host_stream *s, std::function<void()> work)
{
    // The legacy stream and the blocking ones wait for each other.
    if (s == &legacy) {
        for (pm_host_stream *o : streams)
            if (o->blocking)
                run_all(o);
    } else if (s->blocking) {
        run_all(&legacy);
    }
    s->queue.push_back(std::move(work));
    if (settings.eager)
        run_all(s);
}

static bool any_capture()
{
    for (pm_host_stream *s : streams)
        if (s->capture)
            return true;
    return false;
}

// Calls that may not happen while a stream is captured.
static bool forbidden(const char *call)
{
    bool any = false;
    for (pm_host_stream *s : streams)
        if (s->capture)
            s->capture->broken = any = true;
    if (any)
        complain("%s while a stream is being captured", call);
    return any;
}

namespace pm_host {

bool submit(cudaStream_t stream, std::function<void()> work)
{
    LOCK;
    pm_host_stream *s = real(stream);
    if (!s)
        return complain("no such stream: %p", (void *)stream);
    if (s == &legacy && any_capture()) {
        forbidden("work in the default stream");
        return false;
    }
    if (!s->capture) {
        push(s, std::move(work));
        return true;
    }
    s->capture->nodes.push_back({std::move(work), s->after});
    s->after = {(int)s->capture->nodes.size() - 1};
    return true;
}

bool in_device(const void *p, size_t bytes)
{
    LOCK;
    auto at = device_memory.upper_bound((char *)p);
    if (at == device_memory.begin())
        return false;
    --at;
    return (char *)p + bytes <= at->first + at->second.bytes;
}

std::string describe_device(const void *p)
{
    LOCK;
    auto at = device_memory.upper_bound((char *)p);
    if (at == device_memory.begin())
        return "";
    --at;
    const size_t offset = (size_t)((char *)p - at->first);
    if (offset >= at->second.bytes + 64) // a little behind its end it is still this one
        return "";
    return "device memory + " + std::to_string(offset) + " bytes (of " +
           std::to_string(at->second.bytes) + ")";
}

static bool in_pinned(const void *p)
{
    auto at = pinned_memory.upper_bound((char *)p);
    if (at == pinned_memory.begin())
        return false;
    --at;
    return (char *)p < at->first + at->second.bytes;
}

// ------------------------------------------------------------------ launches
static std::map<std::string, long> launches;
static long graph_launches;

void count_launch(const char *name)
{
    LOCK;
    launches[name]++;
}

void enqueue(const void *function, dim3 grid, dim3 block, size_t dynamic_bytes,
             void *stream, size_t parameter_bytes, std::function<void()> thread)
{
    LOCK;
    const uint64_t n = (uint64_t)block.x * block.y * block.z;
    const KernelSymbols &k = symbols(function);
    const char *name = k.name.c_str();
    if (n == 0 || n > 1024 || block.x > 1024 || block.y > 1024 || block.z > 64)
        wrong(cudaErrorInvalidConfiguration,
              "kernel %s: a block of (%u, %u, %u) threads; allowed: at least 1, at most 1024, z at most "
              "64",
              name, block.x, block.y, block.z);
    else if (grid.x == 0 || grid.y == 0 || grid.z == 0 || grid.x > 0x7fffffffu || grid.y > 65535 ||
             grid.z > 65535)
        wrong(cudaErrorInvalidConfiguration,
              "kernel %s: a grid of (%u, %u, %u) blocks; allowed: at least 1, at most (2147483647, "
              "65535, 65535)",
              name, grid.x, grid.y, grid.z);
    else if (k.static_bytes > 48 * 1024)
        wrong(cudaErrorInvalidConfiguration, "kernel %s: %zu bytes of static shared memory; at most %d",
              name, k.static_bytes, 48 * 1024);
    else if (dynamic_bytes > k.dynamic_limit)
        wrong(cudaErrorInvalidValue,
              "kernel %s: %zu bytes of dynamic shared memory, allowed %zu: ask with "
              "cudaFuncSetAttribute(cudaFuncAttributeMaxDynamicSharedMemorySize)",
              name, dynamic_bytes, k.dynamic_limit);
    else if (k.static_bytes + dynamic_bytes > shared_limit())
        wrong(cudaErrorInvalidValue,
              "kernel %s: %zu + %zu bytes of shared memory; sm_%d has %zu for a block", name,
              k.static_bytes, dynamic_bytes, settings.arch, shared_limit());
    else if (parameter_bytes > 4096)
        wrong(cudaErrorInvalidValue, "kernel %s: %zu bytes of arguments; at most 4096", name,
              parameter_bytes);
    else {
        const Kernel kernel = {&k, grid, block, dynamic_bytes, std::move(thread)};
        if (!submit((cudaStream_t)stream, [kernel] {
                count_launch(kernel.symbols->name.c_str());
                run(kernel);
            }))
            result(cudaErrorInvalidResourceHandle);
    }
}

cudaError_t allow_dynamic_shared(const void *function, cudaFuncAttribute attribute, int value)
{
    LOCK;
    if (attribute == cudaFuncAttributePreferredSharedMemoryCarveout)
        return result(value >= -1 && value <= 100 ? cudaSuccess : cudaErrorInvalidValue);
    KernelSymbols &k = symbols(function);
    if (attribute != cudaFuncAttributeMaxDynamicSharedMemorySize || value < 0 ||
        (size_t)value + k.static_bytes > shared_limit())
        return wrong(cudaErrorInvalidValue,
                     "cudaFuncSetAttribute: %d bytes of dynamic + %zu of static shared memory; sm_%d "
                     "has %zu for a block",
                     value, k.static_bytes, settings.arch, shared_limit());
    k.dynamic_limit = std::max((size_t)value, (size_t)48 * 1024);
    return result(cudaSuccess);
}

} // namespace pm_host

// ------------------------------------------------------------------ errors
extern "C" cudaError_t cudaPeekAtLastError()
{
    LOCK;
    return result(last_error);
}

extern "C" cudaError_t cudaGetLastError()
{
    LOCK;
    const cudaError_t e = result(last_error);
    last_error = sticky;
    return e;
}

static const struct {
    cudaError_t error;
    const char *name, *text;
} ERRORS[] = {
    {cudaSuccess, "cudaSuccess", "no error"},
    {cudaErrorInvalidValue, "cudaErrorInvalidValue", "invalid argument"},
    {cudaErrorMemoryAllocation, "cudaErrorMemoryAllocation", "out of memory"},
    {cudaErrorInitializationError, "cudaErrorInitializationError", "initialization error"},
    {cudaErrorInvalidConfiguration, "cudaErrorInvalidConfiguration", "invalid configuration argument"},
    {cudaErrorInvalidDevicePointer, "cudaErrorInvalidDevicePointer", "invalid device pointer"},
    {cudaErrorInvalidMemcpyDirection, "cudaErrorInvalidMemcpyDirection",
     "invalid copy direction for memcpy"},
    {cudaErrorInsufficientDriver, "cudaErrorInsufficientDriver",
     "CUDA driver version is insufficient for CUDA runtime version"},
    {cudaErrorInvalidDeviceFunction, "cudaErrorInvalidDeviceFunction", "invalid device function"},
    {cudaErrorNoDevice, "cudaErrorNoDevice", "no CUDA-capable device is detected"},
    {cudaErrorInvalidDevice, "cudaErrorInvalidDevice", "invalid device ordinal"},
    {cudaErrorInvalidResourceHandle, "cudaErrorInvalidResourceHandle", "invalid resource handle"},
    {cudaErrorNotReady, "cudaErrorNotReady", "device not ready"},
    {cudaErrorIllegalAddress, "cudaErrorIllegalAddress", "an illegal memory access was encountered"},
    {cudaErrorLaunchOutOfResources, "cudaErrorLaunchOutOfResources",
     "too many resources requested for launch"},
    {cudaErrorLaunchFailure, "cudaErrorLaunchFailure", "unspecified launch failure"},
    {cudaErrorNotSupported, "cudaErrorNotSupported", "operation not supported"},
    {cudaErrorStreamCaptureUnsupported, "cudaErrorStreamCaptureUnsupported",
     "operation not permitted when stream is capturing"},
    {cudaErrorStreamCaptureInvalidated, "cudaErrorStreamCaptureInvalidated",
     "operation failed due to a previous error during capture"},
    {cudaErrorStreamCaptureUnmatched, "cudaErrorStreamCaptureUnmatched",
     "operation not permitted: the capture was not begun in this stream"},
    {cudaErrorStreamCaptureUnjoined, "cudaErrorStreamCaptureUnjoined",
     "capturing stream has unjoined work"},
    {cudaErrorUnknown, "cudaErrorUnknown", "unknown error"},
};

extern "C" const char *cudaGetErrorName(cudaError_t error)
{
    for (const auto &e : ERRORS)
        if (e.error == error)
            return e.name;
    return "unrecognized error code";
}

// With what the stand-in knows more than the runtime would say.
extern "C" const char *cudaGetErrorString(cudaError_t error)
{
    LOCK;
    static std::string text;
    text = "unrecognized error code";
    for (const auto &e : ERRORS)
        if (e.error == error)
            text = e.text;
    if (error != cudaSuccess && !fault.empty())
        text += ": " + fault;
    else if (error != cudaSuccess && !complaint.empty())
        text += ": " + complaint;
    return text.c_str();
}

// ------------------------------------------------------------------ the device
extern "C" cudaError_t cudaGetDeviceCount(int *count)
{
    *count = 1;
    return result(cudaSuccess);
}

extern "C" cudaError_t cudaSetDevice(int device)
{
    return device == 0 ? result(cudaSuccess)
                       : wrong(cudaErrorInvalidDevice, "device %d; there is one, 0", device);
}

extern "C" cudaError_t cudaGetDevice(int *device)
{
    *device = 0;
    return result(cudaSuccess);
}

extern "C" cudaError_t cudaGetDeviceProperties(cudaDeviceProp *p, int device)
{
    if (device != 0)
        return wrong(cudaErrorInvalidDevice, "device %d; there is one, 0", device);
    *p = {};
    snprintf(p->name, sizeof p->name, "CPU in place of sm_%d", settings.arch);
    p->totalGlobalMem = (size_t)8 << 30;
    p->sharedMemPerBlock = 48 * 1024;
    p->sharedMemPerBlockOptin = shared_limit();
    p->sharedMemPerMultiprocessor = shared_limit() + 1024;
    p->major = settings.arch / 10, p->minor = settings.arch % 10;
    p->multiProcessorCount = 4; // few, so that persistent kernels loop
    p->warpSize = 32;
    p->maxThreadsPerBlock = 1024;
    p->regsPerBlock = 65536;
    p->l2CacheSize = 50 << 20;
    p->maxThreadsDim[0] = p->maxThreadsDim[1] = 1024, p->maxThreadsDim[2] = 64;
    p->maxGridSize[0] = 0x7fffffff, p->maxGridSize[1] = p->maxGridSize[2] = 65535;
    return result(cudaSuccess);
}

extern "C" cudaError_t cudaDeviceGetAttribute(int *value, cudaDeviceAttr attribute, int device)
{
    cudaDeviceProp p;
    const cudaError_t e = cudaGetDeviceProperties(&p, device);
    if (e != cudaSuccess)
        return e;
    switch (attribute) {
    case cudaDevAttrMaxSharedMemoryPerBlock:
        *value = (int)p.sharedMemPerBlock;
        break;
    case cudaDevAttrMultiProcessorCount:
        *value = p.multiProcessorCount;
        break;
    case cudaDevAttrComputeCapabilityMajor:
        *value = p.major;
        break;
    case cudaDevAttrComputeCapabilityMinor:
        *value = p.minor;
        break;
    case cudaDevAttrMaxSharedMemoryPerBlockOptin:
        *value = (int)p.sharedMemPerBlockOptin;
        break;
    default:
        return wrong(cudaErrorInvalidValue, "attribute %d is not known here", (int)attribute);
    }
    return result(cudaSuccess);
}

extern "C" cudaError_t cudaDriverGetVersion(int *version)
{
    *version = CUDART_VERSION;
    return result(cudaSuccess);
}

extern "C" cudaError_t cudaRuntimeGetVersion(int *version)
{
    *version = CUDART_VERSION;
    return result(cudaSuccess);
}

extern "C" cudaError_t cudaDeviceSynchronize()
{
    LOCK;
    if (forbidden("cudaDeviceSynchronize"))
        return result(cudaErrorStreamCaptureUnsupported);
    run_everything();
    return result(cudaSuccess);
}

extern "C" void pm_host_reset()
{
    LOCK;
    fault.clear(), complaint.clear();
    sticky = last_error = cudaSuccess;
    legacy.queue.clear();
    for (pm_host_stream *s : streams)
        s->queue.clear(), s->capture = nullptr;
}

// ------------------------------------------------------------------ memory
// Fresh memory holds NaN (and -1); so does memory that was freed.
typedef std::map<char *, Memory> Memories;

static char *take_memory(const Memories &map, size_t bytes)
{
    if (settings.fail_allocation > 0 && --settings.fail_allocation == 0)
        return nullptr;
    void *p = nullptr;
#ifdef PM_HOST_RACE
    if (&map == &device_memory)
        p = race_allocate(bytes);
    else
#else
    (void)map;
#endif
        if (posix_memalign(&p, 256, bytes))
        p = nullptr;
    if (p)
        memset(p, 0xff, bytes);
    return (char *)p;
}

static void release(Memories &map, char *p)
{
    auto at = map.find(p);
    memset(p, 0xff, at->second.bytes);
    map.erase(at);
#ifdef PM_HOST_RACE
    if (&map == &device_memory) {
        race_release(p);
        return;
    }
#endif
    free(p);
}

static cudaError_t allocate(Memories &map, const char *call, void **memory,
                            size_t bytes)
{
    if (!memory)
        return wrong(cudaErrorInvalidValue, "%s: memory is null", call);
    *memory = nullptr;
    if (bytes == 0)
        return result(cudaSuccess);
    char *p = take_memory(map, bytes);
    if (!p)
        return wrong(cudaErrorMemoryAllocation, "%s of %zu bytes", call, bytes);
    map[p] = {bytes};
    *memory = p;
    return result(cudaSuccess);
}

extern "C" cudaError_t cudaMalloc(void **memory, size_t bytes)
{
    LOCK;
    if (forbidden("cudaMalloc"))
        return result(cudaErrorStreamCaptureUnsupported);
    return allocate(device_memory, "cudaMalloc", memory, bytes);
}

extern "C" cudaError_t cudaFree(void *memory)
{
    LOCK;
    if (!memory)
        return result(cudaSuccess);
    if (forbidden("cudaFree"))
        return result(cudaErrorStreamCaptureUnsupported);
    run_everything(); // it waits for the device
    if (!device_memory.count((char *)memory))
        return wrong(cudaErrorInvalidValue, "cudaFree(%p): not from cudaMalloc, or freed before",
                     memory);
    release(device_memory, (char *)memory);
    return result(cudaSuccess);
}

extern "C" cudaError_t cudaMallocAsync(void **memory, size_t bytes, cudaStream_t stream)
{
    LOCK;
    pm_host_stream *s = real(stream);
    if (!s)
        return wrong(cudaErrorInvalidResourceHandle, "cudaMallocAsync: no such stream");
    if (s->capture)
        return wrong(cudaErrorNotSupported, "cudaMallocAsync in a captured stream");
    return allocate(device_memory, "cudaMallocAsync", memory, bytes);
}

extern "C" cudaError_t cudaFreeAsync(void *memory, cudaStream_t stream)
{
    LOCK;
    if (!memory)
        return result(cudaSuccess);
    pm_host_stream *s = real(stream);
    if (!s)
        return wrong(cudaErrorInvalidResourceHandle, "cudaFreeAsync: no such stream");
    if (s->capture)
        return wrong(cudaErrorNotSupported, "cudaFreeAsync in a captured stream");
    if (!device_memory.count((char *)memory))
        return wrong(cudaErrorInvalidValue, "cudaFreeAsync(%p): not from cudaMalloc, or freed before",
                     memory);
    push(s, [memory] {
        if (device_memory.count((char *)memory))
            release(device_memory, (char *)memory);
    });
    return result(cudaSuccess);
}

extern "C" cudaError_t cudaHostAlloc(void **memory, size_t bytes, unsigned)
{
    LOCK;
    if (forbidden("cudaHostAlloc"))
        return result(cudaErrorStreamCaptureUnsupported);
    return allocate(pinned_memory, "cudaHostAlloc", memory, bytes);
}

extern "C" cudaError_t cudaMallocHost(void **memory, size_t bytes)
{
    return cudaHostAlloc(memory, bytes, cudaHostAllocDefault);
}

extern "C" cudaError_t cudaFreeHost(void *memory)
{
    LOCK;
    if (!memory)
        return result(cudaSuccess);
    run_everything();
    if (!pinned_memory.count((char *)memory))
        return wrong(cudaErrorInvalidValue, "cudaFreeHost(%p): not from cudaMallocHost, or freed before",
                     memory);
    release(pinned_memory, (char *)memory);
    return result(cudaSuccess);
}

extern "C" cudaError_t cudaDeviceReset()
{
    LOCK;
    pm_host_reset();
    while (!device_memory.empty())
        release(device_memory, device_memory.begin()->first);
    return cudaSuccess;
}

extern "C" cudaError_t cudaMemGetInfo(size_t *free, size_t *total)
{
    LOCK;
    size_t used = 0;
    for (auto &m : device_memory)
        used += m.second.bytes;
    *total = (size_t)8 << 30;
    *free = *total > used ? *total - used : 0;
    return result(cudaSuccess);
}

extern "C" cudaError_t cudaPointerGetAttributes(cudaPointerAttributes *attributes, const void *memory)
{
    LOCK;
    *attributes = {};
    attributes->device = -2; // cudaInvalidDeviceId
    if (in_device(memory, 1))
        *attributes = {cudaMemoryTypeDevice, 0, (void *)memory, nullptr};
    else if (in_pinned(memory))
        *attributes = {cudaMemoryTypeHost, 0, (void *)memory, (void *)memory};
    return result(cudaSuccess);
}

static cudaError_t set(const char *call, void *memory, int value, size_t bytes, cudaStream_t stream)
{
    if (bytes == 0)
        return result(cudaSuccess);
    if (!in_device(memory, bytes))
        return wrong(cudaErrorInvalidValue, "%s: %p + %zu bytes is not within an allocation", call,
                     memory, bytes);
    if (!submit(stream, [=] { memset(memory, value, bytes); }))
        return result(cudaErrorInvalidResourceHandle);
    return result(cudaSuccess);
}

extern "C" cudaError_t cudaMemsetAsync(void *memory, int value, size_t bytes, cudaStream_t stream)
{
    LOCK;
    return set("cudaMemsetAsync", memory, value, bytes, stream);
}

extern "C" cudaError_t cudaMemset(void *memory, int value, size_t bytes)
{
    LOCK;
    return set("cudaMemset", memory, value, bytes, nullptr);
}

// A host that is not pinned: what is read is read now, what is written is there on return.
static cudaError_t copy_rows(const char *call, void *to, size_t to_pitch, const void *from,
                             size_t from_pitch, size_t width, size_t height, cudaMemcpyKind kind,
                             cudaStream_t stream)
{
    if (width == 0 || height == 0)
        return result(cudaSuccess);
    if (to_pitch < width || from_pitch < width)
        return wrong(cudaErrorInvalidValue, "%s: a pitch is smaller than the width", call);
    const size_t to_bytes = to_pitch * (height - 1) + width;
    const size_t from_bytes = from_pitch * (height - 1) + width;
    const bool to_device = in_device(to, to_bytes), from_device = in_device(from, from_bytes);
    if (kind == cudaMemcpyDefault)
        kind = to_device ? from_device ? cudaMemcpyDeviceToDevice : cudaMemcpyHostToDevice
                         : from_device ? cudaMemcpyDeviceToHost : cudaMemcpyHostToHost;
    const bool to_should = kind == cudaMemcpyHostToDevice || kind == cudaMemcpyDeviceToDevice;
    const bool from_should = kind == cudaMemcpyDeviceToHost || kind == cudaMemcpyDeviceToDevice;
    if (!to || to_device != to_should || (!to_should && in_device(to, 1)))
        return wrong(cudaErrorInvalidValue, "%s: the destination %p + %zu bytes is not within %s", call,
                     to, to_bytes, to_should ? "an allocation of the device" : "host memory");
    if (!from || from_device != from_should || (!from_should && in_device(from, 1)))
        return wrong(cudaErrorInvalidValue, "%s: the source %p + %zu bytes is not within %s", call, from,
                     from_bytes, from_should ? "an allocation of the device" : "host memory");
    pm_host_stream *s = real(stream);
    if (!s)
        return wrong(cudaErrorInvalidResourceHandle, "%s: no such stream", call);
    std::shared_ptr<std::vector<char>> staged;
    if (!from_device && !in_pinned(from) && !s->capture)
        staged = std::make_shared<std::vector<char>>((const char *)from, (const char *)from + from_bytes);
    const bool submitted = submit(stream, [=] {
        const char *source = staged ? staged->data() : (const char *)from;
        for (size_t i = 0; i < height; i++)
            memmove((char *)to + i * to_pitch, source + i * from_pitch, width);
    });
    if (!submitted)
        return result(cudaErrorStreamCaptureUnsupported);
    if (!to_device && !in_pinned(to)) {
        if (s->capture)
            return wrong(cudaErrorStreamCaptureUnsupported,
                         "%s to host memory that is not pinned, in a captured stream", call);
        run_all(s);
    }
    return result(cudaSuccess);
}

extern "C" cudaError_t cudaMemcpyAsync(void *to, const void *from, size_t bytes, cudaMemcpyKind kind,
                                       cudaStream_t stream)
{
    LOCK;
    return copy_rows("cudaMemcpyAsync", to, bytes, from, bytes, bytes, 1, kind, stream);
}

extern "C" cudaError_t cudaMemcpy2DAsync(void *to, size_t to_pitch, const void *from, size_t from_pitch,
                                         size_t width, size_t height, cudaMemcpyKind kind,
                                         cudaStream_t stream)
{
    LOCK;
    return copy_rows("cudaMemcpy2DAsync", to, to_pitch, from, from_pitch, width, height, kind, stream);
}

extern "C" cudaError_t cudaMemcpy(void *to, const void *from, size_t bytes, cudaMemcpyKind kind)
{
    LOCK;
    if (forbidden("cudaMemcpy"))
        return result(cudaErrorStreamCaptureUnsupported);
    const cudaError_t e = copy_rows("cudaMemcpy", to, bytes, from, bytes, bytes, 1, kind, nullptr);
    run_all(&legacy);
    return result(e);
}

// ------------------------------------------------------------------ streams
extern "C" cudaError_t cudaStreamCreateWithFlags(cudaStream_t *stream, unsigned flags)
{
    LOCK;
    if (flags & ~1u)
        return wrong(cudaErrorInvalidValue, "cudaStreamCreateWithFlags: flags %u", flags);
    *stream = new pm_host_stream;
    (*stream)->blocking = !(flags & cudaStreamNonBlocking);
    streams.insert(*stream);
    return result(cudaSuccess);
}

extern "C" cudaError_t cudaStreamCreate(cudaStream_t *stream)
{
    return cudaStreamCreateWithFlags(stream, cudaStreamDefault);
}

#define STREAM(call)                                                                               \
    LOCK;                                                                                          \
    pm_host_stream *s = real(stream);                                                              \
    if (!s)                                                                                        \
        return wrong(cudaErrorInvalidResourceHandle, call ": no such stream: %p", (void *)stream)

extern "C" cudaError_t cudaStreamDestroy(cudaStream_t stream)
{
    STREAM("cudaStreamDestroy");
    if (s == &legacy)
        return wrong(cudaErrorInvalidResourceHandle, "cudaStreamDestroy: the default stream");
    run_all(s);
    for (pm_host_event *e : events)
        if (e->stream == s)
            e->stream = nullptr;
    streams.erase(s);
    delete s;
    return result(cudaSuccess);
}

extern "C" cudaError_t cudaStreamSynchronize(cudaStream_t stream)
{
    STREAM("cudaStreamSynchronize");
    if (s->capture) {
        forbidden("cudaStreamSynchronize");
        return result(cudaErrorStreamCaptureUnsupported);
    }
    run_all(s);
    return result(cudaSuccess);
}

extern "C" cudaError_t cudaStreamQuery(cudaStream_t stream)
{
    STREAM("cudaStreamQuery");
    if (s->capture) {
        forbidden("cudaStreamQuery");
        return result(cudaErrorStreamCaptureUnsupported);
    }
    if (run_one(s) && !s->queue.empty())
        return cudaErrorNotReady; // not an error to be remembered
    return result(cudaSuccess);
}

// ------------------------------------------------------------------ events
extern "C" cudaError_t cudaEventCreateWithFlags(cudaEvent_t *event, unsigned flags)
{
    LOCK;
    *event = new pm_host_event;
    (*event)->timing = !(flags & cudaEventDisableTiming);
    events.insert(*event);
    return result(cudaSuccess);
}

extern "C" cudaError_t cudaEventCreate(cudaEvent_t *event)
{
    return cudaEventCreateWithFlags(event, cudaEventDefault);
}

#define EVENT(call)                                                                                \
    if (!events.count(event))                                                                      \
    return wrong(cudaErrorInvalidResourceHandle, call ": no such event: %p", (void *)event)

static void merge(std::vector<int> &into, const std::vector<int> &from)
{
    into.insert(into.end(), from.begin(), from.end());
    std::sort(into.begin(), into.end());
    into.erase(std::unique(into.begin(), into.end()), into.end());
}

static double now()
{
    struct timespec t;
    clock_gettime(CLOCK_MONOTONIC, &t);
    return (double)t.tv_sec + 1e-9 * (double)t.tv_nsec;
}

extern "C" cudaError_t cudaEventRecord(cudaEvent_t event, cudaStream_t stream)
{
    STREAM("cudaEventRecord");
    EVENT("cudaEventRecord");
    event->graph = s->capture;
    if (s->capture) {
        event->after = s->after;
        return result(cudaSuccess);
    }
    event->stream = s;
    const long number = ++event->recorded;
    push(s, [event, number] {
        if (events.count(event))
            event->reached = number, event->time = now();
    });
    return result(cudaSuccess);
}

static void reach(pm_host_event *event, long number)
{
    while (event->reached < number && event->stream && run_one(event->stream)) {
    }
}

extern "C" cudaError_t cudaStreamWaitEvent(cudaStream_t stream, cudaEvent_t event, unsigned flags)
{
    STREAM("cudaStreamWaitEvent");
    EVENT("cudaStreamWaitEvent");
    if (flags)
        return wrong(cudaErrorInvalidValue, "cudaStreamWaitEvent: flags %u", flags);
    if (event->graph) { // the stream joins the capture
        if (s->capture && s->capture != event->graph)
            return wrong(cudaErrorStreamCaptureUnsupported,
                         "cudaStreamWaitEvent: an event of another capture");
        if (!s->capture) {
            s->capture = event->graph;
            s->capture->streams.insert(s);
            s->after.clear();
        }
        merge(s->after, event->after);
        return result(cudaSuccess);
    }
    if (s->capture) {
        forbidden("cudaStreamWaitEvent for an event that was recorded outside the capture");
        return result(cudaErrorStreamCaptureUnsupported);
    }
    const long number = event->recorded;
    push(s, [event, number] {
        if (events.count(event))
            reach(event, number);
    });
    return result(cudaSuccess);
}

extern "C" cudaError_t cudaEventSynchronize(cudaEvent_t event)
{
    LOCK;
    EVENT("cudaEventSynchronize");
    if (event->graph) {
        forbidden("cudaEventSynchronize");
        return result(cudaErrorStreamCaptureUnsupported);
    }
    reach(event, event->recorded);
    return result(cudaSuccess);
}

extern "C" cudaError_t cudaEventQuery(cudaEvent_t event)
{
    LOCK;
    EVENT("cudaEventQuery");
    if (event->stream && event->reached < event->recorded)
        run_one(event->stream);
    return event->reached < event->recorded ? cudaErrorNotReady : result(cudaSuccess);
}

extern "C" cudaError_t cudaEventElapsedTime(float *milliseconds, cudaEvent_t begin, cudaEvent_t end)
{
    LOCK;
    if (!events.count(begin) || !events.count(end) || !begin->timing || !end->timing ||
        !begin->recorded || !end->recorded)
        return wrong(cudaErrorInvalidResourceHandle,
                     "cudaEventElapsedTime: an event that was not recorded, or has no timing");
    if (begin->reached < begin->recorded || end->reached < end->recorded)
        return cudaErrorNotReady;
    *milliseconds = (float)(1e3 * (end->time - begin->time));
    return result(cudaSuccess);
}

extern "C" cudaError_t cudaEventDestroy(cudaEvent_t event)
{
    LOCK;
    EVENT("cudaEventDestroy");
    reach(event, event->recorded);
    events.erase(event);
    delete event;
    return result(cudaSuccess);
}

// ------------------------------------------------------------------ graphs
extern "C" cudaError_t cudaStreamBeginCapture(cudaStream_t stream, cudaStreamCaptureMode)
{
    STREAM("cudaStreamBeginCapture");
    if (s == &legacy || s->capture)
        return wrong(cudaErrorStreamCaptureUnsupported, "cudaStreamBeginCapture: %s",
                     s->capture ? "the stream is captured already" : "the default stream");
    s->capture = new pm_host_graph;
    s->capture->origin = s;
    s->capture->streams.insert(s);
    s->after.clear();
    graphs.insert(s->capture);
    return result(cudaSuccess);
}

extern "C" cudaError_t cudaStreamIsCapturing(cudaStream_t stream, cudaStreamCaptureStatus *status)
{
    STREAM("cudaStreamIsCapturing");
    *status = !s->capture         ? cudaStreamCaptureStatusNone
              : s->capture->broken ? cudaStreamCaptureStatusInvalidated
                                   : cudaStreamCaptureStatusActive;
    return result(cudaSuccess);
}

// Which nodes come before those in `last`, themselves included.
static std::vector<bool> ancestors(const pm_host_graph *g, const std::vector<int> &last)
{
    std::vector<bool> seen(g->nodes.size());
    for (int n : last)
        seen[(size_t)n] = true;
    for (size_t n = g->nodes.size(); n-- > 0;)
        if (seen[n])
            for (int before : g->nodes[n].after)
                seen[(size_t)before] = true;
    return seen;
}

extern "C" cudaError_t cudaStreamEndCapture(cudaStream_t stream, cudaGraph_t *graph)
{
    STREAM("cudaStreamEndCapture");
    *graph = nullptr;
    pm_host_graph *g = s->capture;
    if (!g || g->origin != s)
        return wrong(cudaErrorStreamCaptureUnmatched,
                     "cudaStreamEndCapture: the capture was not begun in this stream");
    const std::vector<bool> joined = ancestors(g, s->after);
    const bool all = std::count(joined.begin(), joined.end(), true) == (long)joined.size();
    if (settings.fail_capture)
        g->broken = true, settings.fail_capture = false;
    for (pm_host_stream *o : g->streams)
        o->capture = nullptr;
    for (pm_host_event *e : events)
        if (e->graph == g)
            e->graph = nullptr;
    if (g->broken || !all) {
        graphs.erase(g);
        const bool broken = g->broken;
        delete g;
        return broken ? result(cudaErrorStreamCaptureInvalidated)
                      : wrong(cudaErrorStreamCaptureUnjoined,
                              "cudaStreamEndCapture: work in another stream that this one does not "
                              "wait for");
    }
    *graph = g;
    return result(cudaSuccess);
}

extern "C" cudaError_t cudaGraphInstantiate(cudaGraphExec_t *exec, cudaGraph_t graph,
                                            unsigned long long flags)
{
    LOCK;
    if (!exec || !graphs.count(graph) || flags)
        return wrong(cudaErrorInvalidValue, "cudaGraphInstantiate: %s",
                     flags ? "flags" : "no such graph");
    *exec = new pm_host_graph_exec{graph->nodes};
    executables.insert(*exec);
    return result(cudaSuccess);
}

// Runs the nodes in an order that their dependencies allow: the first captured first, or the last.
static void run_graph(const std::vector<pm_host_node> &nodes)
{
    std::vector<size_t> waits(nodes.size());
    std::vector<std::vector<size_t>> next(nodes.size());
    std::set<size_t> ready;
    for (size_t n = 0; n < nodes.size(); n++) {
        waits[n] = nodes[n].after.size();
        for (int before : nodes[n].after)
            next[(size_t)before].push_back(n);
        if (!waits[n])
            ready.insert(n);
    }
    while (!ready.empty() && fault.empty()) {
        const size_t n = settings.order == Order::FORWARD ? *ready.begin() : *ready.rbegin();
        ready.erase(n);
        nodes[n].work();
        for (size_t m : next[n])
            if (--waits[m] == 0)
                ready.insert(m);
    }
}

extern "C" cudaError_t cudaGraphLaunch(cudaGraphExec_t exec, cudaStream_t stream)
{
    LOCK;
    if (!executables.count(exec))
        return wrong(cudaErrorInvalidValue, "cudaGraphLaunch: no such executable graph");
    auto nodes = std::make_shared<std::vector<pm_host_node>>(exec->nodes);
    graph_launches++;
    if (!submit(stream, [nodes] { run_graph(*nodes); }))
        return result(cudaErrorInvalidResourceHandle);
    return result(cudaSuccess);
}

extern "C" cudaError_t cudaGraphGetNodes(cudaGraph_t graph, void *nodes, size_t *count)
{
    LOCK;
    if (!graphs.count(graph) || nodes)
        return wrong(cudaErrorInvalidValue, "cudaGraphGetNodes: no such graph, or nodes is not null");
    *count = graph->nodes.size();
    return result(cudaSuccess);
}

extern "C" cudaError_t cudaGraphDestroy(cudaGraph_t graph)
{
    LOCK;
    if (!graphs.erase(graph))
        return wrong(cudaErrorInvalidValue, "cudaGraphDestroy: no such graph");
    delete graph;
    return result(cudaSuccess);
}

extern "C" cudaError_t cudaGraphExecDestroy(cudaGraphExec_t exec)
{
    LOCK;
    if (!executables.erase(exec))
        return wrong(cudaErrorInvalidValue, "cudaGraphExecDestroy: no such executable graph");
    delete exec;
    return result(cudaSuccess);
}

// ------------------------------------------------------------------ settings
extern "C" bool pm_host_set(const char *name, const char *value)
{
    LOCK;
    const std::string n = name, v = value;
    if (n == "order" && v == "forward")
        settings.order = Order::FORWARD;
    else if (n == "order" && v == "reverse")
        settings.order = Order::REVERSE;
    else if (n == "order" && v == "shuffled")
        settings.order = Order::SHUFFLED;
    else if (n == "seed")
        settings.seed = strtoull(value, nullptr, 10);
    else if (n == "arch" && (v == "80" || v == "90"))
        settings.arch = atoi(value);
    else if (n == "timeout" && atof(value) > 0)
        settings.timeout = atof(value);
    else if (n == "fail_allocation")
        settings.fail_allocation = atol(value);
    else if (n == "fail_capture" && (v == "0" || v == "1"))
        settings.fail_capture = v == "1";
    else if (n == "heuristic" && (v == "none" || v == "plain" || v == "all"))
        settings.heuristic = v == "none" ? 0 : v == "plain" ? 1 : 2;
    else if (n == "count" && (v == "0" || v == "1"))
        settings.count = v == "1";
    else if (n == "eager" && (v == "0" || v == "1"))
        settings.eager = v == "1";
    else
        return false;
    return true;
}

#ifndef PM_HOST_RACE
extern "C" const char *pm_host_moved() { return ""; }
#endif

extern "C" long pm_host_launches(const char *name)
{
    LOCK;
    long count = 0;
    if (name && !strcmp(name, "cudaGraphLaunch"))
        return graph_launches;
    for (auto &l : launches)
        if (!name || l.first == name)
            count += l.second;
    return count;
}

static const bool environment_read = [] {
    const char *text = getenv("PM_HOST");
    std::string words = text ? text : "";
    for (char *save, *word = strtok_r(&words[0], " ", &save); word;
         word = strtok_r(nullptr, " ", &save)) {
        char *equals = strchr(word, '=');
        if (equals)
            *equals = 0;
        if (!equals || !pm_host_set(word, equals + 1)) {
            fprintf(stderr, "cuda-on-cpu: PM_HOST: unknown setting %s\n", word);
            abort();
        }
    }
    return true;
}();
