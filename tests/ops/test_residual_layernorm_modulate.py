import numpy as np
import pytest

import promoe
from promoe import ops
from tests.oracle import residual_layernorm_modulate as oracle

from .common import assert_close, cast, check_backward, check_finite_differences, make

OP = "residual_layernorm_modulate"
forward, backward = ops.residual_layernorm_modulate_forward, ops.residual_layernorm_modulate_backward


@pytest.mark.parametrize("case", oracle.CASES)
def test_matches_oracle(case):
    check_backward(OP, case, floors(make(OP, case)))


def floors(inputs, **upstream):
    """dx is what is left of terms of size rstd * |dxhat| after the mean and the xhat part are taken out; of D
    channels D - 2 directions survive, so with few channels nearly everything cancels, and the error is 4 ulp
    of the terms, not of the result: of the largest rstd * |dxhat|, where dy is below 4 and the gradients made
    from it are about 1."""
    if inputs["x"].shape[1] > 3:
        return {}
    inputs = cast(inputs, np.float64)
    scale = 1 + np.abs(inputs.get("scale", np.zeros(1))).max()
    floor = 4.0 * max(1.0, oracle.forward(**inputs)["rstd"].max() * 4 * scale)
    return dict.fromkeys(("dx", "dbranch", "dgate"), floor)


@pytest.mark.parametrize("case", ["all", "no gate", "layernorm alone", "conditions"])
def test_finite_differences(case):
    inputs = make(OP, case)
    check_finite_differences(OP, case, [k for k in inputs if k not in ("B", "eps", "cond")])


@pytest.mark.parametrize("case", ["conditions", "conditions in chunks"])
def test_conditions_are_rows_shared(case):
    """The same bits as with a row for every image."""
    inputs = make(OP, case)
    cond = inputs.pop("cond")
    dy, dxo = upstream(inputs)
    shared = forward(**inputs, cond=cond)
    own = {k: v[cond] if k in ("gate", "shift", "scale") else v for k, v in inputs.items()}
    alone = forward(**own)
    for name in alone:
        np.testing.assert_array_equal(shared[name], alone[name], err_msg=name)
    got, want = backward(**inputs, cond=cond, **shared, dy=dy, dxo=dxo), backward(**own, **alone, dy=dy, dxo=dxo)
    for name in ("dx", "dbranch"):
        np.testing.assert_array_equal(got[name], want[name], err_msg=name)
    for name in ("dgate", "dshift", "dscale"):
        assert not got[name][-1].any()  # no image has the last one
        for c in range(len(got[name])):
            np.testing.assert_allclose(got[name][c], want[name][cond == c].sum(0), rtol=1e-4, atol=1e-4)


def test_conditions_out_of_range():
    inputs = make(OP, "conditions")
    for wrong in (-1, 4):
        inputs["cond"][3] = wrong
        with pytest.raises(ValueError, match=f"cond has {wrong} at 3; it must be in 0..3"):
            forward(**inputs)
    del inputs["cond"]
    with pytest.raises(ValueError, match="C is 4 and B is 5"):
        forward(**inputs)


def upstream(inputs, seed=5):
    rng = np.random.default_rng(seed)
    return [rng.standard_normal(inputs["x"].shape).astype(np.float32) for _ in range(2)]


def test_without_a_gradient_from_above():
    inputs = make(OP, "all")
    outs, (dy, _) = forward(**inputs), upstream(inputs)
    got = backward(**inputs, **outs, dy=dy)
    truth, naive = (oracle.backward(**cast({**inputs, "dy": dy}, t)) for t in (np.float64, np.float32))
    for name in truth:
        assert_close(name, got[name], truth[name], naive[name])


@pytest.mark.parametrize("case", ["all", "no gate", "layernorm alone"])
def test_in_place(case):
    """xo in x's buffer, dx in dxo's: the same bits."""
    inputs = make(OP, case)
    outs, (dy, dxo) = forward(**inputs), upstream(inputs)
    want = backward(**inputs, **outs, dy=dy, dxo=dxo)
    x = inputs["x"].copy()
    again = forward(**{**inputs, "x": x}, xo=x)
    np.testing.assert_array_equal(x, outs["xo"])
    np.testing.assert_array_equal(again["y"], outs["y"])
    got = backward(**{**inputs, "x": x}, **{**outs, "xo": x}, dy=dy, dxo=dxo, dx=dxo)
    assert got["dx"] is dxo
    for name in want:
        np.testing.assert_array_equal(got[name], want[name], err_msg=name)


def test_constant_row():
    """Variance 0: y is the shift, and nothing is infinite."""
    x = np.full((2, 20), 3.5, np.float32)
    shift = np.arange(20, dtype=np.float32)[None]
    outs = forward(x=x, B=1, shift=shift)
    np.testing.assert_array_equal(outs["y"], np.repeat(shift, 2, 0))
    np.testing.assert_allclose(outs["rstd"], 1000, rtol=1e-6)
    assert np.isfinite(backward(x=x, B=1, shift=shift, **outs, dy=x)["dx"]).all()


def test_nan_stays_in_its_token():
    inputs = make(OP, "all")
    inputs["x"][3, 5] = np.nan
    outs, (dy, dxo) = forward(**inputs), upstream(inputs)
    bad = np.isnan(outs["y"]).any(axis=1)
    assert bad[3] and bad.sum() == 1 and np.isnan(outs["y"][3]).all()
    dx = backward(**inputs, **outs, dy=dy, dxo=dxo)["dx"]
    assert np.isnan(dx[3]).all() and np.isfinite(np.delete(dx, 3, 0)).all()


@pytest.mark.parametrize("case", ["chunks", "one image", "conditions in chunks"])
def test_same_bits_for_any_thread_count(case):
    inputs = make(OP, case)
    dy, dxo = upstream(inputs)
    results = []
    for threads in (1, 2):
        promoe.set_num_threads(threads)
        outs = forward(**inputs)
        results.append({**outs, **backward(**inputs, **outs, dy=dy, dxo=dxo)})
    for name, value in results[0].items():
        np.testing.assert_array_equal(value, results[1][name], err_msg=name)
