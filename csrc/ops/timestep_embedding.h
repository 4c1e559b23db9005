/* timestep_embedding: sinusoids of the time (DiT).
 *
 *   e[b, i]       = cos(t[b] * exp(-ln(max_period) i / (F/2)))      i < F/2
 *   e[b, F/2 + i] = sin(the same)
 *
 * t is on the 0..1000 scale and may be fractional. Evaluated in double, rounded once. F is even. */
#ifndef PM_OPS_TIMESTEP_EMBEDDING_H
#define PM_OPS_TIMESTEP_EMBEDDING_H
#define PM_TIMESTEP_EMBEDDING(X)                                                                   \
    X(DIM, B)                                                                                      \
    X(DIM, F)                                                                                      \
    X(IN, t, f32, "B", NONE)                                                                       \
    X(OUT, e, act, "B,F", NONE)                                                                    \
    X(REAL, max_period, 10000.0)
#endif
