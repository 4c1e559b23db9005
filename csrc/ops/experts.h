/* experts: the whole feed-forward layer over a routing plan: routed, unconditional and shared
 * experts, each down(gelu_tanh(up(x))) or, with a gate, down(silu(gate(x)) * up(x)). A dense FFN is
 * G = 0, S = 1.
 *
 *   gelu_tanh: E_g(x) = down_g . gelu_tanh(up_g . x + up_bias_g) + down_bias_g
 *   swiglu:    E_g(x) = down_g . (silu(gate_g . x + gate_bias_g) * (up_g . x + up_bias_g)) + down_bias_g
 *   y_n = sum over rows r of token n of row_weight[r] * E_{group of r}(x_n)  +  sum over shared s of E_s(x_n)
 *
 * G plan groups (routed, then unconditional), then S shared groups which have every token. Group g is
 * foff[g+1] - foff[g] = F_g wide; F = foff[G+S]. It has P_g pre-activations: F_g, or for swiglu 2 F_g,
 * those of the gate first; P = F or 2 F. W >= P_g of every plan group, Z >= P_g of every shared group.
 * Weights of all groups are contiguous: up = rows (P, D), those of a group's gate before those of its up;
 * up_bias (P) alike; down = the blocks (D, F_g), one after another (D*F numbers); down_bias (G+S, D). A
 * bias that is NULL is zero. up.derived and down.derived are the derived twins of all matrices, (F_g, D)
 * (for swiglu a gate's before its up's) and (D, F_g), one after another. Plan arrays are those of
 * routing_plan, and may be NULL when G = 0; a group or token may have no row.
 *
 * saved: the pre-activations: pre (R rows of W, a row of group g uses its first P_g) and pre_shared (S*N
 * rows of Z). backward with G_n = dy_n, h = gelu_tanh(pre) or silu(pre_gate) * pre_up: for row r of
 * token n
 *   drow_weight[r] = <down_g^T G_n, h_r> + <G_n, down_bias_g>          (=; rows beyond the plan: 0)
 *   ddown_g += (w_r G_n) h_r^T;  ddown_bias_g += w_r G_n
 *   dpre = (w_r down_g^T G_n) * dh/dpre;  dup_g += dpre x_n^T;  dup_bias_g += dpre
 *   dx_n = sum over its rows and the shared groups of up_g^T dpre      (=; gathered through tok_row)
 * Same bits for any thread count; a row's product does not depend on how many rows its group has. */
#ifndef PM_OPS_EXPERTS_H
#define PM_OPS_EXPERTS_H
enum { PM_EXPERTS_GELU_TANH, PM_EXPERTS_SWIGLU };
#define PM_EXPERTS(X)                                                                              \
    X(DIM, N)                                                                                      \
    X(DIM, D)                                                                                      \
    X(DIM, G)                                                                                      \
    X(DIM, S)                                                                                      \
    X(DIM, F)                                                                                      \
    X(DIM, P)                                                                                      \
    X(DIM, R)                                                                                      \
    X(DIM, W)                                                                                      \
    X(DIM, Z)                                                                                      \
    X(IN, x, act, "N,D", SET)                                                                      \
    X(OPT, row_off, i32, "G+1", NONE)                                                              \
    X(OPT, row_token, i32, "R", NONE)                                                              \
    X(OPT, row_weight, f32, "R", SET)                                                              \
    X(OPT, tok_off, i32, "N+1", NONE)                                                              \
    X(OPT, tok_row, i32, "R", NONE)                                                                \
    X(IN, foff, i32, "G+S+1", NONE)                                                                \
    X(IN, up, weight, "P,D", ADD)                                                                  \
    X(OPT, up_bias, f32, "P", ADD)                                                                 \
    X(IN, down, weight, "D*F", ADD)                                                                \
    X(OPT, down_bias, f32, "G+S,D", ADD)                                                           \
    X(OUT, y, act, "N,D", GRAD)                                                                    \
    X(SAVED, pre, act, "R,W")                                                                      \
    X(SAVED, pre_shared, act, "S*N,Z")                                                             \
    X(ENUM, activation, "gelu_tanh|swiglu", 0)
#endif
