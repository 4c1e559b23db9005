/* euler_step: classifier-free guidance and one Euler step of the flow.
 *
 *   v = uncond + cfg * (cond - uncond)   on all C channels;  v = cond when uncond is NULL
 *   y = x + (sigma_next - sigma) * v
 *
 * schedule = {sigma, sigma_next, cfg} in double. cond and uncond have M >= C channels: those beyond C
 * (a learned variance) are not read. y may alias x. */
#ifndef PM_OPS_EULER_STEP_H
#define PM_OPS_EULER_STEP_H
#define PM_EULER_STEP(X)                                                                           \
    X(DIM, B)                                                                                      \
    X(DIM, C)                                                                                      \
    X(DIM, M)                                                                                      \
    X(DIM, V)                                                                                      \
    X(IN, x, f32, "B,C,V", NONE)                                                                   \
    X(IN, cond, f32, "B,M,V", NONE)                                                                \
    X(OPT, uncond, f32, "B,M,V", NONE)                                                             \
    X(IN, schedule, f64, "3", NONE)                                                                \
    X(OUT, y, f32, "B,C,V", NONE)
#endif
