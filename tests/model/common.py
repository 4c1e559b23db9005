"""Small models, batches, and the golden cases of tests/golden."""

import json
from pathlib import Path

import numpy as np

import promoe

GOLDEN = Path(__file__).parent.parent / "golden"
CASES = sorted(p.stem for p in GOLDEN.glob("*.npz"))

SMALL = promoe.ModelConfig(
    input_size=8, patch_size=2, in_channels=2, hidden_size=24, depth=3, num_heads=2, num_classes=5,
    num_routed_experts=3, top_k=2, router_gate="sigmoid")


def golden(name):
    with np.load(GOLDEN / f"{name}.npz") as file:
        return dict(file)


def golden_model(case, **arguments):
    config = promoe.ModelConfig.from_official(json.loads(str(case["config"])))
    model = promoe.Model(config, **arguments)
    model.load_state_dict({k[6:]: v for k, v in case.items() if k.startswith("param.")})
    return model


def scramble(model, seed=0):
    """Random weights everywhere: an initial model has zeros that hide faults."""
    rng = np.random.default_rng(seed)
    state = model.state_dict()
    for name, array in state.items():
        if name != "pos_embed":
            scale = 0.3 if array.ndim < 2 or "norm" in name else 1 / np.sqrt(array[0].size)
            array[:] = scale * rng.standard_normal(array.shape)
    model.load_state_dict(state)
    return model


def small_model(seed=0, config=SMALL, **arguments):
    return scramble(promoe.Model(config, seed=seed, **arguments), seed)


def batch(config, n=5, seed=0, null=0.4):
    """x, t, y, target; about `null` of the labels mean "no class"."""
    rng = np.random.default_rng([seed, 7])
    x = rng.standard_normal((n, *config.input_shape)).astype(np.float32)
    t = rng.uniform(0, 1000, n).astype(np.float32)
    y = rng.integers(0, config.num_classes, n)
    if config.has_null_label:
        y[rng.uniform(size=n) < null] = config.null_label
    target = rng.standard_normal(x.shape).astype(np.float32)
    return x, t, y, target


def relative(got, truth):
    """Largest error, relative to the largest value."""
    got, truth = np.asarray(got, np.float64), np.asarray(truth, np.float64)
    assert got.shape == truth.shape
    return np.abs(got - truth).max() / max(np.abs(truth).max(), 1e-300)


def assert_gradients(grads, truth, tolerance):
    """Every gradient within `tolerance` of its tensor's largest value. One that is zero in theory (the
    bias of the keys) is rounding noise on both sides: a bound of 1e-7 of the largest gradient of all."""
    scale = max(float(np.abs(g).max()) for g in truth.values())
    for name, grad in grads.items():
        wanted = truth.get(name, np.zeros(grad.shape))  # PyTorch has none for what took no part
        error, largest = np.abs(grad - wanted).max(), np.abs(wanted).max()
        assert error <= tolerance * largest + 1e-7 * scale, f"{name}: {error:.2e} of {largest:.2e}"
