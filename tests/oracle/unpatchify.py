"""unpatchify: tokens back to images; the channel is the fastest index inside a token."""

import numpy as np


def forward(x, B, C, V, s0=1, s1=1, s2=1, p0=1, p1=1, p2=1):
    n = s0 // p0, s1 // p1, s2 // p2
    y = x.reshape(B, *n, p0, p1, p2, C).transpose(0, 7, 1, 4, 2, 5, 3, 6)
    return {"y": np.ascontiguousarray(y).reshape(B, C, V)}


def backward(x, dy, B, C, V, s0=1, s1=1, s2=1, p0=1, p1=1, p2=1):
    n = s0 // p0, s1 // p1, s2 // p2
    dx = dy.reshape(B, C, n[0], p0, n[1], p1, n[2], p2).transpose(0, 2, 4, 6, 3, 5, 7, 1)
    return {"dx": np.ascontiguousarray(dx).reshape(x.shape)}


def _case(B, C, s, p):
    def make(rng):
        V, inside = int(np.prod(s)), int(np.prod(p))
        x = rng.standard_normal((B * (V // inside), inside * C)).astype(np.float32)
        sizes = {f"s{i}": s[i] for i in range(3)} | {f"p{i}": p[i] for i in range(3)}
        return {"x": x, "B": B, "C": C, "V": V} | sizes
    return make


CASES = {
    "one_voxel": _case(1, 1, (1, 1, 1), (1, 1, 1)),
    "one_token": _case(2, 3, (2, 2, 3), (2, 2, 3)),
    "image": _case(2, 4, (1, 8, 8), (1, 2, 2)),
    "tall_image": _case(2, 3, (1, 12, 4), (1, 3, 2)),
    "video": _case(2, 4, (4, 6, 8), (2, 3, 2)),
    "voxels": _case(1, 3, (6, 4, 8), (3, 2, 4)),
    "patch_of_one": _case(2, 5, (2, 3, 2), (1, 1, 1)),
    "many_tokens": _case(9, 8, (1, 32, 32), (1, 2, 2)),
}
