/* silu: y = x * sigmoid(x), elementwise. */
#ifndef PM_OPS_SILU_H
#define PM_OPS_SILU_H
#define PM_SILU(X)                                                                                 \
    X(DIM, N)                                                                                      \
    X(DIM, D)                                                                                      \
    X(IN, x, act, "N,D", SET)                                                                      \
    X(OUT, y, act, "N,D", GRAD)
#endif
