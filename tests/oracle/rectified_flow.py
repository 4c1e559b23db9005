"""rectified_flow: x_t = (1 - s) x0 + s noise, target = noise - x0, t = 1000 s. Computes in the dtype of
x0; the draws' words and the uniform draws are exact in both."""

import numpy as np

from . import draws


def forward(x0, y, key, density="logit_normal", logit_mean=0.0, logit_std=1.0, sigmoid_scale=1.0, shift=1.0,
            drop_prob=0.1, null_label=1000):
    dtype = x0.dtype.type
    B = x0.shape[0]
    u = np.empty(B, dtype)
    noise = np.empty_like(x0)
    dropped = np.empty(B, bool)
    for b in range(B):
        place = int(key[1]) + b
        noise[b] = draws.normal(key[0], draws.NOISE, place, x0[b].size, dtype).reshape(x0[b].shape)
        n = draws.normal(key[0], draws.TIME, place, 1, dtype)[0]
        u[b] = draws.uniform(key[0], draws.TIME, place, 1)[0]
        dropped[b] = float(draws.uniform(key[0], draws.DROP, place, 1)[0]) < drop_prob
        if density == "logit_normal":
            u[b] = 1 / (1 + np.exp(-dtype(sigmoid_scale) * (dtype(logit_mean) + dtype(logit_std) * n)))
        elif density == "mode":
            u[b] = 1 - u[b] - dtype(1.29) * (np.cos(dtype(np.pi / 2) * u[b]) ** 2 - 1 + u[b])
    s = dtype(shift) * u / (1 + dtype(shift - 1) * u)
    wide = s.reshape(-1, *[1] * (x0.ndim - 1))
    return {"xt": (1 - wide) * x0 + wide * noise, "target": noise - x0, "t": 1000 * s,
            "label": np.where(dropped, null_label, y)}


def _case(B, C, V, position=0, seed=1, **attributes):
    def case(rng):
        return {"x0": rng.standard_normal((B, C, V)).astype(np.float32), "y": rng.integers(0, 10, B),
                "key": np.array([seed, position], np.int64), "null_label": 10, **attributes}

    return case


CASES = {
    "one": _case(1, 1, 1),
    "image": _case(2, 4, 32 * 32, position=123456789012),
    "digits": _case(150, 1, 64),
    "uniform": _case(40, 3, 5, density="uniform"),
    "mode": _case(40, 3, 5, density="mode", seed=-1),
    "shifted": _case(40, 2, 17, shift=3.0, logit_mean=-0.5, logit_std=1.7, sigmoid_scale=1.3),
    "video": _case(2, 3, 4099),
    "all dropped": _case(5, 1, 9, drop_prob=1.0),
    "none dropped": _case(50, 1, 9, drop_prob=0.0),
    "none": _case(0, 4, 16),
}
