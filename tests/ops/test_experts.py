"""experts: the feed-forward layer over a routing plan, against its oracle."""

import numpy as np
import pytest

import promoe
from promoe import _core, ops
from tests.oracle import experts as oracle

from .common import assert_close, cast, check_backward, check_finite_differences, make

GRADIENTS = ("dx", "drow_weight", "dup", "dup_bias", "ddown", "ddown_bias")


COMPUTES = promoe.backend_info()["computes"]


def run(inputs, dy=None, compute="fp32"):
    """Forward and backward: everything the op writes."""
    outs = ops.experts_forward(**inputs, compute=compute)
    dy = np.ones_like(outs["y"]) if dy is None else dy
    return outs | ops.experts_backward(**inputs, **outs, dy=dy, compute=compute)


@pytest.mark.parametrize("case", oracle.CASES)
def test_against_oracle(case):
    # A bias gradient is a sum of products of pre, gelu', dh and the weight, each rounded: with few rows the
    # largest of a few naive errors is a matter of luck. test_error_on_the_whole is the sharper test.
    check_backward("experts", case, floor=8)


@pytest.mark.parametrize("case", ["promoe", "slices", "dense", "skewed", "swiglu", "swiglu_slices", "swiglu_dense"])
def test_error_on_the_whole(case):
    """Root mean square errors are those of a naive float32 computation, up to chance."""
    inputs = make("experts", case)
    outs = ops.experts_forward(**inputs)
    dy = np.random.default_rng(1).standard_normal(outs["y"].shape).astype(np.float32)
    got = outs | ops.experts_backward(**inputs, **outs, dy=dy)
    exact = cast(inputs, np.float64)
    truth = oracle.forward(**exact) | oracle.backward(**exact, dy=dy.astype(np.float64))
    naive = oracle.forward(**inputs) | oracle.backward(**inputs, dy=dy)
    for name, value in truth.items():
        if value.size >= 500:
            assert np.square(got[name] - value).mean() <= 1.6 * np.square(naive[name] - value).mean(), name


@pytest.mark.parametrize("case", oracle.SMALL)
def test_oracle_by_finite_differences(case):
    names = [name for name in ("x", "up", "up_bias", "down", "down_bias", "row_weight") if name in make("experts", case)]
    check_finite_differences("experts", case, names)


@pytest.mark.parametrize("case", ["promoe", "widths", "some_without", "skewed", "slices", "dense", "blocks", "wide",
                                  "swiglu_biases", "swiglu_blocks"])
@pytest.mark.parametrize("compute", COMPUTES)
def test_same_bits_for_any_thread_count(case, compute):
    inputs, results = make("experts", case), []
    before = promoe.get_num_threads()
    try:
        for threads in (1, 2, 3):
            promoe.set_num_threads(threads)
            results.append(run(inputs, compute=compute))
    finally:
        promoe.set_num_threads(before)
    for other in results[1:]:
        for name, value in results[0].items():
            np.testing.assert_array_equal(other[name], value, err_msg=name)


@pytest.mark.parametrize("activation", ["gelu_tanh", "swiglu"])
@pytest.mark.parametrize("compute", COMPUTES)
def test_a_row_does_not_depend_on_its_company(activation, compute):
    """A token's result has the same bits in a batch and alone."""
    inputs = oracle.case(70, 24, (48,) * 5, (48,), activation=activation)(np.random.default_rng(0))
    y = ops.experts_forward(**inputs, compute=compute)["y"]
    groups = len(inputs["row_off"]) - 1
    for n in (0, 1, 33, 69):
        row = inputs["tok_row"][inputs["tok_off"][n]]
        group = np.searchsorted(inputs["row_off"], row, side="right") - 1
        alone = inputs | oracle.plan(np.array([[group]]), inputs["row_weight"][[row]][None], groups)
        alone["x"] = inputs["x"][[n]]
        np.testing.assert_array_equal(ops.experts_forward(**alone, compute=compute)["y"][0], y[n])


def test_parameter_gradients_accumulate_and_others_are_set():
    inputs = make("experts", "widths")
    outs = ops.experts_forward(**inputs)
    dy = np.random.default_rng(0).standard_normal(outs["y"].shape).astype(np.float32)
    fresh = ops.experts_backward(**inputs, **outs, dy=dy)
    truth = oracle.backward(**cast(inputs, np.float64), dy=dy.astype(np.float64))
    given = {name: np.full_like(fresh[name], 3) for name in GRADIENTS}
    ops.experts_backward(**inputs, **outs, dy=dy, **given)
    for name in GRADIENTS:
        if name in ("dx", "drow_weight"):
            np.testing.assert_array_equal(given[name], fresh[name], err_msg=name)
        else:
            assert_close(name, given[name], truth[name] + 3, fresh[name] + np.float32(3), floor=8)


@pytest.mark.parametrize("unwanted", [*[(name,) for name in GRADIENTS],
                                      ("dup", "dup_bias", "ddown", "ddown_bias"), ("dx", "drow_weight")])
def test_gradients_that_are_not_wanted(unwanted):
    inputs = make("experts", "some_without")
    outs = ops.experts_forward(**inputs)
    full = ops.experts_backward(**inputs, **outs, dy=outs["y"])
    part = ops.experts_backward(**inputs, **outs, dy=outs["y"], **dict.fromkeys(unwanted))
    assert not set(unwanted) & set(part)
    for name, value in part.items():
        np.testing.assert_array_equal(value, full[name], err_msg=name)


@pytest.mark.parametrize("case", ["promoe", "two_shared", "dense", "swiglu", "swiglu_padded", "swiglu_dense"])
def test_inference_saves_nothing(case):
    inputs = make("experts", case)
    full = ops.experts_forward(**inputs)
    y = ops.experts_forward(**inputs, pre=None, pre_shared=None)
    assert set(y) == {"y"}
    np.testing.assert_array_equal(y["y"], full["y"])


def test_rows_beyond_the_plan_are_not_touched():
    inputs = make("experts", "some_without")
    used = inputs["row_off"][-1]
    assert used < len(inputs["row_token"])
    pre = np.full((len(inputs["row_token"]), inputs["W"]), 7, np.float32)
    drow_weight = np.full(len(inputs["row_token"]), 7, np.float32)
    outs = ops.experts_forward(**inputs, pre=pre) | {"pre": pre}
    assert (pre[used:] == 7).all() and not (pre[:used] == 7).any()
    ops.experts_backward(**inputs, **outs, dy=outs["y"], drow_weight=drow_weight)
    assert (drow_weight[used:] == 0).all()


def test_nan_stays_in_its_token():
    inputs = make("experts", "promoe")
    inputs["x"][5, 3] = np.nan
    outs = ops.experts_forward(**inputs)
    assert np.isnan(outs["y"][5]).all() and np.isfinite(np.delete(outs["y"], 5, axis=0)).all()
    dx = ops.experts_backward(**inputs, **outs, dy=np.ones_like(outs["y"]))["dx"]
    assert np.isnan(dx[5]).all() and np.isfinite(np.delete(dx, 5, axis=0)).all()


def test_weight_zero_still_has_a_gradient():
    inputs = make("experts", "promoe")
    inputs["row_weight"][:] = 0
    got = run(inputs)
    truth = oracle.backward(**cast(inputs, np.float64), dy=np.ones(inputs["x"].shape))
    naive = oracle.backward(**inputs, dy=np.ones(inputs["x"].shape, np.float32))
    assert_close("drow_weight", got["drow_weight"], truth["drow_weight"], naive["drow_weight"])
    routed = inputs["foff"][len(inputs["row_off"]) - 1]
    assert not got["dup"][:routed].any() and got["dup"][routed:].any()


@pytest.mark.parametrize("case", ["promoe", "widths", "some_without", "no_rows_no_shared", "D17", "swiglu",
                                  "swiglu_biases", "swiglu_some_without", "swiglu_D33", "swiglu_blocks"])
@pytest.mark.parametrize("compute", COMPUTES)
def test_what_scratch_held_before_does_not_matter(case, compute):
    inputs = make("experts", case)
    clean = run(inputs, compute=compute)
    _core._poison(True)
    try:
        poisoned = run(inputs, compute=compute)
    finally:
        _core._poison(False)
    for name in {"y", *GRADIENTS} & set(clean):
        np.testing.assert_array_equal(poisoned[name], clean[name], err_msg=name)


@pytest.mark.parametrize("change, word", [
    ({"row_token": (0, -1)}, "row_token"), ({"row_token": (3, 70)}, "row_token"),
    ({"tok_row": (2, 70)}, "tok_row"), ({"tok_row": (0, -1)}, "tok_row"),
    ({"row_off": (0, 1)}, "row_off"), ({"row_off": (2, 60)}, "row_off"), ({"row_off": (-1, 71)}, "row_off"),
    ({"tok_off": (3, 9)}, "tok_off"), ({"tok_off": (-1, 71)}, "tok_off"),
    ({"foff": (2, 48)}, "foff"), ({"foff": (1, 49)}, "foff"), ({"foff": (0, 1)}, "foff"),
    ({"foff": (-1, 300)}, "foff"),
])
def test_a_broken_plan_is_an_error(change, word):
    inputs = make("experts", "promoe")
    outs = ops.experts_forward(**inputs)
    for name, (index, value) in change.items():
        inputs[name][index] = value
    with pytest.raises(ValueError, match=word):
        ops.experts_forward(**inputs)
    with pytest.raises(ValueError, match=word):
        ops.experts_backward(**inputs, **outs, dy=outs["y"])


def test_two_tokens_do_not_share_a_row():
    inputs = make("experts", "promoe")
    inputs["tok_row"][[0, 1]] = inputs["tok_row"][[1, 0]]
    with pytest.raises(ValueError, match="tok_row"):
        ops.experts_forward(**inputs)


def test_swiglu_of_known_numbers():
    """One token, one unit: silu(2 x) * 3 x * 5, and its slope."""
    x, up = np.array([[0.7]], np.float32), np.array([[2.0], [3.0]], np.float32)
    inputs = {"x": x, "foff": np.array([0, 1], np.int32), "up": up, "down": np.array([5.0], np.float32),
              "activation": "swiglu", "G": 0}
    outs = ops.experts_forward(**inputs)
    s = 1 / (1 + np.exp(-1.4))
    np.testing.assert_allclose(outs["pre_shared"], [[1.4, 2.1]], rtol=1e-6)
    np.testing.assert_allclose(outs["y"], [[5 * 1.4 * s * 2.1]], rtol=1e-6)
    grads = ops.experts_backward(**inputs, **outs, dy=np.ones((1, 1), np.float32))
    assert set(grads) == {"dx", "dup", "ddown"}
    gate, lift = 5 * 2.1 * (s + 1.4 * s * (1 - s)), 5 * 1.4 * s
    np.testing.assert_allclose(grads["ddown"], [1.4 * s * 2.1], rtol=1e-6)
    np.testing.assert_allclose(grads["dup"], [[0.7 * gate], [0.7 * lift]], rtol=1e-6)
    np.testing.assert_allclose(grads["dx"], [[2 * gate + 3 * lift]], rtol=1e-6)


def test_a_bias_of_zero_is_none():
    inputs = make("experts", "swiglu")
    outs = run(inputs)
    zeros = run(inputs | {"up_bias": np.zeros(len(inputs["up"]), np.float32),
                          "down_bias": np.zeros((len(inputs["foff"]) - 1, inputs["x"].shape[1]), np.float32)})
    for name, value in outs.items():
        np.testing.assert_array_equal(value, zeros[name], err_msg=name)


@pytest.mark.parametrize("changes, word", [
    ({"activation": "gelu_tanh", "W": 96, "Z": 96}, "up"), ({"activation": "swish"}, "activation"),
    ({"W": 95}, "W"), ({"Z": 95}, "Z"), ({"P": 288}, "up"),
])
def test_a_gate_that_does_not_fit_is_an_error(changes, word):
    inputs = make("experts", "swiglu")
    ops.experts_forward(**inputs)
    with pytest.raises(ValueError, match=rf"\b{word}\b"):
        ops.experts_forward(**{**inputs, **changes})
