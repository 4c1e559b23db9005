import numpy as np
import pytest

import promoe
from promoe import ops
from tests.oracle import silu as oracle

from .common import check_backward, check_finite_differences, make


@pytest.mark.parametrize("case", oracle.CASES)
def test_matches_oracle(case):
    check_backward("silu", case)


def test_finite_differences():
    check_finite_differences("silu", "3x33", ["x"])


def test_far_from_zero_and_nan():
    x = np.array([[-1e4, -100, -20, 20, 100, 1e4, np.nan]], np.float32)
    y = ops.silu_forward(x=x)["y"][0]
    assert np.all(np.abs(y[:2]) < 1e-30) and np.isnan(y[-1])
    np.testing.assert_array_equal(y[3:6], x[0, 3:6])
    np.testing.assert_allclose(y[2], -20 * np.exp(-20.0), rtol=1e-6)
    dx = ops.silu_backward(x=x, y=y[None], dy=np.ones_like(x))["dx"][0]
    assert np.all(np.abs(dx[:2]) < 1e-30) and np.isnan(dx[-1])
    np.testing.assert_allclose(dx[3:6], 1, rtol=1e-6)


def test_same_bits_for_any_thread_count():
    x = make("silu", "40x1000")["x"]
    results = []
    for threads in (1, 2):
        promoe.set_num_threads(threads)
        y = ops.silu_forward(x=x)["y"]
        results.append((y, ops.silu_backward(x=x, y=y, dy=x)["dx"]))
    for one, two in zip(*results):
        np.testing.assert_array_equal(one, two)
