// race.cpp: the race build. Kernels are compiled with -fsanitize=thread, whose calls end here instead
// of in its runtime: every access to shared and device memory is compared with the last ones to the
// same bytes. Two accesses of which one writes must be ordered:
//   - in a block, by a barrier of the block between them, or in a warp by a collective that both
//     lanes took part in between (every thread has a vector clock over the lanes of its warp);
//   - between blocks of a launch never (but a block that did an atomic is believed to know what it does);
//   - between launches always.
// It also finds reads of shared memory that nobody wrote, and accesses outside of what the kernel has.
#ifdef PM_HOST_RACE
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <map>

#include <dlfcn.h>
#include <sys/mman.h>

#include "internal.h"

namespace pm_host {

// ------------------------------------------------------------------ what is remembered
// An access: who, when, where. epoch counts block barriers and blocks; clock is the thread's own.
struct Record {
    uint64_t thread : 10, atomic : 1, flying : 1, clock : 26, epoch : 26; // flying: of a cp.async
    uint32_t place; // of the instruction: offset in the library; from SITES on: an index of sites
    uint32_t bytes; // which of the cell's two
};
// Of two bytes: the last write and three readers since: the last, the one before it, and the last of
// another warp than the last. So some reader of another warp, and of another thread, is never lost.
struct Cell {
    Record write, last, before, other;
};
constexpr uint32_t SITES = 0x80000000u;
constexpr uint64_t MOST_EPOCHS = 1u << 26, MOST_CLOCKS = 1u << 26;
constexpr size_t CELL_BYTES = 2;

static uint64_t epoch = 1, block_epoch, launch_epoch; // now; of the block's and the launch's begin
static bool block_acquired;
static uint32_t clocks[1024][32]; // (thread, lane of its warp)
static std::vector<std::pair<uint64_t, unsigned>> blocks; // (first epoch, number) of the launch
static std::vector<std::pair<const char *, int>> sites;
static dim3 grid;

struct Shadow {
    char *begin = nullptr, *end = nullptr;
    Cell *cells = nullptr;

    void cover(char *b, size_t bytes)
    {
        if (b == begin)
            return;
        if (cells)
            munmap(cells, (size_t)(end - begin) / CELL_BYTES * sizeof(Cell));
        begin = b, end = b + bytes;
        void *m = mmap(nullptr, bytes / CELL_BYTES * sizeof(Cell), PROT_READ | PROT_WRITE,
                       MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
        if (m == MAP_FAILED) {
            perror("cuda-on-cpu: no memory for the race detector");
            abort();
        }
        cells = (Cell *)m;
    }
    void forget()
    {
        if (cells)
            madvise(cells, (size_t)(end - begin) / CELL_BYTES * sizeof(Cell), MADV_DONTNEED);
    }
    bool has(const void *p) const { return p >= begin && p < end; }
};
static Shadow shared_shadow, device_shadow;

// ------------------------------------------------------------------ device memory
// One range of addresses, so that its shadow is found by an offset. First fit; gaps catch overruns.
constexpr size_t ARENA = (size_t)4 << 30, GAP = 256;
static char *arena;
static std::map<char *, size_t> taken;

char *race_allocate(size_t bytes)
{
    if (!arena) {
        void *m = mmap(nullptr, ARENA, PROT_READ | PROT_WRITE,
                       MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
        if (m == MAP_FAILED)
            return nullptr;
        arena = (char *)(((uintptr_t)m + 255) & ~(uintptr_t)255);
        device_shadow.cover(arena, ARENA - 4096);
    }
    const size_t size = (bytes + 255) / 256 * 256 + GAP;
    char *at = arena;
    for (auto &t : taken) {
        if (t.first - at >= (ptrdiff_t)size)
            break;
        at = t.first + t.second;
    }
    if (at + size > device_shadow.end)
        return nullptr;
    taken[at] = size;
    return at;
}

void race_release(char *p) { taken.erase(p); }

// ------------------------------------------------------------------ messages
static std::string place_name(uint32_t place)
{
    char text[512];
    if (place >= SITES) {
        const auto &s = sites[place - SITES];
        const char *slash = strrchr(s.first, '/');
        snprintf(text, sizeof text, "%s:%d", slash ? slash + 1 : s.first, s.second);
        return text;
    }
    Dl_info library;
    if (!dladdr((const void *)&place_name, &library))
        return "?";
    char command[1024], line[512];
    snprintf(command, sizeof command, "addr2line -s -i -e '%s' 0x%x 2>/dev/null", library.dli_fname, place);
    std::string name;
    if (FILE *pipe = popen(command, "r")) {
        while (fgets(line, sizeof line, pipe)) { // the line, then those it was inlined into
            line[strcspn(line, " \n")] = 0;
            if (strncmp(line, "device.h", 8) && strncmp(line, "cuda_", 5))
                name += (name.empty() ? "" : ", called at ") + std::string(line);
        }
        pclose(pipe);
    }
    return name.empty() ? "?" : name;
}

static uint32_t place_of(const void *pc)
{
    static char *base;
    if (!base) {
        Dl_info library;
        if (dladdr((const void *)&place_of, &library))
            base = (char *)library.dli_fbase;
    }
    return (uint32_t)((char *)pc - 1 - base);
}

static uint32_t site(const char *file, int line)
{
    static uint32_t last;
    if (last < sites.size() && sites[last].first == file && sites[last].second == line)
        return SITES + last;
    for (last = 0; last < sites.size(); last++)
        if (sites[last].first == file && sites[last].second == line)
            return SITES + last;
    sites.push_back({file, line});
    return SITES + last;
}

static std::string whose(const Record &r)
{
    if (r.epoch >= block_epoch)
        return "thread " + thread_name((int)r.thread);
    unsigned number = 0;
    for (auto &b : blocks)
        if (b.first <= r.epoch)
            number = b.second;
    char text[128];
    snprintf(text, sizeof text, "block (%u, %u, %u)", number % grid.x, number / grid.x % grid.y,
             number / grid.x / grid.y);
    return text;
}

[[noreturn]] static void report(const char *p, bool write, uint32_t place, const Record &r,
                                bool other_wrote)
{
    fail("race: %s %s (%s), which %s %s (%s) without a barrier between", write ? "writes" : "reads",
         describe(p).c_str(), place_name(place).c_str(), whose(r).c_str(),
         other_wrote ? "wrote" : "reads", place_name(r.place).c_str());
}

// ------------------------------------------------------------------ the check
static inline bool ordered(const Record &r, bool shared)
{
    if (r.epoch == epoch) {
        if (r.thread == (uint64_t)self_index)
            return true;
        return (r.thread ^ (uint64_t)self_index) < 32 &&
               clocks[self_index][r.thread % 32] >= r.clock;
    }
    return shared || r.epoch >= block_epoch || r.epoch < launch_epoch || block_acquired;
}

static inline void read_by(Cell &c, const Record &me)
{
    if (c.last.thread == me.thread && c.last.epoch == me.epoch) {
        const uint32_t bytes = c.last.bytes | me.bytes;
        c.last = me;
        c.last.bytes = bytes;
        return;
    }
    c.before = c.last;
    if (c.last.thread / 32 != me.thread / 32 || c.last.epoch < block_epoch)
        c.other = c.last;
    c.last = me;
}

static void outside(const char *p, size_t bytes, bool write)
{
    fail("out of bounds: %s %zu bytes at %s, which is not %s", write ? "writes" : "reads", bytes,
         describe(p).c_str(),
         shared_shadow.has(p) ? "shared memory of this kernel" : "an allocation of device memory");
}

// ------------------------------------------------------------------ what is moved (pm_host_moved)
struct Moved {
    long launches;
    double read, write, read_once, write_once, operations;
};
static std::map<std::string, Moved> moved;
static Moved *counting; // of the kernel that runs
constexpr size_t SECTOR = 32;
// A bit per sector of the arena: touched by this launch.
struct Touched {
    std::vector<uint64_t> bits;
    std::vector<size_t> words; // that are not 0

    double touch(size_t from, size_t bytes)
    {
        double fresh = 0;
        if (bits.empty())
            bits.resize(ARENA / SECTOR / 64);
        for (size_t s = from / SECTOR; s <= (from + bytes - 1) / SECTOR; s++) {
            uint64_t &word = bits[s / 64];
            const uint64_t bit = (uint64_t)1 << s % 64;
            if (word & bit)
                continue;
            if (!word)
                words.push_back(s / 64);
            word |= bit;
            fresh += SECTOR;
        }
        return fresh;
    }
    void clear()
    {
        for (size_t w : words)
            bits[w] = 0;
        words.clear();
    }
};
static Touched sectors_read, sectors_written;

static void count_access(const char *p, size_t bytes, Kind kind)
{
    if (!counting || !device_shadow.has(p) || bytes == 0)
        return;
    const size_t at = (size_t)(p - device_shadow.begin);
    if (kind != Kind::WRITE) {
        counting->read += (double)bytes;
        counting->read_once += sectors_read.touch(at, bytes);
    }
    if (kind != Kind::READ) {
        counting->write += (double)bytes;
        counting->write_once += sectors_written.touch(at, bytes);
    }
}

void count_operations(double operations)
{
    if (counting)
        counting->operations += operations;
}

void count_product(const char *name, double read, double write, double operations)
{
    if (!settings.count)
        return;
    Moved &m = moved[name];
    m.launches++;
    m.read += read, m.read_once += read;
    m.write += write, m.write_once += write;
    m.operations += operations;
}

static void count_launch_of(const Kernel &kernel)
{
    counting = settings.count ? &moved[kernel.symbols->name] : nullptr;
    if (!counting)
        return;
    counting->launches++;
    sectors_read.clear(), sectors_written.clear();
}

static void access(const char *p, size_t bytes, Kind kind, uint32_t place)
{
    const bool write = kind != Kind::READ;
    const bool shared = shared_shadow.has(p);
    if (!shared && !device_shadow.has(p))
        return;
    if (settings.count)
        return count_access(p, bytes, kind);
    if (self_index < 0) {
        if (!shared)
            fail("host code (%s) touches device memory at %p", place_name(place).c_str(), (void *)p);
        return;
    }
    if (shared ? !in_shared(p, bytes) : !in_device(p, bytes))
        outside(p, bytes, write);
    const Shadow &shadow = shared ? shared_shadow : device_shadow;
    Record me;
    me.thread = (uint64_t)self_index & 1023, me.atomic = kind == Kind::ATOMIC;
    me.clock = clocks[self_index][self_index % 32] % MOST_CLOCKS;
    me.epoch = epoch % MOST_EPOCHS;
    me.flying = kind == Kind::ISSUE;
    me.place = place;
    for (size_t done = 0; done < bytes;) {
        const size_t offset = (size_t)(p + done - shadow.begin), at = offset % CELL_BYTES;
        const size_t n = bytes - done < CELL_BYTES - at ? bytes - done : CELL_BYTES - at;
        me.bytes = ((1u << n) - 1) << at;
        Cell &c = shadow.cells[offset / CELL_BYTES];
        if (shared && !write && c.write.epoch < block_epoch)
            fail("uninitialised: reads %s (%s), which no thread has written",
                 describe(p + done).c_str(), place_name(place).c_str());
        if (c.write.flying && (c.write.bytes & me.bytes) && c.write.epoch >= block_epoch &&
            kind != Kind::ARRIVAL)
            fail("%s %s (%s), where a cp.async of thread %s (%s) has not arrived: nobody waited for it",
                 write ? "writes" : "reads", describe(p + done).c_str(), place_name(place).c_str(),
                 thread_name((int)c.write.thread).c_str(), place_name(c.write.place).c_str());
        if ((c.write.bytes & me.bytes) && !(me.atomic && c.write.atomic) && !ordered(c.write, shared))
            report(p + done, write, place, c.write, true);
        if (write) {
            for (const Record *r : {&c.last, &c.before, &c.other})
                if ((r->bytes & me.bytes) && !ordered(*r, shared))
                    report(p + done, true, place, *r, false);
            const uint32_t both = c.write.thread == me.thread && c.write.epoch == me.epoch
                                      ? c.write.bytes | me.bytes
                                      : me.bytes;
            c.write = me;
            c.write.bytes = both;
        } else {
            read_by(c, me);
        }
        done += n;
    }
}

void race_access(const void *p, size_t bytes, Kind kind, const char *file, int line)
{
    access((const char *)p, bytes, kind, site(file, line));
}

void race_atomic(const void *p, size_t bytes, const void *pc)
{
    access((const char *)p, bytes, Kind::ATOMIC, place_of(pc));
    if (!shared_shadow.has(p))
        block_acquired = true;
}

// ------------------------------------------------------------------ what orders
void race_launch(const Kernel &kernel, char *shared, size_t shared_bytes)
{
    shared_shadow.cover(shared, shared_bytes);
    count_launch_of(kernel);
    if (epoch > MOST_EPOCHS / 2) {
        shared_shadow.forget();
        device_shadow.forget();
        epoch = 1;
    }
    launch_epoch = ++epoch;
    blocks.clear();
    grid = kernel.grid;
    for (auto &c : clocks)
        for (uint32_t &lane : c)
            lane = 0;
}

void race_block(unsigned number)
{
    block_epoch = ++epoch;
    block_acquired = false;
    blocks.push_back({epoch, number});
    for (int t = 0; t < 1024; t++) {
        memset(clocks[t], 0, sizeof clocks[t]);
        clocks[t][t % 32] = 1;
    }
}

void race_barrier() { epoch++; }

void race_collective(int warp, uint32_t lanes)
{
    uint32_t all[32] = {};
    for (int l = 0; l < 32; l++)
        if (lanes >> l & 1)
            for (int i = 0; i < 32; i++) {
                const uint32_t c = clocks[warp * 32 + l][i];
                all[i] = all[i] > c ? all[i] : c;
            }
    for (int l = 0; l < 32; l++)
        if (lanes >> l & 1) {
            memcpy(clocks[warp * 32 + l], all, sizeof all);
            clocks[warp * 32 + l][l]++;
        }
}

} // namespace pm_host

extern "C" __attribute__((visibility("default"))) const char *pm_host_moved()
{
    static std::string text;
    text.clear();
    for (const auto &[name, m] : pm_host::moved) {
        char line[256];
        snprintf(line, sizeof line, "\t%ld\t%.0f\t%.0f\t%.0f\t%.0f\t%.0f\n", m.launches, m.read,
                 m.write, m.read_once, m.write_once, m.operations);
        text += name + line;
    }
    pm_host::moved.clear();
    pm_host::counting = nullptr;
    return text.c_str();
}

// ------------------------------------------------------------------ what the compiler calls
#define ACCESS(name, bytes, kind)                                                                  \
    extern "C" void __tsan_##name(void *p)                                                         \
    {                                                                                              \
        pm_host::access((char *)p, bytes, pm_host::Kind::kind,                                    \
                        pm_host::place_of(__builtin_return_address(0)));                           \
    }
#define ACCESSES(bytes)                                                                            \
    ACCESS(read##bytes, bytes, READ)                                                              \
    ACCESS(write##bytes, bytes, WRITE)                                                              \
    ACCESS(unaligned_read##bytes, bytes, READ)                                                    \
    ACCESS(unaligned_write##bytes, bytes, WRITE)
ACCESSES(1)
ACCESSES(2)
ACCESSES(4)
ACCESSES(8)
ACCESSES(16)
extern "C" void __tsan_read_range(void *p, size_t bytes)
{
    pm_host::access((char *)p, bytes, pm_host::Kind::READ, pm_host::place_of(__builtin_return_address(0)));
}
extern "C" void __tsan_write_range(void *p, size_t bytes)
{
    pm_host::access((char *)p, bytes, pm_host::Kind::WRITE, pm_host::place_of(__builtin_return_address(0)));
}
extern "C" void __tsan_init() {}
extern "C" void __tsan_func_entry(void *) {}
extern "C" void __tsan_func_exit() {}
extern "C" void __tsan_vptr_update(void *, void *) {}
extern "C" void __tsan_vptr_read(void *) {}
#endif
