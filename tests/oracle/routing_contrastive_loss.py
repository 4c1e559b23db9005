"""routing_contrastive_loss: each prototype near the mean of its tokens, far from the others' means."""

import numpy as np

from .numeric import mm, total
from .prototypical_routing import unit, unit_backward


def _clusters(choice, E, assign):
    """(E, N): whether the token belongs to the cluster."""
    choice = choice[:, :1] if assign == "top1" else choice
    return np.array([(choice == i).any(axis=1) for i in range(E)]).reshape(E, len(choice))


def forward(x, proto, choice, assign="top1", temperature=0.1, weight=1.0):
    E = len(proto)
    members = _clusters(choice, E, assign)
    count = members.sum(axis=1).astype(np.int32)
    centroid, prob = np.zeros_like(proto), np.zeros((E, E), proto.dtype)
    for i in np.flatnonzero(count):
        centroid[i] = total(x[members[i]]) / proto.dtype.type(count[i])
    loss, valid = np.zeros(1, proto.dtype), np.flatnonzero(count)
    if len(valid) >= 2:
        logits = mm(unit(proto[valid])[0], unit(centroid[valid])[0].T) / proto.dtype.type(temperature)
        largest = logits.max(axis=1, keepdims=True)
        e = np.exp(logits - largest)
        norm = total(e, axis=1)
        loss = weight * total(np.log(norm) + largest[:, 0] - np.diag(logits)) / len(valid)
        prob[np.ix_(valid, valid)] = e / norm[:, None]
    return {"loss": np.reshape(loss, 1).astype(proto.dtype), "centroid": centroid, "count": count, "prob": prob}


def backward(x, proto, choice, dloss, assign="top1", temperature=0.1, weight=1.0):
    saved = forward(x, proto, choice, assign, temperature, weight)
    dx, dproto, valid = np.zeros_like(x), np.zeros_like(proto), np.flatnonzero(saved["count"])
    if len(valid) < 2:
        return {"dx": dx, "dproto": dproto}
    m, p = saved["centroid"][valid], proto[valid]
    dcos = saved["prob"][np.ix_(valid, valid)] - np.eye(len(valid), dtype=x.dtype)
    dcos = dcos * (dloss[0] * x.dtype.type(weight / (len(valid) * temperature)))
    dproto[valid] = unit_backward(p, mm(dcos, unit(m)[0]))
    dm = unit_backward(m, mm(dcos.T, unit(p)[0]))
    members = _clusters(choice, len(proto), assign)
    for j, i in enumerate(valid):
        dx[members[i]] += dm[j] / x.dtype.type(saved["count"][i])
    return {"dx": dx, "dproto": dproto}


def _case(N, D, E, A=1, groups=None, edit=None, **attributes):
    """groups: the experts that are chosen at all (more than E: forced; -1: empty)."""
    def make(rng):
        values = {"x": rng.standard_normal((N, D)).astype(np.float32),
                  "proto": (0.02 * rng.standard_normal((E, D))).astype(np.float32),
                  "choice": rng.choice(np.arange(E) if groups is None else groups, (N, A)).astype(np.int32),
                  **attributes}
        if edit:
            edit(values)
        return values
    return make


def _two_zero_means(values):  # cluster 0 has mean zero, cluster 1 a zero prototype
    values["choice"][:4, 0] = [0, 0, 1, 2]
    values["choice"][4:, 0] = 2
    values["x"][1] = -values["x"][0]
    values["proto"][1] = 0


def _half(values):
    """Every second token unconditional, as token_choice forces them."""
    values["choice"][::2, 0], values["choice"][::2, 1:] = len(values["proto"]), -1


CASES = {
    "one_cluster": _case(1, 3, 1),
    "two": _case(2, 5, 2, edit=lambda v: v["choice"].__setitem__(slice(None), [[0], [1]])),
    "top1": _case(60, 24, 12, edit=_half, temperature=0.07),
    "first_of_two": _case(60, 24, 6, A=2, edit=_half),
    "any_of_two": _case(60, 24, 6, A=2, edit=_half, assign="topk", temperature=0.07, weight=10.0),
    "any_of_three": _case(40, 12, 4, A=3, assign="topk"),  # with duplicates: a token counts once
    "empty_clusters": _case(50, 16, 12, groups=[2, 5, 11]),
    "all_on_one": _case(20, 9, 5, groups=[3]),
    "all_forced": _case(20, 9, 5, groups=[5, -1], A=2, assign="topk"),
    "forced_first": _case(30, 9, 5, groups=[5, -1, 1, 2], A=2, assign="topk"),
    "zero_norms": _case(10, 8, 4, edit=_two_zero_means),
    "no_token": _case(0, 4, 3),
    "slots": _case(700, 20, 7),  # three partial sums
    "many": _case(500, 12, 200, A=2, assign="topk"),
    "wide": _case(40, 500, 5, temperature=0.07),
}
CASES |= {f"width_{D}": _case(12, D, 3) for D in range(1, 34)}
OWN_BOUNDS = ("zero_norms", "width_1")


def floor(inputs):
    """A cosine that is off by an ulp moves its logit by 1/temperature ulp, and a probability by that share."""
    return 2 / inputs.get("temperature", 0.1)
