/* routing_contrastive_loss (ProMoE, 2510.24711 section 3.3).
 *
 *   cluster i = the tokens that chose expert i: by their first slot (assign "top1"), or by any slot
 *   (assign "topk"); choices >= E (forced tokens) and -1 count for nothing
 *   m_i = mean of x over cluster i (not normalised, not detached)
 *   l_ij = cos(p_i, m_j) / temperature        for valid (non-empty) i, j
 *   loss = weight * mean over valid i of [ logsumexp_j l_ij - l_ii ]
 *
 * Fewer than two valid clusters: loss 0 and no gradient. Norms are clamped at 1e-12 as in
 * prototypical_routing. saved: centroid m (0 when empty), count, and prob = row softmax of l over
 * the valid pairs (0 elsewhere). dx += and dproto += are scaled by dloss. */
#ifndef PM_OPS_ROUTING_CONTRASTIVE_LOSS_H
#define PM_OPS_ROUTING_CONTRASTIVE_LOSS_H
enum { PM_ASSIGN_TOP1, PM_ASSIGN_TOPK };
#define PM_ROUTING_CONTRASTIVE_LOSS(X)                                                             \
    X(DIM, N)                                                                                      \
    X(DIM, D)                                                                                      \
    X(DIM, E)                                                                                      \
    X(DIM, A)                                                                                      \
    X(IN, x, act, "N,D", ADD)                                                                      \
    X(IN, proto, f32, "E,D", ADD)                                                                  \
    X(IN, choice, i32, "N,A", NONE)                                                                \
    X(OUT, loss, f32, "1", GRAD)                                                                   \
    X(SAVED, centroid, f32, "E,D")                                                                 \
    X(SAVED, count, i32, "E")                                                                      \
    X(SAVED, prob, f32, "E,E")                                                                     \
    X(ENUM, assign, "top1|topk", 0)                                                                \
    X(REAL, temperature, 0.1)                                                                      \
    X(REAL, weight, 1.0)
#endif
