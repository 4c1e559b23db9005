"""`make bench`: every op of ProMoE-S, a step of it and the sampler, into one file of benchmarks/results/.

    python -m benchmarks [--model S] [--batch 8] [--compute fp32] [--threads 2]
    python -m benchmarks --final [--repo PATH --python OTHER/bin/python] [--minutes 12] [--only steps threads ...]

--final measures all that the README shows, the most important first: models S, B and L at batch 1, 8 and 32 in fp32
and bf16, the digits model, one against all threads, the public PyTorch code (with --repo, see vs_official.py), the cost
against experts and tokens, and every op. After --minutes no figure is begun; the same command again goes on where it
was, since what the file of this commit has is not measured again (--again: all of it is). In the end the tables are
printed and docs/images/ is drawn.
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


def ops(results, sizes, computes, threads):
    """bench_ops in a process of its own, for the sizes and computes that the file does not have yet."""
    for size in sizes:
        for compute in computes:
            held = [name for name in results.sections.get("ops", {})
                    if name.startswith(f"ProMoE-{size}-") and name.endswith(compute)]
            if results.due("ops", held[0] if held else f"ProMoE-{size} {compute}"):
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


def parts(results, threads, repo, python):
    """{part of --final: what measures it, one after the other}, the most important first."""
    every = bench_step.COMPUTES

    def step(models, batches, seconds, computes=every):
        return lambda: bench_step.run(results, models, batches, computes, threads, seconds)

    def official(models, batches, seconds, computes=every, **options):
        return lambda: vs_official.run(results, repo, python, models, batches, computes, threads, seconds, **options)

    found = {
        "steps": [step(["S"], (8, 1), 6), step(["B"], (8,), 8), step(["digits"], (64,), 4, ["fp32"]), step(["S"], (32,), 6),
                  step(["B"], (1,), 5)],
        "threads": [lambda: bench_step.run_scaling(results, ["S"], (8,), ["fp32"], threads, 5)],
        "official": [official(["S"], (8, 1), 5)],
        "scaling": [lambda: bench_scaling.run(results, ["fp32"], threads, 1)],
        "ops": [lambda: ops(results, ["S"], every, threads)],
        "large": [step(["L"], (1,), 5), step(["B"], (32,), 5), step(["L"], (8,), 5)],
        "official-large": [official(["B"], (8,), 5, what=("step", "evaluation")),
                           official(["S"], (32,), 5, what=("step", "evaluation"))],
        "compiled": [official(["S"], (8,), 5, compiled=True, what=("step", "evaluation"))],
    }
    return {name: runs for name, runs in found.items() if repo or name not in OFFICIAL}


OFFICIAL = ("official", "official-large", "compiled")
PARTS = ("steps", "threads", "official", "scaling", "ops", "large", "official-large", "compiled")


def main():
    parser = bench_step.arguments(__doc__)
    parser.add_argument("--final", action="store_true", help="all that the README shows")
    parser.add_argument("--repo", type=Path, help="checkout of the public PyTorch code, for --final")
    parser.add_argument("--python", default=sys.executable, help="an interpreter that has torch")
    parser.add_argument("--minutes", type=float, default=12, help="of --final: then no figure is begun")
    parser.add_argument("--only", nargs="+", choices=PARTS, default=PARTS, help="parts of --final")
    a = parser.parse_args()
    results = Results(a.threads, again=a.again, minutes=a.minutes if a.final else None)
    if a.final:
        for name, runs in parts(results, a.threads, a.repo, a.python).items():
            began = time.perf_counter()
            for run in runs if name in a.only else ():
                run()
            print(f"-- {name}: {time.perf_counter() - began:.0f} s", flush=True)
    else:
        bench_step.run(results, a.model, a.batch, a.compute, a.threads, a.seconds)
        ops(results, [size for size in a.model if size in ("S", "B")], a.compute, a.threads)
    held = {"machine": results.machine, **results.sections}
    print(report.markdown(held))
    for path in report.pictures(held) if a.final else ():
        print(f"written: {path.relative_to(ROOT)}")
    if results.path.exists():
        print(f"written: {results.path.relative_to(ROOT)}")
    if results.late:
        print("no time was left for these; the same command again goes on:\n  " + "\n  ".join(results.late))


if __name__ == "__main__":
    main()
