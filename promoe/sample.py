"""Sampling: from labels to images, in batches."""

from __future__ import annotations

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
    if not hasattr(model, "sample"):
        model = checkpoint.load(model, device=device, compute=compute)
    labels = check_labels(labels, per_class, model.config)
    if not isinstance(steps, (int, np.integer)) or isinstance(steps, bool) or steps < 1:
        raise ValueError(f"sample: steps = {steps!r}: must be an integer of at least 1")
    if isinstance(batch_size, bool) or int(batch_size) != batch_size or batch_size < 1:
        raise ValueError(f"sample: batch_size = {batch_size!r}: must be an integer of at least 1")
    out = np.empty((len(labels), *model.config.input_shape), np.float32)
    passes = -(-len(labels) // batch_size)
    with tqdm(total=passes * steps, unit="step", disable=not progress) as bar:
        for first in range(0, len(labels), batch_size):
            part = slice(first, first + batch_size)
            bar.set_postfix_str(f"{first} of {len(labels)} samples", refresh=False)
            out[part] = model.sample(labels[part], steps=steps, cfg=cfg, seed=seed, weights=weights,
                                     start=first, callback=lambda *_: bar.update())
    return out


def check_labels(labels, per_class, config):
    """The labels as int64, from one of the two ways to give them."""
    if (labels is None) == (per_class is None):
        raise TypeError("sample: give either labels or per_class")
    if per_class is not None:
        if isinstance(per_class, bool) or int(per_class) != per_class or per_class < 1:
            raise ValueError(f"sample: per_class = {per_class!r}: must be an integer of at least 1")
        return np.repeat(np.arange(config.num_classes), int(per_class))
    labels = np.atleast_1d(np.asarray(labels))
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
