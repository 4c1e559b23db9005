/* label_embedding: c = add + table[y].
 *
 * Y rows: the classes, and the null label when the model has one. y outside 0..Y-1 is PM_EINVAL.
 * dadd = dc; dtable[y[b]] += dc[b], in the order of b. add may be NULL (zero). */
#ifndef PM_OPS_LABEL_EMBEDDING_H
#define PM_OPS_LABEL_EMBEDDING_H
#define PM_LABEL_EMBEDDING(X)                                                                      \
    X(DIM, B)                                                                                      \
    X(DIM, Y)                                                                                      \
    X(DIM, D)                                                                                      \
    X(IN, y, i64, "B", NONE)                                                                       \
    X(IN, table, f32, "Y,D", ADD)                                                                  \
    X(OPT, add, act, "B,D", SET)                                                                   \
    X(OUT, c, act, "B,D", GRAD)
#endif
