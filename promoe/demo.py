"""The demo: train a ProMoE on handwritten digits, sample it, and say how good the samples are.

    python -m promoe.demo            (or: make demo)

It writes samples.png, loss.png, routing.png and report.json beside the training run. The same
command again continues a run that was stopped, and does not train a finished one again: its
pictures and figures are made anew. Another seed needs another folder.
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from contextlib import contextmanager
from pathlib import Path

import numpy as np

import promoe
from promoe import cli, evaluate, report
from promoe.checkpoint import CheckpointError
from promoe.data import load_digits

__all__ = ["RECIPE", "demo", "main"]

RECIPE = dict(batch_size=64, lr=1e-3, warmup=50, clip=0.5, ema=0.995)
STEPS = 1500  # updates: 64 epochs
GUIDANCE = 1.5
NOISE_LEVELS = (0.1, 0.3, 0.5, 0.7, 0.9)  # where the load of the experts is counted
SHOWN_LEVEL = 0.3  # and where routing.png looks


def demo(out="runs/demo", *, config="ProMoE-digits", steps=STEPS, samples=1000, sample_steps=30,
         seed=0, since=None, progress=True, **recipe):
    """Train, sample, evaluate, draw.

    Parameters
    ----------
    out : path
        Folder for the pictures and report.json; the training run is in its folder `train`.
    config : ModelConfig or str
        A model of the embedded digits.
    steps, samples, sample_steps, seed : int
        Updates; samples that are judged (a multiple of the 10 classes); Euler steps of each; seed
        of everything.
    since : float, optional
        Unix time at which the preparations began, for the report.
    progress : bool
        Show bars.
    **recipe
        Changes of `RECIPE`, arguments of `promoe.train`.

    Returns
    -------
    dict
        What report.json holds. Beside the figures of `evaluate.score_digits`: load and balance of
        the experts on held-out digits at five noise levels, a tenth of them without a class; the
        last losses; seconds per part; and what was run.
    """
    config = promoe.preset(config) if isinstance(config, str) else config
    out = Path(out)
    out.mkdir(parents=True, exist_ok=True)
    seconds = {} if since is None else {"environment_and_build": round(time.time() - since, 1)}
    begin = time.perf_counter()

    @contextmanager
    def part(name):
        start = time.perf_counter()
        yield
        seconds[name] = round(time.perf_counter() - start, 1)

    with part("train"):
        recipe = {**RECIPE, **recipe}
        continued = _last_step(out / "train")
        run = promoe.train(config, "digits", out=out / "train", steps=steps, seed=seed, keep_last=1,
                           checkpoint_every=500, progress=progress, **recipe)
    with part("sample"):
        labels = np.arange(samples) % config.num_classes
        x = promoe.sample(run.model, labels, steps=sample_steps, cfg=GUIDANCE, seed=seed,
                          batch_size=250, progress=progress)
    with part("evaluate"):
        score = evaluate.score_digits(x, labels)
        layers = _route(run.model, *_held_out(config, 10), NOISE_LEVELS, seed)
    with part("pictures"):
        _draw(out, run, x, labels, layers, seed)
    prepared = seconds.get("environment_and_build", 0)
    seconds["total"] = round(prepared + time.perf_counter() - begin, 1)

    last = run.history[-50:]
    found = {
        **score,
        "load": evaluate.expert_load(layers, config),
        "balance": evaluate.load_balance(layers, config),
        "loss": {name: float(np.mean([r[name] for r in last])) if last else None
                 for name in ("loss", "mse", "aux")},  # mean of the last 50 records
        "seconds": seconds,
        "images_per_s": float(np.median([r["images_per_s"] for r in last])) if last else None,
        "training": {"steps": run.model.step, "images": run.model.step * recipe["batch_size"],
                     "continued_from_step": continued, "seed": seed, **recipe},
        "sampling": {"steps": sample_steps, "cfg": GUIDANCE, "weights": "ema", "seed": seed},
        "model": {"parameters": config.num_params, "active_parameters": config.num_active_params,
                  "router": config.router, "config": config.to_dict()},
        "machine": {**promoe.backend_info(), "threads": promoe.get_num_threads()},
        "promoe": promoe.__version__,
    }
    (out / "report.json").write_text(json.dumps(found, indent=2) + "\n")
    return found


def _last_step(folder):
    """The last step in the log of an earlier run; 0 without one."""
    log = folder / "log.jsonl"
    lines = log.read_text().splitlines() if log.is_file() else []
    return json.loads(lines[-1])["step"] if lines else 0


# ---------------------------------------------------------------- routing


def _held_out(config, every):
    """Held-out digits, every `every`-th without a class."""
    x, y = load_digits("heldout")
    return x, np.where(np.arange(len(y)) % every == every - 1, config.null_label, y)


def _route(model, x, y, levels, seed):
    """What the routers do with digits at noise levels in (0, 1), in one batch: a list of Routing.

    The input of level s is (1 - s) x + s noise at time 1000 s, as in training.
    """
    noise = np.random.default_rng(seed).standard_normal((len(levels), *x.shape))
    s = np.asarray(levels)[:, None, None, None, None]
    noised = ((1 - s) * x + s * noise).reshape(-1, *x.shape[1:])
    return model.routing(noised, 1000 * np.repeat(levels, len(x)), np.tile(y, len(levels)))


def _draw(out, run, x, labels, layers, seed):
    """The three pictures."""
    config = run.model.config
    rows = [np.flatnonzero(labels == digit)[:16] for digit in range(config.num_classes)]
    columns = min(map(len, rows))
    order = np.concatenate([row[:columns] for row in rows])
    report.save_png(report.sample_grid(x[order], columns, labels[order]), out / "samples.png")
    report.save_png(report.loss_curve(run.history), out / "loss.png")

    held, y = load_digits("heldout")
    chosen = [int(np.flatnonzero(y == digit)[0]) for digit in range(10)]
    chosen += [int(np.flatnonzero(y == digit)[1]) for digit in (3, 8)]  # shown without their class
    held, y = held[chosen], np.array([*range(10), config.null_label, config.null_label])
    shown = _route(run.model, held, y, (SHOWN_LEVEL,), seed)
    load = evaluate.expert_load(layers, config)
    counts = [list(load[f"block {layer.block}"].values()) for layer in layers]
    groups = evaluate.expert_names(config) + ["shared (every token)"] * config.use_shared_expert
    figure = report.routing_map(
        np.stack([layer.expert[:, :, 0] for layer in shown]), held, grid=config.grid, groups=groups,
        names=[f"block {layer.block}" for layer in shown],
        titles=[f"class {label}" for label in y[:10]] + ["no class"] * 2,
        load=np.array(counts) / layers[0].expert[..., 0].size,
        title=f"Which expert took which token of a held-out digit? "
              f"Colours: at noise level {SHOWN_LEVEL:g}, "
              f"tokens of {config.patches[0]} x {config.patches[1]} pixels; "
              f"bars: all digits and noise levels")
    report.save_png(figure, out / "routing.png")


# ---------------------------------------------------------------- command


def summary(found, out):
    """The report in a few lines."""
    out, seconds = Path(out), found["seconds"]
    parts = ", ".join(f"{name} {s:.0f}" for name, s in seconds.items() if name != "total")
    return "\n".join([
        f"{found['training']['steps']:,} updates of {found['training']['batch_size']} digits, "
        f"{seconds['total']:.0f} s in all ({parts})",
        f"recognised as the digit asked for: {found['recognised']:.1%} of {found['samples']} "
        f"samples (the classifier is right on {found['classifier_accuracy']:.1%} of held-out digits)",
        f"Frechet distance to held-out digits: samples {found['frechet_samples']:.2f}, "
        f"training digits {found['frechet_train']:.2f}",
        f"distance to the nearest training digit: samples {found['nearest_train']:.2f}, "
        f"held-out digits {found['nearest_heldout']:.2f}",
        *(f"{out / name}" for name in ("samples.png", "loss.png", "routing.png", "report.json")),
    ])


def main(argv=None):
    """Run the demo; returns the exit code."""
    parser = argparse.ArgumentParser(prog="python -m promoe.demo",
                                     description=__doc__.split("\n")[0])
    parser.add_argument("--out", default="runs/demo", help="folder to write to (%(default)s)")
    parser.add_argument("--steps", type=int, default=STEPS, help="updates (%(default)s)")
    parser.add_argument("--samples", type=int, default=1000,
                        help="samples that are judged (%(default)s)")
    parser.add_argument("--seed", type=int, default=0, help="of everything (%(default)s)")
    parser.add_argument("--since", type=float, help="Unix time at which make began, for the report")
    parser.add_argument("--quiet", action="store_true", help="no progress bars")
    arguments = parser.parse_args(argv)
    config = promoe.preset("ProMoE-digits")
    print(cli.headline(config), flush=True)
    try:
        found = demo(arguments.out, steps=arguments.steps, samples=arguments.samples,
                     seed=arguments.seed, since=arguments.since, progress=not arguments.quiet)
    except (CheckpointError, ImportError, OSError, ValueError) as error:
        print(f"promoe.demo: error: {error}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        print("promoe.demo: stopped; the same command continues", file=sys.stderr)
        return 130
    print(summary(found, arguments.out))
    return 0


if __name__ == "__main__":
    sys.exit(main())
