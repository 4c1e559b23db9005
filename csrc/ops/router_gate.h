/* router_gate: mixing scores from router logits z, row by row.
 *
 *   identity: s = z      sigmoid: s = 1/(1+exp(-z))      softmax: over the E experts, no temperature
 *
 * Rows that are not routable (part not -1) get s = 0 and dz = 0. dz +=, because a second use of the
 * logits (the softmax of the load-balance loss) may add its own. part NULL: all routable. */
#ifndef PM_OPS_ROUTER_GATE_H
#define PM_OPS_ROUTER_GATE_H
enum { PM_GATE_IDENTITY, PM_GATE_SIGMOID, PM_GATE_SOFTMAX };
#define PM_ROUTER_GATE(X)                                                                          \
    X(DIM, N)                                                                                      \
    X(DIM, E)                                                                                      \
    X(IN, z, f32, "N,E", ADD)                                                                      \
    X(OPT, part, i32, "N", NONE)                                                                   \
    X(OUT, s, f32, "N,E", GRAD)                                                                    \
    X(ENUM, gate, "identity|sigmoid|softmax", 0)
#endif
