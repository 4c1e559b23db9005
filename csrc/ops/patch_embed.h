/* patch_embed: n-dimensional patches to tokens (DiT 2212.09748 section 3.2).
 *
 *   y[b*T + i] = weight . patch(x[b], i) + bias + pos[i]
 *
 * x has up to three spatial axes of sizes s0, s1, s2 (V = s0*s1*s2; an image is s0 = 1, a video is
 * (frames, height, width)), cut into patches p0 x p1 x p2. Tokens are row-major over (s0/p0, s1/p1,
 * s2/p2); inside a patch the order is that of a convolution weight: (c, q0, q1, q2). P = C*p0*p1*p2.
 * pos may be NULL; dpos is the sum over images. dx is the exact adjoint. */
#ifndef PM_OPS_PATCH_EMBED_H
#define PM_OPS_PATCH_EMBED_H
#define PM_PATCH_EMBED(X)                                                                          \
    X(DIM, B)                                                                                      \
    X(DIM, C)                                                                                      \
    X(DIM, V)                                                                                      \
    X(DIM, T)                                                                                      \
    X(DIM, P)                                                                                      \
    X(DIM, D)                                                                                      \
    X(IN, x, f32, "B,C,V", SET)                                                                    \
    X(IN, weight, weight, "D,P", ADD)                                                              \
    X(IN, bias, f32, "D", ADD)                                                                     \
    X(OPT, pos, f32, "T,D", ADD)                                                                   \
    X(OUT, y, f32, "B*T,D", GRAD)                                                                  \
    X(INT, s0, 1)                                                                                  \
    X(INT, s1, 1)                                                                                  \
    X(INT, s2, 1)                                                                                  \
    X(INT, p0, 1)                                                                                  \
    X(INT, p1, 1)                                                                                  \
    X(INT, p2, 1)
#endif
