"""Pictures."""

import sys

import numpy as np
import pytest

import promoe
from promoe import report


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


def test_missing_matplotlib_is_named(monkeypatch):
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    with pytest.raises(ImportError, match=r"promoe\[viz\]"):
        report.sample_grid(np.zeros((1, 1, 8, 8)))
