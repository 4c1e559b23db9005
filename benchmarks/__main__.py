"""`make bench`: every op of ProMoE-S, a step of it and the sampler, into one file of benchmarks/results/.

    python -m benchmarks [--model S] [--batch 8] [--compute fp32] [--threads 2]
    python -m benchmarks --final [--repo PATH] [--python OTHER/bin/python] [--only steps threads ...]

--final measures all that the README shows, in about twelve minutes, the most important first: models S, B and L at batch
1, 8 and 32 in fp32 and bf16, the digits model, 1 against all threads, the public PyTorch code (with --repo, see
vs_official.py), the cost against experts and tokens, and every op. Stopped, it goes on where it was: what the
file of this commit has is not measured again (--again: it is). At the end the tables are printed and docs/images/ is drawn.
"""

import json
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from benchmarks import bench_scaling, bench_step, report, vs_official
from benchmarks.results import Results

ROOT = Path(__file__).resolve().parent.parent


def ops(results, computes, threads, sizes):
    """bench_ops in a process of its own, for the sizes and computes that the file does not have yet."""
    for size in sizes:
        for compute in computes:
            held = results.sections.get("ops", {})
            if any(f"ProMoE-{size}-" in name and name.endswith(compute) for name in held):
                print(f"ops of ProMoE-{size} {compute}: measured already")
                continue
            results.add_all("ops", _bench_ops(f"ProMoE-{size}- and {compute}", threads))


def _bench_ops(selection, threads):
    with tempfile.TemporaryDirectory() as folder:
        out = Path(folder) / "ops.json"
        subprocess.run([sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "benchmarks/bench_ops.py",
                        "-k", selection, "--benchmark-disable-gc", "--benchmark-columns=median,rounds",
                        f"--benchmark-json={out}"],
                       cwd=ROOT, check=True, env={**os.environ, "PROMOE_NUM_THREADS": str(threads)})
        found = json.loads(out.read_text())["benchmarks"]
    return {row["name"].removeprefix("test_op[").removesuffix("]"): row["extra_info"] for row in found}


def final(results, threads, repo, python, only=None):
    """All figures, the most important first; (name, what measures it)."""
    every, wide = bench_step.COMPUTES, (1, 8, 32)
    step, compare = bench_step.run, vs_official.run
    parts = {
        "steps": [lambda: step(results, ["S"], (8, 1), every, threads, 6),
                  lambda: step(results, ["B"], (8,), every, threads, 10),
                  lambda: step(results, ["digits"], (64,), ["fp32"], threads, 4),
                  lambda: step(results, ["S"], (32,), every, threads, 8),
                  lambda: step(results, ["B"], (1,), every, threads, 5)],
        "threads": [lambda: bench_step.run_scaling(results, ["S"], (8,), ["fp32"], threads, 6)],
        "official": [] if repo is None else
                    [lambda: compare(results, repo, python, ["S"], (8, 1), every, threads, 8),
                     lambda: compare(results, repo, python, ["B"], (8,), every, threads, 8, what=("step",))],
        "scaling": [lambda: bench_scaling.run(results, ["fp32"], threads, 2)],
        "ops": [lambda: ops(results, every, threads, ["S"])],
        "large": [lambda: step(results, ["L"], (1,), every, threads, 5),
                  lambda: step(results, ["B"], (32,), every, threads, 8),
                  lambda: step(results, ["L"], (8,), every, threads, 5)],
        "compiled": [] if repo is None else
                    [lambda: compare(results, repo, python, ["S"], (8,), ["fp32"], threads, 6, True, ("step",))],
        "official-32": [] if repo is None else
                       [lambda: compare(results, repo, python, ["S"], wide[2:], every, threads, 8, what=("step", "evaluation"))],
    }
    for name, runs in parts.items():
        if not runs or (only and name not in only):
            continue
        began = time.perf_counter()
        for run in runs:
            run()
        print(f"-- {name}: {time.perf_counter() - began:.0f} s", flush=True)


PARTS = ("steps", "threads", "official", "scaling", "ops", "large", "compiled", "official-32")


def main():
    parser = bench_step.arguments(__doc__)
    parser.add_argument("--final", action="store_true", help="all that the README shows")
    parser.add_argument("--repo", type=Path, help="checkout of the public PyTorch code, for --final")
    parser.add_argument("--python", default=sys.executable, help="an interpreter that has torch")
    parser.add_argument("--only", nargs="+", choices=PARTS, help="parts of --final")
    a = parser.parse_args()
    results = Results(a.threads, again=a.again)
    if a.final:
        final(results, a.threads, a.repo, a.python, a.only)
    else:
        bench_step.run(results, a.model, a.batch, a.compute, a.threads, a.seconds)
        ops(results, a.compute, a.threads, [size for size in a.model if size in ("S", "B")] or ["S"])
    held = {"machine": results.machine, **results.sections}
    print(report.markdown(held))
    for path in report.pictures(held) if a.final else ():
        print(f"written: {path.relative_to(ROOT)}")
    if results.path.exists():
        print(f"written: {results.path.relative_to(ROOT)}")


if __name__ == "__main__":
    main()
