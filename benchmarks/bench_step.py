"""A training step and the sampler beside their floor, and where the time goes.

    python benchmarks/bench_step.py --model S B L --batch 1 8 32 --compute fp32 bf16 [--threads 2]
    python benchmarks/bench_step.py --model digits --batch 64
    python benchmarks/bench_step.py --scaling --model S --batch 8

A training step is accumulate + update (draws, forward, backward, clip, AdamW, EMA); an evaluation is one forward pass; a
guided call is a whole `Model.sample` of one image or of a small model, by GUIDED_STEPS Euler steps with guidance. The
floor is operations / peak of the instructions used + optimizer bytes / bandwidth (`counts.py`), at peaks measured around
every round (`rounds.py`). Update alone is held against the bandwidth. On a machine that is not alone the share by CPU
time is the better guess, and is printed too. Then the profile: seconds and share of each op, and the share of the peak
that its products reach. Peak memory stands beside `promoe.memory_estimate`. Each model, batch and compute runs in a
process of its own; what does not fit into memory is left out aloud.

--scaling: the same step and evaluation with one thread and with all of them, in turns.
"""

import argparse
import multiprocessing
import os
import re
import sys
import time
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path

import numpy as np

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

from benchmarks import counts, rounds  # noqa: E402
from benchmarks.results import Results  # noqa: E402

MODELS = ("S", "B", "L", "XL", "digits")
COMPUTES = ("fp32", "bf16")
GUIDED_STEPS = 4
GUIDANCE = 1.5
SECONDS = 8.0  # of rounds for a figure
STATUS = Path("/proc/self/status")


# ---------------------------------------------------------------- memory


def _resident(which):
    """Bytes: VmRSS now, or VmHWM at most since `_forget_peak`; NaN where the system does not say."""
    if not STATUS.exists():
        return float("nan")
    found = re.search(rf"{which}:\s+(\d+) kB", STATUS.read_text())
    return 1024 * int(found[1]) if found else float("nan")


def _forget_peak():
    try:
        Path("/proc/self/clear_refs").write_text("5")
    except OSError:
        pass  # then the peak counts from the start of the process


def _available():
    """Bytes that the machine can give."""
    found = re.search(r"MemAvailable:\s+(\d+) kB", Path("/proc/meminfo").read_text()) \
        if STATUS.exists() else None
    return 1024 * int(found[1]) if found else float("inf")


# ---------------------------------------------------------------- a model


def shaken(config, compute, rng):
    """A model with weights as they are in training: the network's own zeros (adaLN-Zero) would leave its branches empty.

    In place and with a million draws over and over: of ProMoE-L a second copy would not fit, and fresh ones take long.
    """
    import promoe

    model = promoe.Model(config, seed=0, compute=compute)
    draws = np.float32(0.02) * rng.standard_normal(1 << 20, np.float32)
    flat = model._core.read("param")
    for name, value in model._cut(flat).items():
        if name != "pos_embed":
            value += np.resize(draws, value.shape)
    model._core.load(flat, None, None, None, 0)
    return model


class Job:
    """A model with a batch, and the runs that are timed."""

    def __init__(self, config, batch, compute, rng):
        self.config, self.batch, self.compute = config, batch, compute
        self.x = rng.standard_normal((batch, *config.input_shape), np.float32)
        self.t = rng.uniform(0, 1000, batch).astype(np.float32)
        self.y = rng.integers(0, config.num_classes, batch)
        self.model = shaken(config, compute, rng)
        self.position = 0

    def step(self):
        self.model.accumulate(self.x, self.y, self.position)
        self.position += self.batch
        began = time.perf_counter()
        self.model.update(lr=1e-5)
        return {"update_seconds": time.perf_counter() - began}

    def evaluation(self):
        self.model.forward(self.x, self.t, self.y)

    def guided(self):
        self.model.sample(self.y, steps=GUIDED_STEPS, cfg=GUIDANCE, weights="live")

    def piece(self, what, threads):
        """How `rounds.take` times one of the three."""
        c = self.config
        work = {"step": lambda: counts.step(c, self.batch),
                "evaluation": lambda: counts.forward(c, self.batch),
                "guided": lambda: counts.forward(c, 2 * GUIDED_STEPS * self.batch)}
        return rounds.Piece(rounds.clocked(getattr(self, what), threads),
                            counts.by_compute(work[what](), self.compute), threads,
                            counts.optimizer_bytes(c.num_params, self.compute) if what == "step" else 0)


def _profile(job, level, threads, repeats):
    """Rows of the profile of a step, the slowest first."""
    computes = list(counts.by_compute(counts.step(job.config), job.compute))
    before = rounds.peaks(level, threads, computes)
    job.model.profile(True)
    began = time.perf_counter()
    for _ in range(repeats):
        job.step()
    whole = (time.perf_counter() - began) / repeats
    profile = job.model.profile(False)
    after = rounds.peaks(level, threads, computes)
    work = {f"{op} {way}": counts.by_compute({op: count}, job.compute)
            for way, of in (("forward", counts.forward), ("backward", counts.backward))
            for op, count in of(job.config, job.batch).items()}
    rows = []
    for name, row in profile.items():
        seconds = row["seconds"] / repeats
        of_peak = {}
        if name in work and seconds:
            (kind, count), = work[name].items()
            of_peak["share_of_peak"] = 2 * count / (before[kind].wall + after[kind].wall) / seconds
        rows.append({"op": name, "seconds": seconds, "share": seconds / whole, "calls": row["calls"] // repeats,
                     **of_peak})
    rest = whole - sum(row["seconds"] for row in rows)
    return [*rows, {"op": "outside the ops", "seconds": rest, "share": rest / whole, "calls": 1}]


def config_of(name):
    import promoe

    return promoe.preset(f"ProMoE-{name}")


def measure(config, batch, compute, threads, seconds, training=True, guided=None):
    """Everything about one model at one batch, in this process.

    `guided`: time whole calls of the sampler; by default of one image and of small models."""
    import promoe

    promoe.set_num_threads(threads)
    level = promoe.backend_info()["level"]
    before = _resident("VmRSS")
    job = Job(config, batch, compute, np.random.default_rng(0))
    _forget_peak()
    job.step() if training else job.evaluation()
    resident = _resident("VmHWM") - before
    estimate = promoe.memory_estimate(config, batch, training, compute)["total"]
    found = {"batch": batch, "compute": compute, "parameters": config.num_params,
             "memory": {"resident": resident, "estimate": estimate, "ratio": resident / estimate}}

    def timed(what):
        return rounds.take({what: job.piece(what, threads)}, level, seconds)[what]

    if training:
        train = timed("step")
        train["images_per_second"] = batch / train["seconds"]
        train["share_of_bandwidth"] = train["bytes_floor"] / train["update_seconds"]
        train["profile"] = _profile(job, level, threads, max(1, int(seconds / 4 / train["seconds"])))
        found["train"] = train
    found["evaluation"] = timed("evaluation")
    if guided or (guided is None and (batch == 1 or config.num_params < 1e7)):
        found["guided"] = {"steps": GUIDED_STEPS, "guidance": GUIDANCE, **timed("guided")}
    return found


def scale(config, batch, compute, threads, seconds):
    """The step and the evaluation with one thread and with `threads`, in turns: seconds and their ratio."""
    import promoe

    level = promoe.backend_info()["level"]
    job = Job(config, batch, compute, np.random.default_rng(0))
    found = {"batch": batch, "compute": compute, "threads": threads}
    for what in ("step", "evaluation"):
        pieces = {}
        for count in (1, threads):
            promoe.set_num_threads(count)
            piece = job.piece(what, count)
            inner = piece.run

            def run(count=count, inner=inner):
                promoe.set_num_threads(count)
                return inner()

            piece.run = run
            pieces[f"{count}"] = piece
        result = rounds.take(pieces, level, seconds)
        alone, together = result["1"], result[f"{threads}"]
        peak = f"{compute}_gflops"
        found[what] = {**result, "speedup": alone["seconds"] / together["seconds"],
                       "peak_speedup": together[peak] / alone[peak]}
    return found


def in_its_own_process(function, *arguments):
    """What a function returns, from a fresh process: its memory and its threads are its own."""
    with ProcessPoolExecutor(1, multiprocessing.get_context("spawn")) as process:
        return process.submit(function, *arguments).result()


# ---------------------------------------------------------------- all of them


def _line(name, part, after=""):
    rates = ", ".join(f"{kind.removesuffix('_gflops')} {part[kind]:.0f} GFLOP/s" for kind in part if kind.endswith("_gflops"))
    by_cpu = f" (by CPU time {100 * part['share_of_floor_cpu']:.1f})" if "share_of_floor_cpu" in part else ""
    print(f"  {name:<11}{part['seconds']:9.4f} s {100 * part['share_of_floor']:6.1f} % of floor{by_cpu}, "
          f"{part['times_operations']:.2f} times its operations; peak {rates}"
          f"{'; ' if after else ''}{after}")
    if rounds.note(part):
        print(f"             {rounds.note(part)}")


def _report(name, r):
    memory = r["memory"]
    print(f"{name}")
    if "train" in r:
        train = r["train"]
        _line("train", train, f"{train['images_per_second']:.2f} images/s; update {1e3 * train['update_seconds']:.1f} ms, "
              f"{100 * train['share_of_bandwidth']:.0f} % of {train['update_gb_s']:.0f} GB/s")
    _line("evaluation", r["evaluation"])
    if "guided" in r:
        _line("guided", r["guided"], f"a call of {r['guided']['steps']} steps")
    print(f"  memory     {memory['resident'] / 1e9:9.3f} GB, estimate {memory['estimate'] / 1e9:.3f} GB, "
          f"ratio {memory['ratio']:.3f}")
    for row in r.get("train", {}).get("profile", []):
        if row["share"] >= 0.002:
            of_peak = f"{100 * row['share_of_peak']:5.1f} % of peak" if "share_of_peak" in row else ""
            print(f"    {row['op']:<38}{1e3 * row['seconds']:9.2f} ms {100 * row['share']:5.1f} % "
                  f"{row['calls']:4d} calls  {of_peak}".rstrip())
    sys.stdout.flush()


def knows(key, compute):
    """Whether this CPU has such products; what it has not is said."""
    import promoe

    if compute in promoe.backend_info()["computes"]:
        return True
    print(f"{key}: left out: level {promoe.backend_info()['level']} has no {compute} products")
    return False


def fits(name, config, batch, compute):
    """Whether training fits into memory, and whether sampling does: (bool, bool); what does not is said."""
    import promoe

    room, found = _available(), []
    for training, what in ((True, "training"), (False, "sampling")):
        need = promoe.memory_estimate(config, batch, training, compute)["total"] + 4 * config.num_params
        found.append(1.05 * need < room)
        if not found[-1]:
            print(f"{name}: {what} left out: it takes {need / 1e9:.1f} GB and there are {room / 1e9:.1f}")
    return tuple(found)


def run(results, models, batches, computes, threads, seconds=SECONDS):
    """Measure, print and keep every model, batch and compute."""
    for name in models:
        for batch in batches:
            for compute in computes:
                key = f"ProMoE-{name} batch {batch} {compute}"
                if not knows(key, compute) or not results.due("steps", key):
                    continue
                config = config_of(name)
                training, sampling = fits(key, config, batch, compute)
                if not sampling:
                    continue
                found = in_its_own_process(measure, config, batch, compute, threads, seconds, training)
                results.add("steps", key, {"model": f"ProMoE-{name}", **found})
                _report(key, found)


def run_scaling(results, models, batches, computes, threads, seconds=SECONDS):
    if threads < 2:
        return print("one thread: nothing to scale to")
    for name in models:
        for batch in batches:
            for compute in computes:
                key = f"ProMoE-{name} batch {batch} {compute}"
                if not knows(key, compute) or not results.due("threads", key):
                    continue
                found = in_its_own_process(scale, config_of(name), batch, compute, threads, seconds)
                results.add("threads", key, {"model": f"ProMoE-{name}", **found})
                for what in ("step", "evaluation"):
                    print(f"{key} {what}: {found[what]['speedup']:.2f} times as fast with {threads} threads as with "
                          f"one (the peak {found[what]['peak_speedup']:.2f})")


def arguments(description, models=MODELS):
    """The options that these benchmarks share."""
    parser = argparse.ArgumentParser(description=description, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", nargs="+", choices=models, default=["S"])
    parser.add_argument("--batch", nargs="+", type=int, default=[8], help="images per step")
    parser.add_argument("--compute", nargs="+", choices=COMPUTES, default=["fp32"])
    parser.add_argument("--threads", type=int, default=len(os.sched_getaffinity(0)))
    parser.add_argument("--seconds", type=float, default=SECONDS, help="of rounds for a figure; at least 3 rounds")
    parser.add_argument("--again", action="store_true", help="measure anew what has been measured at this commit")
    return parser


def main():
    parser = arguments(__doc__)
    parser.add_argument("--scaling", action="store_true", help="one thread against all of them instead")
    a = parser.parse_args()
    results = Results(a.threads, again=a.again)
    (run_scaling if a.scaling else run)(results, a.model, a.batch, a.compute, a.threads, a.seconds)
    if results.path.exists():
        print(f"written: {results.path.relative_to(ROOT)}")


if __name__ == "__main__":
    main()
