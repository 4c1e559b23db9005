import numpy as np
import pytest

import promoe
from promoe import ops
from tests.oracle import adamw as oracle

from .common import assert_close, cast, compare, make


def copy(inputs):
    return {k: v.copy() for k, v in inputs.items()}


@pytest.mark.parametrize("case", oracle.CASES)
def test_matches_oracle(case):
    inputs = make("adamw", case)
    compare("adamw", ops.adamw_forward(**copy(inputs)), inputs)


def test_updates_in_place():
    inputs = make("adamw", "odd")
    mine = copy(inputs)
    out = ops.adamw_forward(**mine)
    for name in ("grad", "param", "m", "v", "avg"):
        assert out[name] is mine[name] and not np.array_equal(mine[name], inputs[name])
    assert not mine["grad"].any()


def test_five_clipped_updates():
    """Clip, AdamW with decay and EMA, five times, beside float64: what a training run does."""
    M, rng = 5000, np.random.default_rng(5)
    start = {"param": rng.standard_normal(M), "m": np.zeros(M), "v": np.zeros(M)}
    start["avg"] = start["param"].copy()
    ours, truth, naive = ({k: v.astype(t) for k, v in start.items()} for t in (np.float32, np.float64, np.float32))
    truth = {k: v.astype(np.float64) for k, v in ours.items()}
    for step in range(1, 6):
        grad = (10.0 ** rng.uniform(-6, 0, M) * rng.standard_normal(M)).astype(np.float32)
        norm = ops.grad_norm_forward(g=grad)["norm"]
        hyper = oracle.hyper(lr=1e-2, weight_decay=0.1, clip=0.5, ema=0.9, step=step)
        assert norm[0] > 0.5
        truth = oracle.forward(hyper, norm, grad=grad.astype(np.float64), **without_grad(truth))
        naive = oracle.forward(hyper, norm, grad=grad, **without_grad(naive))
        ours = ops.adamw_forward(hyper=hyper, norm=norm, grad=grad, **without_grad(ours))
    for name in ("param", "m", "v", "avg"):
        assert naive[name].dtype == np.float32
        assert_close(name, ours[name], truth[name], naive[name])


def without_grad(state):
    return {k: v for k, v in state.items() if k != "grad"}


def test_first_update_has_the_size_of_lr():
    """At step 1 the bias corrections cancel: p - lr sign(g), but for eps, whatever the betas."""
    grad = np.array([1e-3, -5, 7e4], np.float32)
    out = ops.adamw_forward(hyper=oracle.hyper(lr=0.5, beta1=0.8, beta2=0.99), norm=np.ones(1), grad=grad,
                            param=np.zeros(3, np.float32), m=np.zeros(3, np.float32), v=np.zeros(3, np.float32))
    np.testing.assert_allclose(out["param"], [-0.5, 0.5, -0.5], rtol=2e-5)


def test_average_of_constant_weights():
    """With lr 0 the weights stand still, and avg_k = p + ema^k (avg_0 - p)."""
    M, ema, k = 100, 0.9, 50
    state = make("adamw", "clipped")
    state = {name: state[name][:M].copy() for name in ("param", "m", "v", "avg")}
    p, avg = state["param"].astype(np.float64), state["avg"].astype(np.float64)
    for step in range(1, k + 1):
        ops.adamw_forward(hyper=oracle.hyper(lr=0.0, ema=ema, step=step), norm=np.ones(1),
                          grad=np.ones(M, np.float32), **state)
    np.testing.assert_array_equal(state["param"], p.astype(np.float32))
    # an update rounds twice, half an ulp of what is near 1 each, and forgets a tenth of what was
    np.testing.assert_allclose(state["avg"], p + ema**k * (avg - p), rtol=0,
                               atol=10 * np.finfo(np.float32).eps * np.abs(p).max())


def test_average_of_equal_weights_stays_exact():
    state = make("adamw", "odd")
    state["avg"] = state["param"].copy()
    out = ops.adamw_forward(**{**state, "hyper": oracle.hyper(lr=0.0)})
    np.testing.assert_array_equal(out["avg"], out["param"])


@pytest.mark.parametrize("bad", [np.nan, np.inf])
def test_norm_that_is_not_finite_skips_the_update(bad):
    inputs = make("adamw", "clipped")
    inputs["norm"][0] = bad
    inputs["grad"][3] = bad
    mine = copy(inputs)
    out = ops.adamw_forward(**mine)
    for name in ("param", "m", "v", "avg"):
        np.testing.assert_array_equal(out[name], inputs[name])
    assert not mine["grad"].any()


def test_zero_gradient_moves_nothing_at_first():
    zero = np.zeros(9, np.float32)
    out = ops.adamw_forward(hyper=oracle.hyper(), norm=np.zeros(1), grad=zero.copy(), param=zero + 2, m=zero.copy(),
                            v=zero.copy())
    np.testing.assert_array_equal(out["param"], zero + 2)
    assert "avg" not in out


@pytest.mark.parametrize("changes, message", [
    ({"step": 0}, "step 0"), ({"step": np.nan}, "step"), ({"beta1": 1.0}, "beta"), ({"beta2": -0.1}, "beta"),
    ({"lr": np.inf}, "lr"), ({"weight_decay": np.nan}, "weight_decay"), ({"eps": -1e-8}, "eps"),
    ({"clip": -1}, "clip"), ({"clip": np.nan}, "clip"), ({"ema": 1.1}, "ema"),
])
def test_wrong_hyper_parameters_change_nothing(changes, message):
    inputs = make("adamw", "odd")
    mine = {**copy(inputs), "hyper": oracle.hyper(**changes)}
    at = oracle.NAMES.index(*changes)  # what a GPU says of it
    with pytest.raises(ValueError, match=rf"{message}|hyper\[{at}\]"):
        ops.adamw_forward(**mine)
    for name in ("grad", "param", "m", "v", "avg"):
        np.testing.assert_array_equal(mine[name], inputs[name])


def test_place_in_the_array_does_not_matter():
    """A tail is computed as what is before it, so slabs may be cut anywhere."""
    inputs = make("adamw", "clipped")
    whole = ops.adamw_forward(**copy(inputs))
    part = {k: (v if k in ("hyper", "norm") else v[7:38].copy()) for k, v in inputs.items()}
    for name, value in ops.adamw_forward(**part).items():
        np.testing.assert_array_equal(value, whole[name][7:38], err_msg=name)


def test_same_bits_for_any_thread_count():
    inputs, results = make("adamw", "blocks"), []
    for threads in (1, 2):
        promoe.set_num_threads(threads)
        results.append(ops.adamw_forward(**copy(inputs)))
    for name in results[0]:
        np.testing.assert_array_equal(results[0][name], results[1][name], err_msg=name)


def test_oracle_in_float64_keeps_it():
    out = oracle.forward(**cast(make("adamw", "odd"), np.float64))
    assert all(value.dtype == np.float64 for value in out.values())
