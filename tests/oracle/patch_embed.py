"""patch_embed: n-dimensional patches to tokens."""

import numpy as np

from .numeric import mm, total


def patches(x, s, p):
    """(B, C, V) -> (B*T, C*p0*p1*p2), rows by token, elements in the order (c, q0, q1, q2)."""
    B, C, _ = x.shape
    n = [a // b for a, b in zip(s, p)]
    x = x.reshape(B, C, n[0], p[0], n[1], p[1], n[2], p[2]).transpose(0, 2, 4, 6, 1, 3, 5, 7)
    return np.ascontiguousarray(x).reshape(B * n[0] * n[1] * n[2], C * p[0] * p[1] * p[2])


def images(rows, B, C, s, p):
    """The inverse of patches."""
    n = [a // b for a, b in zip(s, p)]
    rows = rows.reshape(B, *n, C, *p).transpose(0, 4, 1, 5, 2, 6, 3, 7)
    return np.ascontiguousarray(rows).reshape(B, C, s[0] * s[1] * s[2])


def forward(x, weight, bias, pos=None, s0=1, s1=1, s2=1, p0=1, p1=1, p2=1, T=None):
    y = mm(patches(x, (s0, s1, s2), (p0, p1, p2)), weight.T) + bias
    if pos is not None:
        y = (y.reshape(len(x), *pos.shape) + pos).reshape(y.shape)
    return {"y": y}


def backward(x, weight, bias, dy, pos=None, s0=1, s1=1, s2=1, p0=1, p1=1, p2=1, T=None):
    s, p = (s0, s1, s2), (p0, p1, p2)
    B, C, _ = x.shape
    grads = {"dx": images(mm(dy, weight), B, C, s, p), "dweight": mm(dy.T, patches(x, s, p)),
             "dbias": total(dy)}
    if pos is not None:
        grads["dpos"] = total(dy.reshape(B, *pos.shape))
    return grads


def _case(B, C, s, p, D, pos=True):
    def make(rng):
        normal = lambda *shape: rng.standard_normal(shape).astype(np.float32)  # noqa: E731
        P, T = C * int(np.prod(p)), int(np.prod(s)) // int(np.prod(p))
        values = {"x": normal(B, C, int(np.prod(s))), "bias": normal(D), "T": T,
                  "weight": normal(D, P) / np.float32(np.sqrt(P))}
        values |= {f"s{i}": s[i] for i in range(3)} | {f"p{i}": p[i] for i in range(3)}
        return values | ({"pos": normal(T, D)} if pos else {})
    return make


CASES = {
    "one_voxel": _case(1, 1, (1, 1, 1), (1, 1, 1), 1),
    "one_token": _case(2, 3, (2, 2, 3), (2, 2, 3), 5),
    "image": _case(2, 4, (1, 8, 8), (1, 2, 2), 33),
    "tall_image": _case(2, 3, (1, 12, 4), (1, 3, 2), 16),
    "no_pos": _case(3, 2, (1, 4, 6), (1, 2, 2), 7, pos=False),
    "video": _case(2, 4, (4, 6, 8), (2, 3, 2), 24),
    "frames": _case(2, 4, (3, 4, 4), (1, 2, 2), 10),
    "voxels": _case(1, 3, (6, 4, 8), (3, 2, 4), 70),  # P = 72, T = 8
    "patch_of_one": _case(2, 5, (2, 3, 2), (1, 1, 1), 9),
    "many_tokens": _case(5, 4, (1, 16, 16), (1, 2, 2), 48),  # several row blocks, uneven
    "wide": _case(2, 4, (1, 10, 10), (1, 2, 2), 400),  # more than a GPU's block has columns
}
