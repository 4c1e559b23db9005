"""The training loop."""

from __future__ import annotations

import os
import time
import warnings
from collections.abc import Callable
from contextlib import closing
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tqdm.auto import tqdm

from promoe import checkpoint, set_num_threads
from promoe.checkpoint import CheckpointError
from promoe.config import ModelConfig, RectifiedFlow, TrainSettings, preset
from promoe.data import batches, open_data
from promoe.folder import TrainingFolder, differences
from promoe.interrupt import Interruptible
from promoe.model import Model, StepInfo

__all__ = ["TrainResult", "train"]

MOST_SKIPPED = 100  # updates in a row that were not finite: the run has diverged


@dataclass(frozen=True)
class TrainResult:
    """What `train` returns: the model, the logged records (dicts), and the folder."""

    model: Model
    history: list[dict]
    out: Path

    def __repr__(self):
        last = f", loss {self.history[-1]['loss']:.4g}" if self.history else ""
        return f"TrainResult({len(self.history)} records{last}, out={str(self.out)!r})"


def train(config: ModelConfig | str, data: Any = "digits", *, out: str | os.PathLike, steps: int,
          batch_size: int = 64, lr: float = 1e-4, seed: int = 0, checkpoint_every: int = 1000,
          betas: tuple[float, float] = (0.9, 0.999), eps: float = 1e-8, weight_decay: float = 0.0,
          clip: float | None = 0.5, ema: float | None = 0.9999, ema_warmup: bool = True,
          warmup: int = 0,
          micro_batch: int | None = None, flip: bool = False,
          objective: RectifiedFlow | None = None, keep_last: int = 2, log_every: int = 1,
          threads: int | None = None, device: str = "cpu", compute: str = "fp32",
          progress: bool = True,
          on_step: Callable[[int, StepInfo], Any] | None = None) -> TrainResult:
    """Train a model, or continue training it: the same call again goes on to `steps`.

    A continued run equals an uninterrupted one bit for bit. SIGTERM and Ctrl-C save the last
    complete update and leave (SystemExit, KeyboardInterrupt).

    Parameters
    ----------
    config : ModelConfig, or the name of a preset
    data : "digits", path of an image folder, (x, y) arrays, or a data set
        x is float32 (n, C, *sizes), y integers (n,).
    out : path
        Folder of the run: checkpoints and log.jsonl. Empty or new, or one of this very run.
    steps : int
        Updates in all, those of earlier calls included.
    batch_size, micro_batch : int
        Samples per update; computed `micro_batch` at a time to save memory (default: at once).
        The contrastive loss is over a micro-batch.
    lr, betas, eps, weight_decay, clip, ema, warmup
        AdamW with constant rate after `warmup` updates of linear increase; `clip` bounds the
        norm of the gradient (0 or None: not clipped); `ema` is the decay of the averaged weights
        (None: there are none, and "ema" means the last ones).
    ema_warmup : bool
        Bound that decay by (1 + step) / (10 + step), so that a short run forgets its start. The
        public code does not; with False the decay is `ema` from the first update.
    seed : int
        Of initial weights, noise, times, label drop and data order.
    checkpoint_every, keep_last : int
        Updates between checkpoints; how many are kept.
    flip : bool
        Mirror half of the samples.
    objective : RectifiedFlow, optional
    log_every : int
        Updates between lines of the log.
    threads : int, optional
        Worker threads; the results do not depend on it.
    device, compute : str
        As of `Model`.
    progress : bool
        Show a bar with loss and images per second.
    on_step : callable, optional
        Called as ``on_step(step, info)`` after every update; info is the StepInfo.

    Returns
    -------
    TrainResult

    Raises
    ------
    CheckpointError
        When `out` belongs to another run (the differences are listed), to a running trainer, or
        has no whole checkpoint to continue from.
    """
    config = preset(config) if isinstance(config, str) else config
    objective = RectifiedFlow() if objective is None else objective
    check_type("config", config, ModelConfig)
    check_type("objective", objective, RectifiedFlow)
    check_type("out", out, (str, os.PathLike))
    if on_step is not None and not callable(on_step):
        raise TypeError(f"train: on_step must be callable, not {type(on_step).__name__}")
    settings = TrainSettings(
        steps=steps, checkpoint_every=checkpoint_every, keep_last=keep_last, log_every=log_every,
        seed=seed, batch_size=batch_size, micro_batch=batch_size if micro_batch is None else micro_batch, lr=lr, betas=betas,
        eps=eps, weight_decay=weight_decay, clip=clip or 0.0, ema=ema,
        ema_warmup=ema_warmup, warmup=warmup, flip=flip)
    source = open_data(data, config)
    run = {"config": config.to_dict(), "objective": objective.to_dict(), "seed": settings.seed,
           "compute": compute, "data": source.describe(), "training": settings.to_dict()}
    if threads is not None:
        set_num_threads(threads)

    with TrainingFolder(out) as folder, Interruptible() as stop:
        step, state = start(folder, run)
        model = Model(config, seed=seed, device=device, compute=compute, objective=objective)
        if state is not None:
            say_where(state[0], model, folder.path)
            checkpoint.restore(*state, folder.path, model=model)
        history = folder.log.cut(step)
        if step > steps:
            warnings.warn(f"{out} is at step {step} already, beyond steps = {steps}", stacklevel=2)

        def save():
            folder.save(model, {**run, "step": step, "position": step * batch_size}, keep_last)

        save()  # at step 0 too: a disk without room is found out before the work
        stream = batches(source, seed, step * batch_size, batch_size, flip)
        bar = tqdm(total=steps, initial=step, unit="step", disable=not progress)
        skipped = 0  # updates in a row
        with bar, closing(stream):
            try:
                while step < steps:
                    begin = time.perf_counter()
                    with stop.at_once():
                        x, y = next(stream)
                        accumulate(model, x, y, step * batch_size, settings.micro_batch)
                    info = model.update(**settings.optimizer(step))
                    step += 1
                    speed = batch_size / (time.perf_counter() - begin)
                    if step % log_every == 0 or step == steps:
                        history.append(record(step, info, settings.rate(step - 1), speed))
                        folder.log.append(history[-1])
                        bar.set_postfix_str(f"loss {info.loss:.4f}, {speed:.0f} images/s", False)
                    bar.update()
                    skipped = skipped + 1 if info.skipped else 0
                    if skipped == MOST_SKIPPED:
                        raise FloatingPointError(f"no finite update since step {step - skipped}: "
                                                 f"the run has diverged; lower lr")
                    if step % checkpoint_every == 0:
                        save()
                    if on_step:
                        on_step(step, info)
            finally:
                save()  # the last complete update, whatever ended the loop
    return TrainResult(model, history, Path(out))


def accumulate(model, x, y, position, micro_batch):
    """Gradients of one batch, `micro_batch` samples at a time; position is that of sample 0."""
    for i in range(0, len(x), micro_batch):
        part = slice(i, i + micro_batch)
        model.accumulate(x[part], y[part], position + i, scale=len(x[part]) / len(x))


def record(step, info, lr, speed):
    """One line of the log."""
    return {"step": step, "loss": float(info.loss), "mse": float(info.mse), "aux": float(info.aux),
            "grad_norm": float(info.grad_norm), "skipped": bool(info.skipped), "lr": lr,
            "images_per_s": round(speed, 2), "time": round(time.time(), 2)}


def check_type(name, value, wanted):
    """TypeError when `value` is not a `wanted`: a type, or the two that a path can have."""
    if not isinstance(value, wanted):
        word = wanted.__name__ if isinstance(wanted, type) else "path"
        raise TypeError(f"train: {name} must be a {word}, not {type(value).__name__}")


def start(folder, run):
    """Where the run stands: (0, None) in an empty folder, else (step, (manifest, state)).

    Raises CheckpointError, with the differences, when the folder belongs to another run.
    """
    found = folder.newest()
    if found is None:
        return 0, None
    manifest = found[0]
    if differ := differences(manifest, run):
        raise CheckpointError(f"{folder.path} is another run; it differs in {'; '.join(differ)}. "
                              f"Use the same values, or another folder")
    return manifest["step"], found


def say_where(manifest, model, path):
    """A warning when the run goes on where its bits will differ: another device or instruction set."""
    places = manifest, {"device": model.device, "level": model.level, "compute": model.compute}
    if bits_of(places[0]) != bits_of(places[1]):
        before, now = (place["level"] if place["device"] == "cpu" else f"{place['device']} ({place['level']})"
                       for place in places)
        warnings.warn(f"{path} was trained with {before} and goes on with {now}: its last bits will "
                      f"differ from those of an uninterrupted run", stacklevel=3)


def bits_of(place):
    """What decides the last bits of a run: the level amx is avx512 but for its products of bf16."""
    level = place["level"]
    if level == "amx" and place["compute"] == "fp32":
        level = "avx512"
    return place["device"], level
