"""Checkpoints: whole or not there, whatever happens while they are written."""

import errno
import json
import os
import shutil
import signal
import subprocess
import sys

import numpy as np
import pytest
import safetensors.numpy

import promoe
from promoe import checkpoint
from tests.train.common import (
    CONFIG,
    assert_same_run,
    checkpoint_steps,
    damage,
    run,
    same_arrays,
    state,
)

ROOT = os.path.dirname(os.path.dirname(os.path.dirname(os.path.abspath(__file__))))


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    return run(tmp_path_factory.mktemp("trained") / "run", 5)


@pytest.fixture
def copy(trained, tmp_path):
    shutil.copytree(trained.out, tmp_path / "run")
    return tmp_path / "run"


# ---------------------------------------------------------------- files


def test_the_library_reads_what_we_write(tmp_path):
    rng = np.random.default_rng(0)
    tensors = {"a": rng.standard_normal((3, 5)).astype(np.float32), "empty": np.zeros((0, 4), np.float32),
               "scalar": np.float32(7).reshape(()), "b.ü": np.arange(6, dtype=np.float32)[::2],
               "large": rng.standard_normal(checkpoint.CHUNK // 2 + 3).astype(np.float32)}
    written = checkpoint.write_tensors(tmp_path / "x", tensors, {"key": "value"})
    assert same_arrays(safetensors.numpy.load_file(tmp_path / "x"), tensors)
    assert checkpoint.read_tensors(tmp_path / "x")[1] == {"key": "value"}
    assert written == {"bytes": (tmp_path / "x").stat().st_size,
                       "sha256": checkpoint._sha256(tmp_path / "x")}


def test_manifest_and_files(trained):
    folder = trained.out / "checkpoints" / "step_00000005"
    manifest = json.loads((folder / "manifest.json").read_text())
    assert manifest["step"] == manifest["updates"] == 5 and manifest["position"] == 30
    assert manifest["seed"] == manifest["rng"]["key"] == 7
    assert promoe.ModelConfig.from_dict(manifest["config"]) == CONFIG
    assert manifest["promoe"] == promoe.__version__ and manifest["level"]
    names = set(trained.model.state_dict())
    assert set(safetensors.numpy.load_file(folder / "parameters.safetensors")) == names
    assert set(safetensors.numpy.load_file(folder / "ema.safetensors")) == names
    assert sorted(p.name for p in folder.iterdir()) == [
        "ema.safetensors", "manifest.json", "optimizer.safetensors", "parameters.safetensors"]


# ---------------------------------------------------------------- save and load


def test_load_takes_a_folder_a_checkpoint_or_a_file(trained, tmp_path):
    file = tmp_path / "model.safetensors"
    promoe.save(trained.model, file, optimizer=True)
    promoe.save(trained.model, file, optimizer=True)
    for path in (trained.out, trained.out / "checkpoints" / "step_00000005", file, str(file)):
        model = promoe.load(path)
        assert model.config == CONFIG and model.step == 5 and model.seed == 7
        assert state(model) == state(trained.model)
        assert checkpoint.peek(path)["updates"] == 5
    assert promoe.load(trained.out / "checkpoints" / "step_00000004").step == 4
    assert os.listdir(tmp_path) == ["model.safetensors"]


def test_a_file_without_moments(trained, tmp_path):
    promoe.save(trained.model, tmp_path / "m")
    model = promoe.load(tmp_path / "m")
    assert same_arrays(model.state_dict(), trained.model.state_dict())
    assert same_arrays(model.state_dict(ema=True), trained.model.state_dict(ema=True))
    assert not any(v.any() for k, v in model.training_state().items() if k.startswith("exp_avg"))


@pytest.mark.parametrize("break_it, message", [
    (lambda p: damage(p / "parameters.safetensors"), "parameters.safetensors does not match"),
    (lambda p: damage(p / "optimizer.safetensors", 40), "optimizer.safetensors does not match"),
    (lambda p: (p / "ema.safetensors").unlink(), "ema.safetensors is missing"),
    (lambda p: os.truncate(p / "ema.safetensors", 100), "ema.safetensors has 100 bytes instead of"),
    (lambda p: (p / "manifest.json").write_text("{"), "manifest.json"),
    (lambda p: (p / "manifest.json").write_bytes(b"\xff\xfe"), "manifest.json"),
    (lambda p: (p / "manifest.json").write_text("[]"), "not a checkpoint of promoe"),
    (lambda p: edit_manifest(p, "step", 4), "does not match its checksum"),
    (lambda p: edit_manifest(p, "version", 99), "format version 99.*newer"),
])
def test_damaged_checkpoints(copy, break_it, message):
    path = copy / "checkpoints" / "step_00000005"
    break_it(path)
    with pytest.raises(promoe.CheckpointError, match=message):
        promoe.load(path)
    with pytest.warns(RuntimeWarning, match=message):
        assert promoe.load(copy).step == 4
    assert checkpoint.peek(copy)["updates"] in (4, 5)


def edit_manifest(path, key, value):
    manifest = json.loads((path / "manifest.json").read_text())
    (path / "manifest.json").write_text(json.dumps({**manifest, key: value}))


def test_damaged_and_foreign_files(trained, tmp_path):
    file = tmp_path / "m.safetensors"
    promoe.save(trained.model, file)
    size = file.stat().st_size
    for offset in (3, 20, size - 5):
        promoe.save(trained.model, file)
        damage(file, offset)
        with pytest.raises(promoe.CheckpointError):
            promoe.load(file)
    promoe.save(trained.model, file)
    os.truncate(file, size - 4)
    with pytest.raises(promoe.CheckpointError, match="damaged"):
        promoe.load(file)
    safetensors.numpy.save_file({"x": np.zeros(3, np.float32)}, file)
    with pytest.raises(promoe.CheckpointError, match="not written by promoe.save.*load_state_dict"):
        promoe.load(file)
    header = json.dumps({"x": {"dtype": "BF16", "shape": [2], "data_offsets": [0, 4]}}).encode()
    file.write_bytes(len(header).to_bytes(8, "little") + header + bytes(4))
    with pytest.raises(promoe.CheckpointError, match="not written by promoe.save"):
        promoe.load(file)
    (tmp_path / "m.pth").write_bytes(b"PK\3\4")
    with pytest.raises(promoe.CheckpointError, match="pickles are not read"):
        promoe.load(tmp_path / "m.pth")
    with pytest.raises(FileNotFoundError, match="nowhere"):
        promoe.load(tmp_path / "nowhere")
    (tmp_path / "empty").mkdir()
    with pytest.raises(promoe.CheckpointError, match="has no checkpoint"):
        promoe.load(tmp_path / "empty")
    with pytest.raises(IsADirectoryError, match="model.safetensors"):
        promoe.save(trained.model, tmp_path)


def test_what_is_asked_for_is_not_the_fault_of_the_file(trained, tmp_path):
    file = tmp_path / "m.safetensors"
    promoe.save(trained.model, file)
    for wrong in (dict(device="cuda"), dict(compute="fp16")):
        with pytest.raises(ValueError, match="Model: (device 'cuda'|compute = )") as error:
            promoe.load(file, **wrong)
        assert not isinstance(error.value, promoe.CheckpointError)
    for call in (lambda: promoe.load(None), lambda: promoe.save(trained.model, None)):
        with pytest.raises(TypeError, match="path must be a path"):
            call()
    with pytest.raises(TypeError, match="model must be a Model"):
        promoe.save(None, file)
    assert promoe.load(file).step == trained.model.step


# ---------------------------------------------------------------- the system refuses


def test_a_full_disk_at_any_write(trained, tmp_path, monkeypatch):
    """Every fsync in turn says ENOSPC: the checkpoints before are whole, and nothing half is seen."""
    out, real = tmp_path / "run", os.fsync
    run(out, 4, checkpoint_every=100)
    before = sorted((out / "checkpoints").iterdir())
    for n in range(100):
        answers = iter([True] * n + [False])

        def fsync(descriptor, answers=answers):
            if not next(answers, True):
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
            return real(descriptor)

        monkeypatch.setattr(os, "fsync", fsync)
        try:
            run(out, 5, checkpoint_every=100)
            break
        except OSError as error:
            assert error.errno == errno.ENOSPC
            if n > 0:  # the first one is the log
                assert "step_00000005" in str(error) and "intact" in str(error)
        finally:
            monkeypatch.undo()
        names = sorted((out / "checkpoints").iterdir())
        assert not [p for p in names if p.name.startswith(".")]
        assert names[:len(before)] == before
        assert promoe.load(out).step in (4, 5)
        if promoe.load(out).step == 5:  # only the flush of the last rename failed
            checkpoint.remove_checkpoint(out / "checkpoints" / "step_00000005")
    assert n >= 6
    assert_same_run(run(out, 5, checkpoint_every=100), trained)


def test_a_file_size_limit(tmp_path):
    """The kernel itself refuses a write in the middle of a file."""
    script = ("import sys; sys.path.insert(0, {!r}); from tests.train.common import run\n"
              "import resource; run({!r}, 4)\n"
              "resource.setrlimit(resource.RLIMIT_FSIZE, (20000, 20000)); run({!r}, 8)")
    done = subprocess.run([sys.executable, "-c", script.format(ROOT, str(tmp_path / "r"), str(tmp_path / "r"))],
                          capture_output=True, text=True)
    assert done.returncode == 1 and "cannot save" in done.stderr and "intact" in done.stderr
    assert checkpoint_steps(tmp_path / "r") == [0, 4]
    assert promoe.load(tmp_path / "r").step == 4


# ---------------------------------------------------------------- kill -9


KILLED = """
import os, signal, sys
sys.path.insert(0, {root!r})
at, count = {at}, 0
def deadly(name):
    real = getattr(os, name)
    def call(*arguments, **keywords):
        global count
        count += 1
        if count == at:
            os.kill(os.getpid(), signal.SIGKILL)
        return real(*arguments, **keywords)
    setattr(os, name, call)
for name in ("fsync", "rename", "open", "unlink", "rmdir"):
    deadly(name)
from tests.train.common import run
count = 0
run({out!r}, 10, keep_last=1, on_step=lambda step, info: print(count, flush=True))
"""


@pytest.fixture(scope="module")
def uninterrupted(tmp_path_factory):
    return run(tmp_path_factory.mktemp("uninterrupted") / "run", 10)


def killed_run(out, at):
    script = KILLED.format(root=ROOT, out=str(out), at=at)
    return subprocess.run([sys.executable, "-c", script], capture_output=True, text=True)


@pytest.mark.slow
def test_killed_at_any_point_of_a_save(uninterrupted, tmp_path):
    """kill -9 at every fsync, rename, open and unlink of a run; it then ends as if nothing had been."""
    calls = list(map(int, killed_run(tmp_path / "count", 10**9).stdout.split()))  # after each step
    save = range(calls[2] + 1, calls[3] + 1)  # those of the save at step 4, old checkpoint removed
    assert len(save) > 12
    others = np.random.default_rng(0).choice(calls[0], 4, replace=False) + 1  # of the first one
    for at in (*save, *others):
        out = tmp_path / str(at)
        done = killed_run(out, at)
        assert done.returncode == -signal.SIGKILL, done.stderr
        for path in checkpoint.checkpoints(out):
            checkpoint.read_checkpoint(path)  # what has its final name is whole
        assert_same_run(run(out, 10, keep_last=1), uninterrupted)
        assert checkpoint_steps(out) == [10]


@pytest.mark.slow
def test_killed_at_random_times(uninterrupted, tmp_path):
    out, rng = tmp_path / "run", np.random.default_rng(1)
    script = ("import sys; sys.path.insert(0, {!r}); from tests.train.common import run\n"
              "run({!r}, 10, checkpoint_every=1, on_step=lambda s, i: print(s, flush=True))")
    for _ in range(4):
        process = subprocess.Popen([sys.executable, "-c", script.format(ROOT, str(out))],
                                   stdout=subprocess.PIPE, text=True)
        process.stdout.readline()
        try:
            process.wait(rng.uniform(0, 0.02))
        except subprocess.TimeoutExpired:
            process.kill()
        process.communicate()
    assert_same_run(run(out, 10, checkpoint_every=1), uninterrupted)
