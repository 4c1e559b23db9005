"""accumulate and update: against float64, over micro-batches, for any thread count, interrupted."""

import copy
import signal
import time

import numpy as np
import pytest

import promoe
from promoe import ops
from tests.model import oracle
from tests.model.common import (
    SMALL,
    assert_gradients,
    batch,
    golden,
    golden_model,
    relative,
    small_model,
)
from tests.oracle import adamw, rectified_flow

OPTIONS = dict(lr=1e-3, betas=(0.9, 0.99), eps=1e-8, weight_decay=0.01, clip=0.5, ema=0.9)


def data(config, n, seed=0):
    x, _, y, _ = batch(config, n, seed)
    return x, np.minimum(y, config.num_classes - 1)


def everything(model):
    return {**model.training_state(), "step": np.array(model.step)}


def assert_same(a, b):
    assert a.keys() == b.keys()
    for name in a:
        assert np.array_equal(a[name], b[name], equal_nan=True), name


# ---------------------------------------------------------------- against float64


def draws(model, x, y, position, forward=rectified_flow.forward, dtype=np.float64):
    """Inputs of a step: those of the oracle in float64, or the core's own."""
    c, o = model.config, model.objective
    out = forward(
        x.reshape(len(x), c.in_channels, -1).astype(dtype), np.asarray(y), np.array([model.seed, position]),
        density=o.density, logit_mean=o.logit_mean, logit_std=o.logit_std, sigmoid_scale=o.sigmoid_scale,
        shift=o.shift, drop_prob=c.class_dropout_prob, null_label=c.num_classes)
    return out["xt"].reshape(x.shape), out["t"], out["label"], out["target"].reshape(x.shape)


def test_five_updates_against_float64():
    config = SMALL.replace(class_dropout_prob=0.5)
    model = small_model(config=config)
    state = {k: v.astype(np.float64) for k, v in model.state_dict().items()}
    trained = list(model.grad_index)
    flat = lambda tensors: np.concatenate([np.ravel(tensors[k]) for k in trained])  # noqa: E731
    param, m, v = flat(state), 0 * flat(state), 0 * flat(state)
    avg = param.copy()
    for step in range(1, 6):
        x, y = data(config, 4, seed=step)
        xt, t, label, target = draws(model, x, y, 100 * step, ops.rectified_flow_forward, np.float32)
        truth = oracle.Model(config, state)
        truth.run(xt, t, label, target)
        grad = flat(truth.grads)
        norm = np.sqrt((grad**2).sum())
        options = dict(zip(("beta1", "beta2"), OPTIONS["betas"]), **{
            k: OPTIONS[k] for k in ("lr", "eps", "weight_decay", "clip", "ema")})
        out = adamw.forward(adamw.hyper(**options, step=float(step)), np.array([norm]), grad, param, m, v, avg)

        model.accumulate(x, y, position=100 * step)
        assert_gradients({k: model.gradients()[s].reshape(state[k].shape)
                          for k, s in model.grad_index.items()}, truth.grads, 2e-5)
        info = model.update(**OPTIONS)
        assert info.step == model.step == step and not info.skipped
        assert info.mse == pytest.approx(truth.mse, rel=2e-6)
        assert info.aux == pytest.approx(truth.aux_loss, rel=2e-6, abs=4e-6)
        assert info.loss == info.mse + info.aux
        assert info.grad_norm == pytest.approx(norm, rel=2e-6)
        assert not model.gradients().any()

        # Adam divides by sqrt(v): where a gradient is rounding noise (the bias of the keys) the step is noise,
        # so the state of float64 follows ours and each update is judged by itself.
        ours = model.training_state()
        got = {p: flat({k: ours[f"{p}.{k}"] for k in trained}) for p in ("param", "ema", "exp_avg", "exp_avg_sq")}
        noise = np.abs(grad) < 1e-6 * np.abs(grad).max()
        # An error e of g moves Adam's ratio m/sqrt(v) by about e/|g|: at the least |g| counted, 1e-1 lr.
        assert np.abs((got["param"] - out["param"])[~noise]).max() <= 0.1 * OPTIONS["lr"]
        assert np.median(np.abs(got["param"] - out["param"])) <= 1e-7
        assert relative(got["exp_avg"], out["m"]) <= 2e-5
        assert relative(got["exp_avg_sq"], out["v"]) <= 4e-5
        np.testing.assert_allclose(got["ema"], OPTIONS["ema"] * avg + (1 - OPTIONS["ema"]) * got["param"],
                                   rtol=3e-7, atol=1e-9)
        param, m, v, avg = (got[k].astype(np.float64) for k in ("param", "exp_avg", "exp_avg_sq", "ema"))
        at = 0
        for k in trained:
            size = state[k].size
            state[k] = param[at:at + size].reshape(state[k].shape)
            at += size


def test_the_optimizer_alone_against_float64():
    """Five updates from given gradients: every number of the state, to rounding."""
    model = small_model()
    start = {k: v.astype(np.float64) for k, v in model.training_state().items()}
    start |= {f"ema.{k}": v.astype(np.float64) for k, v in model.state_dict(ema=True).items()}
    rng = np.random.default_rng(0)
    hyper = dict(lr=1e-2, beta1=0.9, beta2=0.99, eps=1e-8, weight_decay=0.1, clip=0.5, ema=0.9)
    for step in range(1, 6):
        view = model.gradients()
        grads = {}
        for name, place in model.grad_index.items():
            view[place] = 0.01 * rng.standard_normal(view[place].shape)
            grads[name] = view[place].astype(np.float64)
        norm = np.sqrt(sum((g**2).sum() for g in grads.values()))
        info = model.update(lr=1e-2, betas=(0.9, 0.99), weight_decay=0.1, clip=0.5, ema=0.9)
        assert info.grad_norm == pytest.approx(norm, rel=1e-12) and np.isnan(info.loss)
        now = model.training_state()
        for name, grad in grads.items():
            out = adamw.forward(adamw.hyper(**hyper, step=float(step)), np.array([norm]), grad, *(
                start[f"{p}.{name}"].ravel() for p in ("param", "exp_avg", "exp_avg_sq", "ema")))
            for slab, key in (("param", "param"), ("exp_avg", "m"), ("exp_avg_sq", "v"), ("ema", "avg")):
                assert relative(now[f"{slab}.{name}"].ravel(), out[key]) <= 2e-6, (slab, name)
                start[f"{slab}.{name}"] = out[key]
    assert np.array_equal(now["param.pos_embed"], now["ema.pos_embed"])  # frozen


def test_a_golden_step_is_adam():
    case = golden("promoe_tc.mixed")
    model = golden_model(case)
    r = model.loss_and_grad(case["x"], case["t"], case["y"], case["target"], accumulate=True)
    before = model.state_dict()
    info = model.update(lr=1e-3, clip=None)
    assert info.mse == r.mse and info.aux == r.aux
    after = model.state_dict()
    for name, grad in r.grads.items():
        far = np.abs(grad) > 1e-5
        np.testing.assert_allclose((before[name] - after[name])[far], 1e-3 * np.sign(grad[far]), rtol=2e-3)
        assert np.array_equal(before[name][grad == 0], after[name][grad == 0])


# ---------------------------------------------------------------- micro-batches, draws


def test_micro_batches_add_up():
    config = SMALL.replace(contrastive_weight=0)  # whose mean over a batch is not a mean of means
    x, y = data(config, 6)
    whole, parts = small_model(config=config), small_model(config=config)
    whole.accumulate(x, y, position=10)
    for i in (0, 2, 3):
        n = {0: 2, 2: 1, 3: 3}[i]
        parts.accumulate(x[i:i + n], y[i:i + n], position=10 + i, scale=n / 6)
    assert relative(parts.gradients(), whole.gradients()) <= 1e-6
    a, b = whole.update(), parts.update()
    assert b.loss == pytest.approx(a.loss, rel=1e-6) and b.grad_norm == pytest.approx(a.grad_norm, rel=1e-6)


def test_scale_scales_both_losses():
    x, y = data(SMALL, 4)
    one, half = small_model(), small_model()
    one.accumulate(x, y, 0)
    half.accumulate(x, y, 0, scale=0.5)
    assert np.array_equal(half.gradients(), one.gradients() / 2)
    assert half.update().loss == one.update().loss


def test_many_micro_batches_between_updates():
    x, y = data(SMALL, 1)
    model = small_model()
    for i in range(40):
        model.accumulate(x, y, i, scale=1 / 40)
    info = model.update()
    losses = []
    for i in range(40):
        model = small_model()
        model.accumulate(x, y, i)
        losses.append(model.update().loss)
    assert info.loss == pytest.approx(np.mean(losses), rel=1e-6)


def test_loss_and_grad_accumulates_only_when_asked():
    x, t, y, target = batch(SMALL)
    model = small_model()
    plain = model.loss_and_grad(x, t, y, target)
    assert not model.gradients().any()
    for _ in range(2):
        again = model.loss_and_grad(x, t, y, target, accumulate=True)
        assert all(np.array_equal(again.grads[k], g) for k, g in plain.grads.items())
    for name, place in model.grad_index.items():
        assert np.array_equal(model.gradients()[place], 2 * plain.grads[name].ravel())


def test_the_gradient_of_accumulate_is_that_of_its_draws():
    x, y = data(SMALL, 5)
    model = small_model(seed=9)
    model.accumulate(x, y, position=77)
    xt, t, label, target = draws(model, x, y, 77)
    r = model.loss_and_grad(xt, t, label, target)
    for name, place in model.grad_index.items():
        # the core's t is up to some ulp of 1000 away, which moves the fastest sinusoid by 1e-4
        assert relative(model.gradients()[place].reshape(r.grads[name].shape), r.grads[name]) <= 1e-3, name
    assert model.update().loss == pytest.approx(r.loss, rel=1e-5)


def test_draws_follow_the_position_and_the_seed():
    x, y = data(SMALL, 2)
    grads = []
    for seed, position in ((0, 0), (0, 2), (1, 0), (0, 0)):
        model = promoe.Model(SMALL, seed=seed)
        model.load_state_dict(small_model().state_dict())
        model.accumulate(x, y, position)
        grads.append(model.gradients().copy())
    assert np.array_equal(grads[0], grads[3])
    assert not np.array_equal(grads[0], grads[1]) and not np.array_equal(grads[0], grads[2])


# ---------------------------------------------------------------- determinism


def train(model, steps=5, per=3, n=8):
    infos = []
    for i in range(steps):
        x, y = data(model.config, n, seed=i)
        model.accumulate(x, y, position=i * n)
        infos.append(model.update(lr=1e-3))
    return infos


def test_same_bits_for_any_thread_count():
    config = SMALL.replace(input_size=16, hidden_size=48, num_heads=3, qk_norm=True)
    before = promoe.get_num_threads()
    results = []
    try:
        for threads in (1, 2, 5):
            promoe.set_num_threads(threads)
            model = small_model(config=config)
            results.append((train(model), everything(model), model.sample([0, 1], steps=2, cfg=2)))
    finally:
        promoe.set_num_threads(before)
    for infos, state, samples in results[1:]:
        assert infos == results[0][0]
        assert_same(state, results[0][1])
        assert np.array_equal(samples, results[0][2])


@pytest.mark.parametrize("device", ["cpu", "cpu-guard"])  # the guard measures each op's scratch
def test_the_thread_count_may_change_between_steps(device):
    before = promoe.get_num_threads()
    try:
        model = small_model(device=device)
        for threads in (1, 9, 2):
            promoe.set_num_threads(threads)
            train(model, steps=1)
    finally:
        promoe.set_num_threads(before)
    other = small_model()
    for _ in range(3):
        train(other, steps=1)
    assert_same(everything(model), everything(other))


def test_resumed_training_equals_uninterrupted():
    whole, first = small_model(), small_model()
    for i in range(4):
        x, y = data(SMALL, 4, seed=i)
        whole.accumulate(x, y, 4 * i)
        whole.update(lr=1e-3)
    for i in range(2):
        x, y = data(SMALL, 4, seed=i)
        first.accumulate(x, y, 4 * i)
        first.update(lr=1e-3)
    second = promoe.Model(SMALL)
    second.load_training_state(first.training_state(), first.step)
    for i in range(2, 4):
        x, y = data(SMALL, 4, seed=i)
        second.accumulate(x, y, 4 * i)
        second.update(lr=1e-3)
    assert_same(everything(whole), everything(second))


def test_a_trained_model_learns():
    model = promoe.Model(SMALL.replace(contrastive_weight=0.1), seed=1)
    x, y = data(SMALL, 32)
    losses = []
    for i in range(60):
        model.accumulate(0.1 * x + 1, y, position=32 * i)
        losses.append(model.update(lr=3e-3).mse)
    assert np.mean(losses[-10:]) < 0.75 * np.mean(losses[:5])


# ---------------------------------------------------------------- what goes wrong


# Panels and strips that are not whole: 27 numbers in a patch, hidden layers of 45, 33 and 39, and widths of 36 and 108.
RAGGED = promoe.ModelConfig(
    input_size=6, patch_size=3, in_channels=3, hidden_size=36, depth=4, num_heads=4, num_classes=3, mlp_ratio=45 / 36,
    num_routed_experts=5, expert_hidden_size=33, shared_expert_hidden_size=39)


@pytest.mark.parametrize("config", [SMALL, RAGGED, RAGGED.replace(hidden_size=108, mlp_ratio=1.0)],
                         ids=["small", "ragged", "wide"])
@pytest.mark.parametrize("compute", promoe.backend_info()["computes"])
def test_an_update_leaves_what_a_load_would_make(config, compute):
    """Products read packed twins of the weights, which an update writes as it goes, and a load from the start."""
    model = small_model(config=config, compute=compute)
    x, t, y, target = batch(config, 7)
    y0 = y.clip(0, config.num_classes - 1)
    outs = [model.forward(x, t, y)]
    for step in range(2):
        model.accumulate(x, y0, position=step)
        model.update(lr=1e-2, ema=0.5)
        loaded = promoe.Model(config, seed=9, compute=compute)
        loaded.load_state_dict(model.state_dict())
        outs.append(model.forward(x, t, y))
        np.testing.assert_array_equal(outs[-1], loaded.forward(x, t, y))
        mine, theirs = (m.loss_and_grad(x, t, y, target) for m in (model, loaded))
        assert mine.loss == theirs.loss
        for name, g in theirs.grads.items():
            np.testing.assert_array_equal(mine.grads[name], g, err_msg=name)
    assert not np.array_equal(outs[0], outs[1]) and not np.array_equal(outs[1], outs[2])
    model.accumulate(x, y0, position=5)
    model.gradients()[3] = np.nan
    assert model.update(lr=1e-2, ema=0.5).skipped
    np.testing.assert_array_equal(model.forward(x, t, y), outs[-1])


def test_a_gradient_that_is_not_finite_is_skipped():
    model = small_model()
    train(model, steps=2)
    before = everything(model)
    model.gradients()[3] = np.nan
    info = model.update()
    assert info.skipped and not np.isfinite(info.grad_norm) and model.skipped == 1
    assert_same(everything(model), before)
    assert not model.gradients().any()
    assert not train(model, steps=1)[0].skipped


def test_data_that_is_not_finite_changes_nothing():
    model = small_model()
    x, y = data(SMALL, 3)
    model.accumulate(x, y, 0)
    before, grad = everything(model), model.gradients().copy()
    for bad in (np.nan, np.inf, 1e300):
        wrong = x.astype(np.float64)
        wrong[1, 0, 2, 3] = bad
        with pytest.raises(ValueError, match="1"):
            model.accumulate(wrong, y, 3)
    assert_same(everything(model), before)
    assert np.array_equal(model.gradients(), grad)
    assert np.isfinite(model.update().loss)


def test_update_before_any_gradient():
    with pytest.raises(RuntimeError, match="accumulate comes first"):
        promoe.Model(SMALL).update()


def test_training_without_an_ema():
    model = small_model()
    x, y = data(SMALL, 2)
    model.accumulate(x, y, 0)
    model.update(ema=None)  # there never was an average: it is the parameters
    now, average = model.state_dict(), model.state_dict(ema=True)
    assert all(np.array_equal(now[k], average[k]) for k in now)
    copied, loaded = copy.copy(model), small_model()
    loaded.gradients()
    loaded.update(ema=0.5)  # has an average, which the load takes away
    loaded.load_training_state(model.training_state(), model.step)
    for twin in (model, copied, loaded):  # a copy knows that there is none, too
        twin.accumulate(x, y, 2)
        twin.update(ema=None)
    assert_same(everything(copied), everything(model))
    assert_same(everything(loaded), everything(model))
    assert not any(name.startswith("ema.") for name in everything(loaded))
    model.accumulate(x, y, 2)
    model.update(ema=0.9)
    average = model.state_dict(ema=True)
    model.accumulate(x, y, 4)
    model.update(ema=None)  # there is one now: it stays
    assert all(np.array_equal(a, average[k]) for k, a in model.state_dict(ema=True).items())


class Stop(Exception):
    pass


@pytest.fixture
def alarm():
    """alarm(seconds): an exception out of a signal handler, so much later."""
    def handler(*_):
        raise Stop

    old = signal.signal(signal.SIGALRM, handler)
    yield lambda seconds: signal.setitimer(signal.ITIMER_REAL, seconds)
    signal.setitimer(signal.ITIMER_REAL, 0)
    signal.signal(signal.SIGALRM, old)


def test_an_interrupted_accumulate_is_whole_or_said(alarm):
    config = SMALL.replace(input_size=16, hidden_size=96, num_heads=4, depth=6)
    model = small_model(config=config)
    n, seconds = 8, 0.0
    while seconds < 0.15:  # signals are looked for every 20 ms
        n *= 2
        x, y = data(config, n)
        model.accumulate(x, y, 0)
        start = time.perf_counter()
        model.accumulate(x, y, 0)
        seconds = time.perf_counter() - start
    before = everything(model)
    model.zero_gradients()
    model.accumulate(x[:1], y[:1], 5)
    model.accumulate(x, y, 0)
    complete = model.gradients().copy()
    outcomes = set()
    for share in (0.7, 0.1, 0.8, 0.6, 0.2, 0.9, 0.5) * 3:
        model.zero_gradients()
        model.accumulate(x[:1], y[:1], 5)
        grad = model.gradients().copy()
        alarm(share * seconds)
        try:
            model.accumulate(x, y, 0)
        except Stop:
            pass
        else:
            alarm(0)
            continue
        if np.array_equal(model.gradients(), complete):  # the signal came when all was done
            continue
        if np.array_equal(model.gradients(), grad):  # nothing has happened: go on
            outcomes.add("before")
            model.accumulate(x[:1], y[:1], 6)
            assert not np.array_equal(model.gradients(), grad)
        else:  # said once, and empty then
            with pytest.raises(RuntimeError, match="incomplete"):
                model.update() if "update" in outcomes else model.accumulate(x[:1], y[:1], 6)
            outcomes.update(["halfway"] if "halfway" not in outcomes else ["update"])
            assert not model.gradients().any()
            model.accumulate(x[:1], y[:1], 5)
            assert np.array_equal(model.gradients(), grad)
        if len(outcomes) == 3:
            break
    assert "halfway" in outcomes
    assert_same(everything(model), before)


def test_sampling_and_forward_can_be_interrupted(alarm):
    model = small_model(config=SMALL.replace(input_size=32))
    alarm(0.1)
    with pytest.raises(Stop):
        model.sample([0] * 8, steps=100_000)
    train(small_model(), steps=1)
    x, t, y, _ = batch(model.config)
    assert np.isfinite(model.forward(x, t, y)).all()
