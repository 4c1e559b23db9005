"""The command line, in this process and as python -m promoe."""

import argparse
import dataclasses
import json
import subprocess
import sys

import numpy as np
import pytest

import promoe
from promoe import cli, doctor
from tests.train.common import CONFIG, damage

TINY = ["--patch-size", "4", "--hidden-size", "16", "--depth", "2", "--num-heads", "2",
        "--num-routed-experts", "3", "--batch-size", "6", "--quiet"]


def train(out, steps, *more):
    return cli.main(["train", "--out", str(out), "--steps", str(steps), *TINY, *more])


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    out = tmp_path_factory.mktemp("cli") / "run"
    assert train(out, 3) == 0
    return out


def actions(parser):
    for action in parser._actions:
        if isinstance(action, argparse._SubParsersAction):
            for child in action.choices.values():
                yield from actions(child)
        else:
            yield action


def test_every_option_has_a_help_text():
    every = list(actions(cli.make_parser()))
    assert len(every) > 60
    assert [a.option_strings for a in every if not a.help] == []


def test_every_field_has_an_option():
    assert list(cli.MODEL_HELP) == [f.name for f in dataclasses.fields(promoe.ModelConfig)]
    assert list(cli.FLOW_HELP) == [f.name for f in dataclasses.fields(promoe.RectifiedFlow)]


def test_defaults_are_shown(capsys):
    with pytest.raises(SystemExit) as stopped:
        cli.main(["train", "--help"])
    assert stopped.value.code == 0
    text = " ".join(capsys.readouterr().out.split())
    assert "learning rate (default: 0.0001)" in text and "(default: None)" not in text


def test_defaults_are_those_of_the_functions():
    import inspect

    parser = cli.make_parser()
    for arguments, function, free in (
            (["train", "--out", "x", "--steps", "1"], promoe.train, {"progress", "on_step", "objective"}),
            (["sample", "x"], promoe.sample, {"progress", "cfg", "labels"})):
        parsed = parser.parse_args(arguments)
        for name, parameter in inspect.signature(function).parameters.items():
            if name not in free and parameter.default is not parameter.empty:
                assert getattr(parsed, name) == parameter.default, name


def test_train_prints_the_headline_and_continues(trained, capsys):
    assert train(trained, 4) == 0
    first, last = capsys.readouterr().out.splitlines()
    info = promoe.backend_info()
    config = promoe.load(trained).config
    assert first == (f"promoe {promoe.__version__}: cpu, {promoe.get_num_threads()} threads, "
                     f"{info['level']}; {config.num_params:,} parameters, "
                     f"{config.num_active_params:,} active")
    assert last.startswith("step 4, loss ")
    assert config == CONFIG and promoe.load(trained).step == 4


def test_train_json(trained, capsys):
    assert train(trained, 5, "--json") == 0
    captured = capsys.readouterr()
    assert json.loads(captured.out)["step"] == 5 and captured.err.startswith("promoe ")


def test_progress_bar_shows_loss_and_speed(tmp_path, capsys):
    assert cli.main(["train", "--out", str(tmp_path / "r"), "--steps", "2", *TINY[:-1]]) == 0
    assert "loss " in (bar := capsys.readouterr().err) and "images/s" in bar


def test_config_files(tmp_path, capsys):
    ours, official = tmp_path / "ours.json", tmp_path / "official.json"
    ours.write_text(json.dumps(CONFIG.to_dict()))
    official.write_text(json.dumps(dict(model="DiT", input_size=8, hidden_size=16, depth=1,
                                        num_heads=2, in_channels=1, num_classes=10)))
    assert cli.main(["train", "--out", str(tmp_path / "r"), "--steps", "0", "--config", str(ours),
                     "--depth", "3", "--input-size", "8", "8", "--no-interleave", "--quiet"]) == 0
    assert promoe.load(tmp_path / "r").config == CONFIG.replace(depth=3, interleave=False)
    assert cli.main(["info", str(official), "--json"]) == 0
    assert json.loads(capsys.readouterr().out.splitlines()[-1])["router"] == {}


@pytest.mark.parametrize("suffix", [".png", ".npy", ".npz"])
def test_sample(trained, tmp_path, suffix, capsys):
    pytest.importorskip("matplotlib")
    out = tmp_path / f"x{suffix}"
    assert cli.main(["sample", str(trained), "--out", str(out), "--per-class", "2", "--steps", "2",
                     "--quiet"]) == 0
    assert capsys.readouterr().out.splitlines()[-1] == f"20 samples: {out}"
    if suffix == ".png":
        assert out.read_bytes().startswith(b"\x89PNG")
    elif suffix == ".npy":
        assert np.load(out).shape == (20, 1, 8, 8)
    else:
        with np.load(out) as file:
            assert file["labels"].tolist() == [i // 2 for i in range(20)]
            expected = promoe.sample(trained, per_class=2, steps=2, cfg=1.5, progress=False)
            assert np.array_equal(file["x"], expected)


def test_sample_labels(trained, tmp_path, capsys):
    assert cli.main(["sample", str(trained), "--out", str(tmp_path / "x.npy"), "--labels", "3", "10",
                     "--steps", "1", "--quiet", "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["labels"] == [3, 10]


def test_info(trained, capsys):
    assert cli.main(["info", "ProMoE-S"]) == 0
    text = capsys.readouterr().out
    assert "75,543,584 parameters, 32,993,312 active" in text and "12 learned prototypes" in text
    assert cli.main(["info", str(trained), "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert found["parameters"] == CONFIG.num_params and found["seed"] == 0
    assert promoe.ModelConfig.from_dict(found["config"]) == CONFIG


def test_doctor(capsys):
    assert cli.main(["doctor"]) == 0
    text = capsys.readouterr().out
    for word in ("instructions", "threads", "huge pages", "Pillow", "cuda          "):
        assert word in text
    assert cli.main(["doctor", "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["problems"] == []


def test_doctor_says_what_is_with_the_gpu(monkeypatch, tmp_path):
    monkeypatch.setattr(doctor, "__file__", str(tmp_path / "doctor.py"))
    assert doctor._cuda().startswith("not built: this promoe was built with PROMOE_CUDA=0")
    (tmp_path / "_cuda.txt").write_text("not built: there is no nvcc\n")
    assert doctor._cuda() == "not built: there is no nvcc"
    (tmp_path / "_cuda.so").touch()
    (tmp_path / "_cuda.txt").write_text("built by nvcc 13.0 for sm_80\n")

    def device(name, compute):
        if name == "cuda" and broken:
            raise ValueError("Model: device 'cuda': this machine has no NVIDIA driver")
        return "sm_90", "NVIDIA H200, 150.1 GB, driver for CUDA 13.0"

    monkeypatch.setattr(doctor._core, "_device", device)
    broken = True
    assert doctor._cuda() == "built by nvcc 13.0 for sm_80; no GPU: device 'cuda': this machine has no NVIDIA driver"
    broken = False
    assert doctor._cuda() == "built by nvcc 13.0 for sm_80; NVIDIA H200, 150.1 GB, driver for CUDA 13.0, sm_90"


def test_doctor_finds_what_is_wrong(monkeypatch, capsys):
    monkeypatch.setattr(doctor, "_self_test", lambda: ["the core computes a wrong product"])
    monkeypatch.setattr(doctor, "_version", lambda name: None)
    assert cli.main(["doctor"]) == 1
    text = capsys.readouterr().out
    assert "tqdm is not installed" in text and "wrong product" in text and "promoe[viz]" in text


@pytest.mark.parametrize("arguments, message", [
    (["info", "ProMoE-Z"], "neither a file or folder nor a preset"),
    (["train", "--out", "OUT/r", "--steps", "1", "--preset", "ProMoE-SS"], "did you mean 'ProMoE-S'"),
    (["train", "--out", "OUT/r", "--steps", "1", "--hidden-size", "33"], "hidden_size = 33"),
    (["train", "--out", "OUT/r", "--steps", "1", "--data", "OUT/none"], "no such folder"),
    (["train", "--out", "OUT/r", "--steps", "-1"], "train: steps = -1"),
    (["train", "--out", "OUT/r", "--steps", "1", "--config", "OUT/none.json"], "No such file"),
    (["train", "--out", "OUT/r", "--steps", "1", "--device", "gpu9"], "gpu9"),
    (["sample", "OUT/none"], "no such file or folder"),
    (["sample", "OUT/none", "--out", "x.bmp"], "must end in .png, .npy, .npz"),
    (["sample", "OUT/none", "--out", "OUT/no/x.png"], "there is no folder"),
    (["sample", "OUT"], "has no checkpoint"),
])
def test_errors_are_one_line(tmp_path, capsys, arguments, message):
    assert cli.main([a.replace("OUT", str(tmp_path)) for a in arguments]) == 1
    error = capsys.readouterr().err.splitlines()
    assert len(error) == 1 and error[0].startswith("promoe: error: ") and message in error[0]


def test_damage_is_a_warning_and_traceback_is_optional(tmp_path, capsys):
    assert train(tmp_path / "r", 2) == 0
    assert train(tmp_path / "r", 3) == 0
    damage(tmp_path / "r" / "checkpoints" / "step_00000003" / "ema.safetensors")
    capsys.readouterr()
    assert train(tmp_path / "r", 3) == 0
    assert "promoe: warning: " in (text := capsys.readouterr().err) and "continuing from" in text
    with pytest.raises(ValueError):
        cli.main(["info", "ProMoE-Z", "--traceback"])


@pytest.mark.parametrize("arguments", [[], ["fly"], ["train"], ["sample", "x", "--cfg", "much"],
                                       ["train", "--out", "x", "--steps", "1", "--router-gate", "y"]])
def test_wrong_usage(arguments, capsys):
    with pytest.raises(SystemExit) as stopped:
        cli.main(arguments)
    assert stopped.value.code == 2 and "usage: promoe" in capsys.readouterr().err


def test_as_a_module(tmp_path):
    done = subprocess.run([sys.executable, "-m", "promoe", "--version"], capture_output=True, text=True,
                          cwd=tmp_path)
    assert done.returncode == 0 and done.stdout == f"promoe {promoe.__version__}\n"
    done = subprocess.run(f"{sys.executable} -m promoe info ProMoE-S | head -n 1", shell=True,
                          capture_output=True, text=True, cwd=tmp_path)
    assert "parameters" in done.stdout and "Traceback" not in done.stderr
