"""conditional_routing: which tokens are forced to the unconditional expert."""

import numpy as np
import pytest

from promoe import ops

from .common import check_forward, oracle

CASES = oracle("conditional_routing").CASES


@pytest.mark.parametrize("case", CASES)
def test_values(case):
    check_forward("conditional_routing", case)


def test_every_token_is_routable_by_default():
    part = ops.conditional_routing_forward(y=np.array([1000, 3]), T=3)["part"]
    assert part.tolist() == [-1] * 6


def test_the_null_label_is_not_a_constant():
    """A data set of 10 classes has null label 10, and 1000 is nothing special to it."""
    part = ops.conditional_routing_forward(y=np.array([10, 1000]), T=1, null_label=10, group=4)["part"]
    assert part.tolist() == [4, -1]


@pytest.mark.parametrize("group", [-2, 2**31])
def test_group_out_of_range(group):
    with pytest.raises(ValueError, match="group"):
        ops.conditional_routing_forward(y=np.array([3]), T=1, group=group)
