"""Sampling: from labels to images, in batches."""

from __future__ import annotations

import numbers
import os

import numpy as np
from numpy.typing import ArrayLike, NDArray
from tqdm.auto import tqdm

from promoe import checkpoint
from promoe.model import Model

__all__ = ["sample"]


def sample(model: Model | str | os.PathLike, labels: ArrayLike | None = None, *,
           per_class: int | None = None, steps: int = 50, cfg: float = 1.0, seed: int = 0,
           weights: str = "ema", batch_size: int = 64, progress: bool = True, device: str = "cpu",
           compute: str = "fp32") -> NDArray[np.float32]:
    """Generate samples.

    A sample depends on (seed, its place in `labels`), its label and the settings; not on
    `batch_size`, beyond the last bits.

    Parameters
    ----------
    model : Model or path
        What `promoe.load` takes.
    labels : int array (n,), optional
        One per sample; ``config.null_label`` is "no class".
    per_class : int, optional
        Instead of `labels`: so many of every class, 0 0 .. 1 1 .. .
    steps : int
        Euler steps.
    cfg : float
        Classifier-free guidance, over all channels; 1 is none.
    seed : int
        Of the initial noise.
    weights : {"ema", "live"}
        The averaged parameters, or those of the last update.
    batch_size : int
        Samples computed together.
    progress : bool
        Show a bar.
    device, compute : str
        Used when `model` is a path.

    Returns
    -------
    float32 array (n, C, *sizes)
    """
    if isinstance(model, (str, os.PathLike)):
        model = checkpoint.load(model, device=device, compute=compute)
    elif not hasattr(model, "sample"):
        raise TypeError(f"sample: model must be a Model or a path, not {type(model).__name__}")
    labels = check_labels(labels, per_class, model.config)
    check_count("steps", steps)
    check_count("batch_size", batch_size)
    out = np.empty((len(labels), *model.config.input_shape), np.float32)
    passes = -(-len(labels) // batch_size)
    with tqdm(total=passes * steps, unit="step", disable=not progress) as bar:
        for first in range(0, len(labels), batch_size):
            part = slice(first, first + batch_size)
            bar.set_postfix_str(f"{first} of {len(labels)} samples", refresh=False)
            out[part] = model.sample(labels[part], steps=steps, cfg=cfg, seed=seed, weights=weights,
                                     start=first, callback=lambda *_: bar.update())
    return out


def check_count(name, value):
    """ValueError when `value` is not an integer of at least 1."""
    if isinstance(value, bool) or not isinstance(value, numbers.Integral) or value < 1:
        raise ValueError(f"sample: {name} = {value!r}: must be an integer of at least 1")


def check_labels(labels, per_class, config):
    """The labels as int64, from one of the two ways to give them."""
    if (labels is None) == (per_class is None):
        raise TypeError("sample: give either labels or per_class")
    if per_class is not None:
        check_count("per_class", per_class)
        return np.repeat(np.arange(config.num_classes), int(per_class))
    labels = np.atleast_1d(np.asarray(labels))
    if labels.size == 0:
        raise ValueError("sample: labels is empty: at least one is expected")
    if labels.ndim != 1 or labels.dtype.kind not in "iu":
        raise TypeError(f"sample: labels must be integers of shape (n,), not {labels.dtype} "
                        f"{labels.shape}")
    most = config.num_classes - (not config.has_null_label)
    wrong = (labels < 0) | (labels > most)
    if wrong.any():
        place = int(np.argmax(wrong))
        raise ValueError(f"sample: label {labels[place]} of sample {place}: must be in 0..{most}"
                         + (f", where {most} is no class" if config.has_null_label else
                            "; the model has no row for no class"))
    return labels.astype(np.int64)
