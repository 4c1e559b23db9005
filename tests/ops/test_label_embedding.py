import numpy as np
import pytest

import promoe
from promoe import ops
from tests.oracle import label_embedding as oracle

from .common import check_backward, check_finite_differences, make


@pytest.mark.parametrize("case", oracle.CASES)
def test_matches_oracle(case):
    check_backward("label_embedding", case)


def test_finite_differences():
    check_finite_differences("label_embedding", "batch", ["table", "add"])


@pytest.mark.parametrize("wrong", [-1, 11, 2**40])
def test_label_out_of_range(wrong):
    inputs = make("label_embedding", "batch")
    inputs["y"][3] = wrong
    c = np.full((8, 33), 7, np.float32)
    with pytest.raises(ValueError, match=rf"y\[3\] is ({wrong}, expected 0\.\.10|not in)"):
        ops.label_embedding_forward(**inputs, c=c)
    assert (c == 7).all()


def test_gradient_of_the_table_accumulates():
    inputs = make("label_embedding", "batch")
    dc = inputs["add"]
    c = ops.label_embedding_forward(**inputs)["c"]
    fresh = ops.label_embedding_backward(**inputs, c=c, dc=dc)["dtable"]
    given = np.full_like(fresh, 2)
    ops.label_embedding_backward(**inputs, c=c, dc=dc, dtable=given)
    np.testing.assert_allclose(given, 2 + fresh, rtol=1e-6, atol=1e-6)


def test_same_bits_for_any_thread_count():
    inputs = make("label_embedding", "wide")
    results = []
    for threads in (1, 2):
        promoe.set_num_threads(threads)
        c = ops.label_embedding_forward(**inputs)["c"]
        results.append((c, ops.label_embedding_backward(**inputs, c=c, dc=c)["dtable"]))
    for one, two in zip(*results):
        np.testing.assert_array_equal(one, two)
