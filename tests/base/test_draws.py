"""Philox, and the draws made of it: known answers, statistics, accuracy, the same bits on every level."""

import json
import os
import subprocess
import sys
from math import erf, sqrt

import numpy as np
import pytest

from promoe import _core, ops
from tests.oracle import draws


def noise(seed, position, B, M):
    return ops.gaussian_noise_forward(key=np.array([seed, position], np.int64), B=B, M=M)["x"]


def flow(seed, position, B, M=1, **attributes):
    return ops.rectified_flow_forward(x0=np.zeros((B, 1, M), np.float32), y=np.zeros(B, np.int64),
                                      key=np.array([seed, position], np.int64), **attributes)


@pytest.mark.parametrize("key, counter, words", [
    # kat_vectors of Random123 (Salmon et al.), philox4x32 with 10 rounds
    ((0, 0), (0, 0, 0, 0), "6627e8d5 e169c58d bc57ac4c 9b00dbd8"),
    ((2**32 - 1,) * 2, (2**32 - 1,) * 4, "408f276d 41c83b0e a20bc7c6 6d5451fd"),
    ((0xA4093822, 0x299F31D0), (0x243F6A88, 0x85A308D3, 0x13198A2E, 0x03707344),
     "d16cfe09 94fdcceb 5001e420 24126ea1"),
])
def test_published_vectors_of_philox(key, counter, words):
    assert " ".join(f"{w:08x}" for w in draws.philox(key, [counter])[0]) == words


def test_uniform_draws_are_the_words():
    """With density "uniform" t is 1000 u: a word of Philox, seen through the op, at every corner of the key."""
    for seed in (0, 1, -1, 2**63 - 1, -(2**63), 0x123456789ABCDEF):
        for position in (0, 2**32 - 1, 2**32, -1, 2**62, 2**63 - 2):
            t = flow(seed, position, 3, density="uniform")["t"]
            for b in range(3):
                assert t[b] == np.float32(1000) * draws.uniform(seed, draws.TIME, position + b, 1)[0]


def test_normal_draws_follow_the_formula():
    """Each draw within 3 ulp of itself: log 1, square root 1, sine 1.1, products 1, halves rounded off."""
    got, truth = noise(11, 0, 4, 50000), np.stack([draws.normal(11, draws.SAMPLER, b, 50000) for b in range(4)])
    assert np.max(np.abs(got - truth) / (np.abs(truth) + 1e-12)) < 3 * np.finfo(np.float32).eps


# Bits of the first normal draws of SAMPLER and NOISE, and of t of three densities. They may never change:
# a resumed run and a GPU must see the same noise.
KNOWN = {
    "sampler 0 0": "be9f3c44 bdf788ce 401a4789 3fa308d6 beec0812 3f243592",
    "noise 0 0": "3f88a6ca bed9c6be c0178cdf be6d0d4d befb4770 be434756",
    "logit_normal 0 0": "43de6480 4440f0e8 44229ef3 445a7620",
    "uniform 0 0": "4213bdab 440e7a04 446272d8 439403e5",
    "mode 0 0": "4470a47e 4417f9f2 43a7cfea 4436f2b0",
    "sampler 42 7": "bf690866 3e904f76 4015ce1e 3fc28c06 bf5232eb bd8b77b1",
    "noise 42 7": "bf2e9c31 3fb2cd2d bf5f98cc bff93e6f 3e871c9e 3f8390e3",
    "logit_normal 42 7": "44590ac6 43a499e3 445b5705 43300760",
    "uniform 42 7": "43d40f42 43f66093 43bfea62 434f3266",
    "mode 42 7": "44245f1e 441da425 4429552d 44485a9c",
    "sampler -1 1099511627776": "3fa87935 3f617e41 3ec28f1c 3eb9f6b7 3d4a89a4 bd79f2a9",
    "noise -1 1099511627776": "3ff49b64 3ea8ad08 bfa55ae8 bf4d5259 bf10ad0b bf1f1e5d",
    "logit_normal -1 1099511627776": "43513fd6 43a6bbd5 441ca2fb 43d5cd45",
    "uniform -1 1099511627776": "437ec3e1 441ff84b 4478862f 44401bd0",
    "mode -1 1099511627776": "443e9ed5 44134108 41ed46a7 440444e4",
    "checksum": "52246f11fe63b75e",
}


def script():
    """What one level draws, as hexadecimal float bits; printed by a child that was told its level."""
    keys = [(0, 0), (42, 7), (-1, 2**40)]
    out = {}
    for seed, position in keys:
        out[f"sampler {seed} {position}"] = noise(seed, position, 1, 6)[0]
        out[f"noise {seed} {position}"] = flow(seed, position, 1, 6)["target"][0, 0]
        for density in ("logit_normal", "uniform", "mode"):
            out[f"{density} {seed} {position}"] = flow(seed, position, 4, density=density, shift=1.5)["t"]
    bits = {k: " ".join(f"{w:08x}" for w in v.view(np.uint32)) for k, v in out.items()}
    many = noise(5, 0, 40, 5001).view(np.uint32).astype(np.uint64).ravel()
    bits["checksum"] = f"{int((many * np.arange(1, many.size + 1, dtype=np.uint64)).sum()):016x}"
    return bits


@pytest.mark.parametrize("level", _core.levels())
def test_known_answers_on_every_level(level):
    code = "import json; from tests.base.test_draws import script; print(json.dumps(script()))"
    done = subprocess.run([sys.executable, "-c", code], env={**os.environ, "PROMOE_CPU": level}, timeout=120,
                          stdout=subprocess.PIPE, text=True, check=True)
    assert json.loads(done.stdout) == KNOWN


def test_statistics_of_normal_draws():
    x = noise(2024, 0, 64, 4096).astype(np.float64)
    n = x.size
    assert abs(x.mean()) < 4 / sqrt(n)
    assert abs(x.var() - 1) < 4 * sqrt(2 / n)
    assert abs((x**3).mean()) < 4 * sqrt(15 / n)
    assert abs((x**4).mean() - 3) < 4 * sqrt(96 / n)
    ordered = np.sort(x.ravel())
    cdf = np.array([0.5 * (1 + erf(v / sqrt(2))) for v in ordered])
    distance = max(np.max(cdf - np.arange(n) / n), np.max(np.arange(1, n + 1) / n - cdf))
    assert distance * sqrt(n) < 1.95  # Kolmogorov-Smirnov, one in a thousand
    assert np.abs(x).max() < 6.8


def test_neighbours_are_uncorrelated():
    x = noise(9, 100, 256, 256).astype(np.float64)
    limit = 4.5 / sqrt(x.size)
    assert abs((x[1:] * x[:-1]).mean()) < limit, "positions"
    assert abs((x[:, 1:] * x[:, :-1]).mean()) < limit, "indices, the two of a pair among them"
    assert abs((x[:, 4:] * x[:, :-4]).mean()) < limit, "blocks"
    assert abs((x * noise(10, 100, 256, 256)).mean()) < limit, "seeds"
    assert abs((x * flow(9, 100, 256, 256)["target"][:, 0]).mean()) < limit, "streams"


def test_uniform_draws_stay_inside():
    """0 < u < 1, and uniform: Kolmogorov-Smirnov over the t of many samples."""
    n = 50000
    u = np.sort(flow(1, 0, n, density="uniform")["t"].astype(np.float64)) / 1000
    assert 0 < u[0] and u[-1] < 1
    distance = max(np.max(u - np.arange(n) / n), np.max(np.arange(1, n + 1) / n - u))
    assert distance * sqrt(n) < 1.95


def test_split_of_a_batch_does_not_matter():
    whole = noise(3, 1000, 7, 333)
    parts = [noise(3, 1000, 2, 333), noise(3, 1002, 1, 333), noise(3, 1003, 4, 333)]
    np.testing.assert_array_equal(whole, np.concatenate(parts))


def test_a_longer_sample_begins_alike():
    np.testing.assert_array_equal(noise(3, 5, 1, 100), noise(3, 5, 1, 20001)[:, :100])
