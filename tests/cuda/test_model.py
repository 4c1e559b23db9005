"""The whole model on the CUDA backend, whose kernels run on the CPU here: the public code's answers, training beside the
CPU backend, sampling, resuming, graphs, and running out of memory. PROMOE_TEST_DEVICE=cuda runs it on a GPU."""

import copy
import pickle
from contextlib import contextmanager

import numpy as np
import pytest

import promoe
from promoe import cli
from tests.cuda.common import DEVICE, on_the_stand_in, stand_in
from tests.model.common import (
    CASES,
    SMALL,
    assert_gradients,
    batch,
    golden,
    golden_model,
    relative,
    small_model,
)
from tests.test_cli import TINY as CLI_TINY
from tests.train.common import assert_same_run, run, state

BF16 = 2e-2  # of the largest value
DIGITS = promoe.ModelConfig(
    input_size=8, patch_size=2, in_channels=1, num_classes=10, hidden_size=64, depth=2, num_heads=4,
    num_routed_experts=4, learn_sigma=False)
MICRO = promoe.ModelConfig(  # odd in every way, for runs that have to be short
    input_size=4, patch_size=2, in_channels=2, hidden_size=12, depth=2, num_heads=2, num_classes=3, num_routed_experts=3,
    top_k=1, learn_sigma=False)
TINY = MICRO.replace(input_size=8, in_channels=1, num_classes=10)  # of digits


# ---------------------------------------------------------------- the public code's answers


@pytest.mark.parametrize("name", CASES)
def test_golden_forward(name):
    case = golden(name)
    out = golden_model(case, device=DEVICE).forward(case["x"], case["t"], case["y"])
    assert relative(out, case["out_eval"]) <= 2e-6


@pytest.mark.parametrize("name", CASES)
def test_golden_loss_and_every_gradient(name):
    case = golden(name)
    r = golden_model(case, device=DEVICE).loss_and_grad(case["x"], case["t"], case["y"], case["target"])
    assert r.mse == pytest.approx(float(case["mse"]), rel=2e-6)
    assert r.aux == pytest.approx(float(case["aux"]), rel=2e-6, abs=1e-9)
    truth = {k[5:]: v.astype(np.float64) for k, v in case.items() if k.startswith("grad.")}
    assert_gradients(r.grads, truth, 2e-5)


@pytest.mark.parametrize("compute", ["bf16", "tf32"])
@pytest.mark.parametrize("name", CASES)
def test_golden_with_rounded_operands(name, compute):
    case = golden(name)
    x, t, y = case["x"], case["t"], case["y"]
    exact = golden_model(case)
    routing = exact.routing(x, t, y)  # forced: a rounding may change a choice
    out = golden_model(case, device=DEVICE, compute=compute).forward(x, t, y, routing=routing or None)
    assert 1e-6 < relative(out, exact.forward(x, t, y)) < BF16


def norms(grads, truth):
    """{name: length of the difference, of that of the gradient}, of those that are more than noise."""
    scale = max(np.linalg.norm(g) for g in truth.values())
    return {name: np.linalg.norm(grads[name] - g) / np.linalg.norm(g)
            for name, g in truth.items() if np.linalg.norm(g) > 1e-6 * scale}


def test_gradients_in_bf16_point_the_same_way():
    dense = promoe.ModelConfig(**{**SMALL.to_dict(), "num_routed_experts": 0})  # no rounding changes a choice
    x, t, y, target = batch(dense, 7)
    exact = small_model(config=dense).loss_and_grad(x, t, y, target)
    rounded = small_model(config=dense, device=DEVICE, compute="bf16").loss_and_grad(x, t, y, target)
    assert rounded.loss == pytest.approx(exact.loss, rel=5e-3)
    errors = norms(rounded.grads, exact.grads)
    assert 1e-4 < max(errors.values()) < 3e-2, max(errors, key=errors.get)


def test_routing_is_that_of_the_cpu():
    x, t, y, _ = batch(SMALL, 6)
    here, there = (small_model(device=device).routing(x, t, y) for device in ("cpu", DEVICE))
    for a, b in zip(here, there):
        assert np.array_equal(a.expert, b.expert) and np.array_equal(a.load, b.load)
        np.testing.assert_allclose(a.weight, b.weight, rtol=1e-5, atol=1e-6)
    out = [small_model(device=DEVICE).forward(x, t, y, routing=routing) for routing in (None, here)]
    assert relative(out[1], out[0]) < 1e-6


# ---------------------------------------------------------------- training


def train_digits(device, compute="fp32", steps=30, config=DIGITS, batch_size=8):
    """(losses, model) of a short run by the calls of promoe.train."""
    x, y = promoe.load_digits()
    model = promoe.Model(config, seed=3, device=device, compute=compute)
    losses = []
    for step in range(steps):
        part = slice(step * batch_size, (step + 1) * batch_size)
        model.accumulate(x[part], y[part], position=step * batch_size)
        info = model.update(lr=2e-3, ema=0.9)
        losses.append((info.loss, info.grad_norm))
    return np.array(losses), model


def test_training_on_the_digits_is_that_of_the_cpu():
    here, exact = train_digits("cpu")
    there, model = train_digits(DEVICE)
    # Sums have another order, and steps amplify that; a choice at a near tie may change late.
    np.testing.assert_allclose(there[:10], here[:10], rtol=2e-5)
    np.testing.assert_allclose(there, here, rtol=2e-3)
    assert there[-5:, 0].mean() < 0.8 * there[:5, 0].mean()  # it learns
    for which in (False, True):
        a, b = exact.state_dict(ema=which), model.state_dict(ema=which)
        for name in a:
            assert np.abs(a[name] - b[name]).max() <= 30 * 2e-3 * 0.1, name  # of what 30 steps can move


def test_training_in_bf16_is_close():
    here, _ = train_digits("cpu", steps=10)
    there, model = train_digits(DEVICE, "bf16", steps=10)
    np.testing.assert_allclose(there[:, 0], here[:, 0], rtol=BF16)
    assert not np.array_equal(there, here)
    assert all(value.dtype == np.float32 for value in model.state_dict().values())


@pytest.mark.parametrize("compute", ["fp32", "bf16"])
def test_two_runs_have_the_same_bits(compute):
    runs = [train_digits(DEVICE, compute, steps=4, config=TINY) for _ in range(2)]
    assert runs[0][0].tobytes() == runs[1][0].tobytes()
    assert state(runs[0][1]) == state(runs[1][1])


def test_a_resumed_run_equals_an_uninterrupted_one(tmp_path):
    whole = run(tmp_path / "whole", 5, device=DEVICE)
    run(tmp_path / "parts", 2, device=DEVICE)
    assert_same_run(whole, run(tmp_path / "parts", 5, device=DEVICE))
    manifest = promoe.checkpoint.newest_checkpoint(tmp_path / "whole", print)[1]
    assert manifest["device"] == DEVICE and manifest["level"].startswith("sm_")
    with pytest.warns(UserWarning, match=rf"was trained with {DEVICE} \(sm_\d+\) and goes on with (amx|avx|generic)"):
        run(tmp_path / "whole", 6)


def test_shadows_after_an_update_are_those_of_a_load():
    """With experts whose matrices begin and end within four numbers, which adamw takes at a time."""
    config = promoe.ModelConfig(input_size=(8,), patch_size=(2,), in_channels=2, hidden_size=10, depth=2, num_heads=2,
                                num_classes=5, num_routed_experts=3, expert_hidden_size=7, shared_expert_hidden_size=9)
    x, t, y, _ = batch(config, 6)
    model = small_model(config=config, device=DEVICE, compute="bf16")
    out = model.forward(x, t, y)
    for position in range(2):
        model.accumulate(x, y, position * len(x))
        model.update(lr=1e-2)
        before, out = out, model.forward(x, t, y)
        loaded = promoe.Model(config, device=DEVICE, compute="bf16")
        loaded.load_state_dict(model.state_dict())
        assert (out != before).any()
        np.testing.assert_array_equal(loaded.forward(x, t, y), out)


def test_a_skipped_update_changes_nothing():
    model = small_model(device=DEVICE)
    x, _, y, _ = batch(SMALL)
    model.accumulate(x, y, 0)
    model.update(lr=1e-3)
    before = state(model)
    for _ in range(2):
        model.accumulate(x, y, 5, scale=3e38)  # overflows
    info = model.update(lr=1e-3)
    assert info.skipped and not np.isfinite(info.grad_norm) and model.skipped == 1
    assert state(model) == before
    model.accumulate(x, y, 5)
    assert not model.update(lr=1e-3).skipped


def test_gradients_are_on_the_device():
    model = small_model(device=DEVICE)
    x, _, y, _ = batch(SMALL)
    model.accumulate(x, y, 0)
    grad = model.gradients()
    assert isinstance(grad, promoe.DeviceArray) and grad.device == "cuda"
    norm = np.sqrt((grad.numpy().astype(np.float64)**2).sum())
    assert model.update(lr=1e-3).grad_norm == pytest.approx(norm, rel=1e-12)
    assert not grad.numpy().any()
    model.close()
    assert not grad.numpy().any()  # a view outlives its model


def test_accumulated_losses_and_gradients_of_forward_calls_add_up():
    x, t, y, target = batch(SMALL)
    model = small_model(device=DEVICE)
    r = model.loss_and_grad(x, t, y, target, accumulate=True)
    flat = model.gradients().numpy()
    assert all(np.array_equal(flat[place], r.grads[name].ravel()) for name, place in model.grad_index.items())
    model.accumulate(x, y, 0, scale=3)
    info, other = model.update(lr=0), small_model(device=DEVICE)
    other.accumulate(x, y, 0)
    assert info.loss == pytest.approx((r.loss + 3 * other.update(lr=0).loss) / 4, rel=1e-6)


# ---------------------------------------------------------------- state


@pytest.mark.parametrize("duplicate", [copy.copy, copy.deepcopy, lambda m: pickle.loads(pickle.dumps(m))],
                         ids=["copy", "deepcopy", "pickle"])
def test_copies(duplicate):
    _, model = train_digits(DEVICE, "bf16", steps=2, config=TINY)
    twin = duplicate(model)
    assert (twin.device, twin.compute, twin.step) == (DEVICE, "bf16", 2)
    assert state(twin) == state(model)
    assert np.array_equal(twin.sample([1, 2], steps=2, cfg=2), model.sample([1, 2], steps=2, cfg=2))


def test_save_and_load_across_devices(tmp_path):
    _, model = train_digits(DEVICE, steps=2, config=TINY)
    promoe.save(model, tmp_path / "m.safetensors")
    for device in (DEVICE, "cpu"):
        other = promoe.load(tmp_path / "m.safetensors", device=device)
        assert other.device == device
        assert all(np.array_equal(value, other.state_dict()[name]) for name, value in model.state_dict().items())
    there = other.sample([1, 2], steps=3, cfg=2)
    assert relative(model.sample([1, 2], steps=3, cfg=2), there) < 1e-5


def test_initial_weights_are_those_of_the_cpu():
    a, b = (promoe.Model(MICRO, seed=5, device=device).state_dict() for device in ("cpu", DEVICE))
    assert all(np.array_equal(a[name], b[name]) for name in a)


def test_memory_estimate_is_what_is_taken():
    parts = promoe.memory_estimate(SMALL, 5, device=DEVICE, compute="bf16")
    derived = sum(2 * v.size for v in promoe.Model(SMALL).state_dict().values() if v.ndim >= 2)
    assert 0.9 * derived < parts["derived"] < 1.2 * derived and promoe.memory_estimate(SMALL, 5, device=DEVICE)["derived"] == 0
    assert parts["activations"] < promoe.memory_estimate(SMALL, 5, device=DEVICE)["activations"]


def test_command_line(tmp_path, capsys):
    where = ["--device", DEVICE, "--compute", "bf16", "--quiet"]
    assert cli.main(["train", "--out", str(tmp_path / "run"), "--steps", "2", *CLI_TINY, *where]) == 0
    first = capsys.readouterr().out.splitlines()[0]
    assert f": {DEVICE}, " in first and ", sm_" in first and " GB, driver for CUDA " in first
    out = tmp_path / "x.npy"
    assert cli.main(["sample", str(tmp_path / "run"), "--labels", "3", "4", "--steps", "2", "--out", str(out), *where]) == 0
    assert np.isfinite(np.load(out)).all() and np.load(out).shape == (2, 1, 8, 8)


# ---------------------------------------------------------------- sampling


@pytest.mark.parametrize("arguments", [dict(cfg=1.0), dict(cfg=2.5, together=True), dict(cfg=2.5, together=False)],
                         ids=["plain", "together", "apart"])
def test_samples_are_those_of_the_cpu(arguments):
    labels = [0, 3, 1, 5, 2]
    here, there = (small_model(device=device).sample(labels, steps=5, seed=2, **arguments) for device in ("cpu", DEVICE))
    assert relative(there, here) < 1e-5
    again = small_model(device=DEVICE).sample(labels, steps=5, seed=2, **arguments)
    assert np.array_equal(again, there)
    if "together" in arguments:
        other = small_model(device=DEVICE).sample(labels, steps=5, seed=2, cfg=2.5, together=not arguments["together"])
        assert relative(other, there) < 1e-6


def test_sampling_in_bf16_with_a_callback_and_its_averages():
    _, model = train_digits(DEVICE, "bf16", steps=2, config=TINY)
    seen = []
    x = model.sample([0, 1, 2], steps=3, cfg=1.5, callback=lambda i, latents: seen.append((i, latents.copy())))
    assert [i for i, _ in seen] == [1, 2, 3] and np.array_equal(seen[-1][1], x)
    assert not np.array_equal(x, model.sample([0, 1, 2], steps=3, cfg=1.5, weights="live"))
    with pytest.raises(KeyError):
        model.sample([0], steps=3, callback=lambda *_: {}["stop"])
    assert np.array_equal(model.sample([0, 1, 2], steps=3, cfg=1.5), x)


# ---------------------------------------------------------------- graphs


def graph_launches():
    return stand_in().pm_host_launches(b"cudaGraphLaunch")


def mixed_work(config=MICRO):
    """Batches of several sizes, updates with and without an average, samples: everything that a graph could get wrong."""
    model = small_model(config=config, device=DEVICE)
    x, t, y, target = batch(config, 6)
    results = []
    for step in range(4):
        for part in (slice(0, 4), slice(4, 6), slice(0, 2)):
            model.accumulate(x[part], y[part], position=6 * step + part.start, scale=0.5)
        info = model.update(lr=1e-3 * (step + 1), ema=None if step == 0 else 0.5)
        results += [np.array([info.loss, info.grad_norm]), model.sample([0, 1], steps=4, cfg=1 + step % 2, seed=step)]
        results.append(model.sample([2], steps=3, cfg=2, together=False, weights="live"))
        if step == 1:
            model.loss_and_grad(x, t, y, target)  # a larger batch: the arena moves
    return [*results, *(np.frombuffer(v, np.uint8) for v in state(model).values())]


def test_graphs_change_nothing(monkeypatch):
    with_graphs = mixed_work()
    monkeypatch.setenv("PROMOE_CUDA_GRAPHS", "0")
    before = graph_launches() if on_the_stand_in() else None
    without = mixed_work()
    if before is not None:
        assert before > 0 and graph_launches() == before
    for a, b in zip(with_graphs, without, strict=True):
        assert a.tobytes() == b.tobytes()
    monkeypatch.setenv("PROMOE_CUDA_GRAPHS", "maybe")
    with pytest.raises(ValueError, match="PROMOE_CUDA_GRAPHS=maybe: one of 0, 1"):
        promoe.Model(MICRO, device=DEVICE)


@pytest.mark.skipif(not on_the_stand_in(), reason="counts the launches of the stand-in")
def test_a_step_is_two_launches():
    model = small_model(config=MICRO, device=DEVICE)
    x, _, y, _ = batch(MICRO, 4)
    counts = []
    for step in range(4):
        before = graph_launches()
        model.accumulate(x, y, position=4 * step)
        model.update(lr=1e-3)
        counts.append(graph_launches() - before)
    assert counts == [0, 2, 2, 2]  # op by op, recorded and run, run, run
    before = graph_launches()
    model.sample([0, 1], steps=9, cfg=2)
    first = graph_launches() - before
    model.sample([1, 2], steps=9, cfg=2, seed=4)
    assert first >= 8 and graph_launches() - before - first >= 9
    model.profile(True)
    before = graph_launches()
    model.accumulate(x, y, position=0)
    assert graph_launches() == before and any(row["calls"] for row in model.profile(False).values())


@pytest.mark.skipif(not on_the_stand_in(), reason="by the stand-in of the runtime")
def test_a_capture_that_fails_is_an_error_and_no_more():
    x, _, y, _ = batch(MICRO, 4)

    def work(sabotage):
        model = small_model(config=MICRO, device=DEVICE)
        for step in range(3):
            model.accumulate(x, y, position=4 * step)
            if step == 0 and sabotage:
                stand_in().pm_host_set(b"fail_capture", b"1")
                with pytest.raises(RuntimeError, match="CUDA: cudaStreamEndCapture: operation failed due to a previous error"):
                    model.accumulate(x, y, position=4)
            model.update(lr=1e-3)
        return state(model)

    assert work(True) == work(False)


# ---------------------------------------------------------------- out of memory


@contextmanager
def failing(nth):
    """The nth allocation of device memory from now fails."""
    library = stand_in()
    library.pm_host_set(b"fail_allocation", str(nth).encode())
    try:
        yield
    finally:
        library.pm_host_set(b"fail_allocation", b"0")


STAGES = {
    "accumulate": lambda m, x, t, y, target: m.accumulate(x, y, 0),
    "update": lambda m, x, t, y, target: m.update(lr=1e-3),
    "forward": lambda m, x, t, y, target: m.forward(x, t, y),
    "loss_and_grad": lambda m, x, t, y, target: m.loss_and_grad(x, t, y, target),
    "sample": lambda m, x, t, y, target: m.sample([0, 1], steps=2, cfg=2),
}


def do(model, data, name):
    result = STAGES[name](model, *data)
    return [result] if isinstance(result, np.ndarray) else \
        [*result.grads.values()] if isinstance(result, promoe.LossAndGrad) else []


@pytest.mark.skipif(not on_the_stand_in(), reason="by the stand-in of the runtime")
@pytest.mark.parametrize("compute", ["fp32", "bf16"])
def test_every_allocation_fails_once(compute):
    data = batch(MICRO, 4)

    def whole():
        model = small_model(config=MICRO, device=DEVICE, compute=compute)
        return [value for name in STAGES for value in do(model, data, name)], state(model)

    wanted, after = whole()
    for nth in range(1, 20):  # making a model
        with failing(nth):
            try:
                promoe.Model(MICRO, device=DEVICE, compute=compute)
            except MemoryError as error:
                assert "MB of GPU memory were asked for, and" in str(error) and "are free" in str(error)
            else:
                break
    assert 3 < nth < 19
    failures = set()
    for nth in range(1, 30):  # using it: whatever fails, what follows goes on as if it had not
        model, got, failed = small_model(config=MICRO, device=DEVICE, compute=compute), [], False
        with failing(nth):
            for name in STAGES:
                before = state(model)
                try:
                    got += do(model, data, name)
                except MemoryError as error:
                    failed = True
                    assert "MB of GPU memory were asked for, and" in str(error) and "are free" in str(error)
                    failures.add(str(error).split(":")[0])
                    assert state(model) == before
                    got += do(model, data, name)
        assert all(np.array_equal(a, b) for a, b in zip(got, wanted, strict=True)) and state(model) == after
        if not failed:
            break
    assert failures == {f"no memory for {what}" for what in (
        "the gradients", "activations", "the first moments", "the second moments", "the EMA of the parameters",
        "the gradients of this call", *["the packed EMA weights"] * (compute == "bf16"))}


@pytest.mark.skipif(not on_the_stand_in(), reason="by the stand-in of the runtime")
def test_a_device_that_does_not_open_is_opened_later():
    import subprocess
    import sys

    code = ("import ctypes, os, promoe\n"
            "library = ctypes.CDLL(os.environ['PROMOE_CUDA_ON_CPU'])\n"
            "for nth in range(1, 9):\n"
            "    library.pm_host_set(b'fail_allocation', str(nth).encode())\n"
            "    try: promoe.DeviceArray(__import__('numpy').zeros(4, 'f4'), 'cuda-on-cpu')\n"
            "    except ValueError as error: print(nth, error)\n"
            "    except MemoryError as error: print(nth, 'array', error); break\n")
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    lines = done.stdout.splitlines()
    assert done.returncode == 0, done.stdout + done.stderr
    for words, line in zip(("cudaHostAlloc: out of memory", "cudaHostAlloc: out of memory", "cudaMalloc: out of memory",
                            "cublasLtCreate: CUBLAS_STATUS_ALLOC_FAILED",
                            "no 33554432 bytes of GPU memory for cuBLASLt: out of memory", "6 array"), lines, strict=True):
        assert words in line
    assert "are free" in lines[-1]


def test_where_there_is_no_such_compute():
    with pytest.raises(ValueError, match="Model: compute = 'bf16-emulated' is for a CPU"):
        promoe.Model(MICRO, device=DEVICE, compute="bf16-emulated")
