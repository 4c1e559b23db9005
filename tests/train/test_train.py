"""The training loop: resuming, settings, signals, the log."""

import json
import os
import signal
import subprocess
import sys
import threading
import time
import warnings
from types import SimpleNamespace

import numpy as np
import pytest

import promoe
from promoe import _core
from promoe.data import Order
from promoe.folder import Log
from promoe.train import say_where
from tests.train.common import (
    CONFIG,
    SETTINGS,
    assert_same_run,
    checkpoint_steps,
    damage,
    losses,
    resume,
    run,
    state,
)

ROOT = os.path.dirname(os.path.dirname(os.path.dirname(os.path.abspath(__file__))))
LEVEL_SCRIPT = """
import sys
root, out, steps, compute = sys.argv[1:]
sys.path.insert(0, root)
from tests.train.common import run
run(out, int(steps), compute=compute)
"""


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    """Ten steps in one go."""
    return run(tmp_path_factory.mktemp("whole") / "run", 10)


def test_history_and_files(whole):
    assert [r["step"] for r in whole.history] == list(range(1, 11))
    assert all(np.isfinite(r["loss"]) and not r["skipped"] for r in whole.history)
    logged = [json.loads(line) for line in (whole.out / "log.jsonl").read_text().splitlines()]
    assert logged == whole.history
    assert checkpoint_steps(whole.out) == [8, 10]
    assert whole.model.step == 10 and "10 records" in repr(whole)


@pytest.mark.parametrize("stops", [(4, 10), (3, 7, 10), (0, 1, 10)], ids=str)
def test_resumed_equals_uninterrupted(whole, tmp_path, stops):
    for steps in stops:
        result = run(tmp_path / "run", steps)
    assert_same_run(result, whole)


@pytest.mark.parametrize("before, now, compute, warns", [
    ("avx512", "amx", "fp32", False), ("amx", "avx512", "fp32", False), ("amx", "amx", "bf16", False),
    ("avx512", "amx", "bf16", True), ("amx", "avx512", "bf16-emulated", True), ("amx", "avx2", "fp32", True),
    ("avx2", "generic", "fp32", True),
])
def test_a_warning_where_the_bits_will_differ(before, now, compute, warns):
    model = SimpleNamespace(device="cpu", level=now, compute=compute)
    with warnings.catch_warnings(record=True) as said:
        warnings.simplefilter("always")
        say_where({"device": "cpu", "level": before, "compute": compute}, model, "here")
    assert [str(w.message).split(":")[0] for w in said] == (
        [f"here was trained with {before} and goes on with {now}"] if warns else [])


@pytest.mark.skipif("amx" not in _core.levels(), reason="needs AMX")
@pytest.mark.parametrize("compute", ["fp32", "bf16"])
def test_from_level_to_level(tmp_path, compute):
    """fp32 goes on from amx to avx512 with the bits of an uninterrupted run; bf16 goes on with others."""
    def at(level, out, steps):
        subprocess.run([sys.executable, "-W", "ignore", "-c", LEVEL_SCRIPT, ROOT, str(out), str(steps), compute],
                       env={**os.environ, "PROMOE_CPU": level}, check=True)

    at("amx", tmp_path / "whole", 4)
    at("amx", tmp_path / "parts", 2)
    at("avx512", tmp_path / "parts", 4)
    ends = [promoe.checkpoint.load(tmp_path / name) for name in ("whole", "parts")]
    assert [model.step for model in ends] == [4, 4]
    assert (state(ends[0]) == state(ends[1])) == (compute == "fp32")


def test_resumed_without_an_average(tmp_path):
    at_once = run(tmp_path / "a", 6, ema=None)
    for steps in (0, 3, 6):
        resumed = run(tmp_path / "b", steps, ema=None)
    assert_same_run(resumed, at_once)
    for model in (resumed.model, promoe.load(tmp_path / "b")):
        last, average = model.state_dict(), model.state_dict(ema=True)
        assert all(np.array_equal(last[name], average[name]) for name in last)


def test_a_finished_run_is_returned_as_it_is(whole):
    assert_same_run(run(whole.out, 10), whole)
    with pytest.warns(UserWarning, match="at step 10 already"):
        assert run(whole.out, 5).model.step == 10


def test_threads_and_log_interval_do_not_change_the_run(whole, tmp_path):
    before = promoe.get_num_threads()
    try:
        result = run(tmp_path / "run", 10, threads=1, log_every=3, keep_last=1)
    finally:
        promoe.set_num_threads(before)
    assert state(result.model) == state(whole.model)
    assert losses(result) == [losses(whole)[i] for i in (2, 5, 8, 9)]
    assert checkpoint_steps(result.out) == [10]


def test_the_loop_by_hand(whole):
    x, y = promoe.load_digits()
    order = Order(len(x), seed=7)
    model = promoe.Model(CONFIG, seed=7)
    for step in range(10):
        indices, _ = order.at(6 * step, 6)
        model.accumulate(x[indices], y[indices], 6 * step)
        info = model.update(lr=2e-3, ema=min(0.9, (1 + step) / (10 + step)))
        assert info.loss == whole.history[step]["loss"]
        assert info.grad_norm == whole.history[step]["grad_norm"]
    assert state(model) == state(whole.model)


def test_micro_batches_add_up(tmp_path):
    dense = CONFIG.replace(num_routed_experts=0)  # the contrastive loss is over a micro-batch
    at_once = run(tmp_path / "a", 2, config=dense)
    in_parts = run(tmp_path / "b", 2, config=dense, micro_batch=4)
    for one, other in zip(at_once.history, in_parts.history):
        assert one["loss"] == pytest.approx(other["loss"], rel=1e-5)
        assert one["grad_norm"] == pytest.approx(other["grad_norm"], rel=1e-4)


def test_warmup(tmp_path):
    history = run(tmp_path / "run", 6, lr=1.0e-3, warmup=4).history
    assert [r["lr"] for r in history] == [0.00025, 0.0005, 0.00075, 0.001, 0.001, 0.001]


def test_another_seed_is_another_run(whole, tmp_path):
    assert losses(run(tmp_path / "run", 2, seed=8)) != losses(whole)[:2]


@pytest.mark.parametrize("changes, message", [
    (dict(lr=1e-3), r"training\.lr: 0\.002 there, 0\.001 now"),
    (dict(config=CONFIG.replace(depth=3)), r"config\.depth: 2 there, 3 now"),
    (dict(seed=1), "seed: 7 there, 1 now"),
    (dict(batch_size=5), r"training\.batch_size: 6 there, 5 now.*micro_batch"),
    (dict(objective=promoe.RectifiedFlow(shift=2)), r"objective\.shift: 1\.0 there, 2\.0 now"),
    (dict(flip=True), r"training\.flip"),
])
def test_a_changed_run_is_refused(whole, changes, message):
    with pytest.raises(promoe.CheckpointError, match=message):
        run(whole.out, 12, **changes)


def test_changed_data_is_refused(whole):
    x, y = promoe.load_digits()
    with pytest.raises(promoe.CheckpointError, match=r"data\.samples: 1501 there, 1500 now"):
        promoe.train(CONFIG, (x[1:], y[1:]), out=whole.out, steps=12, **SETTINGS)


@pytest.mark.parametrize("changes, error, message", [
    (dict(steps=-1), ValueError, "train: steps = -1"),
    (dict(steps=2.5), TypeError, "steps = 2.5: must be an integer"),
    (dict(batch_size=0), ValueError, "batch_size"), (dict(lr=float("nan")), ValueError, "lr"),
    (dict(lr="fast"), TypeError, "lr"), (dict(betas=(0.9,)), TypeError, "betas"),
    (dict(betas=(0.9, 1)), ValueError, "betas"), (dict(ema=1.5), ValueError, "ema"),
    (dict(checkpoint_every=0), ValueError, "checkpoint_every"), (dict(seed=-3), ValueError, "seed"),
    (dict(config="ProMoE-digit"), ValueError, "did you mean 'ProMoE-digits'"),
    (dict(micro_batch=0), ValueError, "micro_batch"), (dict(on_step=3), TypeError, "on_step"),
    (dict(config=7), TypeError, "ModelConfig"), (dict(objective="flow"), TypeError, "objective"),
    (dict(data="digitz"), FileNotFoundError, "digitz"), (dict(keep_last=0), ValueError, "keep_last"),
])
def test_bad_settings(tmp_path, changes, error, message):
    arguments = {"config": CONFIG, "steps": 2, "out": tmp_path / "run", **SETTINGS, **changes}
    with pytest.raises(error, match=message):
        promoe.train(**arguments)
    assert not (tmp_path / "run").exists()


# ---------------------------------------------------------------- callbacks and failures


def test_on_step_sees_every_update_and_its_error_saves(tmp_path):
    seen = []

    def stop_at_six(step, info):
        seen.append((step, info.loss))
        if step == 6:
            raise RuntimeError("enough")

    with pytest.raises(RuntimeError, match="enough"):
        run(tmp_path / "run", 10, on_step=stop_at_six)
    assert [s for s, _ in seen] == [1, 2, 3, 4, 5, 6]
    assert checkpoint_steps(tmp_path / "run") == [4, 6]


def test_bad_data_on_the_way_saves_what_was_done(whole, tmp_path):
    class Rotten:
        name, classes, shape = "rotten", tuple("0123456789"), (1, 8, 8)
        reads = 0

        def __len__(self):
            return 1501

        def read(self, indices):
            Rotten.reads += 1
            x = np.zeros((len(indices), 1, 8, 8), np.float32)
            x[1, 0, 2, 3] = np.nan if Rotten.reads == 4 else 0
            return x, np.zeros(len(indices), np.int64)

        def describe(self):
            return {"name": "rotten"}

    with pytest.raises(ValueError, match="finite"):
        promoe.train(CONFIG, Rotten(), out=tmp_path / "run", steps=9, **SETTINGS)
    assert checkpoint_steps(tmp_path / "run") == [0, 3]


def test_divergence_is_an_error(tmp_path):
    with pytest.raises(FloatingPointError, match="diverged"):
        run(tmp_path / "run", 400, lr=1e30, clip=0, checkpoint_every=1000, log_every=50)


# ---------------------------------------------------------------- folders


def test_two_trainers_cannot_share_a_folder(tmp_path):
    def second(step, info):
        run(tmp_path / "run", 3)

    with pytest.raises(promoe.CheckpointError, match=f"in use by process {os.getpid()}"):
        run(tmp_path / "run", 3, on_step=second)
    assert run(tmp_path / "run", 3).model.step == 3


def test_a_foreign_folder_is_refused(tmp_path):
    (tmp_path / "thesis.tex").write_text("everything")
    with pytest.raises(promoe.CheckpointError, match=r"not empty.*it has thesis\.tex"):
        run(tmp_path, 2)
    assert (tmp_path / "thesis.tex").read_text() == "everything"
    with pytest.raises(promoe.CheckpointError, match="is a file"):
        run(tmp_path / "thesis.tex", 2)


def test_damaged_checkpoints_are_named_and_passed_over(whole, tmp_path):
    out = tmp_path / "run"
    run(out, 8)
    damage(out / "checkpoints" / "step_00000008" / "ema.safetensors")
    with pytest.warns(RuntimeWarning, match=r"step_00000008 is damaged: ema\.safetensors.*"
                                            r"continuing from step_00000004"):
        result = run(out, 10)
    assert_same_run(result, whole)


def test_never_from_scratch(tmp_path):
    out = tmp_path / "run"
    run(out, 5, keep_last=1)
    damage(out / "checkpoints" / "step_00000005" / "manifest.json", 200)
    with pytest.raises(promoe.CheckpointError, match="no whole checkpoint.*step_00000005 is damaged"):
        run(out, 6)


@pytest.mark.parametrize("tail", [b'{"step": 11, "loss', b'{"step": 11}', b"\x00\xff\n", b"[]\n{}\n"])
def test_a_torn_log_is_cut_back(whole, tmp_path, tail):
    out = tmp_path / "run"
    run(out, 6)
    log = (out / "log.jsonl").read_bytes()
    (out / "log.jsonl").write_bytes(log + tail)
    assert_same_run(run(out, 10), whole)


def test_log_is_cut_to_the_step(tmp_path):
    log = Log(tmp_path / "log.jsonl")
    assert log.cut(0) == []
    for step in range(1, 6):
        log.append({"step": step})
    log.close()
    assert log.cut(3) == [{"step": 1}, {"step": 2}, {"step": 3}]
    log.close()
    assert (tmp_path / "log.jsonl").read_bytes() == b'{"step": 1}\n{"step": 2}\n{"step": 3}\n'


# ---------------------------------------------------------------- signals


SCRIPT = """
import sys
sys.path.insert(0, {root!r})
from tests.train.common import run
run({out!r}, 100000, on_step=lambda step, info: print(step, flush=True), keep_last=3,
    checkpoint_every=100000)
"""


def start_training(out):
    return subprocess.Popen([sys.executable, "-c", SCRIPT.format(root=ROOT, out=str(out))],
                            stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)


@pytest.mark.parametrize("number, code", [(signal.SIGTERM, 143), (signal.SIGINT, -signal.SIGINT)])
def test_signals_save_the_last_complete_update(tmp_path, number, code):
    out = tmp_path / "run"
    process = start_training(out)
    steps = []
    for line in process.stdout:  # to the end: communicate() would miss what is buffered here
        steps.append(int(line))
        if steps[-1] == 5:
            process.send_signal(number)
    _, errors = process.communicate(timeout=60)
    assert process.returncode == code, errors
    last = steps[-1]
    assert checkpoint_steps(out)[-1] == last
    again = resume(out, last, keep_last=3, checkpoint_every=100000)
    assert [r["step"] for r in again.history] == list(range(1, last + 1))
    straight = run(tmp_path / "straight", last, keep_last=3)
    assert_same_run(again, straight)


def test_handlers_are_put_back_and_threads_work(tmp_path):
    before = signal.getsignal(signal.SIGTERM), signal.getsignal(signal.SIGINT)
    results = []
    thread = threading.Thread(target=lambda: results.append(run(tmp_path / "t", 2)))
    thread.start()
    thread.join()
    assert results[0].model.step == 2
    run(tmp_path / "m", 1)
    assert (signal.getsignal(signal.SIGTERM), signal.getsignal(signal.SIGINT)) == before


def test_ctrl_c_during_a_save_waits_for_it(tmp_path, monkeypatch):
    real, fired = os.fsync, []

    def interrupted(descriptor):
        if len(fired) == 9:  # in the middle of the second checkpoint
            os.kill(os.getpid(), signal.SIGINT)
            time.sleep(0.01)
        fired.append(descriptor)
        return real(descriptor)

    monkeypatch.setattr(os, "fsync", interrupted)
    with pytest.raises(KeyboardInterrupt):
        run(tmp_path / "run", 10)
    monkeypatch.undo()
    assert checkpoint_steps(tmp_path / "run") == [0, 4]
    assert run(tmp_path / "run", 4).model.step == 4
