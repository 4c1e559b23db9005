"""silu: y = x * sigmoid(x)."""

import numpy as np

from .numeric import sigmoid


def forward(x):
    return {"y": x * sigmoid(x)}


def backward(x, dy):
    s = sigmoid(x)
    return {"dx": dy * (s + x * s * (1 - s))}


def _case(N, D):
    return lambda rng: {"x": (3 * rng.standard_normal((N, D))).astype(np.float32)}


CASES = {f"{N}x{D}": _case(N, D) for N, D in [(1, 1), (3, 33), (2, 384), (40, 1000), (0, 8)]}
