"""One measurement on a GPU, in a process of its own; benchmarks/gpu.py calls it, and reads the last line.

    python -m benchmarks.gpu_bench peaks | step S 256 | sample XL 64 | public S 64 shipped|best CHECKOUT
"""

import ctypes
import json
import re
import statistics
import sys
import time
from pathlib import Path

import numpy as np

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

from benchmarks import counts  # noqa: E402

# Of the data sheets, dense bf16: operations per second. MFU is a share of these.
DATASHEET = {"H100": 989e12, "H200": 989e12, "GH200": 989e12, "A100": 312e12, "L40": 181e12, "RTX 4090": 165e12}
GUIDANCE, SAMPLE_STEPS = 1.5, 250
DEVICE = "cuda"


def datasheet(gpu):
    """The peak of a GPU by its name, or None."""
    return next((peak for name, peak in DATASHEET.items() if re.search(rf"\b{name}\b", gpu)), None)


def median_ms(run, rounds, warm=3):
    """Median milliseconds of run(), which waits for what it started."""
    for _ in range(warm):
        run()
    times = []
    for _ in range(rounds):
        began = time.perf_counter()
        run()
        times.append(1e3 * (time.perf_counter() - began))
    return statistics.median(times)


# ---------------------------------------------------------------- what the GPU can do


def runtime():
    """CUDA's runtime, as the CUDA backend has loaded it."""
    path = next(line.split()[-1] for line in Path("/proc/self/maps").read_text().splitlines() if "libcudart" in line)
    return ctypes.CDLL(path)


def copy_bandwidth(megabytes=4096, rounds=20):
    """Bytes per second, read and written, of a copy in the memory of the GPU."""
    cuda, bytes_ = runtime(), megabytes << 20
    buffers = [ctypes.c_void_p() for _ in range(2)]

    def check(status):
        if status:
            raise RuntimeError(f"CUDA error {status}")

    for buffer in buffers:
        check(cuda.cudaMalloc(ctypes.byref(buffer), ctypes.c_size_t(bytes_)))
        check(cuda.cudaMemset(buffer, 1, ctypes.c_size_t(bytes_)))

    def run():
        check(cuda.cudaMemcpy(buffers[0], buffers[1], ctypes.c_size_t(bytes_), 3))
        check(cuda.cudaDeviceSynchronize())

    ms = median_ms(run, rounds)
    for buffer in buffers:
        check(cuda.cudaFree(buffer))
    return 2 * bytes_ / ms * 1e3


def normals(*shape, seed=0):
    """A million draws over and over: as good as new ones for the power limit, and soon there."""
    return np.resize(np.random.default_rng(seed).standard_normal(1 << 20, np.float32), shape)


def product_peak(N=32768, D=8192, F=8192, rounds=10):
    """Operations per second of a large bf16 product through cuBLASLt, by the op `linear`."""
    from promoe import DeviceArray, ops

    x, weight = DeviceArray(normals(N, D), DEVICE, "bfloat16"), DeviceArray(normals(F, D, seed=1), DEVICE)
    y = DeviceArray(np.zeros((N, F), np.float32), DEVICE, "bfloat16")
    ms = median_ms(lambda: ops.linear_forward(x, weight, y=y, device=DEVICE, compute="bf16"), rounds)
    return 2.0 * N * D * F / ms * 1e3


def peaks():
    from promoe import _core

    _, gpu = _core._device(DEVICE, "bf16")
    return {"copy_bytes_per_second": copy_bandwidth(), "product_operations_per_second": product_peak(),
            "datasheet_operations_per_second": datasheet(gpu), "gpu": gpu}


# ---------------------------------------------------------------- our steps


def batch(config, images):
    rng = np.random.default_rng(1)
    return rng.standard_normal((images, *config.input_shape), np.float32), rng.integers(0, config.num_classes, images)


def shaken(model):
    """Weights as they are in training: a network at its initial zeros is easier on the power limit."""
    state = model.state_dict()
    for name, value in state.items():
        if name != "pos_embed":
            value += np.float32(0.02) * normals(*value.shape, seed=len(name))
    model.load_state_dict(state)
    return model


def share(rate):
    from promoe import _core

    peak = datasheet(_core._device(DEVICE, "bf16")[1])
    return rate / peak if peak else None


def budget_of(name):
    """{op and way: bytes of a step} at 256 images, of cuda_budget, when its result is there."""
    path = ROOT / "benchmarks/results/cuda-budget.json"
    if not path.exists():
        return {}
    rows = json.loads(path.read_text())["models"].get(name, {}).get("rows", [])
    found = {}
    for row in rows:
        at, key = row["images"].get("256"), f"{row['op']} {row['way']}"
        if at:
            found[key] = found.get(key, 0) + at["read_once"] + at["written_once"]
    return found


def step(name, images, rounds=10):
    import promoe

    config = promoe.preset(f"ProMoE-{name}")
    model, position = shaken(promoe.Model(config, seed=0, device=DEVICE, compute="bf16")), 0
    x, y = batch(config, images)

    def run():
        nonlocal position
        model.accumulate(x, y, position)
        position += images
        return model.update(lr=1e-4)

    ms = median_ms(run, rounds)
    info = run()
    if not np.isfinite(info.loss) or info.skipped:
        raise SystemExit(f"the step is wrong: {info}")
    forward, seconds = sum(counts.forward(config, images).values()), ms / 1e3
    model.profile(True)
    for _ in range(3):
        run()
    work = {f"{op} {way}": n for way, of in (("forward", counts.forward), ("backward", counts.backward))
            for op, n in of(config, images).items()}
    moved = budget_of(name) if images == 256 else {}
    rows = model.profile(False)
    model.close()
    copy, product = copy_bandwidth(2048, 10), product_peak()  # of this very minute
    ops = [{"op": op, "ms": 1e3 * row["seconds"] / 3, "calls": row["calls"] // 3,
            **({"tflops": work[op] / row["seconds"] * 3 / 1e12, "share_of_product_peak": work[op] / row["seconds"] * 3 / product}
               if op in work else {}),
            **({"gb_per_s": moved[op] / row["seconds"] * 3 / 1e9, "share_of_bandwidth": moved[op] / row["seconds"] * 3 / copy}
               if op in moved else {})}
           for op, row in rows.items()]
    return {"ms": ms, "images_per_second": images / seconds, "tflops": 3 * forward / seconds / 1e12,
            "mfu": share(3 * forward / seconds), "loss": info.loss, "copy_bytes_per_second": copy,
            "product_operations_per_second": product, "memory": promoe.memory_estimate(
                config, images, device=DEVICE, compute="bf16")["total"], "ops_one_by_one": ops}


def sample(name, images):
    import promoe

    config = promoe.preset(f"ProMoE-{name}")
    model = shaken(promoe.Model(config, seed=0, device=DEVICE, compute="bf16"))
    labels = np.arange(images) % config.num_classes
    model.sample(labels, steps=3, cfg=GUIDANCE, weights="live")  # the graph is recorded
    ms = median_ms(lambda: model.sample(labels, steps=SAMPLE_STEPS, cfg=GUIDANCE, weights="live", seed=1), 1 if images > 1 else 3,
                   warm=0)
    work = 2 * SAMPLE_STEPS * sum(counts.forward(config, images).values())
    return {"ms": ms, "images_per_second": images / ms * 1e3, "ms_per_step": ms / SAMPLE_STEPS, "mfu": share(work / ms * 1e3)}


# ---------------------------------------------------------------- the public code


class Public:
    """The public code on the GPU. shipped: as its scripts run it (eager, bf16 autocast in training, fp32 sampling).
    best: bf16 autocast everywhere, torch.compile, fused AdamW."""

    SIZES = {"S": dict(hidden_size=384, depth=12, num_heads=6), "B": dict(hidden_size=768, depth=12, num_heads=12),
             "L": dict(hidden_size=1024, depth=24, num_heads=16), "XL": dict(hidden_size=1152, depth=28, num_heads=16)}

    def __init__(self, name, how, repo):
        import copy

        import torch

        from benchmarks import official
        from benchmarks.vs_official import moe

        self.torch, self.best, size = torch, how == "best", self.SIZES[name]
        torch.manual_seed(0)
        model = official.load(repo, "ProMoE_TC", moe(size["hidden_size"]), **size).cuda()
        with torch.no_grad():
            for p in model.parameters():
                if p.requires_grad:
                    p.add_(torch.randn_like(p) * 0.02)
        self.model, self.ema = model, copy.deepcopy(model)
        self.run = torch.compile(model) if self.best else model
        trained = [p for p in model.parameters() if p.requires_grad]
        self.optimizer = torch.optim.AdamW(trained, lr=1e-4, weight_decay=0, fused=self.best)

    def data(self, images):
        torch = self.torch
        x = torch.randn(images, 4, 32, 32, device="cuda")
        return x, torch.rand(images, device="cuda") * 1000, torch.randint(0, 1000, (images,), device=DEVICE)

    def step(self, x, t, y):
        torch = self.torch
        self.model.train()
        noise, s = torch.randn_like(x), (t / 1000).view(-1, 1, 1, 1)
        with torch.autocast("cuda", torch.bfloat16):
            out = self.run((1 - s) * x + s * noise, t, y)
        loss = torch.nn.functional.mse_loss(out[:, :4].float(), noise - x)
        self.optimizer.zero_grad(set_to_none=True)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(self.model.parameters(), 0.5)
        self.optimizer.step()
        with torch.no_grad():
            for e, p in zip(self.ema.parameters(), self.model.parameters()):
                e.mul_(0.9999).add_(p, alpha=1e-4)
        return loss.item()

    def sample(self, images, steps):
        """Two passes a step, as its script does."""
        torch = self.torch
        x, _, y = self.data(images)
        none = torch.full_like(y, 1000)
        self.model.eval()
        with torch.no_grad(), torch.autocast("cuda", torch.bfloat16, enabled=self.best):
            for i in range(steps):
                t = torch.full((images,), 1000 * (1 - i / steps), device="cuda")
                cond, uncond = (self.run(x, t, label)[:, :4].float() for label in (y, none))
                x = x - (uncond + GUIDANCE * (cond - uncond)) / steps
        torch.cuda.synchronize()
        return x


def public(name, images, how, repo, sampling=False):
    """Beside ours, in the same process and on the same weights, which have to give the same output."""
    try:
        import torch
    except ImportError:
        return {"status": "not run", "why": "torch is not installed"}
    if not torch.cuda.is_available():
        return {"status": "not run", "why": "torch sees no GPU"}
    if not repo or not (Path(repo) / "models").is_dir():
        return {"status": "not run", "why": "no checkout of the public code: --official PATH"}
    import promoe

    theirs = Public(name, how, repo)
    config = promoe.preset(f"ProMoE-{name}")
    ours = promoe.Model(config, seed=0, device=DEVICE, compute="bf16")
    ours.load_state_dict({k: v.detach().cpu().numpy() for k, v in theirs.model.state_dict().items()})
    x, t, y = theirs.data(4)
    theirs.model.eval()
    with torch.no_grad():
        wanted = theirs.model(x, t, y).float().cpu().numpy()
    got = ours.forward(x.cpu().numpy(), t.cpu().numpy(), y.cpu().numpy())
    error = float(np.abs(got - wanted).max() / np.abs(wanted).max())
    if not error < 5e-2:  # bf16, and a choice at a near tie
        raise SystemExit(f"the two disagree: {error:.2e}")
    if sampling:
        steps = 10  # their time does not depend on the step
        a = median_ms(lambda: theirs.sample(images, steps), 2, 1) / steps
        b = median_ms(lambda: ours.sample(np.arange(images), steps=50, cfg=GUIDANCE, weights="live"), 2, 1) / 50
        return {"ms_per_step": a, "ours_ms_per_step": b, "ratio": a / b, "output_error": error, "torch": torch.__version__}
    data, (x0, labels), position = theirs.data(images), batch(config, images), 0

    def run():
        nonlocal position
        ours.accumulate(x0, labels, position)
        position += images
        ours.update(lr=1e-4)

    a, b = median_ms(lambda: theirs.step(*data), 10, 5), median_ms(run, 10)
    return {"ms": a, "ours_ms": b, "ratio": a / b, "output_error": error, "torch": torch.__version__}


def main(argv):
    what, *rest = argv
    measures = {"peaks": peaks, "step": lambda: step(rest[0], int(rest[1])), "sample": lambda: sample(rest[0], int(rest[1])),
                "public": lambda: public(rest[0], int(rest[1]), *rest[2:4]),
                "public-sample": lambda: public(rest[0], int(rest[1]), *rest[2:4], sampling=True)}
    if what not in measures:
        raise SystemExit(__doc__)
    try:
        found = measures[what]()
    except MemoryError as error:
        found = {"status": "not run", "why": f"it does not fit: {error}"}
    print(json.dumps(found))


if __name__ == "__main__":
    main(sys.argv[1:])
