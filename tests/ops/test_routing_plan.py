"""routing_plan: the counting sort that every router ends in."""

import numpy as np
import pytest

from promoe import ops

from .common import check_backward, check_finite_differences, make, oracle

OP = "routing_plan"


@pytest.mark.parametrize("case", oracle(OP).CASES)
def test_values_and_gradients(case):
    check_backward(OP, case)


@pytest.mark.parametrize("case", ["top1", "duplicates", "empty_slots"])
def test_oracle_finite_differences(case):
    check_finite_differences(OP, case, ["weight"])


@pytest.mark.parametrize("case", oracle(OP).CASES)
def test_the_two_orders_are_one_plan(case):
    """Every row is in exactly one token's list and in one group; its weight is that of its slots."""
    inputs = make(OP, case)
    p = ops.routing_plan_forward(**inputs)
    N, used = len(inputs["choice"]), p["row_off"][-1]
    assert p["row_off"][0] == p["tok_off"][0] == 0 and p["tok_off"][-1] == used
    assert sorted(p["tok_row"][:used]) == list(range(used))
    for n in range(N):
        rows = p["tok_row"][p["tok_off"][n]:p["tok_off"][n + 1]]
        assert (p["row_token"][rows] == n).all()
        groups = np.searchsorted(p["row_off"], rows, side="right") - 1
        wanted = list(dict.fromkeys(g for g in inputs["choice"][n] if g >= 0))  # in the order of slots
        assert groups.tolist() == wanted
        for r, g in zip(rows, groups):
            assert np.isclose(p["row_weight"][r], inputs["weight"][n][inputs["choice"][n] == g].sum(), rtol=1e-5)
    for g in range(inputs["G"]):
        assert (np.diff(p["row_token"][p["row_off"][g]:p["row_off"][g + 1]]) > 0).all()
    assert (p["row_token"][used:] == -1).all() and (p["tok_row"][used:] == -1).all()
    assert not p["row_weight"][used:].any()


def test_duplicates_are_one_row():
    choice = np.array([[2, 2, 0], [-1, 2, -1]], np.int32)
    weight = np.array([[0.5, 0.25, 1], [9, 3, 9]], np.float32)
    p = ops.routing_plan_forward(choice=choice, weight=weight, G=3)
    assert p["row_off"].tolist() == [0, 1, 1, 3]
    assert p["row_token"].tolist() == [0, 0, 1, -1, -1, -1]
    assert p["row_weight"].tolist() == [1, 0.75, 3, 0, 0, 0]
    assert p["tok_off"].tolist() == [0, 2, 3]
    assert p["tok_row"].tolist() == [1, 0, 2, -1, -1, -1]
    assert p["choice_row"].tolist() == [[1, 1, 0], [-1, 2, -1]]
    drow = np.arange(1, 7, dtype=np.float32)
    dweight = ops.routing_plan_backward(choice=choice, weight=weight, G=3, **p, drow_weight=drow)["dweight"]
    assert dweight.tolist() == [[2, 2, 1], [0, 3, 0]]


@pytest.mark.parametrize("wrong", [-2, 4, 2**31 - 1, -2**31])
def test_a_choice_out_of_range_names_its_token(wrong):
    choice = np.zeros((5, 2), np.int32)
    choice[3, 1] = wrong
    with pytest.raises(ValueError, match=f"token 3, slot 1 is {wrong}, expected -1 to 3|choice of slot 7 is not in"):
        ops.routing_plan_forward(choice=choice, weight=np.ones((5, 2), np.float32), G=4)


@pytest.mark.parametrize("wrong", [-2, 10, 2**31 - 1])
def test_backward_checks_the_rows(wrong):
    inputs = dict(choice=np.zeros((5, 2), np.int32), weight=np.ones((5, 2), np.float32), G=4)
    plan = ops.routing_plan_forward(**inputs)
    plan["choice_row"][3, 1] = wrong
    with pytest.raises(ValueError, match=f"token 3, slot 1 is {wrong}, expected -1 to 9|choice_row of slot 7 is no row"):
        ops.routing_plan_backward(**inputs, **plan, drow_weight=np.ones(10, np.float32))


def test_random_plans():
    rng = np.random.default_rng(0)
    for _ in range(100):
        N, A, G = rng.integers(1, 20), rng.integers(1, 6), rng.integers(1, 9)
        inputs = {"choice": rng.integers(-1, G, (N, A)).astype(np.int32), "G": int(G),
                  "weight": rng.standard_normal((N, A)).astype(np.float32)}
        p, expected = ops.routing_plan_forward(**inputs), oracle(OP).forward(**inputs)
        for name, value in expected.items():
            np.testing.assert_array_equal(p[name], value, err_msg=name)
