"""router_gate: mixing scores from router logits."""

import numpy as np

from .numeric import sigmoid, total


def forward(z, part=None, gate="identity"):
    routable = np.ones(len(z), bool) if part is None else part == -1
    z = np.where(routable[:, None], z, 0)
    if gate == "softmax":
        e = np.exp(z - z.max(axis=1, keepdims=True))
        s = e / total(e, axis=1)[:, None]
    else:
        s = sigmoid(z) if gate == "sigmoid" else z
    return {"s": np.where(routable[:, None], s, 0).astype(z.dtype)}


def backward(z, ds, part=None, gate="identity"):
    s = forward(z, part, gate)["s"]
    routable = np.ones(len(z), bool) if part is None else part == -1
    ds = np.where(routable[:, None], ds, 0)
    if gate == "softmax":
        return {"dz": s * (ds - total(ds * s, axis=1)[:, None])}
    return {"dz": ds * s * (1 - s) if gate == "sigmoid" else ds}


def _case(N, E, gate, part=None, scale=1.0):
    def make(rng):
        values = {"z": (scale * rng.standard_normal((N, E))).astype(np.float32), "gate": gate}
        if part is not None:
            away = rng.random(N) < part
            values["part"] = np.where(away, rng.choice([-2, E], N), -1).astype(np.int32)
        return values
    return make


CASES = {}
for _gate in ("identity", "sigmoid", "softmax"):
    CASES |= {
        f"{_gate}": _case(20, 12, _gate),
        f"{_gate}_mixed": _case(600, 7, _gate, part=0.3),
        f"{_gate}_all_forced": _case(5, 3, _gate, part=1),
        f"{_gate}_one": _case(1, 1, _gate),
        f"{_gate}_no_token": _case(0, 4, _gate),
        f"{_gate}_large": _case(9, 40, _gate, scale=10.0),
        f"{_gate}_256": _case(3, 256, _gate),
    }
