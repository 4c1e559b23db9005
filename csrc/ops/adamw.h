/* adamw: clip, AdamW (Loshchilov & Hutter 1711.05101), EMA of the new weights and their derived
 * twins, one pass; the gradient is emptied.
 *
 * hyper = {lr, beta1, beta2, eps, weight_decay, clip, ema, step} in double; step counts from 1.
 *   c = min(1, clip / (norm + 1e-6)), or 1 when clip is 0;   g = c * grad
 *   p = p - lr weight_decay p
 *   m = beta1 m + (1 - beta1) g;   v = beta2 v + (1 - beta2) g^2
 *   p = p - lr * (m / (1 - beta1^step)) / (sqrt(v / (1 - beta2^step)) + eps)
 *   avg = ema avg + (1 - ema) p           (avg NULL: no EMA)
 *   grad = 0;   the derived twin of each matrix of `twins`: as `derive` makes it from the new p
 * norm is that of the whole gradient (grad_norm). When norm is not finite nothing but grad changes:
 * the update is skipped. 1 - beta and the bias corrections are taken in double. An absent gradient is
 * a zero one (PyTorch would skip the tensor). PM_EINVAL, and nothing changed: step < 1, a beta outside
 * 0 <= beta < 1, lr or weight_decay not finite, eps or clip below 0, ema outside 0..1.
 * Only a model has twins. */
#ifndef PM_OPS_ADAMW_H
#define PM_OPS_ADAMW_H
enum { PM_HYPER_LR, PM_HYPER_BETA1, PM_HYPER_BETA2, PM_HYPER_EPS, PM_HYPER_WEIGHT_DECAY,
       PM_HYPER_CLIP, PM_HYPER_EMA, PM_HYPER_STEP, PM_HYPER_COUNT };
#define PM_ADAMW(X)                                                                                \
    X(DIM, M)                                                                                      \
    X(IN, hyper, f64, "8", NONE)                                                                   \
    X(IN, norm, f64, "1", NONE)                                                                    \
    X(INOUT, grad, f32, "M")                                                                       \
    X(INOUT, param, f32, "M")                                                                      \
    X(INOUT, m, f32, "M")                                                                          \
    X(INOUT, v, f32, "M")                                                                          \
    X(INOPT, avg, f32, "M")                                                                        \
    X(TWINS, twins)
#endif
