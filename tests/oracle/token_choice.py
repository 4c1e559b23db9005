"""token_choice: the A best experts of each token, ties to the lowest index, NaN last."""

import numpy as np


def forward(s, A, part=None):
    part = np.full(len(s), -1, np.int32) if part is None else part
    choice = np.argsort(-s, axis=1, kind="stable")[:, :A].astype(np.int32)  # NaN sorts last
    weight = np.take_along_axis(s, choice, axis=1)
    choice[part != -1], weight[part != -1] = -1, 0
    choice[part >= 0, 0], weight[part >= 0, 0] = part[part >= 0], 1
    return {"choice": choice, "weight": weight}


def backward(s, A, dweight, part=None):
    choice = forward(s, A, part)["choice"]
    ds = np.zeros_like(s)
    for n in range(len(s)):
        if part is None or part[n] == -1:
            ds[n, choice[n]] = dweight[n]
    return {"ds": ds}


def _case(N, E, A, part=None, edit=None):
    def make(rng):
        values = {"s": rng.standard_normal((N, E)).astype(np.float32), "A": A}
        if part is not None:
            away = rng.random(N) < part
            values["part"] = np.where(away, rng.choice([-2, E, E + 1], N), -1).astype(np.int32)
        if edit:
            edit(values["s"], rng)
        return values
    return make


def _ties(s, rng):
    s[:] = rng.integers(0, 3, s.shape)
    s[0] = 1
    s[1, ::2], s[1, 1::2] = 0.0, -0.0  # equal too


def _nan(s, rng):
    s[rng.random(s.shape) < 0.4] = np.nan
    s[0] = np.nan
    s[1, 1:] = np.nan
    s[2, :-1] = np.nan
    s[3] = -np.inf
    s[4, 0], s[4, 1:] = np.nan, -np.inf
    s[5, 2] = np.inf


CASES = {
    "one": _case(1, 1, 1),
    "top1": _case(50, 12, 1),
    "top2": _case(50, 12, 2, part=0.3),
    "top3": _case(50, 12, 3, part=0.3),
    "all_of_them": _case(20, 9, 9),
    "all_of_256": _case(3, 256, 256),
    "ties": _case(40, 8, 3, edit=_ties),
    "nan": _case(40, 6, 3, edit=_nan),
    "all_forced": _case(8, 4, 2, part=1),
    "no_token": _case(0, 4, 2),
    "tasks": _case(2500, 5, 2, part=0.1),
}
