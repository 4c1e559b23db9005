"""Figures of merit and pictures."""

import sys

import numpy as np
import pytest

import promoe
from promoe import report


def test_frechet_distance_of_known_gaussians():
    rng = np.random.default_rng(0)
    a = rng.standard_normal((400, 5))
    assert report.frechet_distance(a, a) == pytest.approx(0, abs=1e-9)
    # a shift adds its square; a scaling s adds (s - 1)^2 trace(C)
    assert report.frechet_distance(a, a + 2) == pytest.approx(20)
    spread = np.trace(np.cov(a, rowvar=False))
    assert report.frechet_distance(a - a.mean(0), 3 * (a - a.mean(0))) == pytest.approx(4 * spread)


def test_frechet_distance_against_the_general_square_root():
    rng = np.random.default_rng(1)
    a = rng.standard_normal((60, 4)) @ rng.standard_normal((4, 4))
    b = rng.standard_normal((50, 4)) @ rng.standard_normal((4, 4)) + 1
    values = np.linalg.eigvals(np.cov(a, rowvar=False) @ np.cov(b, rowvar=False))
    truth = (np.square(a.mean(0) - b.mean(0)).sum() + np.trace(np.cov(a, rowvar=False))
             + np.trace(np.cov(b, rowvar=False)) - 2 * np.sqrt(values.real.clip(0)).sum())
    assert report.frechet_distance(a, b) == pytest.approx(truth, rel=1e-9)
    assert report.frechet_distance(a, b) == pytest.approx(report.frechet_distance(b, a), rel=1e-9)


def test_frechet_distance_of_degenerate_features():
    x, _ = promoe.load_digits()  # pixels that are never inked: a singular covariance
    held, _ = promoe.load_digits("heldout")
    assert 0 < report.frechet_distance(x, held) < 1
    assert report.frechet_distance(x[:2], x[:2]) == pytest.approx(0, abs=1e-6)
    assert report.frechet_distance([[1.0], [3.0]], [[2.0], [2.0]]) == pytest.approx(2)


@pytest.mark.parametrize("a, b, message", [
    (np.zeros((1, 2)), np.zeros((3, 2)), "at least 2"), (np.zeros(3), np.zeros((3, 2)), "shape"),
    (np.zeros((3, 2)), np.zeros((3, 4)), "2 features and b 4"),
    (np.full((3, 2), np.nan), np.zeros((3, 2)), "not finite")])
def test_bad_features(a, b, message):
    with pytest.raises(ValueError, match=message):
        report.frechet_distance(a, b)


def test_nearest_distances():
    rng = np.random.default_rng(2)
    a, b = rng.standard_normal((1500, 6)), rng.standard_normal((70, 6))
    truth = np.sqrt(((a[:, None] - b) ** 2).sum(-1)).min(1)
    assert np.allclose(report.nearest_distances(a, b), truth, rtol=1e-9)
    assert np.array_equal(report.nearest_distances(b, b), np.zeros(70))


def test_digit_classifier():
    pytest.importorskip("sklearn")
    classifier, accuracy = report.digit_classifier()
    assert accuracy > 0.98
    x, y = promoe.load_digits()
    assert (report.classify(classifier, x) == y).mean() > 0.99
    assert report.classify(classifier, 3 * x[:5]).dtype == np.int64


# ---------------------------------------------------------------- pictures


@pytest.fixture
def matplotlib():
    pytest.importorskip("matplotlib")


def test_pictures(matplotlib, tmp_path):
    x, y = promoe.load_digits()
    history = [{"step": i, "mse": 1 / i, "aux": 0.5, "skipped": i == 3} for i in range(1, 120)]
    experts = np.random.default_rng(0).integers(-1, 4, (2, 5, 16))
    figures = {
        "grid": report.sample_grid(x[:20], columns=4, labels=y[:20]),
        "ragged": report.sample_grid(np.zeros((7, 3, 5, 6)), columns=3),
        "loss": report.loss_curve(history), "no_loss": report.loss_curve([]),
        "routing": report.routing_map(experts, x[:5]),
        "wide": report.routing_map(experts, grid=(2, 8), names=("block 1", "block 3"))}
    for name, figure in figures.items():
        report.save_png(figure, tmp_path / name, dpi=40)
        assert (tmp_path / name).read_bytes().startswith(b"\x89PNG")


def test_grid_shows_every_sample_in_its_place(matplotlib):
    x = np.arange(6).reshape(6, 1, 1, 1) / 3 - 1
    image = report.sample_grid(x, columns=3).axes[0].images[0].get_array()
    assert np.allclose(image[::2, ::2], np.arange(6).reshape(2, 3) / 6)


@pytest.mark.parametrize("call, message", [
    (lambda: report.sample_grid(np.zeros((2, 4, 8, 8))), "1 or 3"),
    (lambda: report.sample_grid(np.zeros((0, 1, 8, 8))), "1 or 3"),
    (lambda: report.routing_map(np.zeros((2, 3, 16))), "integers"),
    (lambda: report.routing_map(np.zeros((2, 3, 15), int)), "15 tokens")])
def test_bad_pictures(matplotlib, call, message):
    with pytest.raises(ValueError, match=message):
        call()


def test_missing_extras_are_named(monkeypatch):
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    with pytest.raises(ImportError, match=r"promoe\[viz\]"):
        report.sample_grid(np.zeros((1, 1, 8, 8)))
    monkeypatch.setitem(sys.modules, "sklearn.svm", None)
    with pytest.raises(ImportError, match=r"promoe\[demo\]"):
        report.digit_classifier()
