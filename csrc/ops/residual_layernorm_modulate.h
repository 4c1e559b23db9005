/* residual_layernorm_modulate: the residual stream, its LayerNorm, and the adaLN modulation, in one
 * pass over the tokens (DiT adaLN-Zero).
 *
 *   xo = x + gate * branch              (branch NULL: xo = x; xo may be NULL then)
 *   xhat = (xo - mean) * rstd           over D, variance biased, rstd = 1/sqrt(var + eps)
 *   y = xhat * (1 + scale) + shift      (scale and shift NULL: y = xhat)
 *
 * gate, shift and scale have a row for each of C conditions, at distance gate_ld and mod_ld (they are
 * columns of a wider adaLN projection); image b has condition cond[b], in 0..C-1, or, cond NULL, b (and
 * C = B). gate NULL: 1.
 * backward, with dxo the gradient that reaches the residual stream from above (NULL: zero):
 *   dx = dxo + (LayerNorm backward of dy);  dbranch = gate * dx;  dgate = sum dx * branch;
 *   dshift = sum dy;  dscale = sum dy * xhat       (=; sums over the tokens of a condition's images)
 * dgate is at distance gate_ld, dshift and dscale at mod_ld. dx may alias dxo; xo may alias x (backward
 * reads xo, and x only where xo is NULL). */
#ifndef PM_OPS_RESIDUAL_LAYERNORM_MODULATE_H
#define PM_OPS_RESIDUAL_LAYERNORM_MODULATE_H
#define PM_RESIDUAL_LAYERNORM_MODULATE(X)                                                          \
    X(DIM, B)                                                                                      \
    X(DIM, C)                                                                                      \
    X(DIM, T)                                                                                      \
    X(DIM, D)                                                                                      \
    X(LD, gate_ld, D)                                                                              \
    X(LD, mod_ld, D)                                                                               \
    X(IN, x, f32, "B*T,D", SET)                                                                    \
    X(OPT, branch, act, "B*T,D", SET)                                                              \
    X(OPT, gate, act, "C,D", SET)                                                                  \
    X(OPT, shift, act, "C,D", SET)                                                                 \
    X(OPT, scale, act, "C,D", SET)                                                                 \
    X(OPT, cond, i32, "B", NONE)                                                                   \
    X(OUT, xo, f32, "B*T,D", MAYBE)                                                                \
    X(OUT, y, act, "B*T,D", GRAD)                                                                  \
    X(SAVED, mean, f32, "B*T")                                                                     \
    X(SAVED, rstd, f32, "B*T")                                                                     \
    X(REAL, eps, 1e-6)
#endif
