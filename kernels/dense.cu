// dense.cu: the plans of cuBLASLt, and what stands in for a product or an epilogue that it does not
// offer. A plan is made at the first product of a kind and kept; a product then costs one call.
#include "dense.cuh"

#include <cublasLt.h>

#include <cstdio>
#include <map>
#include <tuple>

namespace {

constexpr size_t WORKSPACE = (size_t)32 << 20; // what NVIDIA recommends for Hopper

struct plan {
    cublasLtMatmulDesc_t description;
    cublasLtMatrixLayout_t a, b, c;
    cublasLtMatmulAlgo_t algorithm;
    size_t workspace;
    bool offered; // false: cuBLASLt has nothing for it
};

// All that a heuristic may look at.
struct key {
    int64_t rows, columns, depth;
    int epilogue, compute;
    bool at, bt, add, bf16_in, bf16_out;
    int align_a, align_b, align_c, align_pre,
        align_bias; // of a bias, or of sums: 0 when there is none
    auto all() const
    {
        return std::tie(rows, columns, depth, epilogue, compute, at, bt, add, bf16_in, bf16_out,
                        align_a, align_b, align_c, align_pre, align_bias);
    }
    bool operator<(const key &other) const { return all() < other.all(); }
};

cublasLtHandle_t handle;
void *workspace;
std::map<key, plan> plans;

pm_status blas(pm_ctx *ctx, const char *what, cublasStatus_t status)
{
    if (status == CUBLAS_STATUS_SUCCESS)
        return PM_OK;
    return pm_fail(ctx, PM_EINTERNAL, "cuBLASLt: %s: %s", what, cublasLtGetStatusString(status));
}

// The largest power of two, up to 256, that divides an address.
int alignment(const void *p)
{
    const uintptr_t bits = reinterpret_cast<uintptr_t>(p) | 256;
    return (int)(bits & (~bits + 1));
}

template <class T> constexpr cudaDataType_t type_of()
{
    return std::is_same<T, bf16>::value ? CUDA_R_16BF : CUDA_R_32F;
}

// ---------------------------------------------------------------- plans

// cuBLASLt is column-major: a row-major (r, c) matrix is its (c, r). So it computes the transpose,
// c^T = b^T a^T: its first operand is our b, its m our columns, and a bias over our columns is one
// over its rows, as it wants. Its "bias gradient of B" is the sum over the depth of our a.
cublasLtEpilogue_t epilogue_of(const pm_dense &p)
{
    switch (p.epilogue) {
    case PM_EPILOGUE_BIAS:
        return CUBLASLT_EPILOGUE_BIAS;
    case PM_EPILOGUE_BIAS_GELU:
        if (p.pre)
            return p.bias ? CUBLASLT_EPILOGUE_GELU_AUX_BIAS : CUBLASLT_EPILOGUE_GELU_AUX;
        return p.bias ? CUBLASLT_EPILOGUE_GELU_BIAS : CUBLASLT_EPILOGUE_GELU;
    case PM_EPILOGUE_DGELU:
        return CUBLASLT_EPILOGUE_DGELU;
    case PM_EPILOGUE_SUM_A:
        return CUBLASLT_EPILOGUE_BGRADB;
    case PM_EPILOGUE_NONE:
        break;
    }
    return CUBLASLT_EPILOGUE_DEFAULT;
}

template <class V>
pm_status set(pm_ctx *ctx, const plan &p, cublasLtMatmulDescAttributes_t attribute, V value)
{
    return blas(ctx, "cublasLtMatmulDescSetAttribute",
                cublasLtMatmulDescSetAttribute(p.description, attribute, &value, sizeof value));
}

// The pointers of an epilogue: a plan is used with others at each call.
pm_status set_pointers(pm_ctx *ctx, const plan &p, const pm_dense &d, const void *bias)
{
    if (bias)
        PM_TRY(set(ctx, p, CUBLASLT_MATMUL_DESC_BIAS_POINTER, bias));
    if (d.pre) {
        PM_TRY(set(ctx, p, CUBLASLT_MATMUL_DESC_EPILOGUE_AUX_POINTER, d.pre));
        PM_TRY(set(ctx, p, CUBLASLT_MATMUL_DESC_EPILOGUE_AUX_LD, (int64_t)d.columns));
    }
    return PM_OK;
}

template <class T, class C>
pm_status describe(pm_ctx *ctx, const pm_dense &d, const void *bias, plan *p)
{
    const cublasComputeType_t type = ctx->backend->compute == PM_TF32 ? CUBLAS_COMPUTE_32F_FAST_TF32
                                                                      : CUBLAS_COMPUTE_32F;
    PM_TRY(blas(ctx, "cublasLtMatmulDescCreate",
                cublasLtMatmulDescCreate(&p->description, type, CUDA_R_32F)));
    PM_TRY(set(ctx, *p, CUBLASLT_MATMUL_DESC_TRANSA, d.bt ? CUBLAS_OP_T : CUBLAS_OP_N));
    PM_TRY(set(ctx, *p, CUBLASLT_MATMUL_DESC_TRANSB, d.at ? CUBLAS_OP_T : CUBLAS_OP_N));
    PM_TRY(set(ctx, *p, CUBLASLT_MATMUL_DESC_EPILOGUE, epilogue_of(d)));
    PM_TRY(set_pointers(ctx, *p, d, bias));
    const int64_t b_rows = d.bt ? d.depth : d.columns, b_columns = d.bt ? d.columns : d.depth;
    const int64_t a_rows = d.at ? d.rows : d.depth, a_columns = d.at ? d.depth : d.rows;
    PM_TRY(blas(ctx, "cublasLtMatrixLayoutCreate",
                cublasLtMatrixLayoutCreate(&p->b, type_of<T>(), (uint64_t)b_rows,
                                           (uint64_t)b_columns, b_rows)));
    PM_TRY(blas(ctx, "cublasLtMatrixLayoutCreate",
                cublasLtMatrixLayoutCreate(&p->a, type_of<T>(), (uint64_t)a_rows,
                                           (uint64_t)a_columns, a_rows)));
    return blas(ctx, "cublasLtMatrixLayoutCreate",
                cublasLtMatrixLayoutCreate(&p->c, type_of<C>(), (uint64_t)d.columns,
                                           (uint64_t)d.rows, d.columns));
}

pm_status choose(pm_ctx *ctx, const key &k, plan *p)
{
    cublasLtMatmulPreference_t preference = nullptr;
    PM_TRY(
        blas(ctx, "cublasLtMatmulPreferenceCreate", cublasLtMatmulPreferenceCreate(&preference)));
    // The order of every sum is fixed, and partial sums are not rounded to bf16.
    const uint32_t reductions = CUBLASLT_REDUCTION_SCHEME_COMPUTE_TYPE;
    const uint32_t align_a = (uint32_t)k.align_b, align_b = (uint32_t)k.align_a,
                   align_c = (uint32_t)k.align_c;
    const struct {
        cublasLtMatmulPreferenceAttributes_t attribute;
        const void *value;
        size_t bytes;
    } wishes[] = {
        {CUBLASLT_MATMUL_PREF_MAX_WORKSPACE_BYTES, &WORKSPACE, sizeof WORKSPACE},
        {CUBLASLT_MATMUL_PREF_REDUCTION_SCHEME_MASK, &reductions, sizeof reductions},
        {CUBLASLT_MATMUL_PREF_MIN_ALIGNMENT_A_BYTES, &align_a, sizeof align_a},
        {CUBLASLT_MATMUL_PREF_MIN_ALIGNMENT_B_BYTES, &align_b, sizeof align_b},
        {CUBLASLT_MATMUL_PREF_MIN_ALIGNMENT_C_BYTES, &align_c, sizeof align_c},
        {CUBLASLT_MATMUL_PREF_MIN_ALIGNMENT_D_BYTES, &align_c, sizeof align_c},
    };
    pm_status status = PM_OK;
    for (const auto &wish : wishes)
        if (status == PM_OK)
            status = blas(ctx, "cublasLtMatmulPreferenceSetAttribute",
                          cublasLtMatmulPreferenceSetAttribute(preference, wish.attribute,
                                                               wish.value, wish.bytes));
    cublasLtMatmulHeuristicResult_t found = {};
    int count = 0;
    if (status == PM_OK) {
        // An error here is an answer, too: nothing for such a product.
        const cublasStatus_t answer = cublasLtMatmulAlgoGetHeuristic(
            handle, p->description, p->b, p->a, p->c, p->c, preference, 1, &found, &count);
        p->offered = answer == CUBLAS_STATUS_SUCCESS && count > 0 &&
                     found.state == CUBLAS_STATUS_SUCCESS && found.workspaceSize <= WORKSPACE;
        p->algorithm = found.algo;
        p->workspace = found.workspaceSize;
    }
    (void)cublasLtMatmulPreferenceDestroy(preference);
    return status;
}

template <class T, class C>
pm_status find_plan(pm_ctx *ctx, const pm_dense &d, const void *bias, const plan **out)
{
    const key k = {d.rows,
                   d.columns,
                   d.depth,
                   epilogue_of(d),
                   ctx->backend->compute,
                   d.at,
                   d.bt,
                   d.add,
                   std::is_same<T, bf16>::value,
                   std::is_same<C, bf16>::value,
                   alignment(d.a),
                   alignment(d.b),
                   alignment(d.c),
                   alignment(d.pre),
                   bias ? alignment(bias) : 0};
    const auto known = plans.find(k);
    if (known != plans.end()) {
        *out = &known->second;
        return PM_OK;
    }
    plan p = {};
    PM_TRY(describe<T, C>(ctx, d, bias, &p));
    PM_TRY(choose(ctx, k, &p));
    *out = &(plans[k] = p);
    return PM_OK;
}

// Does it by cuBLASLt if that offers to; *done says so. bias is of C.
template <class T, class C>
pm_status try_blas(pm_ctx *ctx, const pm_dense &d, const void *bias, bool *done)
{
    const plan *p;
    PM_TRY(find_plan<T, C>(ctx, d, bias, &p));
    *done = p->offered;
    if (!p->offered)
        return PM_OK;
    PM_TRY(set_pointers(ctx, *p, d, bias));
    const float one = 1, beta = d.add ? 1 : 0;
    return blas(ctx, "cublasLtMatmul",
                cublasLtMatmul(handle, p->description, &one, d.b, p->b, d.a, p->a, &beta, d.c, p->c,
                               d.c, p->c, &p->algorithm, workspace, WORKSPACE, pm_device().stream));
}

// ---------------------------------------------------------------- what stands in

// One 32 x 32 tile of c per block of 256 threads, 2 x 2 of it per thread; the depth in steps of 16.
// grid: (tiles of columns) * (tiles of rows). Every element is read once per tile of the other
// side.
template <class T, class C>
__global__ void __launch_bounds__(256)
    product_kernel(int64_t rows, int64_t columns, int64_t depth, const T *__restrict__ a, bool at,
                   const T *__restrict__ b, bool bt, C *__restrict__ c, bool add)
{
    constexpr int TILE = 32, STEP = 16;
    __shared__ float as[STEP][TILE + 1], bs[STEP][TILE + 1];
    const int64_t tiles = (columns + TILE - 1) / TILE;
    const int64_t row0 = blockIdx.x / tiles * TILE, column0 = blockIdx.x % tiles * TILE;
    const int ty = threadIdx.x / 16, tx = threadIdx.x % 16;
    float sum[2][2] = {};
    for (int64_t k0 = 0; k0 < depth; k0 += STEP) {
        for (int i = threadIdx.x; i < TILE * STEP; i += 256) {
            // neighbours in memory are neighbours in the warp
            const int ka = at ? i / TILE : i % STEP, ra = at ? i % TILE : i / STEP;
            const int kb = bt ? i % STEP : i / TILE, cb = bt ? i / STEP : i % TILE;
            const int64_t row = row0 + ra, column = column0 + cb;
            as[ka][ra] = row < rows && k0 + ka < depth
                             ? pm_float(at ? a[(k0 + ka) * rows + row] : a[row * depth + k0 + ka])
                             : 0.0f;
            bs[kb][cb] =
                column < columns && k0 + kb < depth
                    ? pm_float(bt ? b[column * depth + k0 + kb] : b[(k0 + kb) * columns + column])
                    : 0.0f;
        }
        __syncthreads();
#pragma unroll
        for (int k = 0; k < STEP; k++)
#pragma unroll
            for (int i = 0; i < 2; i++)
#pragma unroll
                for (int j = 0; j < 2; j++)
                    sum[i][j] = fmaf(as[k][ty + 16 * i], bs[k][tx + 16 * j], sum[i][j]);
        __syncthreads();
    }
    for (int i = 0; i < 2; i++)
        for (int j = 0; j < 2; j++) {
            const int64_t row = row0 + ty + 16 * i, column = column0 + tx + 16 * j;
            if (row >= rows || column >= columns)
                continue;
            C *const out = c + row * columns + column;
            *out = pm_to<C>(add ? pm_float(*out) + sum[i][j] : sum[i][j]);
        }
}

// An epilogue by itself, in place: one pass over c, and over pre.
template <class T, class C>
__global__ void epilogue_kernel(int64_t count, int64_t columns, pm_epilogue epilogue,
                                const float *__restrict__ bias, T *__restrict__ pre,
                                C *__restrict__ c)
{
    for (int64_t i = pm_thread(); i < count; i += pm_threads()) {
        float x = pm_float(c[i]);
        if (epilogue == PM_EPILOGUE_DGELU) {
            x *= pm_dgelu(pm_float(pre[i]));
        } else {
            if (bias)
                x += bias[i % columns];
            if (epilogue == PM_EPILOGUE_BIAS_GELU) {
                if (pre)
                    pre[i] = pm_to<T>(x);
                x = pm_gelu(x);
            }
        }
        c[i] = pm_to<C>(x);
    }
}

// Column sums in two steps: each block sums up to SUM_ROWS rows of 32 columns into part (chunks,
// columns), then one thread per column adds the chunks in order.
constexpr int64_t SUM_ROWS = 512;

template <class T>
__global__ void __launch_bounds__(256)
    column_part_kernel(int64_t rows, int64_t columns, const T *__restrict__ x,
                       float *__restrict__ part)
{
    __shared__ float sums[8][32];
    const int64_t groups = (columns + 31) / 32;
    const int64_t chunk = blockIdx.x / groups;
    const int64_t column = blockIdx.x % groups * 32 + threadIdx.x % 32;
    const int64_t end = (chunk + 1) * SUM_ROWS < rows ? (chunk + 1) * SUM_ROWS : rows;
    float sum = 0;
    if (column < columns)
        for (int64_t row = chunk * SUM_ROWS + threadIdx.x / 32; row < end; row += 8)
            sum += pm_float(x[row * columns + column]);
    sums[threadIdx.x / 32][threadIdx.x % 32] = sum;
    __syncthreads();
    if (threadIdx.x < 32 && column < columns) {
        for (int i = 1; i < 8; i++)
            sum += sums[i][threadIdx.x];
        part[chunk * columns + column] = sum;
    }
}

__global__ void column_total_kernel(int64_t chunks, int64_t columns, const float *__restrict__ part,
                                    float *__restrict__ sums)
{
    const int64_t column = pm_thread();
    if (column >= columns)
        return;
    float sum = 0;
    for (int64_t chunk = 0; chunk < chunks; chunk++)
        sum += part[chunk * columns + column];
    sums[column] += sum;
}

// sums[i] += sum of row i of x (rows, columns): one warp per row.
template <class T>
__global__ void row_sum_kernel(int64_t rows, int64_t columns, const T *__restrict__ x,
                               float *__restrict__ sums)
{
    const int64_t row = pm_thread() / 32;
    if (row >= rows)
        return;
    float sum = 0;
    for (int64_t j = threadIdx.x % 32; j < columns; j += 32)
        sum += pm_float(x[row * columns + j]);
    sum = pm_warp_sum(sum);
    if (threadIdx.x % 32 == 0)
        sums[row] += sum;
}

template <class T, class C> pm_status product_without(pm_ctx *ctx, const pm_dense &d)
{
    const int64_t tiles = ((d.rows + 31) / 32) * ((d.columns + 31) / 32);
    PM_RUN(ctx, (product_kernel<T, C>), (unsigned)tiles, 256, 0, d.rows, d.columns, d.depth,
           static_cast<const T *>(d.a), d.at, static_cast<const T *>(d.b), d.bt,
           static_cast<C *>(d.c), d.add);
    return PM_OK;
}

template <class T, class C> pm_status epilogue_apart(pm_ctx *ctx, const pm_dense &d, void **scratch)
{
    const int64_t count = d.rows * d.columns;
    if (d.epilogue == PM_EPILOGUE_NONE)
        return PM_OK;
    if (d.epilogue != PM_EPILOGUE_SUM_A) {
        PM_RUN(ctx, (epilogue_kernel<T, C>), pm_blocks(count, 1024), 256, 0, count, d.columns,
               d.epilogue, d.bias, static_cast<T *>(d.pre), static_cast<C *>(d.c));
        return PM_OK;
    }
    const T *const a = static_cast<const T *>(d.a);
    if (d.at)
        return pm_column_sums<T>(ctx, d.depth, d.rows, a, d.sums, scratch);
    PM_RUN(ctx, (row_sum_kernel<T>), pm_blocks(d.rows, 8), 256, 0, d.rows, d.depth, a, d.sums);
    return PM_OK;
}

// The vector of cuBLASLt's epilogue: a bias of C, or room for the sums.
template <class T, class C> size_t vector_room(const pm_dense &d)
{
    if (d.epilogue == PM_EPILOGUE_SUM_A)
        return pm_room(d.rows, sizeof(float));
    return d.bias && std::is_same<C, bf16>::value ? pm_room(d.columns, sizeof(bf16)) : 0;
}

template <class T, class C>
pm_status with_epilogue(pm_ctx *ctx, const pm_dense &d, void **scratch, bool *done)
{
    const void *vector = d.bias;
    float *const sums = d.epilogue == PM_EPILOGUE_SUM_A ? pm_take<float>(scratch, d.rows) : nullptr;
    if (sums)
        vector = sums;
    else if (d.bias && std::is_same<C, bf16>::value) {
        bf16 *const rounded = pm_take<bf16>(scratch, d.columns);
        PM_TRY(pm_round(ctx, d.columns, d.bias, rounded));
        vector = rounded;
    }
    PM_TRY(try_blas<T, C>(ctx, d, vector, done));
    return *done && sums ? pm_add(ctx, d.rows, sums, d.sums) : PM_OK;
}

} // namespace

// ---------------------------------------------------------------- the product

static size_t sums_room(const pm_dense &d)
{
    return d.epilogue == PM_EPILOGUE_SUM_A && d.at ? pm_column_sums_room(d.depth, d.rows) : 0;
}

// GELU of cuBLASLt is right to 1e-6 of the largest value: enough for tf32 and bf16, but ten times the
// rounding of fp32. There it is a pass of its own.
template <class T> static bool is_exact(const pm_ctx *ctx, const pm_dense &d)
{
    const bool gelu = d.epilogue == PM_EPILOGUE_BIAS_GELU || d.epilogue == PM_EPILOGUE_DGELU;
    return !(gelu && std::is_same<T, float>::value && ctx->backend->compute != PM_TF32);
}

template <class T, class C> size_t pm_dense_room(const pm_dense &d)
{
    return vector_room<T, C>(d) + sums_room(d);
}

template <class T, class C> pm_status pm_dense_run(pm_ctx *ctx, const pm_dense &d, void **scratch)
{
    if (d.rows == 0 || d.columns == 0)
        return PM_OK;
    bool done = false;
    if (d.depth > 0 && d.epilogue != PM_EPILOGUE_NONE && is_exact<T>(ctx, d))
        PM_TRY(with_epilogue<T, C>(ctx, d, scratch, &done));
    if (done)
        return PM_OK;
    pm_dense plain = d;
    plain.epilogue = PM_EPILOGUE_NONE;
    plain.pre = nullptr;
    if (d.depth > 0)
        PM_TRY(try_blas<T, C>(ctx, plain, nullptr, &done));
    if (!done)
        PM_TRY(product_without<T, C>(ctx, plain));
    return epilogue_apart<T, C>(ctx, d, scratch);
}

size_t pm_column_sums_room(int64_t rows, int64_t columns)
{
    return pm_room((rows + SUM_ROWS - 1) / SUM_ROWS * columns, sizeof(float));
}

template <class T>
pm_status pm_column_sums(pm_ctx *ctx, int64_t rows, int64_t columns, const T *x, float *sums,
                         void **scratch)
{
    const int64_t chunks = (rows + SUM_ROWS - 1) / SUM_ROWS, groups = (columns + 31) / 32;
    float *const part = pm_take<float>(scratch, chunks * columns);
    PM_RUN(ctx, (column_part_kernel<T>), (unsigned)(chunks * groups), 256, 0, rows, columns, x,
           part);
    PM_RUN(ctx, column_total_kernel, pm_blocks(chunks ? columns : 0, 256), 256, 0, chunks, columns,
           part, sums);
    return PM_OK;
}

#define PM_DENSE(T, C)                                                                             \
    template pm_status pm_dense_run<T, C>(pm_ctx *, const pm_dense &, void **);                    \
    template size_t pm_dense_room<T, C>(const pm_dense &);
PM_DENSE(float, float)
PM_DENSE(bf16, bf16)
PM_DENSE(bf16, float)
template pm_status pm_column_sums<float>(pm_ctx *, int64_t, int64_t, const float *, float *,
                                         void **);
template pm_status pm_column_sums<bf16>(pm_ctx *, int64_t, int64_t, const bf16 *, float *, void **);

bool pm_dense_open(char *message, size_t message_bytes)
{
    const cublasStatus_t status = cublasLtCreate(&handle);
    if (status != CUBLAS_STATUS_SUCCESS) {
        snprintf(message, message_bytes, "cublasLtCreate: %s", cublasLtGetStatusString(status));
        return false;
    }
    const cudaError_t error = cudaMalloc(&workspace, WORKSPACE);
    if (error == cudaSuccess)
        return true;
    snprintf(message, message_bytes, "no %zu bytes of GPU memory for cuBLASLt: %s", WORKSPACE,
             cudaGetErrorString(error));
    (void)cudaGetLastError();
    (void)cublasLtDestroy(handle);
    return false;
}
