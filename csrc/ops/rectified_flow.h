/* rectified_flow: the inputs of a training step from clean data (Liu et al. 2209.03003; the time
 * densities of Esser et al. 2403.03206).
 *
 *   n ~ N(logit_mean, logit_std); u = sigmoid(sigmoid_scale * n)      density logit_normal
 *   u ~ U(0,1); u = 1 - u - 1.29 (cos^2(pi u / 2) - 1 + u)            density mode
 *   u ~ U(0,1)                                                        density uniform
 *   s = shift * u / (1 + (shift - 1) u);  t = 1000 s
 *   xt = (1 - s) x0 + s noise;  target = noise - x0
 *   label = null_label with probability drop_prob, else y
 *
 * key = {seed, position of sample 0}; every draw of sample b depends only on (seed, position + b).
 * A non-finite x0 is PM_EDATA naming the sample; a label outside 0..null_label, or an attribute that
 * makes no sense, is PM_EINVAL; then nothing is written. C is the number of channels, V the number of
 * pixels (voxels) of each. */
#ifndef PM_OPS_RECTIFIED_FLOW_H
#define PM_OPS_RECTIFIED_FLOW_H
enum { PM_DENSITY_LOGIT_NORMAL, PM_DENSITY_UNIFORM, PM_DENSITY_MODE };
#define PM_RECTIFIED_FLOW(X)                                                                       \
    X(DIM, B)                                                                                      \
    X(DIM, C)                                                                                      \
    X(DIM, V)                                                                                      \
    X(IN, x0, f32, "B,C,V", NONE)                                                                  \
    X(IN, y, i64, "B", NONE)                                                                       \
    X(IN, key, i64, "2", NONE)                                                                     \
    X(OUT, xt, f32, "B,C,V", NONE)                                                                 \
    X(OUT, target, f32, "B,C,V", NONE)                                                             \
    X(OUT, t, f32, "B", NONE)                                                                      \
    X(OUT, label, i64, "B", NONE)                                                                  \
    X(ENUM, density, "logit_normal|uniform|mode", 0)                                               \
    X(REAL, logit_mean, 0.0)                                                                       \
    X(REAL, logit_std, 1.0)                                                                        \
    X(REAL, sigmoid_scale, 1.0)                                                                    \
    X(REAL, shift, 1.0)                                                                            \
    X(REAL, drop_prob, 0.1)                                                                        \
    X(INT, null_label, 1000)
#endif
