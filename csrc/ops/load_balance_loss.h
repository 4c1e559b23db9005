/* load_balance_loss (Switch, 2101.03961; as in the public ProMoE and DiT-MoE).
 *
 *   over the routable tokens S (part -1):  f_i = E * (slots of S that chose i) / (A * |S|),
 *   P_i = mean over S of p[n, i],  loss = weight * sum_i f_i P_i
 *
 * per "batch": S is the whole batch. per "sequence": S is one image; the loss is the mean over the
 * images that have a routable token. f is a count and has no gradient. No routable token: loss 0.
 * p: router_gate softmax of the mixing scores s, or s itself when the gate is softmax already (that is
 * what the public code does, also for the sigmoid gate). A choice outside 0..E-1 is nobody's.
 * saved: frac = f per image ("sequence": B rows) or, "batch", the same f in every row. B*T tokens.
 * part NULL: all routable. dp = ... * dloss. */
#ifndef PM_OPS_LOAD_BALANCE_LOSS_H
#define PM_OPS_LOAD_BALANCE_LOSS_H
enum { PM_PER_BATCH, PM_PER_SEQUENCE };
#define PM_LOAD_BALANCE_LOSS(X)                                                                    \
    X(DIM, B)                                                                                      \
    X(DIM, T)                                                                                      \
    X(DIM, E)                                                                                      \
    X(DIM, A)                                                                                      \
    X(IN, p, f32, "B*T,E", SET)                                                                    \
    X(IN, choice, i32, "B*T,A", NONE)                                                              \
    X(OPT, part, i32, "B*T", NONE)                                                                 \
    X(OUT, loss, f32, "1", GRAD)                                                                   \
    X(SAVED, frac, f32, "B,E")                                                                     \
    X(ENUM, per, "batch|sequence", 0)                                                              \
    X(REAL, weight, 0.01)
#endif
