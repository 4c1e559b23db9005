import numpy as np
import pytest

import promoe
from promoe import ops
from tests.oracle import timestep_embedding as oracle

from .common import make


@pytest.mark.parametrize("case", oracle.CASES)
def test_matches_oracle(case):
    inputs = make("timestep_embedding", case)
    e = ops.timestep_embedding_forward(**inputs)["e"]
    truth = oracle.forward(**{**inputs, "t": inputs["t"].astype(np.float64)})["e"]
    # rounded once: half an ulp, and what two libraries' cos(double) may differ by
    np.testing.assert_allclose(e, truth, rtol=2.0**-24 + 1e-9, atol=1e-12)


def test_cosines_come_first():
    e = ops.timestep_embedding_forward(t=np.zeros(1, np.float32), F=6)["e"]
    np.testing.assert_array_equal(e, [[1, 1, 1, 0, 0, 0]])


def test_odd_width_is_refused():
    with pytest.raises(ValueError, match="F must be even, not 7"):
        ops.timestep_embedding_forward(t=np.zeros(1, np.float32), F=7)


def test_nan_stays_in_its_row():
    e = ops.timestep_embedding_forward(t=np.array([1, np.nan], np.float32), F=8)["e"]
    assert np.isfinite(e[0]).all() and np.isnan(e[1]).all()


def test_same_bits_for_any_thread_count():
    inputs = make("timestep_embedding", "many")
    results = []
    for threads in (1, 2):
        promoe.set_num_threads(threads)
        results.append(ops.timestep_embedding_forward(**inputs)["e"])
    np.testing.assert_array_equal(*results)
