"""promoe beside the public PyTorch code, on this machine, in one run: training and sampling.

    python benchmarks/vs_official.py --repo PATH [--python OTHER/bin/python] [--model S B] [--batch 1 8 32]
                                     [--compute fp32 bf16] [--compile] [--threads 2]

Needs a checkout of github.com/ali-vilab/ProMoE, and torch in this environment or in that of --python
(`pip install torch==2.13.0 numpy`). The public networks run unmodified (`official.py` says what stands in for `timm`), and the
step and the sampler around them are those of its train.py and sample.py, with what makes torch faster on a CPU: a malloc
that keeps its memory and asks for huge pages, a fused AdamW; --compile times `torch.compile` beside eager.
bf16 is torch's autocast there, `compute="bf16"` here.

    step        draws, forward, loss, backward, clip 0.5, AdamW, EMA
    evaluation  one forward pass
    guided      SAMPLE_STEPS Euler steps with guidance, a pass with labels and one without in each

The weights of one are loaded into the other, and outputs, losses and samples are compared before anything is timed.
The sides run in processes of their own and take turns, so that the neighbours of a shared machine disturb all alike.
A ratio is taken within a round; medians are reported, with the share of the peak that each side reaches.
"""

import contextlib
import json
import os
import statistics
import subprocess
import sys
import time
from pathlib import Path

import numpy as np

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

SIZES = {"S": dict(hidden_size=384, depth=12, num_heads=6), "B": dict(hidden_size=768, depth=12, num_heads=12),
         "tiny": dict(hidden_size=48, depth=2, num_heads=3)}  # tiny: of the tests
WHAT = ("step", "evaluation", "guided")
SAMPLE_STEPS, GUIDANCE = 2, 1.5
EXACT = 1e-4  # of the largest value: by so much two fp32 computations may differ
ROUNDED = 5e-2  # of the norm: by so much bf16 may differ from fp32
MISROUTED = 2e-1  # the public code's own bf16: its router is rounded too, so that a token may take another expert
TUNED = dict(  # glibc's malloc: keep what was freed, on huge pages
    MALLOC_TRIM_THRESHOLD_="100000000000", MALLOC_MMAP_THRESHOLD_="100000000000", MALLOC_TOP_PAD_="268435456",
    GLIBC_TUNABLES="glibc.malloc.hugetlb=1")


def moe(width):
    """The MoE_config of the public YAML files."""
    return dict(num_routed_experts=12, moe_intermediate_size=2 * width, shared_expert_intermediate_size=2 * width,
                load_balance_loss_coef=0, norm_topk_prob=False, seq_aux=False, use_shared_expert=True,
                interleave=True, init_MoeMLP=False, top_k=1, router_weight_mode="identity",
                routing_contrastive_lam=1, use_top_k_for_routing_contrastive=True,
                routing_contrastive_temperature=0.07)


def batch(size, rng):
    x = rng.standard_normal((size, 4, 32, 32), np.float32)
    target = rng.standard_normal((size, 4, 32, 32), np.float32)
    y = rng.integers(0, 1000, size)
    y[1:: 10] = 1000  # a dropped label or more, as in training
    return x, rng.uniform(0, 1000, size).astype(np.float32), y, target


# ---------------------------------------------------------------- the two sides, each in a process


class Official:
    """The public code; every call says whether the network is eager or compiled."""

    def __init__(self, a):
        import copy

        import torch

        from benchmarks import official

        torch.manual_seed(0)
        torch.set_num_threads(a["threads"])
        size = SIZES[a["model"]]
        self.torch = torch
        self.model = official.load(a["repo"], "ProMoE_TC", moe(size["hidden_size"]), **size)
        with torch.no_grad():  # a network at its initial zeros would not test anything
            for p in self.model.parameters():
                if p.requires_grad:
                    p.add_(torch.randn_like(p) * 0.02)
        self.ema = copy.deepcopy(self.model)
        trained = [p for p in self.model.parameters() if p.requires_grad]
        self.optimizer = torch.optim.AdamW(trained, lr=1e-5, weight_decay=0, fused=True)
        self.ways = {"eager": self.model}
        if a["compile"]:
            self.ways["compiled"] = torch.compile(self.model)
        self.bf16 = a["compute"] == "bf16"

    def _autocast(self, rounded):
        return self.torch.autocast("cpu", self.torch.bfloat16) if rounded else contextlib.nullcontext()

    def _call(self, way, rounded, x, t, y):
        with self._autocast(rounded):
            return self.ways[way](x, t, y).float()

    def step(self, way, x, t, y, target):
        """As in train.py; `t` and `target` are drawn."""
        torch = self.torch
        self.model.train()
        z, y = torch.from_numpy(x), torch.from_numpy(y).clamp(max=999)
        sigma = torch.sigmoid(torch.randn(len(z)))
        noise = torch.randn_like(z)
        noised = (1 - sigma).view(-1, 1, 1, 1) * z + sigma.view(-1, 1, 1, 1) * noise
        out = self._call(way, self.bf16, noised, 1000 * sigma, y)
        torch.nn.functional.mse_loss(out[:, :4], noise - z).backward()
        torch.nn.utils.clip_grad_norm_(self.model.parameters(), 0.5)
        self.optimizer.step()
        self.optimizer.zero_grad()
        with torch.no_grad():
            for e, p in zip(self.ema.parameters(), self.model.parameters()):
                e.mul_(0.9999).add_(p, alpha=1 - 0.9999)

    def evaluation(self, way, x, t, y, _, exact=False):
        self.model.eval()
        with self.torch.no_grad():
            return self._call(way, self.bf16 and not exact, *(self.torch.from_numpy(v) for v in (x, t, y))).numpy()

    def guided(self, way, x, t, y, _, exact=False):
        """As in sample.py, from the noise x."""
        torch = self.torch
        self.model.eval()
        rounded = self.bf16 and not exact
        latents, y = torch.from_numpy(x), torch.from_numpy(y)
        sigmas = torch.linspace(1, 0, SAMPLE_STEPS + 1)
        with torch.no_grad():
            for now, then in zip(sigmas, sigmas[1:]):
                times = (1000 * now).expand(len(latents))
                cond = self._call(way, rounded, latents, times, y)
                uncond = self._call(way, rounded, latents, times, torch.full_like(y, 1000))
                velocity = (uncond + GUIDANCE * (cond - uncond))[:, :4]
                latents = latents + (then - now) * velocity
        return latents.numpy()

    def loss(self, x, t, y, target):
        """In fp32, without draws."""
        torch = self.torch
        self.model.train()
        drop, self.model.y_embedder.dropout_prob = self.model.y_embedder.dropout_prob, 0
        with torch.no_grad():
            out = self.model(*(torch.from_numpy(v) for v in (x, t, y)))
        self.model.y_embedder.dropout_prob = drop
        return float(torch.nn.functional.mse_loss(out[:, :4], torch.from_numpy(target)))

    def weights(self):
        return {k: v.detach().numpy().copy() for k, v in self.model.state_dict().items()}

    def facts(self):
        torch = self.torch
        return {"torch": torch.__version__, "cpu_capability": torch.backends.cpu.get_cpu_capability(),
                "threads": torch.get_num_threads()}


class Ours:
    def __init__(self, a):
        import promoe

        promoe.set_num_threads(a["threads"])
        self.model = promoe.Model(config_of(a["model"]), seed=0, compute=a["compute"])
        self.position = 0

    def step(self, _, x, t, y, target):
        self.model.accumulate(x, np.minimum(y, 999), self.position)  # draws its own t, noise and label drop
        self.position += len(x)
        self.model.update(lr=1e-5)

    def evaluation(self, _, x, t, y, target, exact=False):
        return self.model.forward(x, t, y)

    def guided(self, _, x, t, y, target, exact=False):
        return self.model.sample(y, steps=SAMPLE_STEPS, cfg=GUIDANCE, noise=x, weights="live")

    def loss(self, *data):
        return float(self.model.loss_and_grad(*data).mse)

    def set_weights(self, w):
        self.model.load_state_dict(w)


def config_of(name):
    import promoe

    if name == "tiny":
        return promoe.preset("ProMoE-S").replace(**SIZES[name])
    return promoe.preset(f"ProMoE-{name}")


def worker(a):
    """One side: answers a line for every command on standard input."""
    side = Official(a) if a["side"] == "official" else Ours(a)
    data = batch(a["batch"], np.random.default_rng(1))
    for line in sys.stdin:
        command, *rest = line.split()
        answer = {}
        began = time.perf_counter()
        if command in WHAT:
            getattr(side, command)(rest[0], *data)
        elif command == "show":  # what, way, "exact" (fp32) or "timed" (in the compute that is timed), file
            np.save(rest[3], getattr(side, rest[0])(rest[1], *data, exact=rest[2] == "exact"))
        elif command == "save":
            np.savez(rest[0], **side.weights())
        elif command == "load":
            side.set_weights(dict(np.load(rest[0])))
        elif command == "loss":
            answer["loss"] = side.loss(*data)
        elif command == "facts":
            answer["facts"] = side.facts()
        answer["seconds"] = time.perf_counter() - began
        print(json.dumps(answer), flush=True)


class Process:
    """A side, in a process of its own."""

    def __init__(self, side, python, **arguments):
        env = dict(os.environ, OMP_NUM_THREADS=str(arguments["threads"]), **(TUNED if side == "official" else {}))
        self.process = subprocess.Popen([str(python), __file__, "--worker", json.dumps({"side": side, **arguments})],
                                        env=env, text=True, stdin=subprocess.PIPE, stdout=subprocess.PIPE)

    def __call__(self, *command):
        self.process.stdin.write(" ".join(map(str, command)) + "\n")
        self.process.stdin.flush()
        line = self.process.stdout.readline()
        if not line:
            raise SystemExit("a worker stopped; its message is above")
        return json.loads(line)

    def __enter__(self):
        return self

    def __exit__(self, *_):
        with contextlib.suppress(BrokenPipeError):
            self.process.stdin.close()
        self.process.wait()


# ---------------------------------------------------------------- do they compute the same?


def _distance(got, truth):
    """(of the largest value, of the norm)."""
    return (float(np.abs(got - truth).max() / np.abs(truth).max()),
            float(np.linalg.norm(got - truth) / np.linalg.norm(truth)))


def verify(official, ours, ways, compute, folder):
    """Errors of both sides against the public code in fp32; SystemExit when ours, or compiled code, is not the same."""
    official("save", f"{folder}/w.npz")
    ours("load", f"{folder}/w.npz")

    def shown(side, what, way="eager", how="timed"):
        side("show", what, way, how, f"{folder}/shown.npy")
        return np.load(f"{folder}/shown.npy")

    found, bad = {}, []
    for what in ("evaluation", "guided"):
        truth = shown(official, what, how="exact")
        sides = {"promoe": shown(ours, what)}
        sides |= {way: shown(official, what, way) for way in ways if compute != "fp32" or way != "eager"}
        for name, got in sides.items():
            largest, norm = _distance(got, truth)
            found[f"{what} {name}"] = {"of_largest": largest, "of_norm": norm}
            if not (largest < EXACT if compute == "fp32" else norm < (ROUNDED if name == "promoe" else MISROUTED)):
                bad.append(f"{what} of {name}: off by {largest:.1e} of the largest value, {norm:.1e} of the norm")
    losses = official("loss")["loss"], ours("loss")["loss"]
    found["losses"] = losses
    if not abs(losses[0] - losses[1]) < (EXACT if compute == "fp32" else ROUNDED) * abs(losses[0]):
        bad.append(f"losses {losses}")
    if bad:
        raise SystemExit("the two disagree, so nothing was timed:\n" + "\n".join(bad))
    return found


# ---------------------------------------------------------------- a comparison


def compare(repo, python, model, size, compute, threads, seconds, compiled=False, what=WHAT):
    """One model, batch and compute: for each of `what`, medians, ratios and shares."""
    import tempfile

    import promoe
    from benchmarks import counts, rounds

    config, level = config_of(model), promoe.backend_info()["level"]
    ways = ("eager", "compiled") if compiled else ("eager",)
    both = dict(model=model, batch=size, compute=compute, threads=threads)
    with Process("official", python, repo=str(repo), compile=compiled, **both) as official, \
            Process("ours", sys.executable, **both) as ours, tempfile.TemporaryDirectory() as folder:
        found = {"model": f"ProMoE-{model}", "batch": size, "compute": compute, "official": official("facts")["facts"],
                 "errors": verify(official, ours, ways, compute, folder)}
        work = {"step": (counts.step(config, size), config.num_params),
                "evaluation": (counts.forward(config, size), 0),
                "guided": (counts.forward(config, 2 * SAMPLE_STEPS * size), 0)}
        for command in what:
            operations, parameters = work[command]
            pieces = {}
            for name, side, way in [("promoe", ours, "ours"), *((way, official, way) for way in ways)]:
                run = lambda side=side, way=way, command=command: rounds.Timing(side(command, way)["seconds"])
                run(), run()  # warm; and compiled
                pieces[name] = rounds.Piece(run, counts.by_compute(operations, compute), threads,
                                           counts.optimizer_bytes(parameters, compute if side is ours else None))
            result = rounds.take(pieces, level, seconds)
            for way in ways:
                result[way]["ratio"] = _ratio(result[way]["rounds"], result["promoe"]["rounds"])
            found[command] = result
    return found


def _ratio(theirs, ours):
    """Median of the rounds in which the machine was steady for both; of all, when there is none."""
    pairs = [(a["seconds"] / b["seconds"], a["steady"] and b["steady"]) for a, b in zip(theirs, ours)]
    return statistics.median([ratio for ratio, steady in pairs if steady] or [ratio for ratio, _ in pairs])


def _report(key, found, what):
    from benchmarks import rounds

    for command in what:
        mine = found[command]["promoe"]
        print(f"{key} {command}: promoe {mine['seconds']:.3f} s ({100 * mine['share_of_floor']:.0f} % of floor)")
        for way, side in found[command].items():
            if way != "promoe":
                print(f"    {way:<9} {side['seconds']:8.3f} s ({100 * side['share_of_floor']:.0f} % of floor): "
                      f"{side['ratio']:.2f} times promoe's"
                      f"{'; ' if rounds.note(side) else ''}{rounds.note(side)}")
    sys.stdout.flush()


def run(results, repo, python, models, batches, computes, threads, seconds, compiled=False, what=WHAT):
    """Measure, print and keep every model, batch and compute."""
    from benchmarks import bench_step

    for model in models:
        for size in batches:
            for compute in computes:
                key = f"ProMoE-{model} batch {size} {compute}{' compiled' if compiled else ''}"
                if not bench_step.knows(key, compute) or not results.due("official", key):
                    continue
                found = compare(repo, python, model, size, compute, threads, seconds, compiled, what)
                results.add("official", key, found)
                _report(key, found, what)


def main():
    if sys.argv[1:2] == ["--worker"]:
        return worker(json.loads(sys.argv[2]))
    from benchmarks import bench_step
    from benchmarks.results import Results

    parser = bench_step.arguments(__doc__, SIZES)
    parser.add_argument("--repo", type=Path, required=True, help="checkout of the public code")
    parser.add_argument("--python", default=sys.executable, help="an interpreter that has torch")
    parser.add_argument("--compile", action="store_true", help="torch.compile beside eager")
    parser.add_argument("--what", nargs="+", choices=WHAT, default=WHAT)
    a = parser.parse_args()
    results = Results(a.threads, again=a.again)
    run(results, a.repo, a.python, a.model, a.batch, a.compute, a.threads, a.seconds, a.compile, a.what)
    if results.path.exists():
        print(f"written: {results.path.relative_to(ROOT)}")


if __name__ == "__main__":
    main()
