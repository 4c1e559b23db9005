// engine.cpp: fibres, the scheduler, barriers and warp collectives.
#include <csetjmp>
#include <csignal>
#include <cstdarg>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <ctime>
#include <mutex>

#include <sys/mman.h>
#include <sys/syscall.h>
#include <ucontext.h>
#include <unistd.h>

#include "internal.h"

#if defined(__SANITIZE_ADDRESS__)
#include <sanitizer/asan_interface.h>
#define PM_ASAN 1
#else
#define PM_ASAN 0
#define ASAN_POISON_MEMORY_REGION(p, n) ((void)(p), (void)(n))
#define ASAN_UNPOISON_MEMORY_REGION(p, n) ((void)(p), (void)(n))
#endif

uint3 threadIdx, blockIdx;
dim3 blockDim, gridDim;

constexpr size_t DYNAMIC_MOST = 227 * 1024, CANARY = 1024;
alignas(1024) thread_local unsigned char pm_shared[DYNAMIC_MOST + CANARY];

namespace pm_host {

Settings settings;
std::string fault, complaint;
int self_index = -1;

size_t shared_limit() { return settings.arch >= 90 ? 227 * 1024 : 163 * 1024; }

// ------------------------------------------------------------------ the switch
// Saves what the ABI says a function keeps, on the stack of the fibre that leaves, and takes it from
// the stack of the one that comes.
#if defined(__x86_64__)
struct Context {
    void *sp;
};
extern "C" void pm_host_switch(void **save, void *load);
extern "C" void pm_host_resume();
asm(R"(
.pushsection .text
.hidden pm_host_switch
.globl pm_host_switch
.type pm_host_switch, @function
pm_host_switch:
    push %rbp
    push %rbx
    push %r12
    push %r13
    push %r14
    push %r15
    mov %rsp, (%rdi)
    mov %rsi, %rsp
.hidden pm_host_resume
.globl pm_host_resume
pm_host_resume:
    pop %r15
    pop %r14
    pop %r13
    pop %r12
    pop %rbx
    pop %rbp
    ret
.size pm_host_switch, .-pm_host_switch
.popsection
)");
static inline void switch_context(Context &from, Context &to) { pm_host_switch(&from.sp, to.sp); }
static void make_context(Context &c, char *stack_end, void (*entry)())
{
    void **sp = (void **)((uintptr_t)stack_end & ~(uintptr_t)15);
    *--sp = nullptr; // entry's return address: it does not return
    *--sp = (void *)entry;
    c.sp = sp - 6; // six registers, whatever they hold
}
#else
struct Context {
    ucontext_t u;
};
static void switch_context(Context &from, Context &to) { swapcontext(&from.u, &to.u); }
#endif

// ------------------------------------------------------------------ stacks
constexpr int MOST_THREADS = 1024;
constexpr size_t STACK = PM_ASAN ? 256 * 1024 : 64 * 1024, GUARD = 4096;

static char *stack_memory;
static int stacks_made;
static int free_stacks[MOST_THREADS], free_stack_count;

static char *stack_begin(int stack) { return stack_memory + (size_t)stack * (STACK + GUARD) + GUARD; }

// Stacks begin at different lines of a page, so that they do not fight for the same cache sets.
static char *stack_end(int stack) { return stack_begin(stack) + STACK - stack % 64 * 5 * 64 % 4096; }

static int take_stack()
{
    if (free_stack_count > 0)
        return free_stacks[--free_stack_count];
    if (!stack_memory) {
        void *m = mmap(nullptr, MOST_THREADS * (STACK + GUARD), PROT_READ | PROT_WRITE,
                       MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
        if (m == MAP_FAILED) {
            perror("cuda-on-cpu: no memory for the stacks of fibres");
            abort();
        }
        stack_memory = (char *)m;
    }
    mprotect(stack_begin(stacks_made) - GUARD, GUARD, PROT_NONE);
    return stacks_made++;
}

// ------------------------------------------------------------------ a block
enum class State : uint8_t { NEW, READY, COLLECTIVE, BARRIER, RETURNED };

struct Thread {
    Context context;
    uint3 index;
    int stack = -1;
    State state;
    // what it waits for, and where it is
    const Collective *what;
    void *operand;
    uint32_t mask;
    int line;
    const char *file;
};

struct Group { // lanes that wait for one another
    const Collective *what;
    const char *file;
    int line;
    uint32_t mask, arrived;
};

struct Warp {
    uint32_t live, ready;
    int group_count;
    Group groups[32];
};

struct Copy {
    char *shared;
    const char *global;
    int bytes, source_bytes;
    long group;
    const char *file;
    int line;
};

static Thread threads[MOST_THREADS];
static Warp warps[MOST_THREADS / 32];
static std::vector<Copy> copies[MOST_THREADS];
static long committed[MOST_THREADS];

static struct {
    int threads, warps, live;
    uint32_t ready_warps;
    int warp; // the warp that runs
    // the block barrier
    int waiting, predicates, result;
    const char *name, *file;
    int line;
} block;

static const Kernel *kernel;
static char *tls_base; // of the host thread that runs
static Context main_context;
static Thread *self;
static uint64_t random_state;

static inline uint32_t random_bits()
{
    random_state = random_state * 6364136223846793005u + 1442695040888963407u;
    return (uint32_t)(random_state >> 32);
}

static inline int pick_bit(uint32_t set)
{
    switch (settings.order) {
    case Order::FORWARD:
        return __builtin_ctz(set);
    case Order::REVERSE:
        return 31 - __builtin_clz(set);
    default: {
        const int turn = random_bits() & 31;
        const uint32_t turned = set >> turn | (turn ? set << (32 - turn) : 0);
        return (__builtin_ctz(turned) + turn) & 31;
    }
    }
}

static inline void make_ready(int warp, uint32_t lanes)
{
    warps[warp].ready |= lanes;
    block.ready_warps |= 1u << warp;
}

// The next thread to run, or -1. Stays within a warp while it can.
static inline int pick()
{
    uint32_t ready = warps[block.warp].ready;
    if (!ready || (settings.order == Order::SHUFFLED && (random_bits() & 7) == 0)) {
        if (!ready)
            block.ready_warps &= ~(1u << block.warp);
        if (!block.ready_warps)
            return -1;
        block.warp = pick_bit(block.ready_warps);
        ready = warps[block.warp].ready;
    }
    return block.warp * 32 + pick_bit(ready);
}

// ------------------------------------------------------------------ messages
static std::string format(const char *text, va_list list)
{
    char buffer[4096];
    vsnprintf(buffer, sizeof buffer, text, list);
    return buffer;
}

static std::string formatted(const char *text, ...) __attribute__((format(printf, 1, 2)));
static std::string formatted(const char *text, ...)
{
    va_list list;
    va_start(list, text);
    std::string s = format(text, list);
    va_end(list);
    return s;
}

bool complain(const char *text, ...)
{
    va_list list;
    va_start(list, text);
    complaint = format(text, list);
    va_end(list);
    return false;
}

const char *base_name(const char *file)
{
    const char *slash = strrchr(file, '/');
    return slash ? slash + 1 : file;
}

static std::string triple(uint3 v) { return formatted("(%u, %u, %u)", v.x, v.y, v.z); }
std::string thread_name(int thread) { return triple(threads[thread].index); }

std::string here()
{
    return "kernel " + kernel->symbols->name + ", block " + triple(blockIdx) +
           (self_index < 0 ? "" : ", thread " + thread_name(self_index));
}

[[noreturn]] void fail(const char *text, ...)
{
    va_list list;
    va_start(list, text);
    std::string message = format(text, list);
    va_end(list);
    if (!kernel) {
        fprintf(stderr, "cuda-on-cpu: %s\n", message.c_str());
        abort();
    }
    fault = here() + ": " + message;
    message.~basic_string(); // the stack is left as it is
    Context abandoned;
    switch_context(abandoned, main_context);
    __builtin_unreachable();
}

// Nobody can run: says who waits where.
[[noreturn]] static void deadlock()
{
    std::string waits;
    std::vector<bool> told(block.threads);
    for (int i = 0; i < block.threads; i++) {
        const Thread &t = threads[i];
        if (told[i] || t.state == State::RETURNED)
            continue;
        int count = 0;
        for (int j = i; j < block.threads; j++) {
            const Thread &o = threads[j];
            if (o.state == t.state && o.file == t.file && o.line == t.line && o.mask == t.mask)
                told[j] = true, count++;
        }
        waits += waits.empty() ? "" : "; ";
        waits += formatted("%d thread%s, the first %s, at ", count, count > 1 ? "s" : "",
                           thread_name(i).c_str());
        if (t.state == State::BARRIER)
            waits += formatted("%s (%s:%d)", block.name, base_name(t.file), t.line);
        else
            waits += formatted("%s with mask 0x%08x (%s:%d)", t.what->name, t.mask,
                               base_name(t.file), t.line);
    }
    self_index = -1;
    fail("deadlock: %s; %d of %d threads have returned", waits.c_str(), block.threads - block.live,
         block.threads);
}

// ------------------------------------------------------------------ running and waiting
static void thread_main();

static inline void start(Thread &t)
{
    t.stack = take_stack();
#if defined(__x86_64__)
    make_context(t.context, stack_end(t.stack), thread_main);
#else
    getcontext(&t.context.u);
    t.context.u.uc_stack.ss_sp = stack_begin(t.stack);
    t.context.u.uc_stack.ss_size = (size_t)(stack_end(t.stack) - stack_begin(t.stack));
    t.context.u.uc_link = nullptr;
    makecontext(&t.context.u, thread_main, 0);
#endif
}

static inline void set_self(int thread)
{
    self = &threads[thread];
    self_index = thread;
    threadIdx = self->index;
}

static inline void go_on(Context &from, int next)
{
    set_self(next);
    if (self->state == State::NEW) {
        self->state = State::READY;
        start(*self);
    }
    switch_context(from, self->context);
}

// The thread that runs has something to wait for: lets others run until it is ready again.
static inline void wait()
{
    const int next = pick();
    if (next < 0)
        deadlock();
    if (next == self_index)
        return;
    go_on(self->context, next);
}

static void release_barrier()
{
    block.result = block.predicates;
    block.waiting = block.predicates = 0;
    for (int i = 0; i < block.threads; i++)
        if (threads[i].state == State::BARRIER) {
            threads[i].state = State::READY;
            make_ready(i / 32, 1u << i % 32);
        }
    block.warp = pick_bit(block.ready_warps); // not the one that happened to come last
#ifdef PM_HOST_RACE
    race_barrier();
#endif
}

int block_barrier(bool predicate, const char *name, const char *file, int line)
{
    if (block.waiting == 0) {
        block.name = name, block.file = file, block.line = line;
    } else if (block.line != line || block.file != file) {
        int other = 0;
        while (threads[other].state != State::BARRIER)
            other++;
        fail("divergent barrier: this thread is at %s (%s:%d), thread %s at %s (%s:%d)", name,
             base_name(file), line, thread_name(other).c_str(), block.name, base_name(block.file),
             block.line);
    }
    self->state = State::BARRIER;
    self->file = file, self->line = line, self->mask = 0;
    warps[block.warp].ready &= ~(1u << self_index % 32);
    block.predicates += predicate;
    if (++block.waiting == block.live)
        release_barrier();
    wait();
    return block.result;
}

// Every live lane of the group is there: computes and lets them go on.
static void complete(int warp, int group_index)
{
    Warp &w = warps[warp];
    const Group g = w.groups[group_index];
    w.groups[group_index] = w.groups[--w.group_count];
    void *operand[32];
    Thread *first = &threads[warp * 32];
    for (int l = 0; l < 32; l++) {
        const bool present = g.arrived >> l & 1;
        operand[l] = present ? first[l].operand : nullptr;
        if (present)
            first[l].state = State::READY;
    }
    if (g.what->whole && g.arrived != 0xffffffffu)
        fail("%s (%s:%d) needs all 32 lanes of warp %d; those there: 0x%08x", g.what->name,
             base_name(g.file), g.line, warp, g.arrived);
    if (g.what->run)
        g.what->run(operand, g.arrived, g.file, g.line);
    make_ready(warp, g.arrived);
#ifdef PM_HOST_RACE
    race_collective(warp, g.arrived);
#endif
}

void rendezvous(const Collective &what, uint32_t mask, void *operand, const char *file, int line)
{
    Warp &w = warps[block.warp];
    const uint32_t bit = 1u << self_index % 32;
    if (!(mask & bit))
        fail("%s (%s:%d): the mask 0x%08x does not name the calling lane %d", what.name,
             base_name(file), line, mask, self_index % 32);
    self->what = &what, self->operand = operand, self->mask = mask;
    self->file = file, self->line = line;
    self->state = State::COLLECTIVE;
    w.ready &= ~bit;
    int i = 0;
    while (i < w.group_count && !(w.groups[i].what == &what && w.groups[i].mask == mask &&
                                  w.groups[i].line == line && w.groups[i].file == file))
        i++;
    if (i == w.group_count)
        w.groups[w.group_count++] = {&what, file, line, mask, 0};
    w.groups[i].arrived |= bit;
    if (w.groups[i].arrived == (mask & w.live))
        complete(block.warp, i);
    wait();
}

static void thread_returned()
{
    const int warp = self_index / 32;
    Warp &w = warps[warp];
    const uint32_t bit = 1u << self_index % 32;
    if (!copies[self_index].empty()) {
        const Copy &c = copies[self_index][0];
        fail("returned with a cp.async (%s:%d) that nobody waited for", base_name(c.file), c.line);
    }
    wgmma_returned();
    self->state = State::RETURNED;
    w.live &= ~bit;
    w.ready &= ~bit;
    block.live--;
    for (int i = 0; i < w.group_count; i++)
        if (w.groups[i].arrived && w.groups[i].arrived == (w.groups[i].mask & w.live)) {
            complete(warp, i);
            i = -1;
        }
    if (block.waiting > 0 && block.waiting == block.live)
        release_barrier();
}

// The life of a fibre: runs threads that have not begun, one after another, on one stack.
static void thread_main()
{
    for (;;) {
        kernel->thread();
        const int stack = self->stack;
        thread_returned();
        Context done;
        if (block.live == 0) {
            self_index = -1;
            free_stacks[free_stack_count++] = stack;
            switch_context(done, main_context);
        }
        const int next = pick();
        if (next < 0)
            deadlock();
        if (threads[next].state == State::NEW) {
            set_self(next);
            self->state = State::READY;
            self->stack = stack;
        } else {
            free_stacks[free_stack_count++] = stack;
            go_on(done, next);
        }
    }
}

// ------------------------------------------------------------------ shared memory
static char *variable_begin(const SharedVariable &v) { return tls_base + v.offset; }

bool in_shared(const void *p, size_t bytes)
{
    const char *b = (const char *)p, *dynamic = (const char *)pm_shared;
    if (b >= dynamic && b + bytes <= dynamic + kernel->dynamic_bytes)
        return true;
    for (const SharedVariable &v : kernel->symbols->variables)
        if (b >= variable_begin(v) && b + bytes <= variable_begin(v) + v.bytes)
            return true;
    return false;
}

bool in_shared_storage(const void *p)
{
    return (const char *)p >= tls_base && (const char *)p < tls_base + storage_bytes();
}

std::string describe(const void *p)
{
    const char *b = (const char *)p, *dynamic = (const char *)pm_shared;
    if (kernel) {
        for (const SharedVariable &v : kernel->symbols->variables)
            if (b >= variable_begin(v) && b < variable_begin(v) + v.bytes)
                return formatted("shared %s + %td bytes", v.name.c_str(), b - variable_begin(v));
        if (b >= dynamic && b < dynamic + sizeof pm_shared)
            return formatted("dynamic shared memory + %td bytes (of %zu)", b - dynamic,
                             kernel->dynamic_bytes);
    }
    const std::string device = describe_device(p);
    return device.empty() ? formatted("%p", p) : device;
}

void check_aligned(const void *p, size_t alignment, const char *what)
{
    if ((uintptr_t)p % alignment)
        fail("misaligned: %s at %s needs an address that is a multiple of %zu", what,
             describe(p).c_str(), alignment);
}

void check_shared(const void *p, size_t bytes, size_t alignment, const char *what)
{
    if (!in_shared(p, bytes))
        fail("out of bounds: %s at %s is not in the block's shared memory", what,
             describe(p).c_str());
    check_aligned(p, alignment, what);
}

static void poison_shared()
{
    for (const SharedVariable &v : kernel->symbols->variables)
        memset(variable_begin(v), 0xff, v.bytes);
    ASAN_UNPOISON_MEMORY_REGION(pm_shared, sizeof pm_shared);
    memset(pm_shared, 0xff, kernel->dynamic_bytes + CANARY);
    ASAN_POISON_MEMORY_REGION(pm_shared + kernel->dynamic_bytes,
                              sizeof pm_shared - kernel->dynamic_bytes);
}

// Writes behind the end are seen when the block has ended.
static void check_canary()
{
    ASAN_UNPOISON_MEMORY_REGION(pm_shared, sizeof pm_shared);
    const unsigned char *end = pm_shared + kernel->dynamic_bytes;
    for (size_t i = 0; i < CANARY; i++)
        if (end[i] != 0xff) {
            fault = here() + formatted(": out of bounds: somebody wrote %zu bytes behind the end of "
                                       "the %zu bytes of dynamic shared memory",
                                       i, kernel->dynamic_bytes);
            return;
        }
}

// ------------------------------------------------------------------ cp.async
void async_copy(void *shared, const void *global, int bytes, int source_bytes, const char *file,
                int line)
{
    check_shared(shared, (size_t)bytes, (size_t)bytes, "the destination of cp.async");
    check_aligned(global, (size_t)bytes, "the source of cp.async");
    if (source_bytes < 0 || source_bytes > bytes)
        fail("cp.async (%s:%d) of %d bytes with source size %d", base_name(file), line, bytes,
             source_bytes);
    if (source_bytes && in_shared_storage(global))
        fail("the source of cp.async (%s:%d) is in shared memory", base_name(file), line);
    race_access(shared, (size_t)bytes, Kind::ISSUE, file, line);
    race_access(global, (size_t)source_bytes, Kind::READ, file, line);
    memset(shared, 0xff, (size_t)bytes);
    copies[self_index].push_back({(char *)shared, (const char *)global, bytes, source_bytes,
                                  committed[self_index], file, line});
}

void async_commit() { committed[self_index]++; }

void async_wait(int groups_left)
{
    std::vector<Copy> &queue = copies[self_index];
    const long until = groups_left < 0 ? committed[self_index] + 1 : committed[self_index] - groups_left;
    size_t n = 0;
    while (n < queue.size() && queue[n].group < until) {
        const Copy &c = queue[n++];
        race_access(c.shared, (size_t)c.bytes, Kind::ARRIVAL, c.file, c.line);
        if (!settings.count) // it was at the issue
            race_access(c.global, (size_t)c.source_bytes, Kind::READ, c.file, c.line);
        memcpy(c.shared, c.global, (size_t)c.source_bytes);
        memset(c.shared + c.source_bytes, 0, (size_t)(c.bytes - c.source_bytes));
    }
    queue.erase(queue.begin(), queue.begin() + (long)n);
    if (n)
        wgmma_copies_arrived();
}

// ------------------------------------------------------------------ signals
// A wild address, a stack that overflows, a division by zero, a loop that never ends: the handler makes
// the host thread go on where the launch was made.
static struct sigaction old_actions[4];
static const int SIGNALS[4] = {SIGSEGV, SIGBUS, SIGFPE, SIGILL};
static stack_t old_alternate;

static int time_signal() { return SIGRTMIN + 7; }

static void on_signal(int number, siginfo_t *info, void *context)
{
    if (!kernel || self_index < 0) {
        if (number == time_signal())
            return;
        for (int i = 0; i < 4; i++)
            sigaction(SIGNALS[i], &old_actions[i], nullptr);
        return; // happens again, to the one who was there before
    }
    const char *p = (const char *)info->si_addr;
    std::string what;
    if (number == time_signal())
        what = formatted("still running after %g s: a loop that does not end, or one that waits for "
                         "another thread without a barrier",
                         settings.timeout);
    else if (number == SIGFPE)
        what = "integer division by zero";
    else if (self->stack >= 0 && p < stack_begin(self->stack) && p >= stack_begin(self->stack) - GUARD)
        what = "the thread's stack overflowed: too many bytes in local arrays";
    else if (number == SIGSEGV && info->si_code == SI_KERNEL)
        what = "a misaligned vector access, or an address that is none";
    else
        what = formatted("%s at address %p", number == SIGILL ? "illegal instruction" : "invalid access",
                         info->si_addr);
    fault = here() + ": " + what;
#if defined(__x86_64__)
    ucontext_t *u = (ucontext_t *)context;
    u->uc_mcontext.gregs[REG_RSP] = (greg_t)main_context.sp;
    u->uc_mcontext.gregs[REG_RIP] = (greg_t)(void *)pm_host_resume;
#else
    (void)context;
    setcontext(&main_context.u);
#endif
}

static void catch_signals(bool on)
{
    static char alternate[64 * 1024];
    static timer_t timer;
    static pid_t timer_of;
    if (on) {
        struct sigaction a = {};
        a.sa_sigaction = on_signal;
        a.sa_flags = SA_SIGINFO | SA_ONSTACK;
        if (!PM_ASAN) {
            stack_t s = {};
            s.ss_sp = alternate;
            s.ss_size = sizeof alternate;
            sigaltstack(&s, &old_alternate);
            for (int i = 0; i < 4; i++)
                sigaction(SIGNALS[i], &a, &old_actions[i]);
        }
        const pid_t me = (pid_t)syscall(SYS_gettid);
        if (timer_of != me) {
            sigaction(time_signal(), &a, nullptr);
            if (timer_of)
                timer_delete(timer);
            struct sigevent e = {};
            e.sigev_notify = SIGEV_THREAD_ID;
            e.sigev_signo = time_signal();
            e._sigev_un._tid = me;
            timer_create(CLOCK_MONOTONIC, &e, &timer);
            timer_of = me;
        }
    } else if (!PM_ASAN) {
        for (int i = 0; i < 4; i++)
            sigaction(SIGNALS[i], &old_actions[i], nullptr);
        old_alternate.ss_flags &= ~SS_ONSTACK;
        sigaltstack(&old_alternate, nullptr);
    }
    struct itimerspec t = {};
    if (on) {
        t.it_value.tv_sec = (time_t)settings.timeout;
        t.it_value.tv_nsec = (long)((settings.timeout - (double)t.it_value.tv_sec) * 1e9);
    }
    timer_settime(timer, 0, &t, nullptr);
}

// ------------------------------------------------------------------ a launch
static void begin_block()
{
    const int n = block.threads;
    block.live = n;
    block.waiting = block.predicates = 0;
    block.ready_warps = 0;
    for (int w = 0; w < block.warps; w++) {
        const int lanes = n - w * 32 < 32 ? n - w * 32 : 32;
        warps[w].live = warps[w].ready = lanes == 32 ? 0xffffffffu : (1u << lanes) - 1;
        warps[w].group_count = 0;
        block.ready_warps |= 1u << w;
    }
    for (int i = 0; i < n; i++) {
        threads[i].state = State::NEW;
        copies[i].clear();
        committed[i] = 0;
    }
    wgmma_block();
    block.warp = pick_bit(block.ready_warps);
}

// Blocks in the chosen order: i -> first + i step, modulo their number.
static void run_blocks()
{
    const uint64_t count = (uint64_t)gridDim.x * gridDim.y * gridDim.z;
    uint64_t first = 0, step = 1;
    if (settings.order == Order::REVERSE)
        first = count - 1, step = count - 1;
    if (settings.order == Order::SHUFFLED) {
        first = random_bits() % count;
        do
            step = 1 + random_bits() % count;
        while (std::__gcd(step, count) != 1);
    }
    for (uint64_t i = 0; i < count && fault.empty(); i++) {
        const uint64_t b = (uint64_t)((first + (unsigned __int128)i * step) % count);
        blockIdx = {(unsigned)(b % gridDim.x), (unsigned)(b / gridDim.x % gridDim.y),
                    (unsigned)(b / gridDim.x / gridDim.y)};
        begin_block();
        poison_shared();
#ifdef PM_HOST_RACE
        race_block((unsigned)b);
#endif
        go_on(main_context, pick());
        self_index = -1;
        if (fault.empty())
            check_canary();
    }
}

void run(const Kernel &k)
{
    static std::mutex one_at_a_time;
    std::lock_guard<std::mutex> lock(one_at_a_time);
    kernel = &k;
    tls_base = (char *)pm_shared - dynamic_offset();
    gridDim = k.grid, blockDim = k.block;
    block.threads = (int)(k.block.x * k.block.y * k.block.z);
    block.warps = (block.threads + 31) / 32;
    random_state = settings.seed * 0x9e3779b97f4a7c15u;
    for (int i = 0; i < block.threads; i++)
        threads[i].index = {(unsigned)i % k.block.x, (unsigned)i / k.block.x % k.block.y,
                            (unsigned)i / k.block.x / k.block.y};
#ifdef PM_HOST_RACE
    race_launch(k, tls_base, storage_bytes());
#endif
    catch_signals(true);
    run_blocks();
    catch_signals(false);
    if (!fault.empty()) { // fibres were left in the middle: their stacks are free again
        if (stack_memory)
            ASAN_UNPOISON_MEMORY_REGION(stack_memory, (size_t)stacks_made * (STACK + GUARD));
        free_stack_count = 0;
        for (int i = stacks_made; i-- > 0;)
            free_stacks[free_stack_count++] = i;
    }
    kernel = nullptr;
}

} // namespace pm_host
