import math

import numpy as np
import pytest

import promoe
from promoe import ops
from tests.oracle import grad_norm as oracle

from .common import make


@pytest.mark.parametrize("case", oracle.CASES)
def test_matches_oracle(case):
    """The squares are exact in double; n sums of rounded halves cannot be off by more than n / 2 ulp, and
    sixteen chains of at most 4096 are not by more than 4096 / 2."""
    inputs = make("grad_norm", case)
    norm = ops.grad_norm_forward(**inputs)["norm"]
    assert norm.dtype == np.float64
    np.testing.assert_allclose(norm, oracle.forward(**inputs)["norm"], rtol=2100 * np.finfo(np.float64).eps)


def test_every_element_counts_once():
    for at in (0, 1, 15, 16, 65535, 65536, 65551, 131088):
        g = np.zeros(131089, np.float32)
        g[at] = -3
        assert ops.grad_norm_forward(g=g)["norm"][0] == 3


def test_many_slots():
    """More partial sums than a GPU's block has threads."""
    M = 300 * 32768 + 5
    assert ops.grad_norm_forward(g=np.ones(M, np.float32))["norm"][0] == math.sqrt(M)


@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
@pytest.mark.parametrize("at", [0, 70000])
def test_what_is_not_finite_is_seen(bad, at):
    g = np.ones(70001, np.float32)
    g[at] = bad
    assert not np.isfinite(ops.grad_norm_forward(g=g)["norm"][0])


def test_largest_and_smallest_floats():
    assert ops.grad_norm_forward(g=np.full(4, 3e38, np.float32))["norm"][0] == 2 * float(np.float32(3e38))
    assert ops.grad_norm_forward(g=np.full(4, 1e-45, np.float32))["norm"][0] == 2 * float(np.float32(1e-45))


def test_same_bits_for_any_thread_count():
    g, norms = make("grad_norm", "blocks")["g"], set()
    for threads in (1, 2, 3):
        promoe.set_num_threads(threads)
        norms.add(float(ops.grad_norm_forward(g=g)["norm"][0]))
    assert len(norms) == 1
