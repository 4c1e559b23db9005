/* linear: y = x . weight^T + bias, then the activation.
 *
 * pre (the value before the activation) is saved when there is one; it is NULL for "none".
 * backward: g = dy * act'(pre);  dx = g . weight  (+= when dx_add);  dweight += g^T . x;  dbias += sum g.
 * A row's result does not depend on how many rows share the call. y may not alias x. */
#ifndef PM_OPS_LINEAR_H
#define PM_OPS_LINEAR_H
enum { PM_ACT_NONE, PM_ACT_SILU, PM_ACT_GELU_TANH };
#define PM_LINEAR(X)                                                                               \
    X(DIM, N)                                                                                      \
    X(DIM, D)                                                                                      \
    X(DIM, F)                                                                                      \
    X(IN, x, act, "N,D", SET)                                                                      \
    X(IN, weight, weight, "F,D", ADD)                                                              \
    X(OPT, bias, f32, "F", ADD)                                                                    \
    X(OUT, y, act, "N,F", GRAD)                                                                    \
    X(SAVED, pre, act, "N,F")                                                                      \
    X(ENUM, activation, "none|silu|gelu_tanh", 0)                                                  \
    X(INT, dx_add, 0)
#endif
