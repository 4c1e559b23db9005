"""token_choice: top-A, exactly."""

import numpy as np
import pytest

from promoe import ops

from .common import check_finite_differences, make, make_upstream, oracle, run

OP = "token_choice"


@pytest.mark.parametrize("case", oracle(OP).CASES)
def test_values_and_gradients(case):
    """Nothing is computed, so everything is exact, and NaN and infinity are values like any other."""
    inputs, got = make(OP, case), run(OP, case)
    truth = oracle(OP).forward(**inputs)
    truth |= oracle(OP).backward(**inputs, **make_upstream(OP, case, truth))
    for name, value in truth.items():
        np.testing.assert_array_equal(got[name], value, err_msg=name)


def test_oracle_finite_differences():
    check_finite_differences(OP, "top2", ["s"], step=1e-7)


@pytest.mark.parametrize("E", [1, 2, 12, 33])
def test_ties_go_to_the_lowest_index(E):
    s = np.full((3, E), 0.25, np.float32)
    for A in {1, min(2, E), E}:
        choice = ops.token_choice_forward(s=s, A=A)["choice"]
        np.testing.assert_array_equal(choice, np.tile(np.arange(A), (3, 1)))


@pytest.mark.parametrize("E", [1, 5])
def test_a_choice_among_nan_is_valid_and_distinct(E):
    s = np.full((2, E), np.nan, np.float32)
    s[1, -1] = -1e30
    outs = ops.token_choice_forward(s=s, A=E)
    np.testing.assert_array_equal(np.sort(outs["choice"], axis=1), np.tile(np.arange(E), (2, 1)))
    assert outs["choice"][0, 0] == 0 and outs["choice"][1, 0] == E - 1


def test_forced_and_absent_tokens():
    s = np.full((3, 4), np.nan, np.float32)
    s[2] = [1, 2, 3, 4]
    outs = ops.token_choice_forward(s=s, A=2, part=np.array([5, -2, -1], np.int32))
    assert outs["choice"].tolist() == [[5, -1], [-1, -1], [3, 2]]
    assert outs["weight"].tolist() == [[1, 0], [0, 0], [4, 3]]


def test_tokens_in_another_order():
    inputs = make(OP, "top3")
    order = np.random.default_rng(0).permutation(len(inputs["s"]))
    moved = inputs | {"s": inputs["s"][order], "part": inputs["part"][order]}
    a, b = ops.token_choice_forward(**inputs), ops.token_choice_forward(**moved)
    for name, value in a.items():
        np.testing.assert_array_equal(b[name], value[order], err_msg=name)


@pytest.mark.parametrize("A", [0, 5])
def test_more_experts_than_there_are(A):
    with pytest.raises(ValueError, match="A is .*expected 1 to E = 4"):
        ops.token_choice_forward(s=np.ones((2, 4), np.float32), A=A)


@pytest.mark.parametrize("wrong", [-1, 4, 2**31 - 1])
def test_backward_checks_the_choice(wrong):
    s = np.ones((3, 4), np.float32)
    outs = ops.token_choice_forward(s=s, A=2)
    outs["choice"][2, 1] = wrong
    with pytest.raises(ValueError, match=f"token 2, slot 1 is {wrong}|slot 5 is not in 0"):
        ops.token_choice_backward(s=s, **outs, dweight=outs["weight"])
