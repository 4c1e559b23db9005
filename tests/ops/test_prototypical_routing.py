"""prototypical_routing: cosines, and gradients through both normalisations."""

import numpy as np
import pytest

from promoe import ops

from .common import (
    ULP,
    assert_close,
    cast,
    check_backward,
    check_finite_differences,
    check_forward,
    make,
    make_upstream,
    oracle,
    own_bounds,
    run,
)

OP = "prototypical_routing"
CASES = [case for case in oracle(OP).CASES if case not in own_bounds(OP)]


def gradients(inputs, dz, **wanted):
    outs = ops.prototypical_routing_forward(**inputs)
    return ops.prototypical_routing_backward(**inputs, **outs, dz=dz, **wanted)


@pytest.mark.parametrize("case", CASES)
def test_values_and_gradients(case):
    check_backward(OP, case)


@pytest.mark.parametrize("case", ["one", "one_token", "mixed", "slots", "width_3"])
def test_oracle_finite_differences(case):
    check_finite_differences(OP, case, ["x", "proto"], step=1e-6)


@pytest.mark.parametrize("case", own_bounds(OP))
def test_rows_of_different_scale(case):
    """Each row has its own scale, so each is held to its own bound. The gradient of a row is q minus
    its component along the row, q/|row| itself unrounded: so an error of a few ulp of |q|, also where
    (almost) all of q is along the row and nothing is left of it."""
    inputs, outs = check_forward(OP, case)
    dz = make_upstream(OP, case, outs)["dz"]
    got = gradients(inputs, dz)
    exact = cast(inputs, np.float64) | {"dz": dz.astype(np.float64)}
    truth, naive = oracle(OP).backward(**exact), oracle(OP).backward(**inputs, dz=dz)
    for name, rows, norm in (("dx", dz, outs["xnorm"]), ("dproto", dz.T, outs["pnorm"])):
        for i, row in enumerate(rows):
            size = np.abs(row).sum(dtype=np.float64) / max(norm[i], 1e-12)  # at least |q|
            bound = max(2 * np.abs(naive[name][i] - truth[name][i]).max(), 8 * ULP * size)
            assert np.abs(got[name][i] - truth[name][i]).max() <= bound, f"{name}[{i}]"


def test_one_dimension_has_only_signs():
    x, proto = np.array([[2], [-3], [0]], np.float32), np.array([[0.5], [-7]], np.float32)
    z = ops.prototypical_routing_forward(x=x, proto=proto)["z"]
    np.testing.assert_allclose(z, [[1, -1], [-1, 1], [0, 0]], rtol=2 * ULP)


def test_zero_norms_give_zero_logits():
    inputs = make(OP, "zero_norms")
    outs = ops.prototypical_routing_forward(**inputs)
    assert not outs["z"][[0, 5]].any() and not outs["z"][:, [1, 3]].any()
    assert np.isfinite(outs["z"]).all()
    assert not outs["xnorm"][[0, 5]].any() and not outs["pnorm"][[1, 3]].any()


def test_scale_does_not_matter():
    """Powers of two change no bit of the logits, and divide the gradient."""
    inputs = make(OP, "mixed")
    scaled = inputs | {"x": inputs["x"] * np.float32(1024), "proto": inputs["proto"] / np.float32(256)}
    a, b = ops.prototypical_routing_forward(**inputs), ops.prototypical_routing_forward(**scaled)
    np.testing.assert_array_equal(a["z"], b["z"])
    a, b = gradients(inputs, np.ones_like(a["z"])), gradients(scaled, np.ones_like(a["z"]))
    np.testing.assert_array_equal(a["dx"], b["dx"] * 1024)
    np.testing.assert_array_equal(a["dproto"], b["dproto"] / 256)


@pytest.mark.parametrize("case", ["mixed", "slots", "wide"])
def test_gradients_are_tangent(case):
    inputs, outs, _, grads = check_backward(OP, case)
    for u, du in ((inputs["x"], grads["dx"]), (inputs["proto"], grads["dproto"])):
        u, du = u.astype(np.float64), du.astype(np.float64)
        size = np.linalg.norm(u, axis=1) * np.abs(du).max() * np.sqrt(u.shape[1])
        assert (np.abs((u * du).sum(axis=1)) <= 8 * ULP * size).all()


def test_cosine_of_itself_is_one():
    inputs = make(OP, "along")
    z = ops.prototypical_routing_forward(**inputs)["z"]
    np.testing.assert_allclose(np.diag(z)[:4], 1, rtol=8 * ULP)
    np.testing.assert_allclose(z[4, 0], -1, rtol=8 * ULP)


def test_tokens_in_another_order():
    """The result of a token does not depend on its place, bit for bit."""
    inputs = make(OP, "slots")
    order = np.random.default_rng(0).permutation(len(inputs["x"]))
    moved = inputs | {"x": inputs["x"][order], "part": inputs["part"][order]}
    a, b = (ops.prototypical_routing_forward(**i) for i in (inputs, moved))
    np.testing.assert_array_equal(a["z"][order], b["z"])
    dz = make_upstream(OP, "slots", a)["dz"]
    da, db = gradients(inputs, dz), gradients(moved, dz[order])
    np.testing.assert_array_equal(da["dx"][order], db["dx"])
    truth = oracle(OP).backward(**cast(inputs, np.float64), dz=dz.astype(np.float64))["dproto"]
    naive = oracle(OP).backward(**inputs, dz=dz)["dproto"]
    assert_close("dproto", db["dproto"], truth, naive)


def test_a_token_alone():
    inputs = make(OP, "wide")
    whole = ops.prototypical_routing_forward(**inputs)
    for n in np.flatnonzero(inputs["part"] == -1)[[0, 7, -1]]:
        alone = ops.prototypical_routing_forward(x=inputs["x"][[n]], proto=inputs["proto"])
        np.testing.assert_array_equal(alone["z"][0], whole["z"][n])


def test_tokens_that_are_not_routable_are_not_read():
    """Whatever x and dz hold there."""
    clean = run(OP, "mixed")
    inputs = make(OP, "mixed")
    away = inputs["part"] != -1
    inputs["x"][away] = np.nan
    outs = ops.prototypical_routing_forward(**inputs)
    np.testing.assert_array_equal(outs["z"], clean["z"])
    assert not outs["z"][away].any() and not outs["xnorm"][away].any()
    dz = make_upstream(OP, "mixed", outs)["dz"]
    dz[away] = np.nan
    grads = gradients(inputs, dz)
    for name in ("dx", "dproto"):
        np.testing.assert_array_equal(grads[name], clean[name])
    assert not grads["dx"][away].any()


def test_nan_stays_in_its_row():
    inputs = make(OP, "wide") | {"part": None}
    inputs["x"][4, 3] = np.nan
    inputs["proto"][2, 1] = np.inf
    z = ops.prototypical_routing_forward(**inputs)["z"]
    assert np.isnan(z[4]).all() and np.isnan(z[:, 2]).all()
    assert np.isfinite(np.delete(np.delete(z, 4, axis=0), 2, axis=1)).all()


def test_without_tokens():
    proto = np.ones((3, 5), np.float32)
    outs = ops.prototypical_routing_forward(x=np.ones((0, 5), np.float32), proto=proto)
    assert outs["z"].shape == (0, 3)
    np.testing.assert_allclose(outs["pnorm"], np.sqrt(5), rtol=ULP)
    grads = gradients({"x": np.ones((0, 5), np.float32), "proto": proto}, outs["z"])
    assert grads["dx"].shape == (0, 5) and not grads["dproto"].any()
