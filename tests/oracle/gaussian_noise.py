"""gaussian_noise: x[b, i] = normal(seed, SAMPLER, position + b, i). M is a dim; nothing has a dtype to
follow, so the float64 truth is forward, and naive the same in float32."""

import numpy as np

from . import draws


def forward(key, B, M, dtype=np.float64):
    rows = [draws.normal(key[0], draws.SAMPLER, key[1] + b, M, dtype) for b in range(B)]
    return {"x": np.array(rows, dtype).reshape(B, M)}


def naive(**inputs):
    return forward(**inputs, dtype=np.float32)


def _case(B, M, seed=7, position=0):
    return lambda rng: {"key": np.array([seed, position], np.int64), "B": B, "M": M}


CASES = {
    "one": _case(1, 1),
    "odd": _case(3, 33, seed=-5),
    "small samples": _case(200, 64, position=2**40),
    "image": _case(2, 4 * 32 * 32, seed=2**62 + 3),
    "parts": _case(2, 9001, position=-1),
    "none": _case(0, 16),
    "no elements": _case(3, 0),
}
