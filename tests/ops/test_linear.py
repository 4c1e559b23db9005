"""linear against its oracle: values, gradients, accumulation, NULLs, threads."""

import os

import numpy as np
import pytest

import promoe
from promoe import ops

from .common import (
    ULP,
    assert_close,
    cast,
    check_backward,
    check_finite_differences,
    compare,
    make,
    oracle,
)

CASES = oracle("linear").CASES


@pytest.mark.parametrize("case", CASES)
def test_values_and_gradients(case):
    check_backward("linear", case)


@pytest.mark.parametrize("case", ["one", "no_bias", "silu", "gelu_tanh"])
def test_oracle_finite_differences(case):
    wrt = ["x", "weight"] + ["bias"] * (case != "no_bias")
    check_finite_differences("linear", case, wrt)


@pytest.mark.parametrize("case", ["gelu_tanh", "many_tokens", "no_bias", "gradient_ranges"])
def test_gradients_accumulate(case):
    """dweight and dbias are added to what is there; dx replaces it, or is added with dx_add."""
    inputs, outs, upstream, first = check_backward("linear", case)
    buffers = {name: np.full_like(value, 3) for name, value in first.items()}
    ops.linear_backward(**inputs, **outs, **upstream, **buffers)
    for name, value in first.items():
        start = 0 if name == "dx" else 3
        np.testing.assert_allclose(buffers[name], start + value.astype(np.float64),
                                   atol=8 * ULP * (3 + np.abs(value).max()), err_msg=name)
    buffers = {"dx": np.full_like(first["dx"], 3)}
    ops.linear_backward(**inputs, **outs, **upstream, **buffers, dx_add=1)
    np.testing.assert_allclose(buffers["dx"], 3 + first["dx"].astype(np.float64),
                               atol=8 * ULP * (3 + np.abs(first["dx"]).max()))


@pytest.mark.parametrize("case", ["one_token", "row_blocks", "many_tokens", "panel_ranges",
                                  "gradient_ranges"])
def test_same_bits_for_any_thread_count(case):
    results = []
    before = promoe.get_num_threads()
    try:
        for threads in (1, 2, 3):
            promoe.set_num_threads(threads)
            inputs, outs, upstream, grads = check_backward("linear", case)
            results.append({**outs, **grads})
    finally:
        promoe.set_num_threads(before)
    for other in results[1:]:
        for name, value in results[0].items():
            np.testing.assert_array_equal(value, other[name], err_msg=name)


@pytest.mark.skipif(os.environ.get("PROMOE_TEST_DEVICE") == "cuda", reason="cuBLASLt picks a kernel by the number of rows")
def test_a_row_does_not_depend_on_its_neighbours():
    inputs = make("linear", "panel_ranges")
    whole = ops.linear_forward(**inputs)["y"]
    for begin, end in ((0, 1), (3, 17), (50, 130)):
        part = ops.linear_forward(**{**inputs, "x": inputs["x"][begin:end].copy()})["y"]
        np.testing.assert_array_equal(part, whole[begin:end])


def test_without_tokens():
    inputs = make("linear", "gelu_tanh")
    inputs["x"] = inputs["x"][:0].copy()
    outs = ops.linear_forward(**inputs)
    assert outs["y"].shape == (0, 65)
    kept = np.ones_like(inputs["weight"])
    grads = ops.linear_backward(**inputs, **outs, dy=np.zeros((0, 65), np.float32), dweight=kept)
    assert grads["dx"].shape == (0, 16) and (kept == 1).all() and not grads["dbias"].any()


@pytest.mark.parametrize("activation", ["none", "silu", "gelu_tanh"])
def test_not_a_number_stays_in_its_row(activation):
    inputs = make("linear", "row_blocks") | {"activation": activation}
    inputs["x"][7, 3] = np.nan
    outs = ops.linear_forward(**inputs)
    assert np.isnan(outs["y"][7]).all()
    assert not np.isnan(np.delete(outs["y"], 7, axis=0)).any()
    grads = ops.linear_backward(**inputs, **outs, dy=np.ones_like(outs["y"]))
    assert np.isnan(grads["dweight"][:, 3]).all()
    assert np.isnan(grads["dx"][7]).all() == (activation != "none")
    assert not np.isnan(np.delete(grads["dx"], 7, axis=0)).any()


@pytest.mark.parametrize("activation", ["silu", "gelu_tanh"])
def test_large_values(activation):
    """Far out an activation is the identity or zero: no overflow on the way."""
    x = np.array([[-1e4], [-100], [-20], [0], [20], [100], [1e4]], np.float32)
    inputs = {"x": x, "weight": np.ones((1, 1), np.float32), "activation": activation}
    outs = ops.linear_forward(**inputs)
    with np.errstate(over="ignore"):  # the oracle's exp
        truth = oracle("linear").forward(**cast(inputs, np.float64))["y"]
    assert_close("y", outs["y"], truth, truth)
    grads = ops.linear_backward(**inputs, **outs, dy=np.ones_like(x))
    np.testing.assert_allclose(grads["dx"][[0, 1, 3, 5, 6], 0], [0, 0, 0.5, 1, 1], atol=4 * ULP)


def test_saved_value_may_be_absent():
    """The values of the forward do not depend on what is kept."""
    inputs = make("linear", "silu")
    outs = ops.linear_forward(**inputs)
    compare("linear", outs, inputs)
    y = np.empty_like(outs["y"])
    ops.linear_forward(**inputs, y=y)
    np.testing.assert_array_equal(y, outs["y"])
