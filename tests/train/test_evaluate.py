"""Figures of merit, on cases whose answer is known."""

import sys

import numpy as np
import pytest

from promoe import Model, evaluate, preset
from promoe.data import load_digits
from promoe.model import Routing


def test_frechet_distance_of_known_gaussians():
    rng = np.random.default_rng(0)
    a = rng.standard_normal((400, 5))
    assert evaluate.frechet_distance(a, a) == pytest.approx(0, abs=1e-9)
    # a shift adds its square; a scaling s adds (s - 1)^2 trace(C)
    assert evaluate.frechet_distance(a, a + 2) == pytest.approx(20)
    spread = np.trace(np.cov(a, rowvar=False))
    assert evaluate.frechet_distance(a - a.mean(0), 3 * (a - a.mean(0))) == pytest.approx(4 * spread)


def test_frechet_distance_against_the_general_square_root():
    rng = np.random.default_rng(1)
    a = rng.standard_normal((60, 4)) @ rng.standard_normal((4, 4))
    b = rng.standard_normal((50, 4)) @ rng.standard_normal((4, 4)) + 1
    values = np.linalg.eigvals(np.cov(a, rowvar=False) @ np.cov(b, rowvar=False))
    truth = (np.square(a.mean(0) - b.mean(0)).sum() + np.trace(np.cov(a, rowvar=False))
             + np.trace(np.cov(b, rowvar=False)) - 2 * np.sqrt(values.real.clip(0)).sum())
    assert evaluate.frechet_distance(a, b) == pytest.approx(truth, rel=1e-9)
    assert evaluate.frechet_distance(a, b) == pytest.approx(evaluate.frechet_distance(b, a), rel=1e-9)


def test_frechet_distance_of_degenerate_features():
    x, _ = load_digits()  # pixels that are never inked: a singular covariance
    held, _ = load_digits("heldout")
    assert 0 < evaluate.frechet_distance(x, held) < 1
    assert evaluate.frechet_distance(x[:2], x[:2]) == pytest.approx(0, abs=1e-6)
    assert evaluate.frechet_distance([[1.0], [3.0]], [[2.0], [2.0]]) == pytest.approx(2)


@pytest.mark.parametrize("a, b, message", [
    (np.zeros((1, 2)), np.zeros((3, 2)), "at least 2"), (np.zeros(3), np.zeros((3, 2)), "shape"),
    (np.zeros((3, 2)), np.zeros((3, 4)), "2 features and b 4"),
    (np.full((3, 2), np.nan), np.zeros((3, 2)), "not finite")])
def test_bad_features(a, b, message):
    with pytest.raises(ValueError, match=message):
        evaluate.frechet_distance(a, b)


def test_nearest_distances():
    rng = np.random.default_rng(2)
    a, b = rng.standard_normal((1500, 6)), rng.standard_normal((70, 6))
    truth = np.sqrt(((a[:, None] - b) ** 2).sum(-1)).min(1)
    assert np.allclose(evaluate.nearest_distances(a, b), truth, rtol=1e-9)
    assert np.array_equal(evaluate.nearest_distances(b, b), np.zeros(70))


def test_digit_classifier():
    pytest.importorskip("sklearn")
    classifier, accuracy = evaluate.digit_classifier()
    assert accuracy > 0.98
    x, y = load_digits()
    assert (evaluate.classify(classifier, x) == y).mean() > 0.99
    assert evaluate.classify(classifier, 3 * x[:5]).dtype == np.int64


def test_missing_scikit_learn_is_named(monkeypatch):
    monkeypatch.setitem(sys.modules, "sklearn.svm", None)
    with pytest.raises(ImportError, match=r"promoe\[demo\]"):
        evaluate.digit_classifier()


def test_score_of_real_digits():
    pytest.importorskip("sklearn")
    heldout, y = load_digits("heldout")
    score = evaluate.score_digits(heldout, y)
    assert score["samples"] == 296
    assert score["recognised"] == score["classifier_accuracy"] > 0.98
    assert score["frechet_samples"] < 1e-9 and 0.1 < score["frechet_train"]
    assert score["nearest_train"] == score["nearest_heldout"] > 1
    assert evaluate.score_digits(heldout, (y + 1) % 10)["recognised"] < 0.02


def test_score_of_a_memoriser():
    pytest.importorskip("sklearn")
    score = evaluate.score_digits(*load_digits("train"))
    assert score["nearest_train"] == 0 < score["nearest_heldout"]
    assert score["frechet_samples"] == pytest.approx(score["frechet_train"])  # all of them


def test_score_of_noise():
    """A classifier that is asked for nothing but a class gets one in ten right by chance."""
    pytest.importorskip("sklearn")
    rng = np.random.default_rng(0)
    score = evaluate.score_digits(rng.standard_normal((500, 1, 8, 8)), np.arange(500) % 10)
    assert 0.05 < score["recognised"] < 0.15
    assert score["frechet_samples"] > 10 * score["frechet_train"]
    assert score["nearest_train"] > 2 * score["nearest_heldout"]


# ---------------------------------------------------------------- experts


def layer(*load):
    return Routing(1, np.zeros((1, sum(load), 1), np.int32), None, np.array(load, np.int32))


def test_load_balance():
    config = preset("ProMoE-digits").replace(num_routed_experts=4)
    balance = lambda *load: evaluate.load_balance([layer(*load)], config)["block 1"]
    assert balance(5, 5, 5, 5, 9) == {"largest_over_mean": 1, "effective_experts": pytest.approx(4)}
    assert balance(8, 0, 0, 0, 3) == {"largest_over_mean": 4, "effective_experts": 1}
    assert balance(6, 6, 0, 0, 0)["effective_experts"] == pytest.approx(2)
    assert balance(0, 0, 0, 0, 7) == {"largest_over_mean": 0, "effective_experts": 0}


@pytest.mark.parametrize("uncond, shared", [(True, True), (False, True), (True, False)])
def test_load_of_a_model(uncond, shared):
    config = preset("ProMoE-digits").replace(hidden_size=16, num_heads=2, use_uncond_expert=uncond,
                                             use_shared_expert=shared)
    x, y = load_digits("heldout")
    y = np.where(np.arange(len(y)) % 4 == 0, config.null_label, y)
    load = evaluate.expert_load(Model(config).routing(x, 500.0, y), config)
    assert list(load) == ["block 1", "block 3"]
    for counts in load.values():
        assert len(counts) == 6 + uncond + shared
        assert counts.pop("shared", 296 * 16) == sum(counts.values()) == 296 * 16
        assert counts.get("unconditional", 74 * 16) == 74 * 16
