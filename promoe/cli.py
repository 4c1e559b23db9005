"""The command line: promoe train | sample | info | doctor.

Exit codes: 0 done, 1 an error (one line on stderr), 2 wrong usage, 130 Ctrl-C, 143 SIGTERM; after
either, what was trained is saved.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import os
import sys
import warnings
from pathlib import Path

import numpy as np

import promoe
from promoe import _core, checkpoint, doctor, report
from promoe.config import ASSIGNMENTS, BALANCE_POOLS, DENSITIES, GATES, ModelConfig, RectifiedFlow

__all__ = ["main"]

ERRORS = (ValueError, TypeError, OSError, ImportError, MemoryError, ArithmeticError, RuntimeError)
MODEL_HELP = {  # one option per field of ModelConfig
    "input_size": "pixels per axis: one number for a square image, or one per axis",
    "patch_size": "pixels of a token per axis: one number, or one per axis",
    "in_channels": "channels of the data",
    "hidden_size": "width",
    "depth": "blocks",
    "num_heads": "attention heads",
    "head_dim": "width of an attention head; hidden_size / num_heads when absent",
    "mlp_ratio": "hidden width of a dense FFN, in widths",
    "num_classes": "classes",
    "class_dropout_prob": "probability that training drops a label",
    "learn_sigma": "twice the output channels, as DiT has",
    "qk_norm": "LayerNorm of queries and keys",
    "num_routed_experts": "routed experts of an expert block; 0 is a dense DiT",
    "expert_hidden_size": "hidden width of a routed expert; twice the width when absent",
    "shared_expert_hidden_size": "hidden width of the shared expert; twice the width when absent",
    "use_shared_expert": "an expert that every token takes",
    "use_uncond_expert": "an expert for the tokens without a class",
    "interleave": "experts in odd-indexed blocks only; otherwise in every one",
    "top_k": "experts per token",
    "router_gate": "from cosine to score",
    "contrastive_weight": "weight of the routing contrastive loss",
    "contrastive_temperature": "temperature of the routing contrastive loss",
    "contrastive_assign": "clusters by the first expert of a token, or by each of them",
    "load_balance_weight": "weight of the load-balance loss",
    "load_balance_per": "pool of the load-balance loss",
}
FLOW_HELP = {
    "density": "how the noise level is drawn",
    "logit_mean": "mean of the logit-normal density",
    "logit_std": "standard deviation of the logit-normal density",
    "sigmoid_scale": "scale inside the sigmoid of the logit-normal density",
    "shift": "above 1: train on noisier inputs",
}
CHOICES = {"router_gate": GATES, "contrastive_assign": ASSIGNMENTS, "density": DENSITIES,
           "load_balance_per": BALANCE_POOLS}
OUTPUTS = (".png", ".npy", ".npz")


def main(argv=None):
    """Run the command line; returns the exit code.

    Parameters
    ----------
    argv : list of str, optional
        Arguments without the name of the program; default: those of the process.
    """
    arguments = make_parser().parse_args(argv)
    with warnings.catch_warnings():
        warnings.simplefilter("default")
        warnings.showwarning = lambda message, *_: _say(f"warning: {message}")
        try:
            return arguments.run(arguments) or 0
        except KeyboardInterrupt:
            _say("stopped")
            return 130
        except BrokenPipeError:  # promoe info ... | head
            os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
            return 1
        except ERRORS as error:
            if arguments.traceback:
                raise
            _say(f"error: {' '.join(str(error).split()) or type(error).__name__}")
            return 1


def _say(text):
    print(f"promoe: {text}", file=sys.stderr)


# ---------------------------------------------------------------- options


class _Formatter(argparse.ArgumentDefaultsHelpFormatter):
    """Shows the defaults that there are."""

    def _get_help_string(self, action):
        return action.help if action.default is None else super()._get_help_string(action)


def make_parser():
    """The parser of all commands."""
    common = argparse.ArgumentParser(add_help=False)
    common.add_argument("--json", action="store_true", help="print the result as JSON")
    common.add_argument("--threads", type=int, help="worker threads; all allowed ones when absent")
    common.add_argument("--traceback", action="store_true", help="show where an error comes from")

    parser = argparse.ArgumentParser(
        prog="promoe", description="ProMoE diffusion transformers, trained and sampled in C.")
    parser.add_argument("--version", action="version", version=f"promoe {promoe.__version__}",
                        help="print the version")
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")

    def command(name, run, text):
        added = commands.add_parser(name, parents=[common], formatter_class=_Formatter, help=text,
                                    description=text)
        added.set_defaults(run=run)
        return added

    _train_options(command("train", run_train, "train a model, or continue training it"))
    _sample_options(command("sample", run_sample, "generate samples with a trained model"))
    info = command("info", run_info, "show sizes, router and memory of a model")
    info.add_argument("model", help="name of a preset, JSON file of a configuration, file of "
                                    "promoe.save, checkpoint or training folder")
    info.add_argument("--batch-size", type=int, default=8, help="batch of the memory estimate")
    command("doctor", run_doctor, "show what promoe finds on this machine")
    return parser


def _train_options(parser):
    add = parser.add_argument
    add("--out", required=True, help="folder of the run; the same command again continues it")
    add("--steps", type=int, required=True, help="updates in all")
    add("--data", default="digits", help="'digits' (embedded), or a folder of images with one "
                                         "directory per class")
    model = parser.add_mutually_exclusive_group()
    model.add_argument("--preset", default="ProMoE-digits", help="configuration to start from: "
                       + ", ".join(promoe.presets()))
    model.add_argument("--config", metavar="FILE", help="JSON file to start from: ours, or with "
                       "the names of the public code")
    add("--batch-size", type=int, default=64, help="samples per update")
    add("--micro-batch", type=int, help="samples computed at a time; the batch size when absent")
    add("--lr", type=float, default=1e-4, help="learning rate")
    add("--warmup", type=int, default=0, help="updates of linear increase of the learning rate")
    add("--betas", type=float, nargs=2, default=(0.9, 0.999), metavar=("B1", "B2"),
        help="decays of the moments of AdamW")
    add("--eps", type=float, default=1e-8, help="epsilon of AdamW")
    add("--weight-decay", type=float, default=0.0, help="weight decay of AdamW")
    add("--clip", type=float, default=0.5, help="largest norm of the gradient; 0: not clipped")
    add("--ema", type=float, default=0.9999, help="decay of the averaged weights")
    add("--ema-warmup", action=argparse.BooleanOptionalAction, default=True,
        help="bound the decay by (1 + step) / (10 + step), so that a short run forgets its start")
    add("--seed", type=int, default=0, help="of weights, noise, label drop and data order")
    add("--flip", action="store_true", help="mirror half of the samples")
    add("--checkpoint-every", type=int, default=1000, help="updates between checkpoints")
    add("--keep-last", type=int, default=2, help="checkpoints that are kept")
    add("--log-every", type=int, default=1, help="updates between lines of log.jsonl")
    add("--device", default="cpu", help="where to compute")
    add("--compute", default="fp32", help="type of the products")
    add("--quiet", action="store_true", help="no progress bar")
    group = parser.add_argument_group("model", "changes of the preset or configuration")
    _field_options(group, ModelConfig, MODEL_HELP)
    group = parser.add_argument_group("objective", "rectified flow")
    _field_options(group, RectifiedFlow, FLOW_HELP)


def _field_options(group, cls, helps):
    """An option for each field of a dataclass, without defaults: what is absent is not changed."""
    for field in dataclasses.fields(cls):
        option, text = "--" + field.name.replace("_", "-"), helps[field.name]
        if field.type == "bool":
            group.add_argument(option, action=argparse.BooleanOptionalAction, help=text)
        elif field.name in ("input_size", "patch_size"):
            group.add_argument(option, type=int, nargs="+", metavar="N", help=text)
        elif field.name in CHOICES:
            group.add_argument(option, choices=CHOICES[field.name], help=text)
        else:
            group.add_argument(option, type=float if "float" in field.type else int,
                               metavar="X" if "float" in field.type else "N", help=text)


def _sample_options(parser):
    add = parser.add_argument
    add("model", help="file of promoe.save, checkpoint or training folder")
    which = parser.add_mutually_exclusive_group()
    which.add_argument("--labels", type=int, nargs="+", metavar="N", help="a label per sample; the "
                       "number of classes means no class")
    which.add_argument("--per-class", type=int, metavar="N", help="so many of every class; 8 when "
                       "there are no --labels either")
    add("--out", default="samples.png", help=f"file to write: {', '.join(OUTPUTS)}")
    add("--steps", type=int, default=50, help="Euler steps")
    add("--cfg", type=float, default=1.5, help="classifier-free guidance; 1: none")
    add("--seed", type=int, default=0, help="of the initial noise")
    add("--weights", choices=("ema", "live"), default="ema", help="averaged weights, or the last")
    add("--batch-size", type=int, default=64, help="samples computed together")
    add("--device", default="cpu", help="where to compute")
    add("--compute", default="fp32", help="type of the products")
    add("--quiet", action="store_true", help="no progress bar")


# ---------------------------------------------------------------- commands


def headline(config, device="cpu", compute="fp32"):
    """Device, threads, instruction set, parameters: the first line of every run."""
    level, model = _core._device(device, compute)
    where = f"{promoe.get_num_threads()} threads" if device == "cpu" else model
    return (f"promoe {promoe.__version__}: {device}, {where}, {level}; "
            f"{config.num_params:,} parameters, {config.num_active_params:,} active")


def _start(arguments, config):
    """Set the threads and print the headline; on stderr when stdout is for JSON."""
    if arguments.threads is not None:
        promoe.set_num_threads(arguments.threads)
    print(headline(config, arguments.device, arguments.compute),
          file=sys.stderr if arguments.json else sys.stdout, flush=True)


def run_train(arguments):
    """promoe train"""
    config = (_read_config(arguments.config) if arguments.config
              else promoe.preset(arguments.preset))
    config = config.replace(**_given(arguments, ModelConfig))
    objective = RectifiedFlow(**_given(arguments, RectifiedFlow))
    _start(arguments, config)
    names = ("out", "steps", "batch_size", "micro_batch", "lr", "warmup", "eps", "weight_decay",
             "clip", "ema", "ema_warmup", "seed", "flip", "checkpoint_every", "keep_last",
             "log_every", "device",
             "compute")
    result = promoe.train(config, arguments.data, objective=objective, betas=tuple(arguments.betas),
                          progress=not arguments.quiet, **{n: getattr(arguments, n) for n in names})
    last = result.history[-1] if result.history else {"step": 0}
    if arguments.json:
        print(json.dumps({"out": str(result.out), **last}))
    elif result.history:
        print(f"step {last['step']}, loss {last['loss']:.4f}: {result.out}")


def _given(arguments, cls):
    """The fields of a dataclass that were given as options."""
    found = {}
    for field in dataclasses.fields(cls):
        value = getattr(arguments, field.name)
        if isinstance(value, list):
            value = value[0] if len(value) == 1 else tuple(value)
        if value is not None:
            found[field.name] = value
    return found


def _read_config(path):
    """A configuration from a JSON file: fields of ModelConfig, or the names of the public code."""
    try:
        mapping = json.loads(Path(path).read_text())
    except ValueError as error:
        raise ValueError(f"{path} is not JSON: {error}") from error
    if not isinstance(mapping, dict):
        raise ValueError(f"{path}: a JSON object is expected")
    official = {"model", "model_name", "moe", "MoE_config"} & set(mapping)
    return (ModelConfig.from_official if official else ModelConfig.from_dict)(mapping)


def run_sample(arguments):
    """promoe sample"""
    out = Path(arguments.out)
    if out.suffix not in OUTPUTS:
        raise ValueError(f"--out {out}: the name must end in {', '.join(OUTPUTS)}")
    if not out.absolute().parent.is_dir():
        raise FileNotFoundError(f"--out {out}: there is no folder {out.absolute().parent}")
    model = promoe.load(arguments.model, device=arguments.device, compute=arguments.compute)
    _start(arguments, model.config)
    shape = model.config.input_shape
    if out.suffix == ".png" and (len(shape) != 3 or shape[0] not in (1, 3)):
        raise ValueError(f"--out {out}: samples of shape {shape} are no pictures: "
                         f"write .npy or .npz")
    per_class = arguments.per_class
    if per_class is None and arguments.labels is None:
        per_class = 8
    x = promoe.sample(model, arguments.labels, per_class=per_class, steps=arguments.steps,
                      cfg=arguments.cfg, seed=arguments.seed, weights=arguments.weights,
                      batch_size=arguments.batch_size, progress=not arguments.quiet)
    labels = (np.asarray(arguments.labels) if per_class is None
              else np.repeat(np.arange(model.config.num_classes), per_class))
    if out.suffix == ".npy":
        np.save(out, x)
    elif out.suffix == ".npz":
        np.savez_compressed(out, x=x, labels=labels)
    else:
        rows = {"labels": labels, "columns": per_class} if per_class else {}
        report.save_png(report.sample_grid(x, **rows), out)
    if arguments.json:
        print(json.dumps({"out": str(out), "samples": len(x), "labels": labels.tolist()}))
    else:
        print(f"{len(x)} samples: {out}")


def run_info(arguments):
    """promoe info"""
    if arguments.threads is not None:
        promoe.set_num_threads(arguments.threads)
    name, where = arguments.model, {}
    if name in promoe.presets():
        config = promoe.preset(name)
    elif name.endswith(".json") and Path(name).is_file():
        config = _read_config(name)
    elif Path(name).exists():
        manifest = checkpoint.peek(name)
        config = ModelConfig.from_dict(manifest["config"])
        where = {"updates": manifest["updates"], "seed": manifest["seed"]}
    else:
        raise ValueError(f"{name}: neither a file or folder nor a preset "
                         f"({', '.join(promoe.presets())})")
    memory = promoe.memory_estimate(config, arguments.batch_size)
    if arguments.json:
        print(json.dumps({"parameters": config.num_params, "active": config.num_active_params,
                          **where, "router": config.router, "config": config.to_dict(),
                          "memory": memory}, default=int))
        return
    print(headline(config))
    for key, value in {**where, **config.to_dict()}.items():
        print(f"{key:26} {value}")
    for key, value in config.router.items():
        print(f"router {key:19} {value}")
    print(f"memory, training at batch {arguments.batch_size}:")
    for key, value in memory.items():
        print(f"  {key:24} {value / 2**20:,.1f} MiB")


def run_doctor(arguments):
    """promoe doctor"""
    if arguments.threads is not None:
        promoe.set_num_threads(arguments.threads)
    found = doctor.examine()
    print(json.dumps(found) if arguments.json else doctor.report(found))
    return 1 if found["problems"] else 0
