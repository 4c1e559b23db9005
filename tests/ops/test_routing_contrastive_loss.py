"""routing_contrastive_loss: value, gradients, and what is no cluster."""

import math

import numpy as np
import pytest

from promoe import ops

from .common import (
    ULP,
    assert_close,
    cast,
    check_finite_differences,
    compare,
    floor_of,
    make,
    make_upstream,
    oracle,
    own_bounds,
    run,
)

OP = "routing_contrastive_loss"
CASES = oracle(OP).CASES


def gradients(inputs, outs, dloss=1.0):
    return ops.routing_contrastive_loss_backward(**inputs, **outs, dloss=np.full(1, dloss, np.float32))


@pytest.mark.parametrize("case", [case for case in CASES if case not in own_bounds(OP)])
def test_values_and_gradients(case):
    inputs = make(OP, case)
    floor = floor_of(OP, inputs)
    outs = ops.routing_contrastive_loss_forward(**inputs)
    compare(OP, outs, inputs, floor)
    upstream = make_upstream(OP, case, outs)
    got = ops.routing_contrastive_loss_backward(**inputs, **outs, **upstream)
    compare(OP, got, inputs, floor, which="backward", **upstream)


@pytest.mark.parametrize("case", ["two", "top1", "any_of_two", "any_of_three", "empty_clusters",
                                  "forced_first", "wide"])
def test_oracle_finite_differences(case):
    check_finite_differences(OP, case, ["x", "proto"], step=1e-6)


def test_one_dimension():
    """All cosines are 1 or -1, and no gradient is left but rounding."""
    inputs = make(OP, "width_1")
    outs = ops.routing_contrastive_loss_forward(**inputs)
    compare(OP, outs, inputs, floor_of(OP, inputs))
    grads = gradients(inputs, outs)
    bound = 8 * ULP / 0.1
    assert (np.abs(grads["dproto"] * inputs["proto"]) <= bound).all()
    members = inputs["choice"][:, 0]
    assert (np.abs(grads["dx"] * (outs["centroid"] * outs["count"][:, None])[members]) <= bound).all()


def test_zero_norms():
    """A mean of zero and a prototype of zero have cosine 0 to everything; their norm is the constant 1e-12."""
    inputs = make(OP, "zero_norms")
    outs = ops.routing_contrastive_loss_forward(**inputs)
    compare(OP, outs, inputs, floor_of(OP, inputs))
    np.testing.assert_allclose(outs["prob"][1, :3], 1 / 3, rtol=4 * ULP)
    got = gradients(inputs, outs)
    one = np.ones(1)
    truth = oracle(OP).backward(**cast(inputs, np.float64), dloss=one)
    naive = oracle(OP).backward(**inputs, dloss=one.astype(np.float32))
    huge = {"dx": [0, 1], "dproto": [1]}
    for name, rows in huge.items():
        for part in (lambda a, r=rows: a[r], lambda a, r=rows: np.delete(a, r, axis=0)):
            assert_close(name, part(got[name]), part(truth[name]), part(naive[name]), floor=2 / 0.1)
        assert np.abs(truth[name][rows]).max() > 1e9


def test_equal_logits_have_loss_ln_v():
    """V prototypes with the same cosine to each of V means: -log(1/V)."""
    for V in (2, 5, 12):
        x = np.eye(V, 16, dtype=np.float32)
        x[:, 15] = 1
        inputs = {"x": x, "proto": np.eye(1, 16, 15, dtype=np.float32).repeat(V, axis=0),
                  "choice": np.arange(V, dtype=np.int32)[:, None]}
        outs = ops.routing_contrastive_loss_forward(**inputs, weight=2.0)
        np.testing.assert_allclose(outs["loss"], 2 * math.log(V), rtol=4 * ULP)
        np.testing.assert_allclose(outs["prob"], 1 / V, rtol=4 * ULP)


def test_gradients_keep_their_digits_as_the_clusters_part():
    """prob_ii is 1 to the last bit or two; 1 - prob_ii, which the gradient is made of, is not lost."""
    inputs = make(OP, "wide") | {"temperature": 0.06}
    centre = 10 * inputs["proto"] / np.linalg.norm(inputs["proto"], axis=1, keepdims=True)
    inputs["x"] = (centre[inputs["choice"][:, 0]] + 0.01 * inputs["x"]).astype(np.float32)
    outs = ops.routing_contrastive_loss_forward(**inputs)
    assert (1 - np.diag(outs["prob"]) < 2e-6).all()
    got = gradients(inputs, outs)
    truth = oracle(OP).backward(**cast(inputs, np.float64), dloss=np.ones(1))
    for name in ("dx", "dproto"):  # a relative error of a logit's rounding; naively, it is a few percent
        bound = 16 / 0.06 * ULP * np.abs(truth[name]).max()
        assert np.abs(got[name] - truth[name]).max() <= bound, name


@pytest.mark.parametrize("case", ["one_cluster", "all_on_one", "all_forced", "no_token"])
def test_fewer_than_two_clusters(case):
    inputs, got = make(OP, case), run(OP, case)
    assert got["loss"] == 0 and not got["prob"].any()
    assert not got["dx"].any() and not got["dproto"].any()
    np.testing.assert_array_equal(got["count"], oracle(OP).forward(**inputs)["count"])


def test_fewer_than_two_clusters_have_no_gradient_whatever_they_hold():
    inputs = make(OP, "all_on_one")
    inputs["x"][4] = np.nan
    outs = ops.routing_contrastive_loss_forward(**inputs)
    got = gradients(inputs, outs)
    assert outs["loss"] == 0 and not outs["prob"].any()
    assert not got["dx"].any() and not got["dproto"].any()


def test_an_empty_cluster_is_left_alone():
    """No push, no pull: as if its prototype were not there."""
    inputs = make(OP, "empty_clusters")
    outs = ops.routing_contrastive_loss_forward(**inputs)
    got = gradients(inputs, outs)
    there = np.flatnonzero(outs["count"])
    gone = np.flatnonzero(outs["count"] == 0)
    assert len(there) == 3 and not got["dproto"][gone].any()
    assert not outs["prob"][gone].any() and not outs["prob"][:, gone].any() and not outs["centroid"][gone].any()
    few = {"x": inputs["x"], "proto": inputs["proto"][there],
           "choice": np.searchsorted(there, inputs["choice"]).astype(np.int32)}
    few_outs = ops.routing_contrastive_loss_forward(**few)
    np.testing.assert_allclose(few_outs["loss"], outs["loss"], rtol=ULP)
    np.testing.assert_array_equal(few_outs["prob"], outs["prob"][np.ix_(there, there)])
    few_got = gradients(few, few_outs)
    np.testing.assert_array_equal(few_got["dx"], got["dx"])
    np.testing.assert_array_equal(few_got["dproto"], got["dproto"][there])


def test_top1_looks_at_the_first_slot_only():
    inputs = make(OP, "first_of_two")
    other = inputs | {"choice": inputs["choice"].copy()}
    other["choice"][:, 1] = -1
    np.testing.assert_array_equal(ops.routing_contrastive_loss_forward(**inputs)["loss"],
                                  ops.routing_contrastive_loss_forward(**other)["loss"])


def test_topk_with_one_slot_is_top1():
    inputs = make(OP, "top1")
    a, b = (ops.routing_contrastive_loss_forward(**inputs, assign=assign) for assign in ("top1", "topk"))
    for name, value in a.items():
        np.testing.assert_array_equal(b[name], value, err_msg=name)


def test_a_token_counts_once_per_cluster():
    inputs = make(OP, "any_of_two")
    inputs["choice"] = inputs["choice"][:, :1].repeat(2, axis=1)
    single = inputs | {"assign": "top1"}
    a, b = ops.routing_contrastive_loss_forward(**inputs), ops.routing_contrastive_loss_forward(**single)
    for name, value in a.items():
        np.testing.assert_array_equal(b[name], value, err_msg=name)
    np.testing.assert_array_equal(gradients(inputs, a)["dx"], gradients(single, b)["dx"])


def test_tokens_without_a_cluster_are_not_read():
    inputs = make(OP, "forced_first")
    outs = ops.routing_contrastive_loss_forward(**inputs)
    away = ((inputs["choice"] < 0) | (inputs["choice"] >= 5)).all(axis=1)
    assert away.any() and not away.all()
    grads = gradients(inputs, outs)
    assert not grads["dx"][away].any() and grads["dx"][~away].all()
    inputs["x"][away] = np.nan
    np.testing.assert_array_equal(ops.routing_contrastive_loss_forward(**inputs)["loss"], outs["loss"])


def test_nan_shows():
    inputs = make(OP, "top1")
    routed = np.flatnonzero(inputs["choice"][:, 0] < 12)
    inputs["x"][routed[0], 0] = np.nan
    assert np.isnan(ops.routing_contrastive_loss_forward(**inputs)["loss"])


def test_tokens_in_another_order():
    """Sums over tokens change by rounding, a token's gradient with them; nothing else."""
    inputs = make(OP, "any_of_two")
    order = np.random.default_rng(0).permutation(len(inputs["x"]))
    moved = inputs | {"x": inputs["x"][order], "choice": inputs["choice"][order]}
    a, b = ops.routing_contrastive_loss_forward(**inputs), ops.routing_contrastive_loss_forward(**moved)
    np.testing.assert_array_equal(a["count"], b["count"])
    np.testing.assert_allclose(b["loss"], a["loss"], rtol=32 * ULP)
    da, db = gradients(inputs, a), gradients(moved, b)
    np.testing.assert_allclose(db["dx"], da["dx"][order], rtol=0, atol=64 * ULP * np.abs(da["dx"]).max())


def test_a_step_against_the_gradient_brings_prototypes_to_their_tokens():
    inputs = make(OP, "top1")
    outs = ops.routing_contrastive_loss_forward(**inputs)
    grads = gradients(inputs, outs)
    own = (grads["dproto"] * outs["centroid"]).sum(axis=1)
    assert (own[outs["count"] > 0] < 0).all()
    step = np.float32(1e-5)
    moved = inputs | {"x": inputs["x"] - step * grads["dx"], "proto": inputs["proto"] - step * grads["dproto"]}
    assert ops.routing_contrastive_loss_forward(**moved)["loss"] < outs["loss"]


@pytest.mark.parametrize("temperature", [0.0, -1.0, math.nan])
def test_temperature_is_positive(temperature):
    with pytest.raises(ValueError, match="temperature"):
        ops.routing_contrastive_loss_forward(**make(OP, "two"), temperature=temperature)
