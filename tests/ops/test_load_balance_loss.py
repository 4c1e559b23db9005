"""load_balance_loss: value, gradient, and the sets it is taken over."""

import numpy as np
import pytest

from promoe import ops

from .common import ULP, check_backward, check_finite_differences, make, oracle, run

OP = "load_balance_loss"


@pytest.mark.parametrize("case", oracle(OP).CASES)
def test_values_and_gradients(case):
    check_backward(OP, case)


@pytest.mark.parametrize("case", ["batch", "batch_tokens", "sequence", "sequence_images", "sequence_tokens"])
def test_oracle_finite_differences(case):
    check_finite_differences(OP, case, ["p"])


@pytest.mark.parametrize("per", ["batch", "sequence"])
@pytest.mark.parametrize("A", [1, 3])
def test_the_smallest_loss_is_the_weight(per, A):
    """Uniform use: weight. All on the same: weight * E / A times their probability, which is more."""
    B, T, E = 2, 12, 6
    p = np.full((B * T, E), 1 / E, np.float32)
    even = ((np.arange(B * T)[:, None] + np.arange(A)) % E).astype(np.int32)
    loss = ops.load_balance_loss_forward(p=p, choice=even, B=B, per=per, weight=0.5)
    np.testing.assert_allclose(loss["loss"], 0.5, rtol=4 * ULP)
    np.testing.assert_allclose(loss["frac"], 1, rtol=ULP)
    same = np.tile(np.arange(A, dtype=np.int32), (B * T, 1))
    p = np.zeros_like(p)
    p[:, :A] = 1 / A
    loss = ops.load_balance_loss_forward(p=p, choice=same, B=B, per=per, weight=0.5)["loss"]
    np.testing.assert_allclose(loss, 0.5 * E / A, rtol=4 * ULP)


@pytest.mark.parametrize("per", ["batch", "sequence"])
def test_no_routable_token(per):
    got = run(OP, f"{per}_all_forced")
    assert got["loss"] == 0 and not got["frac"].any() and not got["dp"].any()


@pytest.mark.parametrize("case", ["batch_tokens", "sequence_tokens", "sequence_images"])
def test_tokens_that_are_not_routable_are_not_read(case):
    inputs = make(OP, case)
    before = ops.load_balance_loss_forward(**inputs)
    away = inputs["part"] != -1
    inputs["p"][away] = np.nan
    inputs["choice"][away] = 0
    after = ops.load_balance_loss_forward(**inputs)
    for name, value in before.items():
        np.testing.assert_array_equal(after[name], value, err_msg=name)
    dp = ops.load_balance_loss_backward(**inputs, **after, dloss=np.ones(1, np.float32))["dp"]
    assert not dp[away].any() and np.isfinite(dp).all() and dp[~away].any()


def test_one_image_is_a_batch():
    inputs = make(OP, "batch_tokens") | {"B": 1}
    a = ops.load_balance_loss_forward(**inputs)
    b = ops.load_balance_loss_forward(**inputs | {"per": "sequence"})
    for name, value in a.items():
        np.testing.assert_array_equal(b[name], value, err_msg=name)


def test_tokens_in_another_order():
    """Over a batch the order of tokens does not matter but for rounding."""
    inputs = make(OP, "batch_tokens")
    order = np.random.default_rng(0).permutation(len(inputs["p"]))
    moved = inputs | {k: inputs[k][order] for k in ("p", "choice", "part")}
    a, b = ops.load_balance_loss_forward(**inputs), ops.load_balance_loss_forward(**moved)
    np.testing.assert_array_equal(a["frac"], b["frac"])
    np.testing.assert_allclose(a["loss"], b["loss"], rtol=2 * ULP)


def test_empty_slots_and_other_groups_choose_nobody():
    p = np.full((2, 4), 0.25, np.float32)
    choice = np.array([[1, -1], [7, -5]], np.int32)
    outs = ops.load_balance_loss_forward(p=p, choice=choice, B=1)
    assert outs["frac"].tolist() == [[0, 1, 0, 0]]


def test_nan_shows():
    inputs = make(OP, "batch")
    inputs["p"][3, 1] = np.nan
    assert np.isnan(ops.load_balance_loss_forward(**inputs)["loss"])


@pytest.mark.parametrize("per", ["batch", "sequence"])
def test_without_images(per):
    p, choice = np.ones((0, 3), np.float32), np.zeros((0, 2), np.int32)
    outs = ops.load_balance_loss_forward(p=p, choice=choice, B=0, T=4, per=per)
    assert outs["loss"] == 0 and outs["frac"].shape == (0, 3)
