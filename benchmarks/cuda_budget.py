"""What the CUDA kernels of a training step move and compute, from the code as it is, beside the budget: without a GPU.

    python -m benchmarks.cuda_budget [--model S XL] [--images 64 256] [--out FILE]

Every op of a step runs at the model's shapes on device="cuda-on-cpu", in the build whose every access is seen: per kernel
the bytes of device memory that it reads and writes, the same with each 32-byte sector counted once a launch (what has to
come from memory when the L2 cache holds the rest), and the operations of its tensor-core instructions. cuBLASLt's products
count each matrix once. It is done for one image and for two (routed experts: more); what follows for many is a straight line
through both. bf16.

Budget: outside of products and attention, 24 D bytes per token and block forward and 53 D
backward, at 4.0 TB/s; the optimizer 38 bytes per parameter, its norm 8; products at 720 TFLOP/s, attention at 380.
The routed experts take a quarter of an hour at XL: only with --experts.
"""

import argparse
import ctypes
import json
import os
import re
import sys
import time
from pathlib import Path

import numpy as np

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

DEVICE, COMPUTE = "cuda-on-cpu", "bf16"
BANDWIDTH, PRODUCTS, ATTENTION = 4.0e12, 720e12, 380e12  # of an H200: bytes and operations per second that the budget reckons with
BUDGET = {"forward": 24, "backward": 53}  # bytes per number of the stream and block
# Images of the two runs. With 13 groups of experts 13 images are 256 rows for each: whole tiles, as many images nearly have
# (half a tile per group and layer is lost: 1 % at 256 images, 5 % at 64).
BASE, BASE_OF = (1, 2), {"experts routed": (13, 26)}
COLUMNS = ("launches", "read", "written", "read_once", "written_once", "tensor_operations")


def library():
    """The build that counts; the environment says where it is, for the extension too."""
    if "PROMOE_CUDA_ON_CPU" not in os.environ:
        from tests.cuda.host import build
        os.environ["PROMOE_CUDA_ON_CPU"] = str(build.plugin("race"))
    found = ctypes.CDLL(os.environ["PROMOE_CUDA_ON_CPU"])
    found.pm_host_moved.restype = ctypes.c_char_p
    return found


def counted(run):
    """{kernel: {column: number}} of the kernels that run() launches."""
    counter = library()
    counter.pm_host_moved()  # forget what was before
    counter.pm_host_set(b"count", b"1")
    try:
        run()
    finally:
        counter.pm_host_set(b"count", b"0")
    rows = {}
    for line in counter.pm_host_moved().decode().splitlines():
        name, *numbers = line.split("\t")
        rows[name] = dict(zip(COLUMNS, map(float, numbers), strict=True))
    return rows


# ---------------------------------------------------------------- the ops of a step


def uses(config):
    """How often a training step does each case of bench_ops.cases: {case: times}."""
    c, moe = config, len(config.expert_blocks)
    return {
        "rectified_flow": 1, "patch_embed": 1, "timestep_embedding": 1, "label_embedding": 1, "silu": 1,
        "linear adaLN": c.depth + 1 / 3, "linear qkv": c.depth, "linear proj": c.depth, "linear final": 1,
        "residual_layernorm_modulate": 2 * c.depth + 1, "attention": c.depth,
        "conditional_routing": 1, "prototypical_routing": moe, "router_gate": moe * (c.router_gate != "identity"),
        "token_choice": moe, "routing_plan": moe, "routing_contrastive_loss": moe * (c.contrastive_weight != 0),
        "load_balance_loss": moe * (c.load_balance_weight != 0),
        "experts routed": moe, "experts dense": c.depth - moe,
        "unpatchify": 1, "mse_loss": 1,
    }


def kind(op):
    return op if op in ("attention", "experts", "linear") else "elementwise"


def acts(op):
    """Arguments that are activations: 2 bytes a number on the device, 4 to NumPy."""
    names = set(re.findall(r"X\(\w+,\s*(\w+),\s*act,", (ROOT / f"csrc/ops/{op}.h").read_text()))
    return names | {"d" + name for name in names}


def arrays(op, arguments):
    """Bytes of the arrays of a call: once each, twice what is updated in place or added to; weights are bf16."""
    from benchmarks import bench_ops

    halves = sum(a.nbytes / 2 for name, a in arguments.items() if isinstance(a, np.ndarray)
                 and (name in acts(op) or name in WEIGHTS[op]))
    return bench_ops.moved(op, arguments) - halves


def weights_of(op):
    import promoe
    return {name for _, name, type_, *_ in promoe._core._fields()[op] if type_ == "weight"}


WEIGHTS = {}


def balanced(rng, N, A, G):
    """Choices that give every group the same number of rows."""
    assert A == 1 and N % G == 0
    return rng.permutation(np.repeat(np.arange(G), N // G))


def one(config, name, images):
    """{way: {kernels, arrays, operations}} of one case at so many images."""
    from benchmarks import bench_ops
    from promoe import ops
    from tests.oracle import experts

    op, make, operations = bench_ops.cases(config, images)[name]
    if name == "experts routed":
        c = config
        make = experts.case(images * c.tokens, c.hidden_size, (c.expert_width,) * c.plan_groups, (c.shared_expert_width,),
                            c.top_k, balanced)
    WEIGHTS.setdefault(op, weights_of(op))
    inputs, where, found = make(np.random.default_rng(0)), {"device": DEVICE, "compute": COMPUTE}, {}
    outs = {}

    def forward():
        outs.update(getattr(ops, f"{op}_forward")(**inputs, **where))

    kernels = counted(forward)
    found["forward"] = {"kernels": kernels, "arrays": arrays(op, inputs | outs), "operations": operations or 0}
    if hasattr(ops, f"{op}_backward"):
        rng = np.random.default_rng(1)
        upstream = {"d" + n: rng.standard_normal(outs[n].shape).astype(np.float32) for n in ops.upstream(op)}
        grads = {}

        def backward():
            grads.update(getattr(ops, f"{op}_backward")(**inputs, **outs, **upstream, **where))

        kernels = counted(backward)
        factor = 2.5 if op == "attention" else 2
        found["backward"] = {"kernels": kernels, "arrays": arrays(op, inputs | outs | upstream | grads),
                             "operations": factor * (operations or 0)}
    for part in found.values():  # the weights of a model are in bf16 already
        part["kernels"] = {k: v for k, v in part["kernels"].items() if "round_kernel" not in k}
    return found


def line(base, few, more, images):
    """What `images` images take, when base[0] and base[1] of them take that."""
    return few + (more - few) * (images - base[0]) / (base[1] - base[0])


def step(config, images_wanted, experts=True):
    """Rows of a step at each number of images."""
    rows = []
    for name, times in uses(config).items():
        op = name.split()[0]
        if not times or (name == "experts routed" and not experts):
            continue
        began = time.perf_counter()
        base = BASE_OF.get(name, BASE)
        a, b = (one(config, name, images) for images in base)
        for way in a:
            row = {"case": name, "op": op, "way": way, "times": times, "images": {}}
            kernels = sorted({*a[way]["kernels"], *b[way]["kernels"]})
            zero = dict.fromkeys(COLUMNS, 0.0)
            for images in images_wanted:
                columns = {k: {c: times * line(base, a[way]["kernels"].get(k, zero)[c], b[way]["kernels"].get(k, zero)[c], images)
                               for c in COLUMNS} for k in kernels}
                for k in kernels:  # the number of launches does not grow
                    columns[k]["launches"] = times * b[way]["kernels"].get(k, zero)["launches"]
                total = {c: sum(v[c] for v in columns.values()) for c in COLUMNS}
                row["images"][images] = {
                    **total, "arrays": times * line(base, a[way]["arrays"], b[way]["arrays"], images),
                    "operations": times * line(base, a[way]["operations"], b[way]["operations"], images), "kernels": columns}
            rows.append(row)
        print(f"  {name}: {time.perf_counter() - began:.0f} s", file=sys.stderr)
    return rows


def optimizer():
    """{"bytes": per parameter, "kernels"} of an update: norm, clip, AdamW, EMA, the bf16 weights, the emptied gradient."""
    import promoe

    x, y = promoe.load_digits()
    model = promoe.Model(promoe.preset("ProMoE-digits"), device=DEVICE, compute=COMPUTE)
    model.accumulate(x[:2], y[:2], 0)
    model.gradients().numpy()  # waits for it
    kernels = counted(lambda: model.update(lr=1e-4))
    parameters = sum(place.stop - place.start for place in model.grad_index.values())
    return {"bytes": sum(k["read_once"] + k["written_once"] for k in kernels.values()) / parameters, "kernels": kernels}


# ---------------------------------------------------------------- beside the budget


def summary(config, rows, per_parameter, images):
    """Milliseconds by part, ours and the budget's."""
    tokens, parameters = images * config.tokens, config.num_params
    elementwise = [r for r in rows if kind(r["op"]) == "elementwise"]
    moved = {way: sum(r["images"][images]["read_once"] + r["images"][images]["written_once"]
                      for r in elementwise if r["way"] == way) for way in BUDGET}
    per_number = {way: total / (tokens * config.depth * config.hidden_size) for way, total in moved.items()}
    update = per_parameter["bytes"]
    ms = {
        "elementwise": (1e3 * sum(moved.values()) / BANDWIDTH,
                        1e3 * sum(BUDGET.values()) * tokens * config.depth * config.hidden_size / BANDWIDTH),
        "optimizer": (1e3 * update * parameters / BANDWIDTH, 1e3 * 46 * parameters / BANDWIDTH),
    }
    attention = [r["images"][images] for r in rows if r["op"] == "attention"]
    issued, ideal = (sum(a[c] for a in attention) for c in ("tensor_operations", "operations"))
    ms["attention"] = (1e3 * issued / ATTENTION, 1e3 * ideal / ATTENTION)
    return {"bytes_per_number_of_the_stream": per_number, "budget_bytes": BUDGET, "bytes_per_parameter": update,
            "budget_bytes_per_parameter": 46, "milliseconds": {part: {"ours": a, "budget": b} for part, (a, b) in ms.items()},
            "launches": sum(r["images"][images]["launches"] for r in rows)}


def show(name, rows, found, images):
    print(f"\nProMoE-{name}, {images} images: GB (each sector once a launch; all accesses), share of the arrays, "
          f"tensor cores' TFLOP over the model's")
    for r in rows:
        at = r["images"][images]
        once, every = at["read_once"] + at["written_once"], at["read"] + at["written"]
        tensor = f"{at['tensor_operations'] / at['operations']:6.2f}" \
            if at["tensor_operations"] and at["operations"] and r["op"] != "linear" else ""
        flag = "  <- moves more than twice its arrays" if once > 2 * at["arrays"] else ""
        print(f"  {r['case']:<28}{r['way']:<9}{at['launches']:6.0f} launches {once / 1e9:9.3f} {every / 1e9:9.3f} "
              f"{once / at['arrays']:6.2f} {tensor}{flag}")
    per = found["bytes_per_number_of_the_stream"]
    print(f"  outside products and attention: {per['forward']:.1f} D bytes per token and block forward (budget "
          f"{BUDGET['forward']}), {per['backward']:.1f} D backward (budget {BUDGET['backward']})")
    print(f"  update: {found['bytes_per_parameter']:.1f} bytes per parameter (budget 46)")
    for part, ms in found["milliseconds"].items():
        print(f"  {part:<14}{ms['ours']:7.2f} ms, budget {ms['budget']:.2f}")


def main(argv=None):
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", nargs="+", choices=["S", "B", "L", "XL"], default=["S", "XL"])
    parser.add_argument("--images", nargs="+", type=int, default=[64, 256])
    parser.add_argument("--experts", action="store_true", help="the routed experts of the models beyond S, too")
    parser.add_argument("--out", type=Path, default=ROOT / "benchmarks/results/cuda-budget.json")
    a = parser.parse_args(argv)
    library()
    import promoe
    from benchmarks import machine

    per_parameter = optimizer()
    result = {"commit": machine.commit(), "compute": COMPUTE, "bandwidth": BANDWIDTH, "optimizer": per_parameter, "models": {}}
    for name in a.model:
        config = promoe.preset(f"ProMoE-{name}")
        rows = step(config, a.images, a.experts or name == "S")
        totals = {images: summary(config, rows, per_parameter, images) for images in a.images}
        for images in a.images:
            show(name, rows, totals[images], images)
        result["models"][name] = {"summary": totals, "rows": rows}
    a.out.write_text(json.dumps(result, indent=1) + "\n")
    print(f"written: {a.out}")


if __name__ == "__main__":
    main()
