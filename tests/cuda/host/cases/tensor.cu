// The tensor-core path: mma, ldmatrix, cp.async, misaligned accesses, conversions.
#include "cases.h"

typedef __nv_bfloat16 bf16;

static std::vector<bf16> rounded(const std::vector<float> &v)
{
    std::vector<bf16> r;
    for (float x : v)
        r.push_back(__float2bfloat16_rn(x));
    return r;
}

// c (m, n) = a (m, k) b (n, k)^T
static std::vector<double> product(const std::vector<float> &a, const std::vector<float> &b, int m, int n,
                                   int k)
{
    std::vector<double> c((size_t)(m * n), 0);
    for (int i = 0; i < m; i++)
        for (int j = 0; j < n; j++)
            for (int l = 0; l < k; l++)
                c[i * n + j] += (double)a[i * k + l] * b[j * k + l];
    return c;
}

// One warp: c (16 M, 8 N) of one mma with k = 16, fragments loaded word by word.
template <int M, int N> __global__ void one_mma(const uint32_t *a, const uint32_t *b, float *c, int sabotage)
{
    const int lane = threadIdx.x, g = lane / 4, t = lane % 4;
    uint32_t fa[M][4], fb[N][2];
    float d[M][N][4] = {};
    for (int i = 0; i < M; i++)
        for (int j = 0; j < 4; j++)
            fa[i][j] = a[(i * 16 + g + j % 2 * 8) * 8 + t + (sabotage == 1 ? j % 2 : j / 2) * 4];
    for (int i = 0; i < N; i++)
        for (int j = 0; j < 2; j++)
            fb[i][j] = b[(i * 8 + g) * 8 + t + j * 4];
    if (sabotage == 2 && lane == 9)
        return;
    if (M == 1 && N == 1)
        mma_m16n8k16(d[0][0], fa[0], fb[0]);
    else
        mma_m16n8k16(d, fa, fb);
    for (int i = 0; i < M; i++)
        for (int j = 0; j < N; j++)
            for (int h = 0; h < 4; h++)
                c[(i * 16 + g + h / 2 * 8) * N * 8 + j * 8 + t * 2 + h % 2] = d[i][j][h];
}

template <int M, int N> static int run_mma(int sabotage)
{
    const std::vector<float> a = numbers(M * 16 * 16, 2), b = numbers(N * 8 * 16, 3);
    Array<bf16> da(rounded(a)), db(rounded(b));
    Array<float> c(M * 16 * N * 8);
    LAUNCH((one_mma<M, N>), 1, 32, 0, nullptr, (const uint32_t *)da.p, (const uint32_t *)db.p, c, sabotage);
    return compare(c.get(), product(a, b, M * 16, N * 8, 16), 1e-5);
}

CASE(mma_bf16) { return run_mma<1, 1>(sabotage) || run_mma<3, 5>(sabotage); }

__global__ void one_mma_tf32(const float *a, const float *b, float *c)
{
    const int lane = threadIdx.x, g = lane / 4, t = lane % 4;
    uint32_t fa[4], fb[2];
    float d[4] = {1, 2, 3, 4};
    for (int j = 0; j < 4; j++)
        fa[j] = pm_tf32(a[(g + j % 2 * 8) * 8 + t + j / 2 * 4]);
    for (int j = 0; j < 2; j++)
        fb[j] = pm_tf32(b[g * 8 + t + j * 4]);
    mma_m16n8k8_tf32(d, fa, fb);
    for (int h = 0; h < 4; h++)
        c[(g + h / 2 * 8) * 8 + t * 2 + h % 2] = d[h];
}

CASE(mma_tf32)
{
    const std::vector<float> a = numbers(16 * 8, 2), b = numbers(8 * 8, 3);
    Array<float> da(a), db(b), c(16 * 8);
    LAUNCH(one_mma_tf32, 1, 32, 0, nullptr, da, db, c);
    std::vector<double> want = product(a, b, 16, 8, 8);
    for (int i = 0; i < 16; i++)
        for (int j = 0; j < 8; j++)
            want[i * 8 + j] += 1 + i / 8 * 2 + j % 2;
    return compare(c.get(), want, 1e-5);
}

// Matrices of shared memory in rows of 16 + pad elements.
template <int COUNT, bool TRANSPOSED> __global__ void load(const uint16_t *x, uint32_t *y, int sabotage)
{
    __shared__ __align__(16) uint16_t s[32][24];
    const int lane = threadIdx.x;
    for (int i = lane; i < 32 * 8; i += 32)
        s[i / 8][i % 8] = x[i];
    __syncwarp();
    uint32_t r[COUNT];
    const void *row = &s[lane % (8 * COUNT)][0];
    if (sabotage == 1 && lane == 3)
        row = &s[lane][1];
    if (sabotage == 2 && lane == 4)
        row = x;
    if constexpr (COUNT == 1)
        TRANSPOSED ? ldmatrix_x1_trans(r, row) : ldmatrix_x1(r, row);
    if constexpr (COUNT == 2)
        TRANSPOSED ? ldmatrix_x2_trans(r, row) : ldmatrix_x2(r, row);
    if constexpr (COUNT == 4)
        TRANSPOSED ? ldmatrix_x4_trans(r, row) : ldmatrix_x4(r, row);
    for (int i = 0; i < COUNT; i++)
        y[i * 32 + lane] = r[i];
}

template <int COUNT, bool TRANSPOSED> static int run_load(int sabotage)
{
    std::vector<uint16_t> x(256);
    for (int i = 0; i < 256; i++)
        x[i] = (uint16_t)(i * 257);
    Array<uint16_t> in(x);
    Array<uint32_t> out(COUNT * 32);
    LAUNCH((load<COUNT, TRANSPOSED>), 1, 32, 0, nullptr, in, out, sabotage);
    std::vector<uint32_t> want;
    for (int i = 0; i < COUNT; i++)
        for (int l = 0; l < 32; l++) {
            const int g = l / 4, t = l % 4;
            const auto at = [&](int r, int c) { return (uint32_t)x[i * 64 + (TRANSPOSED ? c * 8 + r : r * 8 + c)]; };
            want.push_back(at(g, t * 2) | at(g, t * 2 + 1) << 16);
        }
    return compare(out.get(), want);
}

CASE(ldmatrix)
{
    return run_load<1, false>(sabotage) || run_load<2, false>(sabotage) || run_load<4, false>(sabotage) ||
           run_load<1, true>(sabotage) || run_load<2, true>(sabotage) || run_load<4, true>(sabotage);
}

// ------------------------------------------------------------------ cp.async
// Every thread copies four words, each in a group, and reads those of its neighbour.
template <int BYTES> __global__ void copies(const char *x, char *y, int sabotage)
{
    __shared__ __align__(16) char s[4][64][BYTES];
    const int t = threadIdx.x;
    for (int i = 0; i < 4; i++) {
        const char *from = x + (i * 64 + t) * BYTES;
        if (sabotage == 5 && t == 33)
            from += BYTES / 2;
        if (i == 3)
            cp_async_zfill<BYTES>(s[i][t], from, t % (BYTES + 1));
        else
            cp_async<BYTES>(s[i][t], from);
        if (!(sabotage == 3 && i == 3))
            cp_async_commit();
    }
    if (sabotage == 2)
        cp_async_wait<1>();
    else if (sabotage == 3)
        cp_async_wait<0>(); // the last one is in no group
    else if (sabotage != 1)
        cp_async_wait_all();
    if (sabotage != 4)
        __syncthreads();
    for (int i = 0; i < 4; i++)
        for (int b = 0; b < BYTES; b++)
            y[(i * 64 + t) * BYTES + b] = s[i][63 - t][b];
    if (sabotage == 1 || sabotage == 2 || sabotage == 3) {
        cp_async_wait_all();
    }
    if (sabotage == 6) {
        cp_async<BYTES>(s[0][t], x);
        cp_async_commit();
    }
}

template <int BYTES> static int run_copies(int sabotage)
{
    std::vector<char> x(4 * 64 * BYTES), want(x.size());
    for (size_t i = 0; i < x.size(); i++)
        x[i] = (char)(i * 7 + i / 100);
    Array<char> in(x), out(x.size());
    LAUNCH((copies<BYTES>), 1, 64, 0, nullptr, in, out, sabotage);
    for (int i = 0; i < 4; i++)
        for (int t = 0; t < 64; t++)
            for (int b = 0; b < BYTES; b++)
                want[(i * 64 + t) * BYTES + b] =
                    i == 3 && b >= (63 - t) % (BYTES + 1) ? 0 : x[(i * 64 + 63 - t) * BYTES + b];
    return compare(out.get(), want);
}

CASE(cp_async_4) { return run_copies<4>(sabotage); }
CASE(cp_async_8) { return run_copies<8>(sabotage); }
CASE(cp_async_16) { return run_copies<16>(sabotage); }

// A pipeline of two stages: the next tile is fetched while this one is used.
__global__ void pipeline(const float *x, float *y, int tiles, int sabotage)
{
    __shared__ __align__(16) float s[2][64];
    const int t = threadIdx.x;
    float sum = 0;
    cp_async<4>(&s[0][t], &x[t]);
    cp_async_commit();
    for (int i = 0; i < tiles; i++) {
        if (i + 1 < tiles)
            cp_async<4>(&s[(i + 1) % 2][t], &x[(i + 1) * 64 + t]);
        cp_async_commit();
        if (sabotage == 1)
            cp_async_wait<2>();
        else
            cp_async_wait<1>();
        __syncthreads();
        sum += s[i % 2][(t + 17) % 64];
        if (sabotage != 2)
            __syncthreads(); // before the stage is filled again
    }
    cp_async_wait_all();
    y[t] = sum;
}

CASE(cp_async_pipeline)
{
    const std::vector<float> x = numbers(64 * 5);
    Array<float> in(x), out(64);
    LAUNCH(pipeline, 1, 64, 0, nullptr, in, out, 5, sabotage);
    std::vector<float> want(64, 0);
    for (int t = 0; t < 64; t++)
        for (int i = 0; i < 5; i++)
            want[t] += x[i * 64 + (t + 17) % 64];
    return compare(out.get(), want, 1e-5);
}

// ------------------------------------------------------------------ a product as the real ones are
// c (64 i, 64 j) = a (m, k) b (n, k)^T: four warps of 32 x 32, three stages, ldmatrix, mma.
__global__ void tiled(const bf16 *a, const bf16 *b, float *c, int n, int k, int sabotage)
{
    extern __shared__ __align__(16) unsigned char pm_shared[];
    typedef bf16 tile[64][40]; // 80 bytes a row: no bank conflicts
    tile *const as = reinterpret_cast<tile *>(pm_shared), *const bs = as + 3;
    const int lane = threadIdx.x % 32, warp = threadIdx.x / 32;
    const int row = warp / 2 * 32, column = warp % 2 * 32;
    const auto fetch = [&](int at) {
        if (at < k)
            for (int i = threadIdx.x; i < 64 * 4; i += 128) {
                const int r = i / 4, e = i % 4 * 8;
                cp_async<16>(&as[at / 32 % 3][r][e], &a[(blockIdx.x * 64 + r) * k + at + e]);
                cp_async<16>(&bs[at / 32 % 3][r][e], &b[(blockIdx.y * 64 + r) * k + at + e]);
            }
        cp_async_commit();
    };
    float d[2][4][4] = {};
    fetch(0), fetch(32);
    for (int at = 0; at < k; at += 32) {
        cp_async_wait<1>();
        if (sabotage != 1)
            __syncthreads();
        fetch(at + 64);
        for (int kk = 0; kk < 32; kk += 16) {
            uint32_t fa[2][4], fb[4][2];
            for (int i = 0; i < 2; i++)
                ldmatrix_x4(fa[i], &as[at / 32 % 3][row + i * 16 + lane % 16][kk + lane / 16 * 8]);
            for (int j = 0; j < 4; j += 2) {
                uint32_t r[4];
                const void *from = &bs[at / 32 % 3][column + j * 8 + lane % 8 + lane / 16 * 8]
                                      [kk + lane / 8 % 2 * 8];
                if (sabotage == 2)
                    ldmatrix_x4_trans(r, from);
                else
                    ldmatrix_x4(r, from);
                fb[j][0] = r[0], fb[j][1] = r[1], fb[j + 1][0] = r[2], fb[j + 1][1] = r[3];
            }
            mma_m16n8k16(d, fa, fb);
        }
    }
    cp_async_wait_all();
    for (int i = 0; i < 2; i++)
        for (int j = 0; j < 4; j++)
            for (int h = 0; h < 2; h++)
                *reinterpret_cast<float2 *>(
                    &c[(blockIdx.x * 64 + row + i * 16 + h * 8 + lane / 4) * n + blockIdx.y * 64 +
                       column + j * 8 + lane % 4 * 2]) = make_float2(d[i][j][h * 2], d[i][j][h * 2 + 1]);
}

CASE(tiled_product)
{
    const int m = 128, n = 64, k = 192;
    const std::vector<float> a = numbers(m * k, 5), b = numbers(n * k, 6);
    Array<bf16> da(rounded(a)), db(rounded(b));
    Array<float> c(m * n);
    const int bytes = 6 * 64 * 40 * 2;
    TRY(cudaFuncSetAttribute(tiled, cudaFuncAttributeMaxDynamicSharedMemorySize, bytes));
    LAUNCH(tiled, dim3(m / 64, n / 64), 128, bytes, nullptr, da, db, c, n, k, sabotage);
    return compare(c.get(), product(a, b, m, n, k), 1e-4);
}

// c (64, 128) = a b, of a warpgroup: two stages of 64 numbers of the depth, in lines of 128 bytes,
// swizzled. MINOR: a is (k, 64), b (k, 128); else (64, k) and (128, k).
template <bool MINOR>
__global__ void by_wgmma(const bf16 *a, const bf16 *b, float *c, int k, int sabotage)
{
    extern __shared__ __align__(16) unsigned char pm_shared[];
    bf16 *const stages = reinterpret_cast<bf16 *>(
        (reinterpret_cast<uintptr_t>(pm_shared) + 1023) / 1024 * 1024);
    const int lane = threadIdx.x % 32, warp = threadIdx.x / 32;
    const auto place = [&](int line, int unit) { return line * 64 + (sabotage == 5 ? unit : unit ^ line % 8) * 8; };
    const auto fetch = [&](int at) {
        bf16 *const as = stages + at / 64 % 2 * (64 + 128) * 64, *const bs = as + 64 * 64;
        if (at < k)
            for (int i = threadIdx.x; i < (64 + 128) * 8; i += 128) {
                const bool of_a = i < 64 * 8;
                const int j = of_a ? i : i - 64 * 8, line = j / 8, unit = j % 8;
                const int half = line / 64 * 64; // MINOR: of b's 128 columns
                const bf16 *const from = of_a ? a : b;
                cp_async<16>((of_a ? as : bs) + place(line, unit),
                             MINOR ? &from[(at + line % 64) * (of_a ? 64 : 128) + half + unit * 8]
                                   : &from[line * k + at + unit * 8]);
            }
        cp_async_commit();
    };
    float d[64] = {};
    fetch(0);
    for (int at = 0; at < k; at += 64) {
        const bf16 *const as = stages + at / 64 % 2 * (64 + 128) * 64, *const bs = as + 64 * 64;
        cp_async_wait<0>();
        if (sabotage != 2)
            wgmma_wait<0>(d);
        if (sabotage != 1)
            fence_proxy_async();
        if (sabotage != 3)
            __syncthreads();
        if (sabotage != 4)
            wgmma_begin();
        for (int i = 0; i < 64; i += 16) {
            const int by = i * (MINOR ? 128 : 2);
            wgmma_m64k16<128, MINOR, MINOR>(d, wgmma_advance(wgmma_describe(as, 0, 1024), by),
                                            wgmma_advance(wgmma_describe(bs, 64 * 128, 1024), by));
        }
        wgmma_commit();
        fetch(at + 64);
    }
    if (sabotage != 6)
        wgmma_wait<0>(d);
    for (int i = 0; i < 64; i++)
        c[(warp * 16 + lane / 4 + i / 2 % 2 * 8) * 128 + i / 4 * 8 + lane % 4 * 2 + i % 2] = d[i];
}

template <bool MINOR> static int run_wgmma(int sabotage)
{
    const int m = 64, n = 128, k = 320, bytes = 2 * (64 + 128) * 128 + 1024;
    std::vector<float> a = numbers(m * k, 7), b = numbers(n * k, 8);
    const std::vector<double> want = product(a, b, m, n, k);
    const auto across = [&](std::vector<float> &x, int lines) {
        const std::vector<float> y = x;
        for (int i = 0; i < lines; i++)
            for (int l = 0; l < k; l++)
                x[l * lines + i] = y[i * k + l];
    };
    if (MINOR)
        across(a, m), across(b, n);
    Array<bf16> da(rounded(a)), db(rounded(b));
    Array<float> c(m * n);
    TRY(cudaFuncSetAttribute((by_wgmma<MINOR>), cudaFuncAttributeMaxDynamicSharedMemorySize, bytes));
    LAUNCH((by_wgmma<MINOR>), 1, 128, bytes, nullptr, da, db, c, k, sabotage);
    return compare(c.get(), want, 1e-4);
}

CASE(wgmma) { return run_wgmma<false>(sabotage); }
CASE(wgmma_across) { return run_wgmma<true>(sabotage); }

// ------------------------------------------------------------------ alignment
__global__ void vectors(const float *x, float *y, int sabotage)
{
    __shared__ __align__(16) float s[68];
    const int t = threadIdx.x;
    const float4 v = *reinterpret_cast<const float4 *>(x + 4 * t + (sabotage == 1 && t == 3));
    const float2 w = *reinterpret_cast<const float2 *>(x + 2 * t + (sabotage == 2 && t == 5));
    *reinterpret_cast<float4 *>(s + 4 * t + (sabotage == 3 && t == 7)) = v;
    *reinterpret_cast<float4 *>(y + 4 * t + (sabotage == 4 && t == 9 ? 2 : 0)) =
        make_float4(v.x + w.x, v.y + w.y, v.z, s[4 * t + 3]);
}

CASE(misaligned_vectors)
{
    const std::vector<float> x = numbers(68);
    Array<float> in(x), out(68);
    LAUNCH(vectors, 1, 16, 0, nullptr, in, out, sabotage);
    std::vector<float> want(64);
    for (int i = 0; i < 64; i++)
        want[i] = x[i] + (i % 4 < 2 ? x[i / 4 * 2 + i % 4] : 0);
    return compare(out.get(), want, 1e-6);
}

// ------------------------------------------------------------------ conversions
CASE(bf16_rounding)
{
    for (uint32_t high = 0; high < 65536; high++) {
        const float down = __uint_as_float(high << 16);
        const bool nan = down != down;
        CHECK(nan || __bfloat16_as_ushort(__float2bfloat16_rn(down)) == high);
        CHECK(nan || __float_as_uint(__bfloat162float(__ushort_as_bfloat16((uint16_t)high))) == high << 16);
        if (nan || (high & 0x7fff) == 0x7f80)
            continue;
        const uint16_t up = (uint16_t)(high + 1);
        const auto bits = [&](uint32_t low) {
            return __bfloat16_as_ushort(__float2bfloat16_rn(__uint_as_float(high << 16 | low)));
        };
        CHECK(bits(0x7fff) == high && bits(0x8001) == up && bits(0x8000) == (high & 1 ? up : high));
    }
    CHECK(__bfloat162float(__float2bfloat16_rn(NAN)) != __bfloat162float(__float2bfloat16_rn(NAN)));
    const __nv_bfloat162 pair = __floats2bfloat162_rn(1.5f, -2.0f);
    uint32_t word;
    memcpy(&word, &pair, 4);
    CHECK(word == 0xc0003fc0u && __low2float(pair) == 1.5f && __high2float(pair) == -2.0f);
    CHECK(pm_tf32(1.0f) == 0x3f800000u && pm_tf32(__uint_as_float(0x3f801000u)) == 0x3f802000u);
    CHECK(pm_tf32(__uint_as_float(0xbf800fffu)) == 0xbf800000u);
    return 0;
}
