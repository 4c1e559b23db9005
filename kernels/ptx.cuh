// ptx.cuh: what kernels need of PTX, and the launch, in one place. nvcc gets inline assembly; the
// build that runs kernels on a CPU (tests/cuda/host/) gets functions with the same meaning.
//
// "The warp" below means all 32 lanes: these instructions are .aligned, every lane has to execute
// them, at the same place, none may have returned. Addresses of ldmatrix rows and of 16-byte copies
// are aligned to 16 bytes. Layouts of fragments: PTX ISA, "Matrix Fragments for mma.m16n8k16"; with
// g = lane / 4, t = lane % 4:
//   A (16 x 16, bf16): a[0] row g, columns 2t, 2t+1   a[1] row g+8    a[2], a[3]: columns + 8
//   B (16 x 8,  bf16): b[0] rows 2t, 2t+1, column g   b[1] rows + 8
//   D (16 x 8,  f32):  d[0], d[1] row g, columns 2t, 2t+1   d[2], d[3] row g+8
//   A (16 x 8,  tf32): a[0] row g, column t   a[1] row g+8   a[2], a[3]: column + 4
//   B (8 x 8,   tf32): b[0] row t, column g   b[1] row t+4
#pragma once
#include <cstdint>

#if defined(__CUDACC__)

#include <cuda_runtime.h>

// Launches kernel<<<grid, block, shared_bytes, stream>>>(...). A template's name with commas goes in
// parentheses: PM_LAUNCH((product<64, 32>), grid, block, bytes, stream, a, b). Ask cudaGetLastError.
#define PM_LAUNCH(kernel, grid, block, shared_bytes, stream, ...)                                  \
    (kernel)<<<(grid), (block), (shared_bytes), (stream)>>>(__VA_ARGS__)

#define PM_PTX static __device__ __forceinline__

PM_PTX uint32_t pm_shared_address(const void *shared)
{
    return (uint32_t)__cvta_generic_to_shared(shared);
}

// Keeps a number in a register: the compiler no longer knows how to compute it once more.
PM_PTX void pm_keep(int &x) { asm volatile("" : "+r"(x)); }
template <class T> PM_PTX void pm_keep(T *&p) { asm volatile("" : "+l"(p)); }

// d += a b, one 16 x 8 tile over k = 16, bf16 in, f32 out.
PM_PTX void mma_m16n8k16(float (&d)[4], const uint32_t (&a)[4], const uint32_t (&b)[2])
{
    asm volatile("mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 "
                 "{%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, {%0, %1, %2, %3};"
                 : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3])
                 : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b[0]), "r"(b[1]));
}

// d += a b, one 16 x 8 tile over k = 8, tf32 in (pm_tf32), f32 out.
PM_PTX void mma_m16n8k8_tf32(float (&d)[4], const uint32_t (&a)[4], const uint32_t (&b)[2])
{
    asm volatile("mma.sync.aligned.m16n8k8.row.col.f32.tf32.tf32.f32 "
                 "{%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, {%0, %1, %2, %3};"
                 : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3])
                 : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b[0]), "r"(b[1]));
}

// M x N tiles at once: d[i][j] += a[i] b[j]. Prefer it: on a CPU it is one meeting of the warp, not M N.
template <int M, int N>
PM_PTX void mma_m16n8k16(float (&d)[M][N][4], const uint32_t (&a)[M][4], const uint32_t (&b)[N][2])
{
#pragma unroll
    for (int i = 0; i < M; i++)
#pragma unroll
        for (int j = 0; j < N; j++)
            mma_m16n8k16(d[i][j], a[i], b[j]);
}

template <int M, int N>
PM_PTX void mma_m16n8k8_tf32(float (&d)[M][N][4], const uint32_t (&a)[M][4],
                             const uint32_t (&b)[N][2])
{
#pragma unroll
    for (int i = 0; i < M; i++)
#pragma unroll
        for (int j = 0; j < N; j++)
            mma_m16n8k8_tf32(d[i][j], a[i], b[j]);
}

// The nearest tf32 (ties away from zero), as the bits of a float.
PM_PTX uint32_t pm_tf32(float x)
{
    uint32_t r;
    asm("cvt.rna.tf32.f32 %0, %1;" : "=r"(r) : "f"(x));
    return r;
}

// 2^x to 2 ulp, results below 2^-126 are 0; one instruction, where exp2f and __expf take more.
PM_PTX float pm_exp2(float x)
{
    float r;
    asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(r) : "f"(x));
    return r;
}

// Loads 8 x 8 matrices of 16-bit elements from shared memory: lanes 8i .. 8i+7 give the addresses of
// the rows of matrix i (lanes that are not needed: any aligned address in shared memory); r[i] gets
// elements 2t, 2t+1 of row g of matrix i. _trans: of the transposed matrix.
#define PM_LDMATRIX(name, count, modifier, outputs, ...)                                           \
    PM_PTX void name(uint32_t(&r)[count], const void *row)                                         \
    {                                                                                              \
        asm volatile("ldmatrix.sync.aligned.m8n8.x" #count modifier ".shared.b16 " outputs         \
:__VA_ARGS__                                                                                       \
                     : "r"(pm_shared_address(row))                                                 \
                     : "memory");                                                                  \
    }
PM_LDMATRIX(ldmatrix_x1, 1, "", "{%0}, [%1];", "=r"(r[0]))
PM_LDMATRIX(ldmatrix_x2, 2, "", "{%0, %1}, [%2];", "=r"(r[0]), "=r"(r[1]))
PM_LDMATRIX(ldmatrix_x4, 4, "", "{%0, %1, %2, %3}, [%4];", "=r"(r[0]), "=r"(r[1]), "=r"(r[2]),
            "=r"(r[3]))
PM_LDMATRIX(ldmatrix_x1_trans, 1, ".trans", "{%0}, [%1];", "=r"(r[0]))
PM_LDMATRIX(ldmatrix_x2_trans, 2, ".trans", "{%0, %1}, [%2];", "=r"(r[0]), "=r"(r[1]))
PM_LDMATRIX(ldmatrix_x4_trans, 4, ".trans", "{%0, %1, %2, %3}, [%4];", "=r"(r[0]), "=r"(r[1]),
            "=r"(r[2]), "=r"(r[3]))
#undef PM_LDMATRIX

// Copies BYTES (4, 8, 16) from global to shared memory in the background. Both addresses are aligned
// to BYTES. The bytes may be read after cp_async_wait by this thread, after a barrier by others.
template <int BYTES> PM_PTX void cp_async(void *shared, const void *global)
{
    static_assert(BYTES == 4 || BYTES == 8 || BYTES == 16, "cp.async copies 4, 8 or 16 bytes");
    if constexpr (BYTES == 16)
        asm volatile("cp.async.cg.shared.global [%0], [%1], 16;" ::"r"(pm_shared_address(shared)),
                     "l"(global)
                     : "memory");
    else
        asm volatile("cp.async.ca.shared.global [%0], [%1], %2;" ::"r"(pm_shared_address(shared)),
                     "l"(global), "n"(BYTES)
                     : "memory");
}

// The same, of the first source_bytes (0 .. BYTES) bytes; the rest become zero. With 0 nothing is read.
template <int BYTES> PM_PTX void cp_async_zfill(void *shared, const void *global, int source_bytes)
{
    static_assert(BYTES == 4 || BYTES == 8 || BYTES == 16, "cp.async copies 4, 8 or 16 bytes");
    if constexpr (BYTES == 16)
        asm volatile(
            "cp.async.cg.shared.global [%0], [%1], 16, %2;" ::"r"(pm_shared_address(shared)),
            "l"(global), "r"(source_bytes)
            : "memory");
    else
        asm volatile(
            "cp.async.ca.shared.global [%0], [%1], %2, %3;" ::"r"(pm_shared_address(shared)),
            "l"(global), "n"(BYTES), "r"(source_bytes)
            : "memory");
}

// Closes the group of this thread's copies since the last one. Wait: until at most GROUPS of the
// newest groups are unfinished; wait_all: until nothing is.
PM_PTX void cp_async_commit() { asm volatile("cp.async.commit_group;" ::: "memory"); }
template <int GROUPS> PM_PTX void cp_async_wait()
{
    asm volatile("cp.async.wait_group %0;" ::"n"(GROUPS) : "memory");
}
PM_PTX void cp_async_wait_all() { asm volatile("cp.async.wait_all;" ::: "memory"); }

// ---------------------------------------------------------------- wgmma (sm_90a)
// A warpgroup (128 threads, from a multiple of 128 on) multiplies what lies in shared memory, and the
// program goes on meanwhile: d (64 x N) += a (64 x 16) b (16 x N), bf16 in, f32 out. A thread's
// d[4 j + e]: row 16 (warp % 4) + g + e / 2 * 8, column 8 j + 2 t + e % 2. MINOR: neighbours are
// along the extent of 64, or N; else along the depth. wgmma_begin comes before the products,
// wgmma_commit closes their group; after wgmma_wait all groups but the newest GROUPS are done: d may
// be read, and what they read be overwritten. What others than wgmma have put into shared memory,
// cp.async among them, wgmma sees after fence_proxy_async by the thread that did it, and a barrier.
#if !defined(__CUDA_ARCH__) || defined(__CUDA_ARCH_FEAT_SM90_ALL)
#define PM_WGMMA(...) asm volatile(__VA_ARGS__)
#else
#define PM_WGMMA(...) __trap() // the host does not launch it there
#endif
using wgmma_operand = uint64_t;

// A matrix descriptor, of the 128-byte swizzle: 8 lines of 128 bytes are 1024, from a multiple of
// 1024 on; the next 8 lines are `stride` bytes behind. leading (MINOR): from 64 numbers of a line to
// its next 64.
PM_PTX wgmma_operand wgmma_describe(const void *shared, int leading, int stride)
{
    return (uint64_t)1 << 62 | (uint64_t)(stride >> 4) << 32 | (uint64_t)(leading >> 4) << 16 |
           (pm_shared_address(shared) & 0x3ffff) >> 4;
}
PM_PTX wgmma_operand wgmma_advance(wgmma_operand of, int bytes) { return of + (bytes >> 4); }

PM_PTX void fence_proxy_async() { PM_WGMMA("fence.proxy.async.shared::cta;" ::: "memory"); }
PM_PTX void wgmma_begin() { PM_WGMMA("wgmma.fence.sync.aligned;" ::: "memory"); }
PM_PTX void wgmma_commit() { PM_WGMMA("wgmma.commit_group.sync.aligned;" ::: "memory"); }
template <int GROUPS, int COUNT> PM_PTX void wgmma_wait(float (&d)[COUNT])
{
    PM_WGMMA("wgmma.wait_group.sync.aligned %0;" ::"n"(GROUPS) : "memory");
#pragma unroll
    for (int i = 0; i < COUNT; i++)
        asm volatile("" : "+f"(d[i])::"memory"); // the compiler does not read it earlier
}

#define PM_NAMES_0                                                                                 \
    "%0, %1, %2, %3, %4, %5, %6, %7, %8, %9, %10, %11, %12, %13, %14, %15, "                       \
    "%16, %17, %18, %19, %20, %21, %22, %23, %24, %25, %26, %27, %28, %29, %30, %31"
#define PM_NAMES_32                                                                                \
    "%32, %33, %34, %35, %36, %37, %38, %39, %40, %41, %42, %43, %44, %45, %46, %47, "             \
    "%48, %49, %50, %51, %52, %53, %54, %55, %56, %57, %58, %59, %60, %61, %62, %63"
#define PM_NAMES_64                                                                                \
    "%64, %65, %66, %67, %68, %69, %70, %71, %72, %73, %74, %75, %76, %77, %78, %79, "             \
    "%80, %81, %82, %83, %84, %85, %86, %87, %88, %89, %90, %91, %92, %93, %94, %95"
#define PM_NAMES_96                                                                                \
    "%96, %97, %98, %99, %100, %101, %102, %103, %104, %105, %106, %107, %108, %109, %110, %111, " \
    "%112, %113, %114, %115, %116, %117, %118, %119, %120, %121, %122, %123, %124, %125, %126, "   \
    "%127"
#define PM_4(i) "+f"(d[i]), "+f"(d[i + 1]), "+f"(d[i + 2]), "+f"(d[i + 3])
#define PM_32(i)                                                                                   \
    PM_4(i), PM_4(i + 4), PM_4(i + 8), PM_4(i + 12), PM_4(i + 16), PM_4(i + 20), PM_4(i + 24),     \
        PM_4(i + 28)
#define PM_WGMMA_N(n, names, a, b, a_minor, b_minor, ...)                                          \
    PM_WGMMA("{.reg .pred p; setp.eq.u32 p, 0, 0; "                                                \
             "wgmma.mma_async.sync.aligned.m64n" n "k16.f32.bf16.bf16 {" names "}, " a ", " b      \
             ", p, 1, 1, " a_minor ", " b_minor ";}"                                               \
             : __VA_ARGS__                                                                         \
             : "l"(x), "l"(y), "n"((int)A_MINOR), "n"((int)B_MINOR))
template <int N, bool A_MINOR, bool B_MINOR>
PM_PTX void wgmma_m64k16(float (&d)[N / 2], wgmma_operand x, wgmma_operand y)
{
    static_assert(N == 128 || N == 192 || N == 256, "the widths that kernels use");
    if constexpr (N == 128)
        PM_WGMMA_N("128", PM_NAMES_0 ", " PM_NAMES_32, "%64", "%65", "%66", "%67", PM_32(0),
                   PM_32(32));
    else if constexpr (N == 192)
        PM_WGMMA_N("192", PM_NAMES_0 ", " PM_NAMES_32 ", " PM_NAMES_64, "%96", "%97", "%98", "%99",
                   PM_32(0), PM_32(32), PM_32(64));
    else
        PM_WGMMA_N("256", PM_NAMES_0 ", " PM_NAMES_32 ", " PM_NAMES_64 ", " PM_NAMES_96, "%128",
                   "%129", "%130", "%131", PM_32(0), PM_32(32), PM_32(64), PM_32(96));
}
#undef PM_NAMES_0
#undef PM_NAMES_32
#undef PM_NAMES_64
#undef PM_NAMES_96
#undef PM_4
#undef PM_32
#undef PM_WGMMA_N
#undef PM_WGMMA

#undef PM_PTX
#else
#include <ptx_on_cpu.h>
#endif
