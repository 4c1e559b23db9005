/* routing_plan: choices to the one object that every router ends in: rows by group, and rows by
 * token, both CSR.
 *
 *   row_off[g] .. row_off[g+1]   the rows of group g, tokens ascending; row_off[G] = rows in use <= R
 *   row_token[r], row_weight[r]  the token of row r and its mixing weight
 *   tok_off[n] .. tok_off[n+1]   the entries of token n in tok_row: its rows, in the order of slots
 *
 * R = N*A < 2^31. choice -1 is an empty slot; the same group twice in one token is one row with the
 * sum of the weights; a choice outside -1..G-1 is PM_EINVAL. Entries beyond the rows in use: row_token
 * -1, row_weight 0, tok_row -1. choice_row[n, a] = the row of the slot (-1 when empty; merged slots
 * share one). backward: dweight[n, a] = drow_weight[choice_row[n, a]]  (0 when empty); a choice_row
 * that is no row is PM_EINVAL. */
#ifndef PM_OPS_ROUTING_PLAN_H
#define PM_OPS_ROUTING_PLAN_H
#define PM_ROUTING_PLAN(X)                                                                         \
    X(DIM, N)                                                                                      \
    X(DIM, A)                                                                                      \
    X(DIM, G)                                                                                      \
    X(IN, choice, i32, "N,A", NONE)                                                                \
    X(IN, weight, f32, "N,A", SET)                                                                 \
    X(OUT, row_off, i32, "G+1", NONE)                                                              \
    X(OUT, row_token, i32, "N*A", NONE)                                                            \
    X(OUT, row_weight, f32, "N*A", GRAD)                                                           \
    X(OUT, tok_off, i32, "N+1", NONE)                                                              \
    X(OUT, tok_row, i32, "N*A", NONE)                                                              \
    X(SAVED, choice_row, i32, "N,A")
#endif
