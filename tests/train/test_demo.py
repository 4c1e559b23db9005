"""The demo and the notebook example, with a few updates each."""

import json
import re
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

import promoe
from promoe import demo as demo_module
from promoe import evaluate

pytest.importorskip("sklearn")
pytest.importorskip("matplotlib")

ROOT = Path(__file__).parents[2]
TINY = promoe.preset("ProMoE-digits").replace(hidden_size=32, num_heads=2)
FILES = ("samples.png", "loss.png", "routing.png", "report.json")


def run(out, steps=4, **changes):
    return demo_module.demo(out, config=TINY, steps=steps, samples=30, sample_steps=2, batch_size=8,
                            progress=False, **changes)


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    out = tmp_path_factory.mktemp("demo")
    return out, run(out, since=0.0)


def test_files_and_keys(finished):
    out, found = finished
    assert json.loads((out / "report.json").read_text()) == found
    for name in FILES[:3]:
        assert (out / name).read_bytes().startswith(b"\x89PNG")
    for name in ("recognised", "classifier_accuracy", "frechet_samples", "frechet_train",
                 "nearest_train", "nearest_heldout"):
        assert np.isfinite(found[name]), name
    assert found["samples"] == 30 and found["training"]["images"] == 32
    assert set(found["seconds"]) == {"environment_and_build", "train", "sample", "evaluate",
                                     "pictures", "total"}


def test_an_untrained_model_is_not_recognised(finished):
    """After four updates samples are noise: the figure tells."""
    assert finished[1]["recognised"] < 0.4
    assert finished[1]["frechet_samples"] > 3 * finished[1]["frechet_train"]
    assert finished[1]["nearest_train"] > 2 * finished[1]["nearest_heldout"]


def test_load_counts_every_token(finished):
    tokens = 296 * len(demo_module.NOISE_LEVELS) * TINY.tokens
    assert list(finished[1]["load"]) == ["block 1", "block 3"] == list(finished[1]["balance"])
    for load in map(dict, finished[1]["load"].values()):
        assert list(load) == [*evaluate.expert_names(TINY), "shared"]
        assert load.pop("shared") == tokens == sum(load.values())
        assert load["unconditional"] == 29 * len(demo_module.NOISE_LEVELS) * TINY.tokens


def test_everything_that_the_demo_promises_is_active():
    config = promoe.preset("ProMoE-digits")
    assert config.num_routed_experts > 1 and config.use_uncond_expert and config.use_shared_expert
    assert config.class_dropout_prob > 0 and config.contrastive_weight > 0
    assert demo_module.GUIDANCE > 1


def test_the_auxiliary_loss_is_trained(finished):
    assert finished[1]["loss"]["aux"] > 0


def test_again_makes_the_pictures_anew_and_trains_no_further(finished):
    out, before = finished
    for name in FILES:
        (out / name).unlink()
    again = run(out)
    assert again["training"]["continued_from_step"] == again["training"]["steps"] == 4
    same = ("recognised", "frechet_samples", "nearest_train", "load", "balance", "loss")
    assert {name: again[name] for name in same} == {name: before[name] for name in same}
    assert all((out / name).is_file() for name in FILES)


def test_a_stopped_run_is_continued(tmp_path, finished):
    assert run(tmp_path, steps=2)["training"]["continued_from_step"] == 0
    whole = run(tmp_path)
    assert whole["training"]["continued_from_step"] == 2
    assert whole["frechet_samples"] == finished[1]["frechet_samples"]
    assert whole["loss"] == finished[1]["loss"]


def test_another_run_is_not_overwritten(finished, capsys):
    assert demo_module.main(["--out", str(finished[0]), "--seed", "1", "--quiet"]) == 1
    error = capsys.readouterr().err
    assert "another run" in error and "hidden_size" in error and "Traceback" not in error


def test_command(tmp_path):
    command = [sys.executable, "-m", "promoe.demo", "--out", str(tmp_path), "--steps", "2",
               "--samples", "20", "--quiet"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    assert re.match(r"promoe \S+: cpu, \d+ threads", done.stdout)
    assert all(str(tmp_path / name) in done.stdout for name in FILES)


def test_notebook_example(tmp_path, monkeypatch, capsys):
    """The cells as they are, but for the number of updates."""
    monkeypatch.chdir(tmp_path)
    source = (ROOT / "examples/notebook.py").read_text()
    short = source.replace("steps=1500", "steps=2").replace("steps=30", "steps=2")
    assert short != source and len(source.splitlines()) <= 25
    names = {}
    exec(compile(short, "notebook.py", "exec"), names)
    assert names["x"].shape == (80, 1, 8, 8) and names["model"].step == 10
    assert capsys.readouterr().out.count("StepInfo(") == 10
