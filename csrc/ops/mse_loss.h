/* mse_loss: mean over the batch of each image's mean squared error over the first C of its M channels.
 *
 *   loss = mean over (b, c < C, v) of (pred[b, c, v] - target[b, c, v])^2
 *
 * dpred = 2 (pred - target) / (B C V) * dloss on the first C channels, 0 on the others.
 * Sums in double. The loss of nothing (B, C or V is 0) is 0. */
#ifndef PM_OPS_MSE_LOSS_H
#define PM_OPS_MSE_LOSS_H
#define PM_MSE_LOSS(X)                                                                             \
    X(DIM, B)                                                                                      \
    X(DIM, M)                                                                                      \
    X(DIM, C)                                                                                      \
    X(DIM, V)                                                                                      \
    X(IN, pred, f32, "B,M,V", SET)                                                                 \
    X(IN, target, f32, "B,C,V", NONE)                                                              \
    X(OUT, loss, f32, "1", GRAD)
#endif
