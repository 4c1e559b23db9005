/* conditional_routing: the partition of ProMoE (2510.24711 section 3).
 *
 *   part[b*T + i] = group  if y[b] == null_label, else -1
 *
 * -1: the token is routable; g >= 0: it is forced to plan group g; -2: it is absent. group = -1 makes
 * every token routable (a model without an unconditional expert). */
#ifndef PM_OPS_CONDITIONAL_ROUTING_H
#define PM_OPS_CONDITIONAL_ROUTING_H
#define PM_CONDITIONAL_ROUTING(X)                                                                  \
    X(DIM, B)                                                                                      \
    X(DIM, T)                                                                                      \
    X(IN, y, i64, "B", NONE)                                                                       \
    X(OUT, part, i32, "B*T", NONE)                                                                 \
    X(INT, null_label, 1000)                                                                       \
    X(INT, group, -1)
#endif
