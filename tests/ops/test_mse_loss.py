import numpy as np
import pytest

import promoe
from promoe import ops
from tests.oracle import mse_loss as oracle

from .common import check_backward, check_finite_differences, make


@pytest.mark.parametrize("case", oracle.CASES)
def test_matches_oracle(case):
    check_backward("mse_loss", case)


def test_finite_differences():
    check_finite_differences("mse_loss", "odd", ["pred"])


def test_other_channels_count_for_nothing():
    """Not in the loss, even when they are NaN, and their gradient is exactly 0."""
    inputs = make("mse_loss", "odd")
    expected = ops.mse_loss_forward(**inputs)["loss"]
    inputs["pred"][:, 2:] = np.nan
    out = ops.mse_loss_forward(**inputs)
    np.testing.assert_array_equal(out["loss"], expected)
    dpred = ops.mse_loss_backward(**inputs, **out, dloss=np.ones(1, np.float32),
                                  dpred=np.full_like(inputs["pred"], 7))["dpred"]
    assert np.all(dpred[:, 2:] == 0) and np.all(np.isfinite(dpred))


def test_nan_is_seen():
    inputs = make("mse_loss", "odd")
    inputs["pred"][1, 1, 7] = np.nan
    assert np.isnan(ops.mse_loss_forward(**inputs)["loss"][0])


def test_sums_in_double():
    """2^20 squares of 1 and as many of 9: the mean is exact."""
    pred = np.ones((2, 1, 1 << 20), np.float32)
    pred[1] = 3
    assert ops.mse_loss_forward(pred=pred, target=np.zeros_like(pred))["loss"][0] == 5


def test_same_bits_for_any_thread_count():
    inputs, results = make("mse_loss", "video"), []
    for threads in (1, 2):
        promoe.set_num_threads(threads)
        loss = ops.mse_loss_forward(**inputs)["loss"]
        results.append((loss, ops.mse_loss_backward(**inputs, loss=loss, dloss=loss)["dpred"]))
    for one, two in zip(*results):
        np.testing.assert_array_equal(one, two)
