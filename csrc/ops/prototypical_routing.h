/* prototypical_routing: cosine of each token to E learned prototypes (ProMoE).
 *
 *   z[n, i] = <x_n / max(|x_n|, 1e-12), p_i / max(|p_i|, 1e-12)>      for routable tokens (part -1)
 *   z[n, :] = 0                                                       for the others
 *
 * xnorm and pnorm are the (unclamped) norms; xnorm is 0 for tokens that are not routable, of which
 * nothing is read. backward: dx += and dproto +=, through both normalisations, from z, xnorm and
 * pnorm; where a norm is below 1e-12 the clamp is a constant (as in PyTorch's normalize). Always f32,
 * so that ties are not noise. part NULL: every token is routable. N < 2^31. */
#ifndef PM_OPS_PROTOTYPICAL_ROUTING_H
#define PM_OPS_PROTOTYPICAL_ROUTING_H
#define PM_PROTOTYPICAL_ROUTING(X)                                                                 \
    X(DIM, N)                                                                                      \
    X(DIM, D)                                                                                      \
    X(DIM, E)                                                                                      \
    X(IN, x, act, "N,D", ADD)                                                                      \
    X(IN, proto, f32, "E,D", ADD)                                                                  \
    X(OPT, part, i32, "N", NONE)                                                                   \
    X(OUT, z, f32, "N,E", GRAD)                                                                    \
    X(SAVED, xnorm, f32, "N")                                                                      \
    X(SAVED, pnorm, f32, "E")
#endif
