/* attention: y = softmax(q k^T / sqrt(K)) v for each image and head, no mask.
 *
 * qkv rows are [q | k | v], each H heads of K (any K >= 1, any T >= 1). With qk-norm, q and k of each head go
 * through LayerNorm over K with affine weight and bias and eps (all four given, or none); the public ProMoE code
 * has 1e-5 there.
 * lse[b, h, t] = log sum exp of the scaled scores. A backward may make the probabilities from it, and their
 * sums with dp from y (a GPU's does, and a CPU's in bf16; in fp32 it makes them anew from qkv). */
#ifndef PM_OPS_ATTENTION_H
#define PM_OPS_ATTENTION_H
#define PM_ATTENTION(X)                                                                            \
    X(DIM, B)                                                                                      \
    X(DIM, T)                                                                                      \
    X(DIM, H)                                                                                      \
    X(DIM, K)                                                                                      \
    X(IN, qkv, act, "B*T,3*H*K", SET)                                                              \
    X(OPT, q_weight, f32, "K", ADD)                                                                \
    X(OPT, q_bias, f32, "K", ADD)                                                                  \
    X(OPT, k_weight, f32, "K", ADD)                                                                \
    X(OPT, k_bias, f32, "K", ADD)                                                                  \
    X(OUT, y, act, "B*T,H*K", GRAD)                                                                \
    X(SAVED, lse, f32, "B,H,T")                                                                    \
    X(REAL, eps, 1e-5)
#endif
