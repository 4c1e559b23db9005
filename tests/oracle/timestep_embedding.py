"""timestep_embedding: [cos | sin] of t times a geometric row of frequencies. Always float64, rounded
once: the op has no naive float32 form (t * f alone would lose 1e-4 at t = 1000)."""

import numpy as np


def forward(t, F, max_period=10000.0):
    half = F // 2
    angle = t.astype(np.float64)[:, None] * np.exp(-np.log(max_period) * np.arange(half) / max(half, 1))
    return {"e": np.concatenate([np.cos(angle), np.sin(angle)], axis=1).astype(t.dtype)}


def _case(B, F, **attributes):
    return lambda rng: {"t": (1000 * rng.random(B)).astype(np.float32), "F": F, **attributes}


CASES = {
    "one": _case(1, 256),
    "batch": _case(8, 256),
    "many": _case(300, 64),
    "narrow": _case(3, 2),
    "period": _case(5, 30, max_period=50.0),
    "none": _case(0, 8),
}
