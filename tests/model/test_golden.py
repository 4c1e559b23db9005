"""The whole network against the public code's exact answers (tests/golden/README.md)."""

import numpy as np
import pytest

from tests.model.common import CASES, assert_gradients, golden, golden_model, relative


@pytest.mark.parametrize("name", CASES)
def test_forward(name):
    case = golden(name)
    out = golden_model(case).forward(case["x"], case["t"], case["y"])
    assert relative(out, case["out_eval"]) <= 2e-6


@pytest.mark.parametrize("name", CASES)
def test_loss_and_every_gradient(name):
    case = golden(name)
    r = golden_model(case).loss_and_grad(case["x"], case["t"], case["y"], case["target"])
    assert r.mse == pytest.approx(float(case["mse"]), rel=2e-6)
    assert r.aux == pytest.approx(float(case["aux"]), rel=2e-6, abs=1e-9)
    assert r.loss == r.mse + r.aux
    truth = {k[5:]: v.astype(np.float64) for k, v in case.items() if k.startswith("grad.")}
    assert set(truth) <= set(r.grads)
    assert_gradients(r.grads, truth, 2e-5)


@pytest.mark.parametrize("name", CASES)
def test_the_label_table_learns_only_the_rows_in_use(name):
    case = golden(name)
    grad = golden_model(case).loss_and_grad(case["x"], case["t"], case["y"], case["target"]) \
        .grads["y_embedder.embedding_table.weight"]
    used = np.unique(case["y"])
    assert np.flatnonzero(np.abs(grad).max(axis=1)).tolist() == used.tolist()
