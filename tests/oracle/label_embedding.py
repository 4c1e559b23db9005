"""label_embedding: c = add + table[y]."""

import numpy as np


def forward(y, table, add=None):
    return {"c": table[y] if add is None else add + table[y]}


def backward(y, table, dc, add=None):
    dtable = np.zeros_like(table)
    for b, label in enumerate(y):
        dtable[label] += dc[b]
    return {"dtable": dtable} if add is None else {"dtable": dtable, "dadd": dc}


def _case(B, Y, D, add=True, same=False):
    def case(rng):
        inputs = {
            "y": rng.integers(0, Y, B),
            "table": rng.standard_normal((Y, D)).astype(np.float32),
        }
        if same:
            inputs["y"][:] = Y - 1
        if add:
            inputs["add"] = rng.standard_normal((B, D)).astype(np.float32)
        return inputs

    return case


CASES = {
    "one": _case(1, 1, 1),
    "batch": _case(8, 11, 33),
    "no add": _case(5, 4, 16, add=False),
    "one class": _case(20, 5, 40, same=True),
    "wide": _case(64, 101, 700),
    "none": _case(0, 3, 8),
}
