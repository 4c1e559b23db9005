"""A training step and a sampling evaluation beside their floor, and where the time goes.

    python benchmarks/bench_step.py --model S B --batch 1 8 32 --threads 2

A training step is accumulate + update (draws, forward, backward, clip, AdamW, EMA); a sampling evaluation is one
forward pass. Each takes turns with a measurement of the FMA peak and of the memory bandwidth; the floor is operations
/ FMA peak + optimizer bytes / bandwidth (`counts.py`), a share is taken within a round, and medians are reported.
On a machine that is not alone the share by CPU time is the better guess, and is printed too.
Then the profile: seconds and share of each op, and the share of the FMA peak that its products reach. Peak memory
stands beside `promoe.memory_estimate`. Each model and batch runs in a process of its own.
"""

import argparse
import json
import multiprocessing
import os
import re
import statistics
import sys
import time
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path

import numpy as np

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

from benchmarks import counts, machine, peak  # noqa: E402

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


def _shaken(model, rng):
    """Weights as they are in training: the network's own zeros (adaLN-Zero) would leave its branches empty."""
    state = model.state_dict()
    for name, value in state.items():
        if name != "pos_embed":
            value += np.float32(0.02) * rng.standard_normal(value.shape, np.float32)
    model.load_state_dict(state)


def _turns(run, operations, level, threads, rounds, parameters=0):
    """Median seconds of run() and of its share of the floor, each round beside its own peaks."""
    for _ in range(2):
        run()
    rows = []
    before = peak.fma(level, threads)
    for _ in range(rounds):
        update = peak.bandwidth(level, threads, 3)["update"] if parameters else peak.Rate(1.0, 1.0)
        wall, cpu = time.perf_counter(), time.process_time()
        run()
        wall, cpu = time.perf_counter() - wall, (time.process_time() - cpu) / threads
        after = peak.fma(level, threads)
        fma = peak.Rate(*((a + b) / 2 for a, b in zip(before, after)))
        before = after
        rows.append({
            "seconds": wall, "fma_gflops": fma.wall / 1e9, "update_gb_s": update.wall / 1e9,
            "fma_gflops_cpu": fma.cpu / 1e9,
            "share_of_floor": counts.floor(operations, fma.wall, parameters, update.wall, "fp32") / wall,
            "share_of_floor_cpu": counts.floor(operations, fma.cpu, parameters, update.cpu, "fp32") / cpu})
    if not parameters:
        for row in rows:
            del row["update_gb_s"]
    medians = {name: statistics.median(row[name] for row in rows) for name in rows[0]}
    return {**medians, "gflop": operations / 1e9, "rounds": rows}


def _profile(model, step, config, batch, level, threads, rounds):
    """Rows of the profile of a step, the slowest first."""
    before = peak.fma(level, threads).wall
    model.profile(True)
    began = time.perf_counter()
    for _ in range(rounds):
        step()
    whole = (time.perf_counter() - began) / rounds
    fma = (before + peak.fma(level, threads).wall) / 2
    work = {f"{op} {way}": count for way, of in (("forward", counts.forward), ("backward", counts.backward))
            for op, count in of(config, batch).items()}
    rows = []
    for name, row in model.profile(False).items():
        seconds = row["seconds"] / rounds
        rows.append({"op": name, "seconds": seconds, "share": seconds / whole, "calls": row["calls"] // rounds,
                     **({"share_of_peak": work[name] / seconds / fma} if name in work else {})})
    rest = whole - sum(row["seconds"] for row in rows)
    return [*rows, {"op": "outside the ops", "seconds": rest, "share": rest / whole, "calls": 1}]


def measure(name, batch, threads, rounds):
    """Everything about one model at one batch, in this process."""
    import promoe

    promoe.set_num_threads(threads)
    level = promoe.backend_info()["level"]
    config = promoe.preset(f"ProMoE-{name}")
    rng = np.random.default_rng(0)
    x = rng.standard_normal((batch, *config.input_shape), np.float32)
    t = rng.uniform(0, 1000, batch).astype(np.float32)
    y = rng.integers(0, config.num_classes, batch)
    before = _resident("VmRSS")
    model = promoe.Model(config, seed=0)
    _shaken(model, rng)
    _forget_peak()
    position = 0

    def step():
        nonlocal position
        model.accumulate(x, y, position)
        position += batch
        model.update(lr=1e-5)

    step()
    resident = _resident("VmHWM") - before
    estimate = promoe.memory_estimate(config, batch)["total"]
    train = _turns(step, counts.training(config, batch), level, threads, rounds, config.num_params)
    train["images_per_second"] = batch / train["seconds"]
    train["profile"] = _profile(model, step, config, batch, level, threads, max(2, rounds // 3))
    forward = sum(counts.forward(config, batch).values())
    sample = _turns(lambda: model.forward(x, t, y), forward, level, threads, rounds)
    return {"model": f"ProMoE-{name}", "batch": batch, "compute": "fp32", "train": train, "sample": sample,
            "memory": {"resident": resident, "estimate": estimate, "ratio": resident / estimate}}


# ---------------------------------------------------------------- all of them


def _report(r):
    train, sample, memory = r["train"], r["sample"], r["memory"]
    print(f"{r['model']} batch {r['batch']}")
    for name, part, after in (
            ("train", train, f"{train['images_per_second']:.2f} images/s, update {train['update_gb_s']:.0f} GB/s"),
            ("sample", sample, "one evaluation")):
        print(f"  {name:<8}{part['seconds']:8.3f} s  {100 * part['share_of_floor']:5.1f} % of floor (by CPU time "
              f"{100 * part['share_of_floor_cpu']:.1f}); peak {part['fma_gflops']:.0f} GFLOP/s "
              f"(by CPU time {part['fma_gflops_cpu']:.0f}); {after}")
        if part["share_of_floor"] > 1 and part["share_of_floor_cpu"] > 1:
            print("          above its floor: that is a fault of this benchmark")
    print(f"  memory  {memory['resident'] / 1e9:8.3f} GB, estimate {memory['estimate'] / 1e9:.3f} GB, "
          f"ratio {memory['ratio']:.3f}")
    for row in train["profile"]:
        if row["share"] >= 0.002:
            of_peak = f"{100 * row['share_of_peak']:5.1f} % of peak" if "share_of_peak" in row else ""
            print(f"    {row['op']:<38}{1e3 * row['seconds']:9.2f} ms {100 * row['share']:5.1f} % "
                  f"{row['calls']:4d} calls  {of_peak}".rstrip())
    sys.stdout.flush()


def run(models, batches, threads, rounds):
    """Measure and print every model and batch; what does not fit into memory is left out aloud."""
    import promoe

    results = []
    for name in models:
        for batch in batches:
            need = promoe.memory_estimate(promoe.preset(f"ProMoE-{name}"), batch)["total"]
            if 1.1 * need > _available():
                print(f"ProMoE-{name} batch {batch}: left out: it takes {need / 1e9:.1f} GB and there are "
                      f"{_available() / 1e9:.1f}")
                continue
            with ProcessPoolExecutor(1, multiprocessing.get_context("spawn")) as process:
                results.append(process.submit(measure, name, batch, threads, rounds).result())
            _report(results[-1])
    return results


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", nargs="+", choices=["S", "B", "L", "XL"], default=["S"])
    parser.add_argument("--batch", nargs="+", type=int, default=[8], help="images per step")
    parser.add_argument("--threads", type=int, default=len(os.sched_getaffinity(0)))
    parser.add_argument("--rounds", type=int, default=7, help="timed rounds; medians are reported")
    parser.add_argument("--out", type=Path, help="write the results here as JSON")
    a = parser.parse_args()
    head = machine.describe(a.threads)
    results = run(a.model, a.batch, a.threads, a.rounds)
    if a.out:
        a.out.parent.mkdir(parents=True, exist_ok=True)
        a.out.write_text(json.dumps({"machine": head, "steps": results}, indent=1) + "\n")


if __name__ == "__main__":
    main()
