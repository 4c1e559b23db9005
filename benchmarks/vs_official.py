"""A training step of promoe beside the public PyTorch code, on this machine, in one run.

    python benchmarks/vs_official.py --repo PATH [--model S] [--batch 8] [--threads 2] [--rounds 7]

Needs torch in the same environment (`pip install torch==2.13.0`) and a checkout of github.com/ali-vilab/ProMoE. Both
sides do the whole step: noise, forward, loss, backward, clip 0.5, AdamW, EMA, fp32. The weights of one are loaded
into the other and loss and output are compared before anything is timed. The two run in processes of their own and
take turns, a step each, so that the neighbours of a shared machine disturb both alike; medians and their ratio are
reported, with the share of the FMA peak that each side reaches: the peak is measured in every round.
"""

import argparse
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

SIZES = {"S": dict(hidden_size=384, depth=12, num_heads=6), "B": dict(hidden_size=768, depth=12, num_heads=12)}


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
    y[:: 10] = 1000  # a dropped label or more, as in training
    return x, rng.uniform(0, 1000, size).astype(np.float32), y, target


class Official:
    """The public code: eager, or compiled with torch.compile."""

    def __init__(self, a):
        import copy

        import torch

        from benchmarks import official

        torch.manual_seed(0)
        torch.set_num_threads(a.threads)
        size = SIZES[a.model]
        self.torch = torch
        self.model = official.load(a.repo, "ProMoE_TC", moe(size["hidden_size"]), **size)
        with torch.no_grad():  # a network at its initial zeros would not test anything
            for p in self.model.parameters():
                if p.requires_grad:
                    p.add_(torch.randn_like(p) * 0.02)
        self.ema = copy.deepcopy(self.model)
        trained = [p for p in self.model.parameters() if p.requires_grad]
        self.optimizer = torch.optim.AdamW(trained, lr=1e-4, weight_decay=0, fused=True)
        self.model.y_embedder.dropout_prob = 0  # labels are dropped by the caller, alike on both sides
        self.run = torch.compile(self.model) if a.compile else self.model

    def loss(self, x, t, y, target):
        torch = self.torch
        x, t, y, target = (torch.from_numpy(v) for v in (x, t, y, target))
        self.model.train()
        out = self.run(x, t, y)
        return torch.nn.functional.mse_loss(out[:, :4], target), out

    def step(self, x, t, y, target):
        torch = self.torch
        loss, _ = self.loss(x, t, y, target)
        self.optimizer.zero_grad(set_to_none=True)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(self.model.parameters(), 0.5)
        self.optimizer.step()
        with torch.no_grad():
            for e, p in zip(self.ema.parameters(), self.model.parameters()):
                e.mul_(0.9999).add_(p, alpha=1e-4)

    def forward(self, x, t, y):
        self.model.eval()
        with self.torch.no_grad():
            return self.run(*(self.torch.from_numpy(v) for v in (x, t, y))).numpy()

    def weights(self):
        return {k: v.detach().numpy().copy() for k, v in self.model.state_dict().items()}


class Ours:
    def __init__(self, a):
        import promoe

        promoe.set_num_threads(a.threads)
        self.config = promoe.preset(f"ProMoE-{a.model}")
        self.model = promoe.Model(self.config, seed=0)
        self.position = 0

    def step(self, x, t, y, target):
        self.model.accumulate(x, np.minimum(y, 999), self.position)  # draws its own t, noise and label drop
        self.position += len(x)
        self.model.update(lr=1e-4)

    def forward(self, x, t, y):
        return self.model.forward(x, t, y)

    def set_weights(self, w):
        self.model.load_state_dict(w)


def worker(a):
    """Answers one line per command on standard input."""
    side = Official(a) if a.side == "official" else Ours(a)
    data = batch(a.batch, np.random.default_rng(1))
    for line in sys.stdin:
        command, *rest = line.split()
        started = time.perf_counter()
        answer = {}
        if command == "step":
            side.step(*data)
        elif command == "forward":
            side.forward(*data[:3])
        elif command == "save":
            np.savez(rest[0], **side.weights())
        elif command == "load":
            side.set_weights(dict(np.load(rest[0])))
        elif command == "output":
            np.save(rest[0], side.forward(*data[:3]))
        elif command == "versions":
            answer["versions"] = {"torch": side.torch.__version__}
        elif command == "loss":
            if a.side == "official":
                loss, _ = side.loss(*data)
                answer["loss"] = float(loss.detach())
            else:
                answer["loss"] = float(side.model.loss_and_grad(*data).mse)
        answer["seconds"] = time.perf_counter() - started
        print(json.dumps(answer), flush=True)


class Process:
    def __init__(self, side, argv, threads):
        env = dict(os.environ, OMP_NUM_THREADS=str(threads), MALLOC_TRIM_THRESHOLD_="100000000000",
                   MALLOC_MMAP_THRESHOLD_="100000000000", MALLOC_TOP_PAD_="268435456")  # malloc that keeps its memory
        self.process = subprocess.Popen([sys.executable, __file__, *argv, "--side", side], env=env, text=True,
                                        stdin=subprocess.PIPE, stdout=subprocess.PIPE)

    def __call__(self, *command):
        print(*command, file=self.process.stdin, flush=True)
        line = self.process.stdout.readline()
        if not line:
            raise SystemExit("a worker stopped; its message is above")
        return json.loads(line)

    def close(self):
        self.process.stdin.close()
        self.process.wait()


def main(argv=None):
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--repo", required=True, help="checkout of the public code")
    parser.add_argument("--model", choices=SIZES, default="S")
    parser.add_argument("--batch", type=int, default=8, help="images per step")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--rounds", type=int, default=7, help="timed rounds; the median is reported")
    parser.add_argument("--compile", action="store_true", help="torch.compile the public code")
    parser.add_argument("--out", help="write the result here as JSON")
    parser.add_argument("--side", choices=["official", "ours"], help=argparse.SUPPRESS)
    a = parser.parse_args(argv)
    if a.side:
        return worker(a)

    import tempfile

    import promoe
    from benchmarks import counts, machine, peak

    head = machine.describe(a.threads)
    forwarded = [x for x in (argv or sys.argv[1:])]
    official, ours = Process("official", forwarded, a.threads), Process("ours", forwarded, a.threads)
    with tempfile.TemporaryDirectory() as folder:
        official("save", f"{folder}/w.npz")
        ours("load", f"{folder}/w.npz")
        official("output", f"{folder}/a.npy")
        ours("output", f"{folder}/b.npy")
        x, y = np.load(f"{folder}/a.npy"), np.load(f"{folder}/b.npy")
        error = float(np.abs(x - y).max() / np.abs(x).max())
        losses = official("loss")["loss"], ours("loss")["loss"]
    if not error < 1e-4 or not abs(losses[0] - losses[1]) < 1e-4 * abs(losses[0]):
        raise SystemExit(f"the two disagree: output error {error:.2e}, losses {losses}: nothing was timed")
    config, sides = promoe.preset(f"ProMoE-{a.model}"), {"official": official, "promoe": ours}
    operations = {"step": counts.training(config, a.batch), "forward": sum(counts.forward(config, a.batch).values())}
    result = {"machine": head, "model": f"ProMoE-{a.model}", "batch": a.batch, "compile": a.compile,
              "output_error": error, "official": official("versions")["versions"]}
    for command, work in operations.items():
        for side in sides.values():
            side(command), side(command)  # warm
        rounds = []
        for _ in range(a.rounds):
            fma = peak.fma(head["level"], a.threads).wall
            seconds = {name: side(command)["seconds"] for name, side in sides.items()}
            fma = (fma + peak.fma(head["level"], a.threads).wall) / 2
            rounds.append({"seconds": seconds, "fma_gflops": fma / 1e9, "ratio": seconds["official"] / seconds["promoe"],
                           "share_of_peak": {name: work / s / fma for name, s in seconds.items()}})
        median = {part: {name: statistics.median(r[part][name] for r in rounds) for name in sides}
                  for part in ("seconds", "share_of_peak")}
        median |= {part: statistics.median(r[part] for r in rounds) for part in ("ratio", "fma_gflops")}
        result[command] = {"gflop": work / 1e9, **median, "rounds": rounds}
        seconds, share = median["seconds"], median["share_of_peak"]
        print(f"{result['model']} batch {a.batch} {command}: public code {seconds['official']:.3f} s "
              f"({100 * share['official']:.0f} % of the FMA peak), promoe {seconds['promoe']:.3f} s "
              f"({100 * share['promoe']:.0f} %), ratio {median['ratio']:.2f}")
    official.close(), ours.close()
    if a.out:
        Path(a.out).parent.mkdir(parents=True, exist_ok=True)
        Path(a.out).write_text(json.dumps(result, indent=1) + "\n")


if __name__ == "__main__":
    main()
