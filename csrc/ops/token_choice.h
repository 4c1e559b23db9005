/* token_choice: each routable token takes its A best experts.
 *
 *   choice[n, a] = index of the a-th largest of s[n, :];  weight[n, a] = s[n, choice[n, a]]
 *
 * Ties go to the lowest index; a NaN ranks below everything, so the choice is always valid and
 * distinct. 1 <= A <= E. No renormalisation, capacity or noise. A token forced to group g (part
 * g >= 0) has choice {g, -1, ...} and weight {1, 0, ...}; an absent one (-2) has -1 and 0 throughout.
 * backward: ds = dweight at the chosen experts of routable tokens, 0 elsewhere; there a choice outside
 * 0..E-1 is PM_EINVAL. part NULL: all routable. */
#ifndef PM_OPS_TOKEN_CHOICE_H
#define PM_OPS_TOKEN_CHOICE_H
#define PM_TOKEN_CHOICE(X)                                                                         \
    X(DIM, N)                                                                                      \
    X(DIM, E)                                                                                      \
    X(DIM, A)                                                                                      \
    X(IN, s, f32, "N,E", SET)                                                                      \
    X(OPT, part, i32, "N", NONE)                                                                   \
    X(OUT, choice, i32, "N,A", NONE)                                                               \
    X(OUT, weight, f32, "N,A", GRAD)
#endif
