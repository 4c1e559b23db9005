"""What the oracles share. An oracle runs in float64 (the truth) or float32 (the naive computation
whose error sets the tolerance): it computes in the dtype of its inputs."""

import numpy as np


def mm(a, b):
    """a @ b. In float32 summed one product after another, as a plain loop would."""
    if a.dtype != np.float32:
        return a @ b
    out = np.zeros((a.shape[0], b.shape[1]), np.float32)
    for k in range(a.shape[1]):
        out += a[:, k, None] * b[k]
    return out


def total(a, axis=0):
    """Sum over one axis. In float32 one after another."""
    if a.dtype != np.float32:
        return a.sum(axis=axis)
    return np.add.accumulate(a, axis=axis, dtype=np.float32).take(-1, axis=axis) if a.shape[axis] \
        else a.sum(axis=axis)


def sigmoid(x):
    return 1 / (1 + np.exp(-x))


def gelu(x):
    """GELU, tanh form."""
    return x * sigmoid(x.dtype.type(np.sqrt(8 / np.pi)) * (x + x.dtype.type(0.044715) * x * x * x))


def dgelu(x):
    c, a = x.dtype.type(np.sqrt(8 / np.pi)), x.dtype.type(0.044715)
    s = sigmoid(c * (x + a * x * x * x))
    return s + x * s * (1 - s) * c * (1 + 3 * a * x * x)


def silu(x):
    return x * sigmoid(x)


def dsilu(x):
    s = sigmoid(x)
    return s * (1 + x * (1 - s))
