/* unpatchify: tokens back to an image, video or voxels.
 *
 * x[b*T + i, ((q0*p1 + q1)*p2 + q2)*C + c] -> y[b, c, (voxel q of patch i)]: the channel is the fastest
 * index inside a token, which is not the order of patch_embed. Sizes as in patch_embed. */
#ifndef PM_OPS_UNPATCHIFY_H
#define PM_OPS_UNPATCHIFY_H
#define PM_UNPATCHIFY(X)                                                                           \
    X(DIM, B)                                                                                      \
    X(DIM, T)                                                                                      \
    X(DIM, P)                                                                                      \
    X(DIM, C)                                                                                      \
    X(DIM, V)                                                                                      \
    X(IN, x, act, "B*T,P", SET)                                                                    \
    X(OUT, y, f32, "B,C,V", GRAD)                                                                  \
    X(INT, s0, 1)                                                                                  \
    X(INT, s1, 1)                                                                                  \
    X(INT, s2, 1)                                                                                  \
    X(INT, p0, 1)                                                                                  \
    X(INT, p1, 1)                                                                                  \
    X(INT, p2, 1)
#endif
