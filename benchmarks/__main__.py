"""`make bench`: every op of ProMoE-S and a step of it at batch 8, into one file of benchmarks/results/.

    python -m benchmarks [--threads 2] [--model S] [--batch 8]
"""

import argparse
import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path

from benchmarks import bench_step, machine

ROOT = Path(__file__).resolve().parent.parent
RESULTS = ROOT / "benchmarks" / "results"


def ops(threads, sizes):
    """bench_ops in a process of its own: what it found, by name."""
    with tempfile.TemporaryDirectory() as folder:
        out = Path(folder) / "ops.json"
        subprocess.run([sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "benchmarks/bench_ops.py",
                        "-k", " or ".join(f"{size}-" for size in sizes), "--benchmark-disable-gc",
                        "--benchmark-columns=median,rounds", f"--benchmark-json={out}"],
                       cwd=ROOT, check=True, env={**os.environ, "PROMOE_NUM_THREADS": str(threads)})
        found = json.loads(out.read_text())["benchmarks"]
    return {row["name"].removeprefix("test_op[").removesuffix("]"): row["extra_info"] for row in found}


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", nargs="+", choices=["S", "B", "L", "XL"], default=["S"])
    parser.add_argument("--batch", nargs="+", type=int, default=[8], help="images per step")
    parser.add_argument("--threads", type=int, default=len(os.sched_getaffinity(0)))
    parser.add_argument("--rounds", type=int, default=7, help="timed rounds; medians are reported")
    a = parser.parse_args()
    head = machine.describe(a.threads)
    result = {"machine": head, "steps": bench_step.run(a.model, a.batch, a.threads, a.rounds),
              "ops": ops(a.threads, [size for size in a.model if size in "SB"] or ["S"])}
    out = RESULTS / f"{head['when'][:10]}-{head['level']}.json"
    RESULTS.mkdir(exist_ok=True)
    out.write_text(json.dumps(result, indent=1) + "\n")
    print(f"written: {out.relative_to(ROOT)}")


if __name__ == "__main__":
    main()
