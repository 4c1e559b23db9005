// cuBLASLt's stand-in against sums in double, and every argument that can be wrong.
#include <cublasLt.h>

#include "cases.h"

#define BLAS(call)                                                                                 \
    do {                                                                                           \
        const cublasStatus_t status = (call);                                                      \
        if (status != CUBLAS_STATUS_SUCCESS) {                                                     \
            printf("%s: %s\n", #call, cublasLtGetStatusString(status));                            \
            exit(2);                                                                               \
        }                                                                                          \
    } while (0)

static double gelu(double x) { return 0.5 * x * (1 + std::tanh(0.7978845608 * (x + 0.044715 * x * x * x))); }
static double gelu_slope(double x)
{
    const double u = 0.7978845608 * (x + 0.044715 * x * x * x), t = std::tanh(u);
    return 0.5 * (1 + t) + 0.5 * x * (1 - t * t) * 0.7978845608 * (1 + 3 * 0.044715 * x * x);
}

// D (m, n) = epilogue(0.5 op(A) op(B) + beta C), in column-major order with leading dimensions.
template <class T> struct Problem {
    int m = 24, n = 10, k = 40;
    bool ta = false, tb = false;
    float beta = 0;
    cublasLtEpilogue_t epilogue = CUBLASLT_EPILOGUE_DEFAULT;
    cublasComputeType_t compute = CUBLAS_COMPUTE_32F;

    static constexpr cudaDataType TYPE = sizeof(T) == 2 ? CUDA_R_16BF : CUDA_R_32F;
    static std::vector<T> as(const std::vector<float> &v) { return std::vector<T>(v.begin(), v.end()); }

    int run(int sabotage)
    {
        const int lda = (ta ? k : m) + 8, ldb = (tb ? n : k) + 16, ldd = m + 8;
        const std::vector<float> a = numbers((size_t)lda * (ta ? m : k), 1),
                                 b = numbers((size_t)ldb * (tb ? k : n), 2),
                                 c = numbers((size_t)ldd * n, 3), bias = numbers((size_t)(m > n ? m : n), 4),
                                 aux = numbers((size_t)ldd * n, 5);
        Array<T> A(as(a)), B(as(b)), D(as(c)), Bias(as(bias)), Aux(as(aux));
        Array<char> workspace(1 << 16);

        cublasLtHandle_t handle;
        cublasLtMatmulDesc_t o;
        cublasLtMatrixLayout_t la, lb, ld;
        cublasLtMatmulPreference_t preference;
        BLAS(cublasLtCreate(&handle));
        BLAS(cublasLtMatmulDescCreate(&o, compute, CUDA_R_32F));
        const cublasOperation_t opa = ta != (sabotage == 3) ? CUBLAS_OP_T : CUBLAS_OP_N,
                                opb = tb ? CUBLAS_OP_T : CUBLAS_OP_N;
        const auto set = [&](cublasLtMatmulDescAttributes_t attribute, auto value) {
            BLAS(cublasLtMatmulDescSetAttribute(o, attribute, &value, sizeof value));
        };
        set(CUBLASLT_MATMUL_DESC_TRANSA, opa);
        set(CUBLASLT_MATMUL_DESC_TRANSB, opb);
        set(CUBLASLT_MATMUL_DESC_EPILOGUE, epilogue);
        set(CUBLASLT_MATMUL_DESC_BIAS_POINTER, sabotage == 9 ? (void *)bias.data() : (void *)Bias.p);
        set(CUBLASLT_MATMUL_DESC_EPILOGUE_AUX_POINTER, (void *)Aux.p);
        set(CUBLASLT_MATMUL_DESC_EPILOGUE_AUX_LD, (int64_t)(sabotage == 8 ? ldd + 4 : ldd));
        BLAS(cublasLtMatrixLayoutCreate(&la, TYPE, (uint64_t)(ta ? k : m), (uint64_t)(ta ? m : k),
                                        sabotage == 1   ? (ta ? k : m) - 1
                                        : sabotage == 2 ? lda + 8
                                        : sabotage == 13 ? lda - 4
                                                        : lda));
        BLAS(cublasLtMatrixLayoutCreate(&lb, TYPE, (uint64_t)(tb ? n : k), (uint64_t)(tb ? k : n), ldb));
        BLAS(cublasLtMatrixLayoutCreate(&ld, TYPE, (uint64_t)m, (uint64_t)n, ldd));
        BLAS(cublasLtMatmulPreferenceCreate(&preference));
        const uint64_t room = 1 << 16;
        BLAS(cublasLtMatmulPreferenceSetAttribute(preference, CUBLASLT_MATMUL_PREF_MAX_WORKSPACE_BYTES,
                                                  &room, sizeof room));
        cublasLtMatmulHeuristicResult_t found;
        int count;
        if (sabotage == 12)
            CHECK(pm_host_set("heuristic", "none"));
        BLAS(cublasLtMatmulAlgoGetHeuristic(handle, o, la, lb, ld, ld, preference, 1, &found, &count));
        const float alpha = 0.5f;
        const int off = sabotage == 5 ? 4 : 0;
        if (sabotage == 6)
            set(CUBLASLT_MATMUL_DESC_EPILOGUE, CUBLASLT_EPILOGUE_GELU);
        void *const place = sabotage == 4    ? nullptr
                            : sabotage == 10 ? (void *)(workspace.p + 8)
                                             : (void *)workspace.p;
        BLAS(cublasLtMatmul(handle, o, &alpha, A + off, la, sabotage == 7 ? D.p : B.p, lb,
                            sabotage == 11 ? nullptr : &beta, D, ld, D, ld, &found.algo, place, 1 << 15,
                            nullptr));
        TRY(cudaDeviceSynchronize());

        std::vector<double> want(D.n), want_bias((size_t)(epilogue == CUBLASLT_EPILOGUE_BGRADB ? n : m), 0),
            want_aux(aux.begin(), aux.end());
        for (size_t i = 0; i < D.n; i++)
            want[i] = (double)(T)c[i];
        const auto at = [](const std::vector<float> &v, int ld, bool t, int i, int j) {
            return (double)v[(size_t)(t ? i * ld + j : j * ld + i)];
        };
        for (int j = 0; j < n; j++)
            for (int i = 0; i < m; i++) {
                const size_t here = (size_t)(j * ldd + i);
                double v = 0;
                for (int l = 0; l < k; l++)
                    v += at(a, lda, ta, i, l) * at(b, ldb, tb, l, j);
                v = 0.5 * v + beta * c[here];
                if (epilogue & CUBLASLT_EPILOGUE_BIAS)
                    v += bias[(size_t)i];
                if (epilogue & 64)
                    v *= gelu_slope(aux[here]);
                else if (epilogue & 128)
                    want_aux[here] = v;
                if (epilogue & CUBLASLT_EPILOGUE_GELU)
                    v = gelu(v);
                want[here] = v;
                if (epilogue & 16)
                    want_bias[(size_t)i] += v;
            }
        for (int l = 0; l < k; l++) {
            for (int i = 0; i < m && epilogue == CUBLASLT_EPILOGUE_BGRADA; i++)
                want_bias[(size_t)i] += at(a, lda, ta, i, l);
            for (int j = 0; j < n && epilogue == CUBLASLT_EPILOGUE_BGRADB; j++)
                want_bias[(size_t)j] += at(b, ldb, tb, l, j);
        }
        const bool sums = epilogue & (16 | CUBLASLT_EPILOGUE_BGRADA | CUBLASLT_EPILOGUE_BGRADB);
        const double tolerance = sizeof(T) == 2 ? 0.05 : 2e-5;
        return compare(D.get(), want, tolerance) || compare(Aux.get(), want_aux, tolerance) ||
               (sums && compare(Bias.get(), want_bias, 4 * tolerance));
    }
};

template <class T> static int everything()
{
    for (cublasLtEpilogue_t e :
         {CUBLASLT_EPILOGUE_DEFAULT, CUBLASLT_EPILOGUE_BIAS, CUBLASLT_EPILOGUE_GELU,
          CUBLASLT_EPILOGUE_GELU_AUX, CUBLASLT_EPILOGUE_GELU_BIAS, CUBLASLT_EPILOGUE_GELU_AUX_BIAS,
          CUBLASLT_EPILOGUE_DGELU, CUBLASLT_EPILOGUE_DGELU_BGRAD, CUBLASLT_EPILOGUE_BGRADA,
          CUBLASLT_EPILOGUE_BGRADB})
        for (int t = 0; t < 8; t++) {
            Problem<T> p;
            p.ta = t & 1, p.tb = t & 2, p.beta = t & 4 ? 1.0f : 0.0f, p.epilogue = e;
            if (p.run(0)) {
                printf("epilogue %d, transposes and beta %d\n", (int)e, t);
                return 1;
            }
        }
    return 0;
}

CASE(blas_float) { return everything<float>(); }
CASE(blas_bf16) { return everything<__nv_bfloat16>(); }
CASE(blas_tf32)
{
    Problem<float> p; // numbers() are exact in tf32
    p.m = 70, p.n = 33, p.k = 100, p.compute = CUBLAS_COMPUTE_32F_FAST_TF32;
    return p.run(0);
}
CASE(blas_wrong)
{
    Problem<float> p;
    p.epilogue = CUBLASLT_EPILOGUE_GELU_AUX_BIAS;
    return p.run(sabotage);
}
CASE(blas_square) // where a missing transpose is not a wrong shape
{
    Problem<float> p;
    p.m = p.n = p.k = 16;
    return p.run(sabotage);
}
