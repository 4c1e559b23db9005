"""A run small enough to repeat: a ProMoE of a few thousand parameters on the embedded digits."""

import warnings

import numpy as np

import promoe

CONFIG = promoe.ModelConfig(
    input_size=8, patch_size=4, in_channels=1, num_classes=10, hidden_size=16, depth=2, num_heads=2,
    num_routed_experts=3, learn_sigma=False)
SETTINGS = dict(batch_size=6, lr=2e-3, seed=7, ema=0.9, checkpoint_every=4, progress=False)


def run(out, steps, config=CONFIG, **changes):
    """promoe.train on the digits."""
    return promoe.train(config, "digits", out=out, steps=steps, **{**SETTINGS, **changes})


def state(model):
    """The whole training state, as bytes."""
    return {name: array.tobytes() for name, array in model.training_state().items()}


def losses(result):
    """The logged numbers, without the clock."""
    return [{k: v for k, v in r.items() if k not in ("images_per_s", "time")}
            for r in result.history]


def assert_same_run(one, other):
    assert losses(one) == losses(other)
    assert state(one.model) == state(other.model)


def damage(path, offset=-1):
    """Flip one bit of a file."""
    content = bytearray(path.read_bytes())
    content[offset] ^= 1
    path.write_bytes(content)


def checkpoint_steps(out):
    return sorted(int(p.name[5:]) for p in (out / "checkpoints").iterdir())


def resume(out, steps, **changes):
    """run, with warnings allowed."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return run(out, steps, **changes)


def same_arrays(one, other):
    return one.keys() == other.keys() and all(np.array_equal(one[k], other[k]) for k in one)
