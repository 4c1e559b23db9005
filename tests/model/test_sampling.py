"""The sampler: noise, guidance, weights, batches, callbacks."""

import numpy as np
import pytest

import promoe
from promoe import ops
from tests.model.common import SMALL, batch, relative, small_model

LABELS = [0, 3, 1, 5, 2]  # 5 means "no class"
SHAPE = (5, *SMALL.input_shape)


def noise(seed, n=5, start=0, shape=SMALL.input_shape):
    count = int(np.prod(shape))
    x = ops.gaussian_noise_forward(np.array([seed, start]), B=n, M=count)["x"]
    return x.reshape(n, *shape)


def reference(model, labels, steps, cfg, x, shift=1.0):
    """Euler in float64 over Model.forward."""
    x = x.astype(np.float64)
    sigma = np.linspace(1, 0, steps + 1)
    sigma = shift * sigma / (1 + (shift - 1) * sigma)
    C, n = model.config.in_channels, len(labels)
    for a, b in zip(sigma, sigma[1:]):
        now = x.astype(np.float32)
        v = model.forward(now, np.float32(1000 * a), labels)[:, :C].astype(np.float64)
        if cfg > 1:
            u = model.forward(now, np.float32(1000 * a), [model.config.null_label] * n)[:, :C]
            v = u + cfg * (v - u)
        x = x + (b - a) * v
    return x


@pytest.mark.parametrize("cfg", [0.5, 1.0, 1.5, 4.0])
@pytest.mark.parametrize("shift", [1.0, 3.0])
def test_euler_with_guidance(cfg, shift):
    model = small_model()
    got = model.sample(LABELS, steps=4, cfg=cfg, seed=2, weights="live", shift=shift)
    assert got.shape == SHAPE and got.dtype == np.float32
    assert relative(got, reference(model, LABELS, 4, cfg, noise(2), shift)) <= 5e-6


def test_guidance_of_one_is_the_conditional_output():
    model = small_model()
    one = model.sample(LABELS, steps=3, cfg=1.0)
    assert np.array_equal(one, model.sample(LABELS, steps=3, cfg=0.0))
    assert relative(model.sample(LABELS, steps=3, cfg=1.0 + 1e-12), one) <= 1e-6


def test_one_batch_of_two_passes_has_the_same_bits():
    for config in (SMALL, SMALL.replace(input_size=20, top_k=1)):
        model = small_model(config=config)
        together = model.sample(LABELS, steps=3, cfg=2.5, together=True)
        assert np.array_equal(together, model.sample(LABELS, steps=3, cfg=2.5, together=False))
        assert np.array_equal(together, model.sample(LABELS, steps=3, cfg=2.5))


def test_a_sample_does_not_depend_on_its_batch():
    model = small_model()
    whole = model.sample(LABELS, steps=3, cfg=2, seed=4)
    assert np.array_equal(whole, model.sample(LABELS, steps=3, cfg=2, seed=4, batch_size=2))
    for i, label in enumerate(LABELS):
        assert np.array_equal(whole[i:i + 1], model.sample([label], steps=3, cfg=2, seed=4, start=i))
    assert not np.array_equal(whole, model.sample(LABELS, steps=3, cfg=2, seed=5))


def test_forward_does_not_depend_on_the_batch():
    model = small_model()
    x, t, y, _ = batch(SMALL)
    whole = model.forward(x, t, y)
    for i in range(len(x)):
        assert np.array_equal(model.forward(x[i:i + 1], t[i], y[i]), whole[i:i + 1])


# ---------------------------------------------------------------- conditions that repeat

MANY = SMALL.replace(num_classes=40, depth=2)


@pytest.mark.parametrize("cfg", [1.0, 2.0])
def test_repeated_labels_give_what_distinct_ones_give(cfg):
    """The conditions of many steps at a time, of some, and of one: the same bits for every image."""
    model = small_model(config=MANY)
    few = [7, 7, 40, 7, 3, 40, 3]  # 40 means "no class"
    noises = noise(1, n=40)
    got = model.sample(few, steps=19, cfg=cfg, noise=noises[few_index(few)])
    many = [7, 3, 40, *(i for i in range(37) if i not in (7, 3))]  # too many for two steps at a time
    want = model.sample(many, steps=19, cfg=cfg, noise=noises[:len(many)])
    assert np.array_equal(got, want[few_index(few)])
    for i, label in enumerate([7, 3, 40]):
        alone = model.sample([label], steps=19, cfg=cfg, noise=noises[i:i + 1])
        assert np.array_equal(alone, want[i:i + 1])


def few_index(labels):
    return [[7, 3, 40].index(label) for label in labels]


@pytest.mark.parametrize("labels, cfg, at_once", [
    ([1], 1, 16), ([1], 2, 8), ([1, 1, 1, 2], 1, 8), ([1] * 5 + [40], 2, 8), (list(range(20)), 1, 1),
    (list(range(20)), 2, 1)])
def test_conditions_are_worked_out_once(labels, cfg, at_once):
    model = small_model(config=MANY)
    for together in (True, False):
        model.profile(True)
        model.sample(labels, steps=18, cfg=cfg, together=together)
        calls = {name: row["calls"] for name, row in model.profile().items()}
        assert calls["timestep_embedding forward"] == -(-18 // at_once)
        assert calls["patch_embed forward"] == 18 * (1 if together or cfg == 1 else 2)


@pytest.mark.parametrize("times, labels, images", [
    ([0.0, -0.0, 1e-30, 250.5, 1000.0], range(41), 100),  # every mix
    (np.linspace(1, 999, 400), (2, 40), 400),  # many times
    ([500.0], (0, 16, 32, 3, 19, 35, 5, 21), 8)])  # labels that meet in a small table
def test_forward_of_repeated_conditions(times, labels, images):
    """Each image is as it is alone."""
    model = small_model(config=MANY)
    rng = np.random.default_rng(3)
    x = rng.standard_normal((images, *MANY.input_shape)).astype(np.float32)
    t, y = rng.choice(times, images).astype(np.float32), np.resize(labels, images)
    together = model.forward(x, t, y)
    for i in range(images):
        assert np.array_equal(model.forward(x[i:i + 1], t[i], y[i]), together[i:i + 1])
    same = model.forward(np.repeat(x[:1], images, 0), t[0], y[0])
    assert np.array_equal(same, np.repeat(same[:1], images, 0))


# ---------------------------------------------------------------- what samples depend on


def test_noise_and_start():
    model = small_model()
    given = model.sample(LABELS[:3], steps=2, noise=noise(7, n=3, start=10), weights="live")
    assert np.array_equal(given, model.sample(LABELS[:3], steps=2, seed=7, start=10, weights="live"))
    strided = noise(7, n=6, start=10).astype(np.float64)[::2]
    model.sample(LABELS[:3], steps=2, noise=strided)


def test_an_initial_model_returns_its_noise():
    assert np.array_equal(promoe.Model(SMALL).sample(LABELS, steps=2, cfg=2, seed=3), noise(3))


def test_weights():
    model = small_model()
    before = model.sample(LABELS, steps=2)
    assert np.array_equal(before, model.sample(LABELS, steps=2, weights="live"))  # no update yet
    x, _, y, _ = batch(SMALL)
    for i in range(2):  # the packed average has to follow
        model.accumulate(x, y, i)
        model.update(lr=1e-2, ema=0.5)
        ema, live = promoe.Model(SMALL), promoe.Model(SMALL)
        ema.load_state_dict(model.state_dict(ema=True))
        live.load_state_dict(model.state_dict())
        for weights, other in (("ema", ema), ("live", live)):
            assert np.array_equal(model.sample(LABELS, steps=2, cfg=2, weights=weights),
                                  other.sample(LABELS, steps=2, cfg=2))
    assert not np.array_equal(model.sample(LABELS, steps=2), model.sample(LABELS, steps=2, weights="live"))
    model.load_state_dict(small_model().state_dict())
    assert np.array_equal(model.sample(LABELS, steps=2), before)


def test_callback():
    model = small_model()
    seen = []
    out = model.sample(LABELS, steps=3, callback=lambda i, x: seen.append((i, x)))
    assert [i for i, _ in seen] == [1, 2, 3]
    assert np.array_equal(seen[-1][1], out) and not np.array_equal(seen[0][1], out)
    assert np.array_equal(out, model.sample(LABELS, steps=3))

    def fail(i, x):
        raise KeyError("mine")

    with pytest.raises(KeyError, match="mine"):
        model.sample(LABELS, steps=3, callback=fail)
    with pytest.raises(RuntimeError, match="busy"):
        model.sample(LABELS, steps=1, callback=lambda i, x: model.forward(x, 0, LABELS))
    assert np.array_equal(out, model.sample(LABELS, steps=3))


@pytest.mark.parametrize("arguments, words", [
    (dict(labels=[0, 6]), r"labels\[1\] = 6"), (dict(labels=[-1]), r"labels\[0\] = -1"),
    (dict(labels=[]), "empty"), (dict(labels=[[1]]), "shape"), (dict(steps=0), "steps"),
    (dict(cfg=-1), "cfg"), (dict(cfg=float("nan")), "cfg"), (dict(weights="best"), "weights"),
    (dict(shift=0), "shift"), (dict(batch_size=0), "batch_size"), (dict(start=-1), "start"),
    (dict(noise=np.zeros((1, 2, 8, 8))), "noise")])
def test_wrong_arguments(arguments, words):
    with pytest.raises(ValueError, match=words):
        small_model().sample(**{"labels": LABELS, **arguments})


@pytest.mark.parametrize("arguments, words", [
    (dict(labels=[0.5]), "integers"), (dict(labels=[True]), "bool"), (dict(steps=1.5), "steps"),
    (dict(cfg="2"), "cfg"), (dict(seed=None), "seed"), (dict(callback=3), "callback"),
    (dict(noise=np.zeros((5, 2, 8, 8), complex)), "complex")])
def test_wrong_types(arguments, words):
    with pytest.raises(TypeError, match=words):
        small_model().sample(**{"labels": LABELS, **arguments})


def test_guidance_needs_a_row_for_no_class():
    model = promoe.Model(SMALL.replace(class_dropout_prob=0))
    assert model.sample([0], steps=1).shape == (1, *SMALL.input_shape)
    with pytest.raises(ValueError, match="no class"):
        model.sample([0], steps=1, cfg=2)
    with pytest.raises(ValueError, match=r"labels\[0\] = 5"):
        model.sample([5], steps=1)


# ---------------------------------------------------------------- forced routing


def test_forced_routing_reproduces():
    model = small_model()
    x, t, y, _ = batch(SMALL)
    plan = model.routing(x, t, y)
    assert [r.block for r in plan] == [1] and plan[0].expert.shape == (5, 16, 2)
    assert np.array_equal(model.forward(x, t, y, routing=plan), model.forward(x, t, y))
    assert model.forward(x, t, y, routing=iter(plan)) is not None


def test_forced_routing_is_obeyed():
    model = small_model()
    x, t, y, _ = batch(SMALL)
    free = model.routing(x, t, y)[0]
    swapped = np.where(free.expert >= 0, (free.expert + 1) % 3, -1)
    other = promoe.Routing(1, swapped, free.weight, free.load)
    out = model.forward(x, t, y, routing=[other])
    assert not np.array_equal(out, model.forward(x, t, y))
    state = model.state_dict()  # the same as experts renamed
    for j in range(3):
        for part in ("up_proj.weight", "up_proj.bias", "down_proj.weight", "down_proj.bias"):
            state[f"blocks.1.mlp.experts.{j}.{part}"] = \
                model.state_dict()[f"blocks.1.mlp.experts.{(j + 1) % 3}.{part}"]
    renamed = promoe.Model(SMALL)
    renamed.load_state_dict(state)
    unconditional = y == SMALL.null_label
    assert relative(renamed.forward(x, t, y, routing=[free])[~unconditional], out[~unconditional]) <= 1e-6


def test_wrong_routing():
    model = small_model()
    x, t, y, _ = batch(SMALL)
    r = model.routing(x, t, y)[0]
    for expert, weight, words in ((r.expert[:4], r.weight, "shape"), (r.expert, r.weight[:4], "shape"),
                                  (r.expert + 4, r.weight, "-1 to 3"), (r.expert - 2, r.weight, "-1 to 3")):
        with pytest.raises(ValueError, match=words):
            model.forward(x, t, y, routing=[promoe.Routing(1, expert, weight, r.load)])
    with pytest.raises(ValueError, match="layers"):
        model.forward(x, t, y, routing=[r, r])
    with pytest.raises(TypeError, match="integers"):
        model.forward(x, t, y, routing=[promoe.Routing(1, r.expert * 1.0, r.weight, r.load)])
    dense = promoe.Model(SMALL.replace(num_routed_experts=0, top_k=1))
    assert dense.routing(x, t, y) == []
    with pytest.raises(ValueError, match="dense"):
        dense.forward(x, t, y, routing=[r])
