// dense.cuh: products of dense row-major matrices by cuBLASLt, with an epilogue where it has one.
#pragma once
#include "common.cuh"

enum pm_epilogue {
    PM_EPILOGUE_NONE,
    PM_EPILOGUE_BIAS,      // c = p + bias
    PM_EPILOGUE_BIAS_GELU, // pre = p + bias;  c = gelu_tanh(pre)
    PM_EPILOGUE_DGELU,     // c = p * gelu_tanh'(pre)
    PM_EPILOGUE_SUM_A,     // c = p, and sums[i] += sum over the depth of a[i, :]
};

// p = a b, with a (rows, depth) and b (depth, columns) of T;  c (rows, columns) of C, = or, with add,
// +=. at: a is stored as its transpose, (depth, rows); bt: b as (columns, depth).
// A product with something of size 0 is one of zeros.
struct pm_dense {
    int64_t rows, columns, depth;
    const void *a, *b;
    bool at, bt;
    void *c;
    bool add; // with PM_EPILOGUE_NONE and PM_EPILOGUE_SUM_A
    pm_epilogue epilogue;
    const float *bias; // (columns); BIAS_GELU and BIAS: may be NULL
    void *pre;         // (rows, columns) of T; BIAS_GELU: may be NULL
    float *sums;       // (rows)
};

// C is T or float. scratch: pm_dense_room bytes are taken from its front.
template <class T, class C>
pm_status pm_dense_run(pm_ctx *ctx, const pm_dense &product, void **scratch);
template <class T, class C> size_t pm_dense_room(const pm_dense &product);

// sums[j] += sum over i of x[i, j], in a fixed order, for x (rows, columns).
template <class T>
pm_status pm_column_sums(pm_ctx *ctx, int64_t rows, int64_t columns, const T *x, float *sums,
                         void **scratch);
size_t pm_column_sums_room(int64_t rows, int64_t columns);

// For backend.cu: makes the handle and its workspace; false and a message when that fails.
bool pm_dense_open(char *message, size_t message_bytes);
