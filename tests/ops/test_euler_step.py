import numpy as np
import pytest

import promoe
from promoe import ops
from tests.oracle import euler_step as oracle

from .common import check_forward, make


@pytest.mark.parametrize("case", oracle.CASES)
def test_matches_oracle(case):
    check_forward("euler_step", case)


def test_in_place():
    inputs = make("euler_step", "odd")
    expected = ops.euler_step_forward(**inputs)["y"]
    out = ops.euler_step_forward(**inputs, y=inputs["x"])
    assert out["y"] is inputs["x"]
    np.testing.assert_array_equal(inputs["x"], expected)


def test_other_channels_are_not_read():
    inputs = make("euler_step", "image")
    expected = ops.euler_step_forward(**inputs)["y"]
    inputs["cond"][:, 4:] = inputs["uncond"][:, 4:] = np.nan
    np.testing.assert_array_equal(ops.euler_step_forward(**inputs)["y"], expected)


def test_guidance_of_zero_and_one():
    inputs = make("euler_step", "odd")
    for cfg, alone in ((0.0, "uncond"), (1.0, "cond")):
        inputs["schedule"][2] = cfg
        plain = {"x": inputs["x"], "cond": inputs[alone], "schedule": inputs["schedule"]}
        np.testing.assert_allclose(ops.euler_step_forward(**inputs)["y"], ops.euler_step_forward(**plain)["y"],
                                   rtol=0, atol=4 * np.finfo(np.float32).eps)


def test_straight_path_is_walked_exactly():
    """With the true velocity x1 - x0 of one pair, steps from sigma 1 to 0 lead from x1 to x0."""
    rng = np.random.default_rng(0)
    x0, x1 = rng.standard_normal((2, 1, 2, 16)).astype(np.float32)
    sigmas = np.linspace(1, 0, 11)
    x = x1.copy()
    for sigma, following in zip(sigmas, sigmas[1:]):
        ops.euler_step_forward(x=x, cond=x1 - x0, schedule=np.array([sigma, following, 1.0]), y=x)
    np.testing.assert_allclose(x, x0, atol=2e-6)


def test_nan_stays_in_its_element():
    inputs = make("euler_step", "odd")
    inputs["cond"][1, 1, 3] = np.nan
    y = ops.euler_step_forward(**inputs)["y"]
    assert np.isnan(y[1, 1, 3]) and np.isnan(y).sum() == 1


def test_same_bits_for_any_thread_count():
    inputs, results = make("euler_step", "video"), []
    for threads in (1, 2):
        promoe.set_num_threads(threads)
        results.append(ops.euler_step_forward(**inputs)["y"])
    np.testing.assert_array_equal(*results)
