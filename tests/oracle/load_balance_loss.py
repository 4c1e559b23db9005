"""load_balance_loss: E * (share of slots) * (mean probability), summed over the experts."""

import numpy as np

from .numeric import total


def _sets(B, T, routable, per):
    """(image or None, the token ids of one set S), for every S that is not empty."""
    if per == "batch":
        sets = [(None, np.flatnonzero(routable))]
    else:
        sets = [(b, b * T + np.flatnonzero(routable[b * T:(b + 1) * T])) for b in range(B)]
    return [(b, tokens) for b, tokens in sets if len(tokens)]


def _share(choice, E):
    """f of one set: E * (slots that chose i) / (all slots)."""
    return E * np.array([(choice == i).sum() for i in range(E)]) / choice.size


def forward(p, choice, B, part=None, per="batch", weight=0.01):
    E, T = p.shape[1], len(p) // max(B, 1)
    routable = np.ones(len(p), bool) if part is None else part == -1
    sets = _sets(B, T, routable, per)
    frac, losses = np.zeros((B, E), p.dtype), []
    for b, tokens in sets:
        f = _share(choice[tokens], E).astype(p.dtype)
        frac[slice(None) if b is None else b] = f
        losses.append(total(f * (total(p[tokens]) / p.dtype.type(len(tokens)))))
    loss = weight * sum(losses) / len(sets) if sets else 0
    return {"loss": np.full(1, loss, p.dtype), "frac": frac}


def backward(p, choice, B, dloss, part=None, per="batch", weight=0.01):
    E, T = p.shape[1], len(p) // max(B, 1)
    routable = np.ones(len(p), bool) if part is None else part == -1
    sets = _sets(B, T, routable, per)
    dp = np.zeros_like(p)
    for _, tokens in sets:
        f = _share(choice[tokens], E).astype(p.dtype)
        dp[tokens] = dloss[0] * p.dtype.type(weight / (len(sets) * len(tokens))) * f
    return {"dp": dp}


def _case(B, T, E, A, per, part=None, weight=0.01, edit=None):
    """part: None, "images" (every second image forced) or "tokens" (a third of them, anywhere)."""
    def make(rng):
        p = np.exp(rng.standard_normal((B * T, E)))
        values = {"p": (p / p.sum(axis=1, keepdims=True)).astype(np.float32), "B": B, "per": per,
                  "choice": np.array([rng.permutation(E)[:A] for _ in range(B * T)],
                                     np.int32).reshape(B * T, A), "weight": weight}
        if part:
            away = np.arange(B * T) // T % 2 == 0 if part == "images" else rng.random(B * T) < 1 / 3
            values["part"] = np.where(away, rng.choice([-2, E], B * T), -1).astype(np.int32)
            values["choice"][away], values["choice"][away, 0] = -1, values["part"][away]
        if edit:
            edit(values)
        return values
    return make


def _all_forced(values):
    values["part"] = np.full(len(values["p"]), values["p"].shape[1], np.int32)


CASES = {}
for _per in ("batch", "sequence"):
    CASES |= {
        f"{_per}": _case(3, 8, 5, 2, _per),
        f"{_per}_images": _case(5, 8, 12, 1, _per, "images"),
        f"{_per}_tokens": _case(4, 6, 4, 3, _per, "tokens", weight=1.0),
        f"{_per}_all_forced": _case(2, 4, 3, 1, _per, edit=_all_forced),
        f"{_per}_one": _case(1, 1, 1, 1, _per),
        f"{_per}_all_experts": _case(2, 5, 4, 4, _per),
        f"{_per}_tasks": _case(5, 700, 3, 1, _per, "tokens"),
        f"{_per}_short_images": _case(700, 2, 6, 2, _per, "tokens"),
    }
