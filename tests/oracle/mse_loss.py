"""mse_loss: mean squared error over the first C of M channels."""

import numpy as np

from .numeric import total


def forward(pred, target):
    B, C, V = target.shape
    e = pred[:, :C] - target
    count = B * C * V
    return {"loss": np.array([total((e * e).ravel()) / max(count, 1)], pred.dtype)}


def backward(pred, target, dloss):
    B, C, V = target.shape
    dpred = np.zeros_like(pred)
    dpred[:, :C] = 2 * (pred[:, :C] - target) / pred.dtype.type(max(B * C * V, 1)) * dloss[0]
    return {"dpred": dpred}


def _case(B, M, C, V):
    def case(rng):
        return {"pred": rng.standard_normal((B, M, V)).astype(np.float32),
                "target": rng.standard_normal((B, C, V)).astype(np.float32)}

    return case


CASES = {
    "one": _case(1, 1, 1, 1),
    "odd": _case(3, 5, 2, 33),
    "image": _case(8, 8, 4, 1024),
    "all channels": _case(40, 3, 3, 300),
    "video": _case(2, 6, 3, 17001),
    "none": _case(0, 8, 4, 16),
}
