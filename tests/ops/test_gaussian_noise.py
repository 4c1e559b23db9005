import numpy as np
import pytest

import promoe
from promoe import ops
from tests.oracle import gaussian_noise as oracle

from .common import assert_close, make

# Streams, positions, statistics and bits: tests/base/test_draws.py.


@pytest.mark.parametrize("case", oracle.CASES)
def test_matches_oracle(case):
    inputs = make("gaussian_noise", case)
    got = ops.gaussian_noise_forward(**inputs)
    assert set(got) == {"x"} and got["x"].dtype == np.float32
    assert_close("x", got["x"], oracle.forward(**inputs)["x"], oracle.naive(**inputs)["x"])


def test_writes_into_a_given_array():
    key, x = np.array([1, 2], np.int64), np.full((3, 5), np.nan, np.float32)
    assert ops.gaussian_noise_forward(key=key, x=x)["x"] is x
    np.testing.assert_array_equal(x, ops.gaussian_noise_forward(key=key, B=3, M=5)["x"])


def test_same_bits_for_any_thread_count():
    results = []
    for threads in (1, 2):
        promoe.set_num_threads(threads)
        results.append([ops.gaussian_noise_forward(**make("gaussian_noise", c))["x"] for c in oracle.CASES])
    for one, two in zip(*results):
        np.testing.assert_array_equal(one, two)
