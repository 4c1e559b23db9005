// wgmma.cpp: asynchronous products of a warpgroup, whose operands lie in shared memory.
//
// What a warp is to multiply is remembered, with the bytes it is to read, and multiplied at the wait:
// so d is not there before it, and a byte that somebody changed meanwhile is reported. Whoever begins
// a product has to have fenced its own copies (fence_proxy_async) since it last waited for some.
#include <cstring>
#include <vector>

#include "device.h"
#include "internal.h"
#include "ptx_on_cpu.h"

namespace pm_host {

constexpr int MOST_WARPS = 32, DEPTH = 16, ROWS = 16; // of a warp, of the instruction's 64
constexpr int UNIT = 16;                              // bytes that lie together

struct Unit {
    const char *at;
    char bytes[UNIT];
};
struct Product {
    float *d[32];
    int n;
    bool a_minor, b_minor;
    long group;
    std::vector<Unit> a, b;
    const char *file;
    int line;
};
struct Queue {
    bool begun = false;
    long committed = 0;
    std::vector<Product> products;
};
static Queue queues[MOST_WARPS];
static bool unfenced[MOST_WARPS * 32]; // has waited for copies and not fenced them

void wgmma_block()
{
    for (Queue &q : queues)
        q = {};
    memset(unfenced, 0, sizeof unfenced);
}
void wgmma_copies_arrived() { unfenced[self_index] = true; }
void wgmma_fence_copies() { unfenced[self_index] = false; }
void wgmma_returned()
{
    const Queue &q = queues[self_index / 32];
    if (!q.products.empty())
        fail("returned with a wgmma (%s:%d) that nobody waited for", base_name(q.products[0].file),
             q.products[0].line);
}

// The 128-byte swizzle: bits 7 to 9 of an address are added to bits 4 to 6.
static const char *swizzled(const char *p)
{
    const uintptr_t u = (uintptr_t)p;
    return (const char *)(u ^ (u >> 7 & 7) << 4);
}

// Reads numbers first .. first + count - 1 of the extent, of the 16 of the depth: lines, a unit after
// another. Lines are the depth (minor), or the extent.
static void gather(const wgmma_operand &of, bool minor, int first, int count, std::vector<Unit> &units,
                   const Product &p)
{
    const int lines = minor ? DEPTH : count, along = minor ? count / 8 : DEPTH / 8;
    if (((uintptr_t)of.at & 15) || (of.stride | of.leading) % 16)
        fail("wgmma (%s:%d): addresses of a descriptor are multiples of 16", base_name(p.file), p.line);
    for (int l = 0; l < lines; l++)
        for (int u = 0; u < along; u++) {
            const int line = minor ? l : first + l, number = minor ? first + u * 8 : u * 8;
            const char *at = of.at + line / 8 * of.stride + line % 8 * 128 +
                             (minor ? number / 64 * of.leading + number % 64 * 2 : number * 2);
            Unit unit = {swizzled(at), {}};
            check_shared(unit.at, UNIT, UNIT, "an operand of wgmma");
            race_access(unit.at, UNIT, Kind::READ, p.file, p.line);
            memcpy(unit.bytes, unit.at, UNIT);
            units.push_back(unit);
        }
}

static float number_of(const std::vector<Unit> &units, bool minor, int extent, int i, int k)
{
    const int line = minor ? k : i, along = minor ? i : k;
    uint16_t half;
    memcpy(&half, units[line * ((minor ? extent : DEPTH) / 8) + along / 8].bytes + along % 8 * 2, 2);
    return bits<float>((uint32_t)half << 16);
}

static void issue(void *const operand[32], uint32_t, const char *file, int line)
{
    const Wgmma *const first = (const Wgmma *)operand[0];
    const int warp = self_index / 32;
    Queue &q = queues[warp];
    if (!q.begun)
        fail("wgmma (%s:%d) without wgmma_begin since the last wgmma_wait", base_name(file), line);
    Product p = {{}, first->n, first->a_minor, first->b_minor, q.committed, {}, {}, file, line};
    for (int l = 0; l < 32; l++) {
        const Wgmma *const o = (const Wgmma *)operand[l];
        if (memcmp(&o->a, &first->a, sizeof o->a) || memcmp(&o->b, &first->b, sizeof o->b))
            fail("wgmma (%s:%d): lane %d has other descriptors than lane 0", base_name(file), line, l);
        if (unfenced[warp * 32 + l])
            fail("wgmma (%s:%d): lane %d has waited for copies without fence_proxy_async behind it",
                 base_name(file), line, l);
        p.d[l] = o->d;
    }
    gather(first->a, p.a_minor, warp % 4 * ROWS, ROWS, p.a, p);
    gather(first->b, p.b_minor, 0, p.n, p.b, p);
    q.products.push_back(std::move(p));
}

static void unchanged(const std::vector<Unit> &units, const Product &p)
{
    for (const Unit &u : units) {
        race_access(u.at, UNIT, Kind::READ, p.file, p.line);
        if (memcmp(u.at, u.bytes, UNIT))
            fail("wgmma (%s:%d): %s was written before wgmma_wait", base_name(p.file), p.line,
                 describe(u.at).c_str());
    }
}

// Sums run over k upwards, from d, in float.
static void multiply(const Product &p)
{
    static float A[ROWS][DEPTH], B[DEPTH][256], D[ROWS][256];
    count_operations(2.0 * ROWS * DEPTH * p.n);
    for (int k = 0; k < DEPTH; k++) {
        for (int i = 0; i < ROWS; i++)
            A[i][k] = number_of(p.a, p.a_minor, ROWS, i, k);
        for (int j = 0; j < p.n; j++)
            B[k][j] = number_of(p.b, p.b_minor, p.n, j, k);
    }
    const auto exchange = [&](bool back) {
        for (int l = 0; l < 32; l++)
            for (int i = 0; i < p.n / 2; i += 2) {
                float *const there = &D[l / 4 + i / 2 % 2 * 8][i / 4 * 8 + l % 4 * 2];
                memcpy(back ? p.d[l] + i : there, back ? there : p.d[l] + i, 8);
            }
    };
    exchange(false);
    for (int r = 0; r < ROWS; r++)
        for (int c = 0; c < p.n; c += 8) {
            float sum[8];
            memcpy(sum, &D[r][c], sizeof sum);
            for (int k = 0; k < DEPTH; k++)
                for (int i = 0; i < 8; i++)
                    sum[i] += A[r][k] * B[k][c + i];
            memcpy(&D[r][c], sum, sizeof sum);
        }
    exchange(true);
}

static void finish(void *const operand[32], uint32_t, const char *, int)
{
    Queue &q = queues[self_index / 32];
    const long until = q.committed - *(const int *)operand[0];
    size_t n = 0;
    while (n < q.products.size() && q.products[n].group < until) {
        const Product &p = q.products[n++];
        unchanged(p.a, p);
        unchanged(p.b, p);
        multiply(p);
    }
    q.products.erase(q.products.begin(), q.products.begin() + (long)n);
    q.begun = false;
}

static void begin(void *const[32], uint32_t, const char *, int) { queues[self_index / 32].begun = true; }
static void commit(void *const[32], uint32_t, const char *, int) { queues[self_index / 32].committed++; }

const Collective WGMMA = {"wgmma", issue, true};
const Collective WGMMA_BEGIN = {"wgmma_begin", begin, true};
const Collective WGMMA_COMMIT = {"wgmma_commit", commit, true};
const Collective WGMMA_WAIT = {"wgmma_wait", finish, true};

} // namespace pm_host
