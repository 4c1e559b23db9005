"""euler_step: guidance on all C channels, then x + (sigma_next - sigma) v."""

import numpy as np


def forward(x, cond, schedule, uncond=None):
    kind, C = x.dtype.type, x.shape[1]
    v = cond[:, :C]
    if uncond is not None:
        v = uncond[:, :C] + kind(schedule[2]) * (v - uncond[:, :C])
    return {"y": x + kind(schedule[1] - schedule[0]) * v}


def _case(B, C, M, V, guided=True, cfg=1.5):
    def case(rng):
        def draw(*shape):
            return rng.standard_normal(shape).astype(np.float32)

        inputs = {"x": draw(B, C, V), "cond": draw(B, M, V), "schedule": np.array([0.9, 0.85, cfg])}
        if guided:
            inputs["uncond"] = draw(B, M, V)
        return inputs

    return case


CASES = {
    "one": _case(1, 1, 1, 1),
    "odd": _case(3, 2, 5, 33),
    "image": _case(5, 4, 8, 1024, cfg=4.0),
    "unguided": _case(2, 4, 8, 64, guided=False),
    "video": _case(2, 3, 3, 9001),
    "none": _case(0, 4, 8, 16),
}
