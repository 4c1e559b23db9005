"""routing_plan: choices to rows by group and rows by token."""

import numpy as np


def forward(choice, weight, G):
    N, A = choice.shape
    # (group, token) -> the slots of the token that name the group, in order
    rows = {}
    for n in range(N):
        for a in range(A):
            if choice[n, a] >= 0:
                rows.setdefault((choice[n, a], n), []).append(a)
    order = sorted(rows)
    row_of = {key: r for r, key in enumerate(order)}
    row_off = np.searchsorted([g for g, _ in order], np.arange(G + 1)).astype(np.int32)
    row_token, tok_row = np.full((2, N * A), -1, np.int32)
    row_weight = np.zeros(N * A, weight.dtype)
    for r, (g, n) in enumerate(order):
        row_token[r] = n
        for a in rows[g, n]:
            row_weight[r] += weight[n, a]
    choice_row = np.full((N, A), -1, np.int32)
    tok_off, used = np.zeros(N + 1, np.int32), 0
    for n in range(N):
        for a in range(A):
            if choice[n, a] < 0:
                continue
            choice_row[n, a] = row_of[choice[n, a], n]
            if rows[choice[n, a], n][0] == a:
                tok_row[used] = choice_row[n, a]
                used += 1
        tok_off[n + 1] = used
    return {"row_off": row_off, "row_token": row_token, "row_weight": row_weight, "tok_off": tok_off,
            "tok_row": tok_row, "choice_row": choice_row}


def backward(choice, weight, G, drow_weight):
    row = forward(choice, weight, G)["choice_row"]
    return {"dweight": np.where(row < 0, 0, drow_weight[row]).astype(weight.dtype)}


def _case(N, A, G, empty=0.0, groups=None, edit=None):
    def make(rng):
        choice = rng.choice(np.arange(G) if groups is None else groups, (N, A))
        choice[rng.random((N, A)) < empty] = -1
        if edit:
            edit(choice)
        return {"choice": choice.astype(np.int32), "G": G,
                "weight": rng.standard_normal((N, A)).astype(np.float32)}
    return make


def _same(choice):
    choice[:] = choice[:, :1]


def _none(choice):
    choice[:] = -1


def _unconditional(choice):  # as token_choice forces them
    choice[::2, 0], choice[::2, 1:] = 13, -1


CASES = {
    "one": _case(1, 1, 1),
    "top1": _case(60, 1, 13),
    "duplicates": _case(60, 3, 4),
    "all_slots_the_same": _case(20, 3, 5, edit=_same),
    "empty_slots": _case(60, 3, 6, empty=0.5),
    "no_rows": _case(10, 2, 3, edit=_none),
    "one_group": _case(30, 1, 8, groups=[5]),
    "first_and_last": _case(30, 2, 9, groups=[0, 8]),
    "unconditional": _case(41, 2, 14, edit=_unconditional),
    "many_groups": _case(25, 2, 257),
    "many_slots": _case(5, 40, 50),
    "no_token": _case(0, 2, 3),
    "blocks": _case(700, 2, 6, empty=0.3),  # of a GPU: 256 tokens
    "many_blocks": _case(9000, 1, 14),
}
