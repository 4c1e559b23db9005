"""router_gate: identity, sigmoid and softmax scores."""

import numpy as np
import pytest

from promoe import ops

from .common import ULP, check_backward, check_finite_differences, make, oracle

OP = "router_gate"
GATES = ("identity", "sigmoid", "softmax")


@pytest.mark.parametrize("case", oracle(OP).CASES)
def test_values_and_gradients(case):
    check_backward(OP, case)


@pytest.mark.parametrize("gate", GATES)
def test_oracle_finite_differences(gate):
    check_finite_differences(OP, gate, ["z"])


@pytest.mark.parametrize("E", range(1, 34))
def test_widths(E):
    z = np.random.default_rng(E).standard_normal((5, E)).astype(np.float32)
    for gate in GATES:
        s = ops.router_gate_forward(z=z, gate=gate)["s"]
        np.testing.assert_allclose(s, oracle(OP).forward(z.astype(np.float64), gate=gate)["s"], rtol=8 * ULP)


def test_softmax_of_equal_logits_is_uniform():
    s = ops.router_gate_forward(z=np.full((2, 12), 0.3, np.float32), gate="softmax")["s"]
    np.testing.assert_allclose(s, 1 / 12, rtol=4 * ULP)


def test_softmax_is_a_distribution_that_no_shift_changes():
    z = make(OP, "softmax_large")["z"]
    s = ops.router_gate_forward(z=z, gate="softmax")["s"]
    np.testing.assert_allclose(s.sum(axis=1, dtype=np.float64), 1, rtol=8 * ULP)
    shifted = ops.router_gate_forward(z=z + np.float32(64), gate="softmax")["s"]
    np.testing.assert_allclose(shifted, s, atol=64 * ULP)


def test_far_out():
    z = np.array([[-1e30, -200, -90, 0, 90, 200, 1e30]], np.float32)
    np.testing.assert_allclose(ops.router_gate_forward(z=z, gate="sigmoid")["s"],
                               [[0, 0, 0, 0.5, 1, 1, 1]], atol=1e-37)
    np.testing.assert_allclose(ops.router_gate_forward(z=z, gate="softmax")["s"],
                               [[0, 0, 0, 0, 0, 0, 1]], atol=1e-37)


@pytest.mark.parametrize("gate", GATES)
def test_nan_stays_in_its_row(gate):
    inputs = make(OP, f"{gate}_mixed")
    routable = np.flatnonzero(inputs["part"] == -1)
    inputs["z"][routable[3], 2] = np.nan
    inputs["z"][inputs["part"] != -1] = np.nan  # not routable: not read
    s = ops.router_gate_forward(**inputs)["s"]
    nan = np.isnan(s)
    assert nan[routable[3]].sum() == (7 if gate == "softmax" else 1)
    assert not np.delete(nan, routable[3], axis=0).any()
    ds = np.where((inputs["part"] == -1)[:, None], np.float32(1), np.float32(np.nan)).repeat(7, axis=1)
    dz = ops.router_gate_backward(**inputs, s=s, ds=ds)["dz"]
    assert np.isfinite(np.delete(dz, routable[3], axis=0)).all()
    assert not dz[inputs["part"] != -1].any()


def test_all_gates_rank_alike():
    z = make(OP, "identity_large")["z"] / np.float32(10)
    order = [np.argsort(-ops.router_gate_forward(z=z, gate=gate)["s"], axis=1, kind="stable")[:, 0]
             for gate in GATES]
    np.testing.assert_array_equal(order[0], order[1])
    np.testing.assert_array_equal(order[0], order[2])
