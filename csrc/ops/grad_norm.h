/* grad_norm: norm = sqrt(sum g^2), summed in double, a slot per task in slot order. */
#ifndef PM_OPS_GRAD_NORM_H
#define PM_OPS_GRAD_NORM_H
#define PM_GRAD_NORM(X)                                                                            \
    X(DIM, M)                                                                                      \
    X(IN, g, f32, "M", NONE)                                                                       \
    X(OUT, norm, f64, "1", NONE)
#endif
