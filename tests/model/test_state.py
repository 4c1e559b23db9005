"""What a model holds, what it accepts, and what it survives."""

import copy
import gc
import pickle
import re
import threading

import numpy as np
import pytest

import promoe
from promoe import _core
from tests.model.common import (
    CASES,
    SMALL,
    assert_gradients,
    batch,
    golden,
    golden_model,
    small_model,
)


def trained_model():
    model = small_model()
    x, _, y, _ = batch(SMALL)
    for i in range(2):
        model.accumulate(x, y, 5 * i)
        model.update(lr=1e-3, ema=0.9)
    return model


def everything(model):
    return {**model.training_state(), "step": np.array(model.step)}


def assert_same(a, b):
    assert a.keys() == b.keys()
    for name in a:
        assert np.array_equal(a[name], b[name], equal_nan=True), name


# ---------------------------------------------------------------- states


def test_state_dict_is_a_copy():
    model = small_model()
    state = model.state_dict()
    for array in state.values():
        array[:] = 0
    assert model.state_dict()["blocks.0.attn.qkv.weight"].any()


def test_load_state_dict():
    state = trained_model().state_dict()
    model = trained_model()
    model.load_state_dict(state)
    assert model.step == 0
    now, average = model.training_state(), model.state_dict(ema=True)
    for name, array in state.items():
        assert np.array_equal(now[f"param.{name}"], array) and np.array_equal(average[name], array)
    assert not any(a.any() for k, a in now.items() if k.startswith("exp_avg"))
    other = small_model(seed=4).state_dict()
    model.load_state_dict({k: v.astype(np.float64) for k, v in state.items()}, ema=other)
    assert all(np.array_equal(a, state[k]) for k, a in model.state_dict().items())
    assert all(np.array_equal(a, other[k]) for k, a in model.state_dict(ema=True).items())
    half = {k: v.astype(np.float16)[...].copy(order="F") for k, v in state.items()}
    model.load_state_dict(half)
    assert all(np.array_equal(a, half[k].astype(np.float32)) for k, a in model.state_dict().items())


def test_a_state_that_does_not_fit_changes_nothing():
    model = trained_model()
    before, x = everything(model), batch(SMALL)
    out = model.forward(*x[:3])
    state = {k: 0 * v for k, v in model.state_dict().items()}
    wrong = dict(state)
    del wrong["blocks.1.mlp.cluster_centers"], wrong["pos_embed"]
    wrong["extra"] = np.zeros(3, np.float32)
    wrong["final_layer.linear.bias"] = np.zeros(3, np.float32)
    wrong["final_layer.linear.weight"] = wrong["final_layer.linear.weight"].astype(int)
    with pytest.raises(ValueError) as error:
        model.load_state_dict(wrong)
    for word in ("missing: blocks.1.mlp.cluster_centers", "missing: pos_embed", "unexpected: extra",
                 "shape of final_layer.linear.bias: (3,), expected (16,)",
                 "dtype of final_layer.linear.weight: int64", "nothing was loaded"):
        assert word in str(error.value)
    with pytest.raises(ValueError, match="ema.*\n.*missing"):
        model.load_state_dict(state, ema={})
    for complaint, arrays in (("missing", {"param.pos_embed": state["pos_embed"]}),
                              ("unexpected name other.x", {"other.x": state["pos_embed"]}),
                              ("missing", {k: v for k, v in before.items() if k != "exp_avg.final_layer.linear.bias"
                                           and k != "step"}),
                              ("belong together", {k: v for k, v in before.items() if not k.startswith("exp_avg_sq")
                                                   and k != "step"})):
        with pytest.raises(ValueError, match=complaint):
            model.load_training_state(arrays, 3)
    assert_same(everything(model), before)
    assert np.array_equal(model.forward(*x[:3]), out)


def test_training_state_round_trip():
    model, other = trained_model(), promoe.Model(SMALL, seed=8)
    other.load_training_state(model.training_state(), model.step)
    assert_same(everything(model), everything(other))
    assert np.array_equal(model.sample([1], steps=2), other.sample([1], steps=2))
    params = {k: v for k, v in model.training_state().items() if k.startswith("param.")}
    other.load_training_state(params, 0)
    assert not any(a.any() for k, a in other.training_state().items() if k.startswith("exp_avg"))


def test_names_of_the_training_state():
    model = trained_model()
    names, trained = set(model.state_dict()), set(model.grad_index)
    assert names - trained == {"pos_embed"}
    state = set(model.training_state())
    assert state == {f"{p}.{n}" for p in ("param", "ema") for n in names} | \
        {f"{p}.{n}" for p in ("exp_avg", "exp_avg_sq") for n in trained}


@pytest.mark.parametrize("duplicate", [copy.copy, copy.deepcopy, lambda m: pickle.loads(pickle.dumps(m))],
                         ids=["copy", "deepcopy", "pickle"])
def test_copies(duplicate):
    model = trained_model()
    twin = duplicate(model)
    assert (twin.config, twin.seed, twin.device, twin.objective) == \
        (model.config, model.seed, model.device, model.objective)
    before = everything(model)
    assert_same(everything(twin), before)
    x, _, y, _ = batch(SMALL)
    twin.accumulate(x, y, 10)
    twin.update(lr=0.1)
    assert_same(everything(model), before)
    model.accumulate(x, y, 10)
    model.update(lr=0.1)
    assert_same(everything(model), everything(twin))


# ---------------------------------------------------------------- gradients


def test_gradients_are_one_live_view():
    model = small_model()
    view = model.gradients()
    x, _, y, _ = batch(SMALL)
    model.accumulate(x, y, 0)
    assert view.any() and view.flags.c_contiguous and view.flags.writeable
    assert np.shares_memory(view, model.gradients())
    gaps = view.copy()
    for name, place in model.grad_index.items():
        assert place.stop - place.start == model.state_dict()[name].size
        gaps[place] = 0
    assert not gaps.any()
    view *= 2
    norm = np.sqrt((view.astype(np.float64)**2).sum())
    assert model.update().grad_norm == pytest.approx(norm, rel=1e-12)
    assert not view.any()


def test_a_view_outlives_its_model():
    model = small_model()
    view = model.gradients()
    view[:] = 3
    model.close()
    del model
    gc.collect()
    assert (view == 3).all()
    view[:] = 4


# ---------------------------------------------------------------- life


def test_close():
    with small_model() as model:
        x, t, y, target = batch(SMALL)
        model.forward(x, t, y)
    assert model.closed and "closed" in repr(model)
    for call in (lambda: model.forward(x, t, y), lambda: model.accumulate(x, y, 0), model.state_dict,
                 model.update, lambda: model.sample([0]), model.gradients, lambda: model.step,
                 lambda: model.loss_and_grad(x, t, y, target), lambda: pickle.dumps(model)):
        with pytest.raises(ValueError, match="closed"):
            call()
    model.close()


def test_a_second_thread_is_told():
    model = small_model()
    entered, leave, errors = threading.Event(), threading.Event(), []

    def callback(step, latents):
        entered.set()
        leave.wait(10)

    thread = threading.Thread(target=lambda: model.sample([0], steps=1, callback=callback))
    thread.start()
    assert entered.wait(10)
    x, t, y, _ = batch(SMALL)
    for call in (lambda: model.forward(x, t, y), model.update, model.close, model.gradients):
        with pytest.raises(RuntimeError, match="busy"):
            call()
    leave.set()
    thread.join()
    assert not errors and model.forward(x, t, y).shape == (5, 4, 8, 8)


def test_two_models_in_two_threads():
    x, t, y, _ = batch(SMALL)
    models = [small_model(seed=s) for s in (0, 1)]
    wanted = [m.forward(x, t, y) for m in models]
    wrong = []

    def work(model, out):
        for _ in range(20):
            if not np.array_equal(model.forward(x, t, y), out):
                wrong.append(model)

    threads = [threading.Thread(target=work, args=pair) for pair in zip(models, wanted)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not wrong


def test_looks():
    model = trained_model()
    for text in (repr(model), model._repr_html_()):
        for word in ("3 routed, top 2", "2 updates", f"{SMALL.num_params:,}"):
            assert word in text
    x, t, y, _ = batch(SMALL)
    assert "<table>" in model.routing(x, t, y)[0]._repr_html_()


def test_memory_estimate():
    for config in (SMALL, promoe.preset("DiT-S")):
        parts = promoe.memory_estimate(config, 4)
        assert parts["total"] == sum(v for k, v in parts.items() if k != "total")
        assert parts["parameters"] >= 4 * config.num_params and parts["moments"] == 2 * parts["gradients"]
        inference = promoe.memory_estimate(config, 4, training=False)
        assert inference["activations"] < parts["activations"] / 2 and inference["moments"] == 0
        more = promoe.memory_estimate(config, 8)
        assert more["activations"] > 1.8 * parts["activations"]
    xl = promoe.memory_estimate(promoe.preset("ProMoE-XL"), 256)
    assert xl["parameters"] > 6e9  # without taking it
    with pytest.raises(ValueError, match="batch"):
        promoe.memory_estimate(SMALL, 0)
    with pytest.raises(TypeError, match="ModelConfig"):
        promoe.memory_estimate({}, 1)


# ---------------------------------------------------------------- arguments


def test_conversions():
    model = small_model()
    x, t, y, target = batch(SMALL)
    out = model.forward(x, t, y)
    strided = np.zeros((5, 2, 8, 16))[..., ::2]
    strided[:] = x
    for other in (x.astype(np.float64), strided, np.asfortranarray(x), x.astype(">f4"), x.tolist()):
        assert np.array_equal(model.forward(other, t, y), out)
    for labels in (y.astype(np.uint8), y.astype(np.int32), y.astype(">i8"), y.astype(np.uint64), y.tolist(), y[::1]):
        assert np.array_equal(model.forward(x, t.astype(np.float64), labels), out)
    assert np.array_equal(model.forward(x, 500, 3), model.forward(x, np.full(5, 500.0), [3] * 5))
    x[0] = 0
    before = x.copy()
    model.loss_and_grad(x, t, y, target)
    assert np.array_equal(x, before)


@pytest.mark.parametrize("name, value, error, words", [
    ("x", np.zeros((5, 2, 8, 9), np.float32), ValueError, r"x has shape \(5, 2, 8, 9\); \(B, 2, 8, 8\)"),
    ("x", np.zeros((2, 8, 8), np.float32), ValueError, "x has shape"),
    ("x", np.zeros((0, 2, 8, 8), np.float32), ValueError, "empty"),
    ("x", np.zeros((5, 2, 8, 8), complex), TypeError, "complex128"),
    ("x", np.zeros((5, 2, 8, 8), bool), TypeError, "bool"),
    ("x", np.zeros((5, 2, 8, 8), np.uint8), TypeError, "uint8"),
    ("x", np.zeros((5, 2, 8, 8), object), TypeError, "object"),
    ("x", "image", ValueError, "shape"),
    ("t", np.zeros(4), ValueError, r"t has shape \(4,\); \(5,\)"),
    ("t", np.zeros((5, 1)), ValueError, "t has shape"),
    ("t", np.zeros(5, complex), TypeError, "complex128"),
    ("t", np.zeros(5, bool), TypeError, "bool"),
    ("t", None, (TypeError, ValueError), "t has"),
    ("y", np.zeros(5), TypeError, "y has dtype float64"),
    ("y", np.zeros(5, bool), TypeError, "bool"),
    ("y", np.zeros(4, int), ValueError, "y has shape"),
    ("y", [0, 1, 6, 1, 1], ValueError, r"y\[2\] = 6: a label is 0 to 5"),
    ("y", [0, 1, 2, -1, 1], ValueError, r"y\[3\] = -1"),
    ("y", np.full(5, 2**64 - 1, np.uint64), ValueError, r"y\[0\]"),
    ("y", [0, 1, 2, None, 1], TypeError, "object"),
    ("target", np.zeros((5, 4, 8, 8), np.float32), ValueError, "target has shape"),
])
def test_wrong_inputs(name, value, error, words):
    model = small_model()
    given = dict(zip(("x", "t", "y", "target"), batch(SMALL)))
    given[name] = value
    with pytest.raises(error, match=words):
        model.loss_and_grad(**given)
    if name in "xy":
        with pytest.raises(error, match=words.replace("x has", "x0 has").replace("x is", "x0 is")):
            model.accumulate(given["x"], given["y"], 0)
    assert not model.gradients().any()


@pytest.mark.parametrize("name, place", [("x", "0, 2, 3"), ("t", None), ("target", "0, 2, 3")])
@pytest.mark.parametrize("value", [np.nan, -np.inf, 1e300])
def test_numbers_that_are_not_finite(name, place, value):
    x, t, y, target = batch(SMALL)
    given = dict(x=x, t=t, y=y, target=target)
    given[name] = given[name].astype(np.float64)
    given[name][(1, 0, 2, 3) if place else 1] = value
    where = re.escape(f"{name}[1, {place}]" if place else f"{name}[1]")
    model = small_model()
    model.loss_and_grad(x, t, y, target, accumulate=True)
    grad = model.gradients().copy()
    with pytest.raises(ValueError, match=f"Model.loss_and_grad: {where}"):
        model.loss_and_grad(**given, accumulate=True)
    assert np.array_equal(model.gradients(), grad)
    if name != "target":
        with pytest.raises(ValueError, match=f"Model.forward: {where}"):
            model.forward(given["x"], given["t"], y)


def test_what_is_no_array_no_mapping_no_routing():
    x, t, y, _ = batch(SMALL)
    model = small_model()
    with pytest.raises(ValueError, match="Model.forward: x is not an array"):
        model.forward([[1.0], [1.0, 2.0]], t, y)
    for state in (None, [1]):
        with pytest.raises(TypeError, match="Model.load_state_dict: a mapping"):
            model.load_state_dict(state)
    for routing in ([None], 3, "ab"):
        with pytest.raises(TypeError, match=r"routing\[0\] is a "):
            model.forward(x, t, y, routing=routing)
    with pytest.raises(ValueError, match=r"Model.forward: y\[0\] = -1: a label is 0 to"):
        model.forward(x, t, -1)
    with pytest.raises(ValueError, match="scale = 1e[+]300"):
        model.accumulate(x, y, 0, scale=1e300)


@pytest.mark.parametrize("name, value, error", [
    ("lr", -1, ValueError), ("lr", float("nan"), ValueError), ("lr", "1", TypeError), ("lr", None, TypeError),
    ("betas", (0.9, 1.0), ValueError), ("betas", (-0.1, 0.9), ValueError), ("betas", 0.9, TypeError),
    ("eps", -1e-8, ValueError), ("weight_decay", -1, ValueError), ("clip", -1, ValueError),
    ("clip", float("inf"), ValueError), ("ema", 1.1, ValueError), ("ema", True, TypeError)])
def test_wrong_options_of_update(name, value, error):
    model = small_model()
    model.gradients()[:3] = 1
    before = everything(model)
    with pytest.raises(error, match=name):
        model.update(**{name: value})
    assert_same(everything(model), before)
    assert model.gradients().any()


@pytest.mark.parametrize("arguments, error, words", [
    (dict(position=-1), ValueError, "position"), (dict(position=0.5), TypeError, "position"),
    (dict(position=2**63), ValueError, "position"), (dict(position=0, scale=0), ValueError, "scale"),
    (dict(position=0, scale=float("inf")), ValueError, "scale"), (dict(position=0, scale="1"), TypeError, "scale")])
def test_wrong_position_or_scale(arguments, error, words):
    x, _, y, _ = batch(SMALL)
    with pytest.raises(error, match=words):
        small_model().accumulate(x, y, **arguments)


@pytest.mark.parametrize("arguments, error, words", [
    (dict(config={}), TypeError, "ModelConfig"), (dict(seed="a"), TypeError, "seed"),
    (dict(seed=2**63), ValueError, "seed"), (dict(device="gpu"), ValueError, "gpu"),
    (dict(device=0), TypeError, "device"), (dict(compute="fp16"), ValueError, "fp16"),
    (dict(objective="ddpm"), TypeError, "RectifiedFlow")])
def test_wrong_model(arguments, error, words):
    with pytest.raises(error, match=words):
        promoe.Model(**{"config": SMALL, **arguments})


def test_an_explicit_cuda_is_never_the_cpu():
    with pytest.raises(ValueError, match="cuda"):
        promoe.Model(SMALL, device="cuda")


# ---------------------------------------------------------------- the guard


@pytest.mark.parametrize("name", CASES)
def test_no_code_of_the_model_touches_backend_memory(name):
    """Training, sampling and state in memory that is unreadable outside ops: any touch is a crash."""
    case = golden(name)
    plain, guarded = golden_model(case), golden_model(case, device="cpu-guard")
    for model in (plain, guarded):
        model.results = [model.forward(case["x"], case["t"], case["y"])]
        r = model.loss_and_grad(case["x"], case["t"], case["y"], case["target"], accumulate=True)
        model.results += [*r.grads.values(), np.array([r.mse, r.aux])]
        for i in range(2):
            model.accumulate(case["x"], np.minimum(case["y"], 999), position=6 * i)
            info = model.update(lr=1e-3)
            model.results.append(np.array([info.loss, info.grad_norm]))
        model.results += [model.sample([1, 2], steps=2, cfg=2), model.sample([1], steps=1, weights="live"),
                          *model.training_state().values()]
        for layer in model.routing(case["x"], case["t"], case["y"]):
            model.results += [layer.expert, layer.weight, layer.load]
    assert all(np.array_equal(a, b) for a, b in zip(plain.results, guarded.results, strict=True))
    with pytest.raises(RuntimeError, match="cannot be viewed"):
        guarded.gradients()


# ---------------------------------------------------------------- memory that is not there


def allocations(call):
    """How many allocations a call makes."""
    before = _core._allocations()
    call()
    return _core._allocations() - before


def failing(call):
    """Runs call again and again, its first, second, ... allocation failing; how many failures there were."""
    nth = 0
    while True:
        nth += 1
        assert nth < 200
        _core._fail_allocation(nth)
        try:
            call()
            return nth - 1
        except MemoryError as error:
            yield str(error)
        finally:
            _core._fail_allocation(0)


def test_every_allocation_fails_once():
    x, t, y, target = batch(SMALL)
    plain = trained_model()
    wanted = everything(plain)
    out, samples = plain.forward(x, t, y), plain.sample([1, 2], steps=2, cfg=2)

    for message in failing(lambda: promoe.Model(SMALL)):
        assert "memory" in message
    seen = 0
    start = small_model()

    model = promoe.Model(SMALL)
    for call in (lambda: model.load_state_dict(start.state_dict()),
                 lambda: model.accumulate(x, y, 0), lambda: model.update(lr=1e-3, ema=0.9),
                 lambda: model.accumulate(x, y, 5), lambda: model.update(lr=1e-3, ema=0.9)):
        for message in failing(call):
            seen += 1
            assert "memory" in message
    assert_same(everything(model), wanted)
    for call, result in ((lambda: model.forward(x, t, y), out),
                         (lambda: model.sample([1, 2], steps=2, cfg=2), samples)):
        for _ in failing(call):
            seen += 1
        assert np.array_equal(call(), result)
    for _ in failing(lambda: model.loss_and_grad(x, t, y, target, accumulate=True)):
        seen += 1
        assert not model.gradients().any()
    for call in (lambda: model.load_training_state(wanted_arrays(wanted), 2), model.training_state,
                 lambda: copy.copy(model), lambda: promoe.memory_estimate(SMALL, 3)):
        for _ in failing(call):
            seen += 1
    assert seen > 20
    assert_same(everything(model), wanted)


def wanted_arrays(state):
    return {k: v for k, v in state.items() if k != "step"}


def test_a_load_that_runs_out_of_memory_changes_nothing():
    state = trained_model().training_state()
    model = small_model(seed=3)
    before = everything(model)
    for _ in failing(lambda: model.load_training_state(state, 2)):
        assert_same(everything(model), before)
    assert model.step == 2


def test_a_step_allocates_nothing_once_warm():
    x, t, y, target = batch(SMALL)
    model = small_model()

    def step():
        model.accumulate(x, y, 0)
        model.update()

    step()
    assert allocations(step) == 0
    model.forward(x, t, y)
    assert allocations(lambda: model.forward(x, t, y)) == 0


def test_failed_and_good_calls_leak_nothing():
    import resource

    x, t, y, target = batch(SMALL, n=64)
    model = small_model()

    def work():
        model.forward(x, t, y)
        model.loss_and_grad(x, t, y, target)
        model.sample([1], steps=1, cfg=2)
        with pytest.raises(ValueError):
            model.forward(x, t, y + 9)
        small_model().close()

    for _ in range(10):
        work()
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    for _ in range(60):
        work()
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 8 * 1024


def test_gradients_after_the_guard():  # the golden gradients hold for the second backend too
    case = golden(CASES[-1])
    r = golden_model(case, device="cpu-guard").loss_and_grad(case["x"], case["t"], case["y"], case["target"])
    assert_gradients(r.grads, {k[5:]: v for k, v in case.items() if k.startswith("grad.")}, 2e-5)
