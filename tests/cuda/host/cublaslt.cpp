// cublaslt.cpp: D = epilogue(alpha op(A) op(B) + beta C), column-major, with the checks.
#include "cublasLt.h"

#include <cmath>
#include <cstdlib>
#include <cstring>
#include <set>
#include <vector>

#include "ptx_on_cpu.h"
#include "runtime.h"

using namespace pm_host;

struct pm_host_blas {};
struct pm_host_layout {
    cudaDataType type;
    uint64_t rows, columns;
    int64_t ld;
    int32_t batch;
    int64_t stride;
};
struct pm_host_matmul {
    cublasComputeType_t compute;
    int32_t transa, transb;
    uint32_t epilogue;
    char *bias, *aux;
    int64_t aux_ld, bias_stride, aux_stride;
    int32_t bias_type, aux_type; // -1: the type of D
};
struct pm_host_preference {
    uint64_t workspace;
    uint32_t reductions, align[4]; // of A, B, C, D
};

namespace {

std::set<void *> objects; // handles, layouts, descriptions, preferences that live

#define COMPLAIN(status, ...) return complain(__VA_ARGS__), CUBLAS_STATUS_##status
#define REQUIRE(condition, status, ...)                                                            \
    do {                                                                                           \
        if (!(condition))                                                                          \
            COMPLAIN(status, __VA_ARGS__);                                                         \
    } while (0)

template <class T> cublasStatus_t create(T **out, const T &value)
{
    REQUIRE(out, INVALID_VALUE, "nowhere to create to: null");
    objects.insert(*out = new T(value));
    return CUBLAS_STATUS_SUCCESS;
}

template <class T> cublasStatus_t destroy(T *object)
{
    if (!object)
        return CUBLAS_STATUS_SUCCESS;
    REQUIRE(objects.erase(object), INVALID_VALUE, "%p was destroyed before", (void *)object);
    delete object;
    return CUBLAS_STATUS_SUCCESS;
}

template <class F> cublasStatus_t take(F *field, const char *name, const void *value, size_t bytes)
{
    REQUIRE(value && bytes == sizeof(F), INVALID_VALUE, "attribute %s has %zu bytes, given %zu", name,
            sizeof(F), bytes);
    memcpy(field, value, bytes);
    return CUBLAS_STATUS_SUCCESS;
}

size_t size_of(int32_t type) { return type == CUDA_R_16BF ? 2 : 4; }

float load(const void *p, int32_t type, int64_t i)
{
    if (type == CUDA_R_16BF)
        return __uint_as_float((unsigned)((const uint16_t *)p)[i] << 16);
    return ((const float *)p)[i];
}

void store(void *p, int32_t type, int64_t i, float v)
{
    if (type == CUDA_R_16BF)
        ((uint16_t *)p)[i] = __float2bfloat16_rn(v).__x;
    else
        ((float *)p)[i] = v;
}

bool has(uint32_t epilogue, uint32_t bits) { return (epilogue & bits) == bits; }
bool bias_in(uint32_t e) { return has(e, CUBLASLT_EPILOGUE_BIAS); }
bool uses_aux(uint32_t e) { return has(e, 128); }
bool dgelu(uint32_t e) { return has(e, 64); }
bool sums_d(uint32_t e) { return has(e, 16); }
bool uses_bias(uint32_t e)
{
    return bias_in(e) || sums_d(e) || e == CUBLASLT_EPILOGUE_BGRADA || e == CUBLASLT_EPILOGUE_BGRADB;
}

// ------------------------------------------------------------------ what is allowed

cublasStatus_t check_layout(const char *name, const pm_host_layout *l)
{
    REQUIRE(objects.count((void *)l), INVALID_VALUE, "layout of %s: null or destroyed", name);
    REQUIRE(l->rows > 0 && l->columns > 0 && l->rows < 1u << 31 && l->columns < 1u << 31, INVALID_VALUE,
            "layout of %s: %llu rows, %llu columns", name, (unsigned long long)l->rows,
            (unsigned long long)l->columns);
    REQUIRE(l->ld >= (int64_t)l->rows, INVALID_VALUE,
            "layout of %s: leading dimension %lld is less than the %llu rows of a column", name,
            (long long)l->ld, (unsigned long long)l->rows);
    REQUIRE(l->type == CUDA_R_32F || l->type == CUDA_R_16BF, NOT_SUPPORTED, "layout of %s: type %d", name,
            (int)l->type);
    REQUIRE(l->batch >= 1, INVALID_VALUE, "layout of %s: batch count %d", name, l->batch);
    return CUBLAS_STATUS_SUCCESS;
}

struct Shape {
    int64_t m, n, k;
};

cublasStatus_t check_problem(const pm_host_matmul *o, const pm_host_layout *a, const pm_host_layout *b,
                             const pm_host_layout *c, const pm_host_layout *d, Shape *shape)
{
    REQUIRE(objects.count((void *)o), INVALID_VALUE, "the description is null or destroyed");
    const pm_host_layout *const layouts[4] = {a, b, c, d};
    for (int i = 0; i < 4; i++) {
        const char name[2] = {"ABCD"[i], 0};
        const cublasStatus_t s = check_layout(name, layouts[i]);
        if (s != CUBLAS_STATUS_SUCCESS)
            return s;
        REQUIRE(layouts[i]->batch == d->batch, INVALID_VALUE, "batch count of %s is %d, of D %d", name,
                layouts[i]->batch, d->batch);
    }
    const int64_t m = (int64_t)(o->transa ? a->columns : a->rows);
    const int64_t k = (int64_t)(o->transa ? a->rows : a->columns);
    const int64_t kb = (int64_t)(o->transb ? b->columns : b->rows);
    const int64_t n = (int64_t)(o->transb ? b->rows : b->columns);
    REQUIRE(k == kb && (int64_t)d->rows == m && (int64_t)d->columns == n && c->rows == d->rows &&
                c->columns == d->columns,
            INVALID_VALUE,
            "shapes do not fit: op(A) (%lld, %lld), op(B) (%lld, %lld), C (%llu, %llu), D (%llu, %llu)",
            (long long)m, (long long)k, (long long)kb, (long long)n, (unsigned long long)c->rows,
            (unsigned long long)c->columns, (unsigned long long)d->rows,
            (unsigned long long)d->columns);
    REQUIRE(a->type == b->type && c->type == d->type &&
                (a->type == CUDA_R_16BF || d->type == CUDA_R_32F),
            NOT_SUPPORTED, "types of A, B, C, D: %d, %d, %d, %d", a->type, b->type, c->type, d->type);
    REQUIRE(a->type == CUDA_R_32F || o->compute == CUBLAS_COMPUTE_32F ||
                o->compute == CUBLAS_COMPUTE_32F_PEDANTIC,
            NOT_SUPPORTED, "compute type %d is for float matrices", (int)o->compute);
    switch (o->epilogue) {
    case CUBLASLT_EPILOGUE_DEFAULT:
    case CUBLASLT_EPILOGUE_BIAS:
    case CUBLASLT_EPILOGUE_GELU:
    case CUBLASLT_EPILOGUE_GELU_AUX:
    case CUBLASLT_EPILOGUE_GELU_BIAS:
    case CUBLASLT_EPILOGUE_GELU_AUX_BIAS:
    case CUBLASLT_EPILOGUE_DGELU:
    case CUBLASLT_EPILOGUE_DGELU_BGRAD:
    case CUBLASLT_EPILOGUE_BGRADA:
    case CUBLASLT_EPILOGUE_BGRADB:
        break;
    default:
        COMPLAIN(NOT_SUPPORTED, "epilogue %u is not known here", o->epilogue);
    }
    REQUIRE(o->bias_type == -1 || o->bias_type == d->type, NOT_SUPPORTED,
            "bias of type %d with D of type %d", o->bias_type, d->type);
    REQUIRE(o->aux_type == -1 || o->aux_type == d->type, NOT_SUPPORTED,
            "auxiliary matrix of type %d with D of type %d", o->aux_type, d->type);
    if (uses_aux(o->epilogue))
        REQUIRE(o->aux_ld >= m && o->aux_ld % 8 == 0, NOT_SUPPORTED,
                "the leading dimension of the auxiliary matrix is %lld: it has to be a multiple of 8, "
                "and at least the %lld rows of D",
                (long long)o->aux_ld, (long long)m);
    *shape = {m, n, k};
    return CUBLAS_STATUS_SUCCESS;
}

// What an algorithm was chosen for; cublasLtMatmul has to be called with the same. data[]:
enum { MAGIC, WORKSPACE, ALIGN_AB, ALIGN_CD, PROBLEM, ALIGN_EPILOGUE };
constexpr uint64_t ALGORITHM = 0x70726f6d6f65ull;

uint64_t hash(const pm_host_matmul *o, const pm_host_layout *const layouts[4])
{
    uint64_t h = 14695981039346656037u;
    const auto mix = [&](uint64_t v) { h = (h ^ v) * 1099511628211u; };
    mix((uint64_t)o->compute), mix((uint64_t)o->transa), mix((uint64_t)o->transb), mix(o->epilogue);
    for (int i = 0; i < 4; i++) {
        mix((uint64_t)layouts[i]->type), mix(layouts[i]->rows), mix(layouts[i]->columns);
        mix((uint64_t)layouts[i]->ld), mix((uint64_t)layouts[i]->batch);
        mix((uint64_t)layouts[i]->stride);
    }
    return h;
}

uint64_t alignment(const void *p)
{
    const uint64_t a = (uint64_t)p | 256;
    return a & (~a + 1);
}

// ------------------------------------------------------------------ the product

struct Matrix {
    char *p;
    pm_host_layout l;
    const char *batch(int i) const { return p + (int64_t)i * l.stride * (int64_t)size_of(l.type); }
    size_t bytes() const
    {
        return ((size_t)(l.batch - 1) * (size_t)l.stride + (l.columns - 1) * (size_t)l.ld + l.rows) *
               size_of(l.type);
    }
};

float rounded(float v, cublasComputeType_t compute)
{
    if (compute == CUBLAS_COMPUTE_32F_FAST_TF32)
        return __uint_as_float(pm_tf32(v));
    if (compute == CUBLAS_COMPUTE_32F_FAST_16BF)
        return __bfloat162float(__float2bfloat16_rn(v));
    return v;
}

constexpr int64_t ROWS = 32, COLUMNS = 4; // of D at a time

struct Product {
    pm_host_matmul o;
    Matrix a, b, c, d;
    Shape s;
    float alpha, beta;

    // (n, k) of op(B), or (panels of ROWS, k, ROWS) of op(A), in float
    std::vector<float> unpack_b(int batch) const
    {
        std::vector<float> out((size_t)(s.n * s.k));
        for (int64_t j = 0; j < s.n; j++)
            for (int64_t k = 0; k < s.k; k++)
                out[(size_t)(j * s.k + k)] =
                    rounded(load(b.batch(batch), b.l.type, o.transb ? k * b.l.ld + j : j * b.l.ld + k),
                            o.compute);
        return out;
    }
    std::vector<float> unpack_a(int batch) const
    {
        const int64_t panels = (s.m + ROWS - 1) / ROWS;
        std::vector<float> out((size_t)(panels * ROWS * s.k));
        for (int64_t i = 0; i < s.m; i++)
            for (int64_t k = 0; k < s.k; k++)
                out[(size_t)((i / ROWS * s.k + k) * ROWS + i % ROWS)] =
                    rounded(load(a.batch(batch), a.l.type, o.transa ? i * a.l.ld + k : k * a.l.ld + i),
                            o.compute);
        return out;
    }

    float gelu(float x) const
    {
        return 0.5f * x * (1 + tanhf(0.7978845608f * (x + 0.044715f * x * x * x)));
    }
    float gelu_slope(float x) const
    {
        const float u = 0.7978845608f * (x + 0.044715f * x * x * x), t = tanhf(u);
        return 0.5f * (1 + t) + 0.5f * x * (1 - t * t) * 0.7978845608f * (1 + 0.134145f * x * x);
    }

    float finish(float v, int64_t i, int64_t j, const char *bias, char *aux) const
    {
        if (bias_in(o.epilogue))
            v += load(bias, d.l.type, i);
        if (dgelu(o.epilogue))
            return v * gelu_slope(load(aux, d.l.type, j * o.aux_ld + i));
        if (uses_aux(o.epilogue))
            store(aux, d.l.type, j * o.aux_ld + i, v);
        return has(o.epilogue, CUBLASLT_EPILOGUE_GELU) ? gelu(v) : v;
    }

    void run(int batch) const
    {
        const std::vector<float> A = unpack_a(batch), B = unpack_b(batch);
        char *const bias = o.bias + (int64_t)batch * o.bias_stride * (int64_t)size_of(d.l.type);
        char *const aux = o.aux + (int64_t)batch * o.aux_stride * (int64_t)size_of(d.l.type);
        const char *const before = c.batch(batch);
        char *const out = (char *)d.batch(batch);
        std::vector<float> sums((size_t)s.m, 0.0f);
        for (int64_t j0 = 0; j0 < s.n; j0 += COLUMNS)
            for (int64_t i0 = 0; i0 < s.m; i0 += ROWS) {
                float sum[COLUMNS][ROWS] = {};
                const float *panel = &A[(size_t)(i0 * s.k)];
                const float *column[COLUMNS];
                for (int j = 0; j < COLUMNS; j++)
                    column[j] = &B[(size_t)((j0 + j < s.n ? j0 + j : j0) * s.k)];
                for (int64_t k = 0; k < s.k; k++)
                    for (int j = 0; j < COLUMNS; j++)
                        for (int i = 0; i < ROWS; i++)
                            sum[j][i] += panel[k * ROWS + i] * column[j][k];
                for (int64_t j = j0; j < s.n && j < j0 + COLUMNS; j++)
                    for (int64_t i = i0; i < s.m && i < i0 + ROWS; i++) {
                        float v = alpha * sum[j - j0][i - i0];
                        if (beta != 0)
                            v += beta * load(before, c.l.type, j * c.l.ld + i);
                        v = finish(v, i, j, bias, aux);
                        sums[(size_t)i] += v;
                        store(out, d.l.type, j * d.l.ld + i, v);
                    }
            }
        if (sums_d(o.epilogue))
            for (int64_t i = 0; i < s.m; i++)
                store(bias, d.l.type, i, sums[(size_t)i]);
        if (o.epilogue == CUBLASLT_EPILOGUE_BGRADA)
            for (int64_t i = 0; i < s.m; i++) {
                float v = 0;
                for (int64_t k = 0; k < s.k; k++)
                    v += A[(size_t)((i / ROWS * s.k + k) * ROWS + i % ROWS)];
                store(bias, d.l.type, i, v);
            }
        if (o.epilogue == CUBLASLT_EPILOGUE_BGRADB)
            for (int64_t j = 0; j < s.n; j++) {
                float v = 0;
                for (int64_t k = 0; k < s.k; k++)
                    v += B[(size_t)(j * s.k + k)];
                store(bias, d.l.type, j, v);
            }
    }
};

bool overlap(const void *p, size_t bytes, const void *q, size_t more)
{
    return (const char *)p < (const char *)q + more && (const char *)q < (const char *)p + bytes;
}

} // namespace

// ------------------------------------------------------------------ the functions

extern "C" const char *cublasLtGetStatusName(cublasStatus_t status)
{
    switch (status) {
    case CUBLAS_STATUS_SUCCESS:
        return "CUBLAS_STATUS_SUCCESS";
    case CUBLAS_STATUS_NOT_INITIALIZED:
        return "CUBLAS_STATUS_NOT_INITIALIZED";
    case CUBLAS_STATUS_ALLOC_FAILED:
        return "CUBLAS_STATUS_ALLOC_FAILED";
    case CUBLAS_STATUS_INVALID_VALUE:
        return "CUBLAS_STATUS_INVALID_VALUE";
    case CUBLAS_STATUS_ARCH_MISMATCH:
        return "CUBLAS_STATUS_ARCH_MISMATCH";
    case CUBLAS_STATUS_EXECUTION_FAILED:
        return "CUBLAS_STATUS_EXECUTION_FAILED";
    case CUBLAS_STATUS_INTERNAL_ERROR:
        return "CUBLAS_STATUS_INTERNAL_ERROR";
    case CUBLAS_STATUS_NOT_SUPPORTED:
        return "CUBLAS_STATUS_NOT_SUPPORTED";
    }
    return "CUBLAS_STATUS of another kind";
}

extern "C" const char *cublasLtGetStatusString(cublasStatus_t status)
{
    static std::string text;
    text = cublasLtGetStatusName(status);
    if (status != CUBLAS_STATUS_SUCCESS && !complaint.empty())
        text += ": " + complaint;
    return text.c_str();
}

extern "C" size_t cublasLtGetVersion() { return 130000; }

extern "C" cublasStatus_t cublasLtCreate(cublasLtHandle_t *handle)
{
    if (settings.fail_allocation > 0 && --settings.fail_allocation == 0)
        COMPLAIN(ALLOC_FAILED, "cublasLtCreate");
    return create(handle, {});
}
extern "C" cublasStatus_t cublasLtDestroy(cublasLtHandle_t handle) { return destroy(handle); }

extern "C" cublasStatus_t cublasLtMatrixLayoutCreate(cublasLtMatrixLayout_t *layout, cudaDataType type,
                                                     uint64_t rows, uint64_t columns, int64_t ld)
{
    return create(layout, {type, rows, columns, ld, 1, 0});
}
extern "C" cublasStatus_t cublasLtMatrixLayoutDestroy(cublasLtMatrixLayout_t layout)
{
    return destroy(layout);
}

extern "C" cublasStatus_t cublasLtMatrixLayoutSetAttribute(cublasLtMatrixLayout_t l,
                                                           cublasLtMatrixLayoutAttribute_t attribute,
                                                           const void *value, size_t bytes)
{
    REQUIRE(objects.count(l), INVALID_VALUE, "the layout is null or destroyed");
    int32_t order = CUBLASLT_ORDER_COL;
    switch (attribute) {
    case CUBLASLT_MATRIX_LAYOUT_TYPE:
        return take(&l->type, "TYPE", value, bytes);
    case CUBLASLT_MATRIX_LAYOUT_ROWS:
        return take(&l->rows, "ROWS", value, bytes);
    case CUBLASLT_MATRIX_LAYOUT_COLS:
        return take(&l->columns, "COLS", value, bytes);
    case CUBLASLT_MATRIX_LAYOUT_LD:
        return take(&l->ld, "LD", value, bytes);
    case CUBLASLT_MATRIX_LAYOUT_BATCH_COUNT:
        return take(&l->batch, "BATCH_COUNT", value, bytes);
    case CUBLASLT_MATRIX_LAYOUT_STRIDED_BATCH_OFFSET:
        return take(&l->stride, "STRIDED_BATCH_OFFSET", value, bytes);
    case CUBLASLT_MATRIX_LAYOUT_ORDER: {
        const cublasStatus_t s = take(&order, "ORDER", value, bytes);
        REQUIRE(order == CUBLASLT_ORDER_COL, NOT_SUPPORTED, "order %d: here all is column-major", order);
        return s;
    }
    }
    COMPLAIN(INVALID_VALUE, "layout attribute %d is not known here", (int)attribute);
}

extern "C" cublasStatus_t cublasLtMatmulDescCreate(cublasLtMatmulDesc_t *description,
                                                   cublasComputeType_t compute, cudaDataType_t scale)
{
    REQUIRE(scale == CUDA_R_32F, NOT_SUPPORTED, "scale type %d", (int)scale);
    return create(description, {compute, CUBLAS_OP_N, CUBLAS_OP_N, CUBLASLT_EPILOGUE_DEFAULT, nullptr,
                                nullptr, 0, 0, 0, -1, -1});
}
extern "C" cublasStatus_t cublasLtMatmulDescDestroy(cublasLtMatmulDesc_t description)
{
    return destroy(description);
}

extern "C" cublasStatus_t cublasLtMatmulDescSetAttribute(cublasLtMatmulDesc_t o,
                                                         cublasLtMatmulDescAttributes_t attribute,
                                                         const void *value, size_t bytes)
{
    REQUIRE(objects.count(o), INVALID_VALUE, "the description is null or destroyed");
    int32_t word = 0;
    switch (attribute) {
    case CUBLASLT_MATMUL_DESC_COMPUTE_TYPE:
        return take(&o->compute, "COMPUTE_TYPE", value, bytes);
    case CUBLASLT_MATMUL_DESC_TRANSA:
        return take(&o->transa, "TRANSA", value, bytes);
    case CUBLASLT_MATMUL_DESC_TRANSB:
        return take(&o->transb, "TRANSB", value, bytes);
    case CUBLASLT_MATMUL_DESC_EPILOGUE:
        return take(&o->epilogue, "EPILOGUE", value, bytes);
    case CUBLASLT_MATMUL_DESC_BIAS_POINTER:
        return take(&o->bias, "BIAS_POINTER", value, bytes);
    case CUBLASLT_MATMUL_DESC_BIAS_BATCH_STRIDE:
        return take(&o->bias_stride, "BIAS_BATCH_STRIDE", value, bytes);
    case CUBLASLT_MATMUL_DESC_BIAS_DATA_TYPE:
        return take(&o->bias_type, "BIAS_DATA_TYPE", value, bytes);
    case CUBLASLT_MATMUL_DESC_EPILOGUE_AUX_POINTER:
        return take(&o->aux, "EPILOGUE_AUX_POINTER", value, bytes);
    case CUBLASLT_MATMUL_DESC_EPILOGUE_AUX_LD:
        return take(&o->aux_ld, "EPILOGUE_AUX_LD", value, bytes);
    case CUBLASLT_MATMUL_DESC_EPILOGUE_AUX_BATCH_STRIDE:
        return take(&o->aux_stride, "EPILOGUE_AUX_BATCH_STRIDE", value, bytes);
    case CUBLASLT_MATMUL_DESC_EPILOGUE_AUX_DATA_TYPE:
        return take(&o->aux_type, "EPILOGUE_AUX_DATA_TYPE", value, bytes);
    case CUBLASLT_MATMUL_DESC_SCALE_TYPE:
    case CUBLASLT_MATMUL_DESC_POINTER_MODE:
    case CUBLASLT_MATMUL_DESC_TRANSC: {
        const cublasStatus_t s = take(&word, "SCALE_TYPE, POINTER_MODE or TRANSC", value, bytes);
        REQUIRE(word == 0, NOT_SUPPORTED, "attribute %d: only its default, 0, is known here",
                (int)attribute);
        return s;
    }
    }
    COMPLAIN(INVALID_VALUE, "attribute %d of a product is not known here", (int)attribute);
}

extern "C" cublasStatus_t cublasLtMatmulPreferenceCreate(cublasLtMatmulPreference_t *preference)
{
    return create(preference, {0, CUBLASLT_REDUCTION_SCHEME_MASK, {256, 256, 256, 256}});
}
extern "C" cublasStatus_t cublasLtMatmulPreferenceDestroy(cublasLtMatmulPreference_t preference)
{
    return destroy(preference);
}

extern "C" cublasStatus_t
cublasLtMatmulPreferenceSetAttribute(cublasLtMatmulPreference_t p,
                                     cublasLtMatmulPreferenceAttributes_t attribute, const void *value,
                                     size_t bytes)
{
    REQUIRE(objects.count(p), INVALID_VALUE, "the preference is null or destroyed");
    uint32_t mode = 0;
    switch (attribute) {
    case CUBLASLT_MATMUL_PREF_SEARCH_MODE:
        return take(&mode, "SEARCH_MODE", value, bytes);
    case CUBLASLT_MATMUL_PREF_MAX_WORKSPACE_BYTES:
        return take(&p->workspace, "MAX_WORKSPACE_BYTES", value, bytes);
    case CUBLASLT_MATMUL_PREF_REDUCTION_SCHEME_MASK:
        return take(&p->reductions, "REDUCTION_SCHEME_MASK", value, bytes);
    case CUBLASLT_MATMUL_PREF_MIN_ALIGNMENT_A_BYTES:
    case CUBLASLT_MATMUL_PREF_MIN_ALIGNMENT_B_BYTES:
    case CUBLASLT_MATMUL_PREF_MIN_ALIGNMENT_C_BYTES:
    case CUBLASLT_MATMUL_PREF_MIN_ALIGNMENT_D_BYTES:
        return take(&p->align[attribute - CUBLASLT_MATMUL_PREF_MIN_ALIGNMENT_A_BYTES], "MIN_ALIGNMENT",
                    value, bytes);
    }
    COMPLAIN(INVALID_VALUE, "preference %d is not known here", (int)attribute);
}

// The algorithm offered wants some workspace, as far as it may have one, and remembers what it was
// chosen for.
extern "C" cublasStatus_t cublasLtMatmulAlgoGetHeuristic(
    cublasLtHandle_t handle, cublasLtMatmulDesc_t o, cublasLtMatrixLayout_t a, cublasLtMatrixLayout_t b,
    cublasLtMatrixLayout_t c, cublasLtMatrixLayout_t d, cublasLtMatmulPreference_t preference, int asked,
    cublasLtMatmulHeuristicResult_t results[], int *returned)
{
    REQUIRE(objects.count(handle), NOT_INITIALIZED, "the handle is null or destroyed");
    REQUIRE(objects.count(preference) && asked > 0 && results && returned, INVALID_VALUE,
            "cublasLtMatmulAlgoGetHeuristic: a null, or no result is asked for");
    *returned = 0;
    Shape shape;
    const cublasStatus_t s = check_problem(o, a, b, c, d, &shape);
    if (s != CUBLAS_STATUS_SUCCESS)
        return s;
    if (settings.heuristic == 0 ||
        (settings.heuristic == 1 && o->epilogue != CUBLASLT_EPILOGUE_DEFAULT))
        COMPLAIN(NOT_SUPPORTED, "the heuristic was told to offer nothing");
    const uint32_t *align = preference->align;
    for (int i = 0; i < 4; i++)
        REQUIRE(align[i] && !(align[i] & (align[i] - 1)), INVALID_VALUE, "alignment %u of %c", align[i],
                "ABCD"[i]);
    REQUIRE(!uses_aux(o->epilogue) || (uintptr_t)o->aux % 16 == 0, NOT_SUPPORTED,
            "the auxiliary matrix at %p is not aligned to 16 bytes", (void *)o->aux);
    const pm_host_layout *const layouts[4] = {a, b, c, d};
    cublasLtMatmulHeuristicResult_t r = {};
    r.workspaceSize = preference->workspace < 4096 ? 0 : 4096;
    r.state = CUBLAS_STATUS_SUCCESS;
    r.wavesCount = 1;
    r.algo.data[MAGIC] = ALGORITHM;
    r.algo.data[WORKSPACE] = r.workspaceSize;
    r.algo.data[ALIGN_AB] = (uint64_t)align[0] << 32 | align[1];
    r.algo.data[ALIGN_CD] = (uint64_t)align[2] << 32 | align[3];
    r.algo.data[PROBLEM] = hash(o, layouts);
    r.algo.data[ALIGN_EPILOGUE] = alignment(o->bias) << 32 | alignment(o->aux);
    results[0] = r;
    *returned = 1;
    return CUBLAS_STATUS_SUCCESS;
}

static cublasStatus_t check_algorithm(const cublasLtMatmulAlgo_t *algorithm, const pm_host_matmul *o,
                                      const Matrix *const m[4], const void *workspace,
                                      size_t workspace_bytes)
{
    const uint64_t *data = algorithm->data;
    REQUIRE(data[MAGIC] == ALGORITHM, INVALID_VALUE, "the algorithm did not come from the heuristic");
    const pm_host_layout *const layouts[4] = {&m[0]->l, &m[1]->l, &m[2]->l, &m[3]->l};
    REQUIRE(data[PROBLEM] == hash(o, layouts), INVALID_VALUE,
            "the algorithm was chosen for another product (shapes, types, transposes or epilogue)");
    REQUIRE(workspace_bytes >= data[WORKSPACE], INVALID_VALUE, "%zu bytes of workspace; it needs %llu",
            workspace_bytes, (unsigned long long)data[WORKSPACE]);
    REQUIRE(data[WORKSPACE] == 0 || workspace, INVALID_VALUE, "the workspace is null; it needs %llu bytes",
            (unsigned long long)data[WORKSPACE]);
    const uint64_t align[4] = {data[ALIGN_AB] >> 32, data[ALIGN_AB] & 0xffffffffu, data[ALIGN_CD] >> 32,
                               data[ALIGN_CD] & 0xffffffffu};
    for (int i = 0; i < 4; i++)
        REQUIRE((uintptr_t)m[i]->p % align[i] == 0, INVALID_VALUE,
                "%c is at %p; the algorithm was chosen for an alignment of %llu bytes", "ABCD"[i],
                (void *)m[i]->p, (unsigned long long)align[i]);
    REQUIRE(!uses_bias(o->epilogue) || alignment(o->bias) >= data[ALIGN_EPILOGUE] >> 32, INVALID_VALUE,
            "the bias at %p is less aligned than when the algorithm was chosen", (void *)o->bias);
    REQUIRE(!uses_aux(o->epilogue) || alignment(o->aux) >= (data[ALIGN_EPILOGUE] & 0xffffffffu),
            INVALID_VALUE, "the auxiliary matrix at %p is less aligned than when the algorithm was chosen",
            (void *)o->aux);
    return CUBLAS_STATUS_SUCCESS;
}

extern "C" cublasStatus_t cublasLtMatmul(cublasLtHandle_t handle, cublasLtMatmulDesc_t o,
                                         const void *alpha, const void *A, cublasLtMatrixLayout_t a,
                                         const void *B, cublasLtMatrixLayout_t b, const void *beta,
                                         const void *C, cublasLtMatrixLayout_t c, void *D,
                                         cublasLtMatrixLayout_t d, const cublasLtMatmulAlgo_t *algorithm,
                                         void *workspace, size_t workspace_bytes, cudaStream_t stream)
{
    REQUIRE(objects.count(handle), NOT_INITIALIZED, "the handle is null or destroyed");
    REQUIRE(alpha && beta, INVALID_VALUE, "alpha or beta is null");
    Product p = {};
    cublasStatus_t s = check_problem(o, a, b, c, d, &p.s);
    if (s != CUBLAS_STATUS_SUCCESS)
        return s;
    p.o = *o;
    p.a = {(char *)A, *a}, p.b = {(char *)B, *b}, p.c = {(char *)C, *c}, p.d = {(char *)D, *d};
    p.alpha = *(const float *)alpha, p.beta = *(const float *)beta;
    const Matrix *const matrices[4] = {&p.a, &p.b, &p.c, &p.d};
    for (int i = 0; i < 4; i++) {
        if (i == 2 && p.beta == 0 && !C)
            continue; // C is not read
        REQUIRE(matrices[i]->p, INVALID_VALUE, "%c is null", "ABCD"[i]);
        REQUIRE(in_device(matrices[i]->p, matrices[i]->bytes()), EXECUTION_FAILED,
                "%c, at %p, reaches over the end of its allocation: %zu bytes are used (%llu columns, "
                "leading dimension %lld)",
                "ABCD"[i], (void *)matrices[i]->p, matrices[i]->bytes(),
                (unsigned long long)matrices[i]->l.columns, (long long)matrices[i]->l.ld);
    }
    for (int i = 0; i < 2; i++)
        REQUIRE(!overlap(matrices[i]->p, matrices[i]->bytes(), p.d.p, p.d.bytes()), INVALID_VALUE,
                "D overlaps %c", "AB"[i]);
    if (C && C == D)
        REQUIRE(p.c.l.ld == p.d.l.ld && p.c.l.stride == p.d.l.stride, INVALID_VALUE,
                "C is D, but their layouts differ");
    else if (C && p.beta != 0)
        REQUIRE(!overlap(C, p.c.bytes(), D, p.d.bytes()), INVALID_VALUE, "D overlaps C");
    const size_t bias_count = (size_t)(o->epilogue == CUBLASLT_EPILOGUE_BGRADB ? p.s.n : p.s.m);
    if (uses_bias(o->epilogue))
        REQUIRE(o->bias && in_device(o->bias, bias_count * size_of(d->type)), INVALID_VALUE,
                "the bias, at %p, is not %zu numbers of device memory", (void *)o->bias, bias_count);
    if (uses_aux(o->epilogue))
        REQUIRE(o->aux && in_device(o->aux, (size_t)((p.s.n - 1) * o->aux_ld + p.s.m) * size_of(d->type)),
                INVALID_VALUE, "the auxiliary matrix, at %p, is not within device memory",
                (void *)o->aux);
    REQUIRE((uintptr_t)workspace % 16 == 0, INVALID_VALUE, "the workspace is not aligned to 16 bytes");
    REQUIRE(workspace_bytes == 0 || !workspace || in_device(workspace, workspace_bytes), INVALID_VALUE,
            "the workspace of %zu bytes is not within device memory", workspace_bytes);
    if (algorithm && (s = check_algorithm(algorithm, o, matrices, workspace, workspace_bytes)) !=
                         CUBLAS_STATUS_SUCCESS)
        return s;
    const size_t used = workspace ? algorithm ? algorithm->data[WORKSPACE] : workspace_bytes : 0;
    const bool submitted = submit(stream, [=] {
        count_launch("cublasLtMatmul");
        const double aux = uses_aux(p.o.epilogue) ? (double)p.d.bytes() : 0; // about: read or written
        count_product("cublasLtMatmul",
                      (double)(p.a.bytes() + p.b.bytes() + (p.beta != 0 ? p.c.bytes() : 0)),
                      (double)p.d.bytes() + aux,
                      2.0 * (double)p.s.m * (double)p.s.n * (double)p.s.k * p.d.l.batch);
        if (used)
            memset(workspace, 0xff, used); // scratch: nobody keeps anything there
        for (int i = 0; i < p.d.l.batch; i++)
            p.run(i);
    });
    return submitted ? CUBLAS_STATUS_SUCCESS : CUBLAS_STATUS_INVALID_VALUE;
}
