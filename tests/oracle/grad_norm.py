"""grad_norm: the Euclidean norm. Summed in double by contract, so the truth is exact and the naive
computation is a float64 loop."""

import math

import numpy as np


def forward(g):
    return {"norm": np.array([math.sqrt(math.fsum(float(x) * float(x) for x in g))])}


def _case(M, scale=1.0):
    return lambda rng: {"g": (scale * rng.standard_normal(M)).astype(np.float32)}


CASES = {"none": _case(0), "one": _case(1), "odd": _case(33), "blocks": _case(150001),
         "large": _case(1000, 1e30), "small": _case(1000, 1e-30)}
