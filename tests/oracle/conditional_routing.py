"""conditional_routing: tokens of images without a label go to one group."""

import numpy as np


def forward(y, T, null_label=1000, group=-1):
    return {"part": np.repeat(np.where(y == null_label, group, -1), T).astype(np.int32)}


def _case(labels, T, **attributes):
    return lambda rng: {"y": np.array(labels, np.int64), "T": T, **attributes}


CASES = {
    "mixed": _case([3, 1000, 999, 1000, 0], 7, group=12),
    "all": _case([1000, 1000], 3, group=12),
    "none": _case([0, 1, 2], 3, group=12),
    "other_null": _case([10, 1000, 9], 2, null_label=10, group=4),
    "no_expert": _case([1000, 5], 4),
    "one": _case([1000], 1, group=0),
    "no_image": _case([], 4, group=1),
    "wide_label": _case([2**40, 2**40 + 1], 2, null_label=2**40, group=3),
}
