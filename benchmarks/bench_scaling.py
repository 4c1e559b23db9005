"""What a training step costs as a model grows: against its number of experts, and against the tokens of an image.

    python benchmarks/bench_scaling.py [--compute fp32 bf16] [--threads 2] [--experts 4 8 .. 128] [--tokens 64 .. 1024]

Experts: ProMoE-S at batch 8 with 4 to 128 routed experts, one of which a token takes: the operations stay the same but
for the router, and the parameters that the optimizer goes over grow. Tokens: ProMoE-S with images of 64 to 1024 tokens,
about 2048 tokens in a step: the products of a token stay the same and its attention grows. Each point stands beside
its floor (`bench_step.py`). `python -m benchmarks.report` draws docs/images/scaling.png.
"""

import math
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

from benchmarks import bench_step, rounds  # noqa: E402
from benchmarks.results import Results  # noqa: E402

EXPERTS = (4, 8, 16, 32, 64, 128)
TOKENS = (64, 144, 256, 576, 1024)
BATCH = 8
STEP_TOKENS = 2048
SECONDS = 5.0


def measure(config, batch, compute, threads, seconds):
    """A training step and an evaluation: what `rounds.take` says of each."""
    import numpy as np

    import promoe

    promoe.set_num_threads(threads)
    level = promoe.backend_info()["level"]
    job = bench_step.Job(config, batch, compute, np.random.default_rng(0))
    found = {"batch": batch, "compute": compute, "parameters": config.num_params, "tokens": config.tokens,
             "experts": config.num_routed_experts}
    for name, what in (("train", "step"), ("evaluation", "evaluation")):
        found[name] = rounds.take({what: job.piece(what, threads)}, level, seconds)[what]
    return found


def points(experts=EXPERTS, tokens=TOKENS, base=None, batch=BATCH, step_tokens=STEP_TOKENS):
    """(section, value, config, batch) of every point of the two curves."""
    base = base or bench_step.config_of("S")
    for count in experts:
        yield "experts", count, base.replace(num_routed_experts=count), batch
    for count in tokens:
        side = math.isqrt(count)
        if side * side != count:
            raise ValueError(f"tokens: {count} is not a square")
        yield "tokens", count, base.replace(input_size=side * base.patches[0]), max(1, round(step_tokens / count))


def run(results, computes, threads, seconds=SECONDS, experts=EXPERTS, tokens=TOKENS, **shape):
    """Measure, print and keep every point that fits into memory."""
    for compute in computes:
        for section, value, config, batch in points(experts, tokens, **shape):
            key = f"{section} {value} {compute}"
            if not bench_step.knows(key, compute) or not results.due("scaling", key):
                continue
            if not all(bench_step.fits(key, config, batch, compute)):
                continue
            found = bench_step.in_its_own_process(measure, config, batch, compute, threads, seconds)
            results.add("scaling", key, {"curve": section, "value": value, **found})
            train = found["train"]
            print(f"{key:<20} train {1e3 * train['seconds'] / batch:8.1f} ms an image, "
                  f"{1e6 * train['seconds'] / batch / config.tokens:6.1f} us a token, {100 * train['share_of_floor']:.0f} % of floor; "
                  f"update {1e3 * train['update_seconds']:.0f} ms of a step"
                  f"{'; ' if rounds.note(train) else ''}{rounds.note(train)}", flush=True)


def main():
    parser = bench_step.arguments(__doc__, ["S"])
    parser.add_argument("--experts", nargs="*", type=int, default=EXPERTS)
    parser.add_argument("--tokens", nargs="*", type=int, default=TOKENS)
    parser.set_defaults(seconds=SECONDS)
    a = parser.parse_args()
    results = Results(a.threads, again=a.again)
    run(results, a.compute, a.threads, a.seconds, a.experts, a.tokens)
    if results.path.exists():
        print(f"written: {results.path.relative_to(ROOT)}")


if __name__ == "__main__":
    main()
