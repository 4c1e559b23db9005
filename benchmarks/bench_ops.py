"""Every op at the shapes of ProMoE-S and ProMoE-B, batch 8, forward and backward, fp32 and bf16: verified, then timed.

    python -m pytest benchmarks/bench_ops.py [-k "ProMoE-S-experts and fp32"] [--benchmark-json=FILE]

`extra_info` has the share of the peak for products, and for the others the share of the bandwidth: the bytes of all
their arrays, each moved once (of arrays that fit into the caches it may pass 100 %). Both are measured around every round
(`rounds.py`). The ops are called as a user of `promoe.ops` does, with the checks of its arguments, scratch of its
own, and the packing of a weight that a model keeps packed: `bench_step.py` has their time within a step.
An op is verified with the same widths on one image, since the oracles are slow. In bf16 there are the ops whose products
follow `compute`; the rest is the same as in fp32.
"""

import functools

import numpy as np
import pytest

import promoe
from benchmarks import counts, machine, rounds
from promoe import ops
from tests.ops.common import cast, compare, oracle
from tests.ops.test_compute import assert_near
from tests.oracle import experts as experts_oracle
from tests.oracle.adamw import hyper

BATCH = 8
SIZES = ("S", "B")
COMPUTES = ("fp32", "bf16")
ROUNDS = 7
MIXED = ("gaussian_noise", "rectified_flow", "grad_norm", "adamw")  # kinds of float are mixed: 1e-5 of the largest value


# ---------------------------------------------------------------- the cases, in the order of ops.def


def inputs_of(op):
    """The function of the oracle's module that makes inputs of given sizes."""
    module = oracle(op)
    return getattr(module, "case", None) or module._case


def cases(config, B):
    """{name: (op, function of a Generator -> inputs, operations of a forward pass or None)}.

    A name is that of the op, and which of its uses when there are several."""
    c, T, D, E = config, config.tokens, config.hidden_size, config.num_routed_experts
    N, heads, sizes, patches = B * T, c.num_heads * c.head_size, (1, *c.sizes), (1, *c.patches)
    volume, voxels, M = int(np.prod(c.patches)), int(np.prod(c.sizes)), min(c.num_params, 1 << 25)
    widths = (c.expert_width,) * c.plan_groups
    if B == 1:
        M = 1 << 16  # of the verification

    def linear(rows, width, outputs, activation="none"):
        return "linear", inputs_of("linear")(rows, width, outputs, activation), 2 * rows * width * outputs

    def sized(op, *arguments, operations=None, **keywords):
        return op, inputs_of(op)(*arguments, **keywords), operations

    def adamw(rng):
        draw = lambda: rng.standard_normal(M).astype(np.float32)  # noqa: E731
        return {"hyper": hyper(lr=1e-4, clip=0.5, step=10), "norm": np.array([7.0]), "grad": draw(), "param": draw(),
                "m": draw(), "v": draw() ** 2, "avg": draw()}

    return {
        "gaussian_noise": sized("gaussian_noise", B, c.in_channels * voxels),
        "rectified_flow": sized("rectified_flow", B, c.in_channels, voxels),
        "patch_embed": sized("patch_embed", B, c.in_channels, sizes, patches, D,
                             operations=2 * N * c.in_channels * volume * D),
        "timestep_embedding": sized("timestep_embedding", B, 256),
        "linear adaLN": linear(B, D, 6 * D),
        "linear qkv": linear(N, D, 3 * heads),
        "linear proj": linear(N, heads, D),
        "linear final": linear(N, D, volume * c.out_channels),
        "label_embedding": sized("label_embedding", B, c.label_rows, D),
        "silu": sized("silu", B, D),
        "residual_layernorm_modulate": sized("residual_layernorm_modulate", B, T, D),
        "attention": sized("attention", B, T, c.num_heads, c.head_size, operations=4 * B * T * T * heads),
        "conditional_routing": sized("conditional_routing", [*range(B - 1), c.null_label], T,
                                     null_label=c.null_label, group=E),
        "prototypical_routing": sized("prototypical_routing", N, D, E, operations=2 * N * D * E),
        "router_gate": sized("router_gate", N, E, "softmax"),
        "token_choice": sized("token_choice", N, E, c.top_k),
        "routing_plan": sized("routing_plan", N, c.top_k, c.plan_groups),
        "routing_contrastive_loss": sized("routing_contrastive_loss", N, D, E, c.top_k),
        "load_balance_loss": sized("load_balance_loss", B, T, E, c.top_k, "batch"),
        "experts routed": ("experts", experts_oracle.case(N, D, widths, (c.shared_expert_width,), c.top_k),
                           4 * N * D * (c.top_k * c.expert_width + c.shared_expert_width)),
        "experts dense": ("experts", experts_oracle.case(N, D, (), (c.mlp_hidden_size,)),
                          4 * N * D * c.mlp_hidden_size),
        "unpatchify": sized("unpatchify", B, c.out_channels, sizes, patches),
        "mse_loss": sized("mse_loss", B, c.out_channels, c.in_channels, voxels),
        "grad_norm": sized("grad_norm", M),
        "adamw": ("adamw", adamw, None),
        "euler_step": sized("euler_step", B, c.in_channels, c.out_channels, voxels),
    }


PRESETS = {size: promoe.preset(f"ProMoE-{size}") for size in SIZES}


def listed(config, batch):
    """(name, forward or backward, compute) of every case."""
    return [(name, way, compute) for name, (op, _, _) in cases(config, batch).items()
            for way in ("forward", "backward") if hasattr(ops, f"{op}_{way}")
            for compute in COMPUTES if compute == "fp32" or op in counts.FOLLOW_COMPUTE]


CASES = [pytest.param(size, *case, id="-".join([f"ProMoE-{size}", *case]).replace(" ", "_")) for size in SIZES
         for case in listed(PRESETS[size], BATCH)]


def test_every_op_has_a_case():
    assert {op for op, _, _ in cases(PRESETS["S"], 1).values()} == set(ops.names())


# ---------------------------------------------------------------- a call, and what it moves


def call(op, way, compute, inputs, rng):
    """(function, all its arguments with buffers for what it writes, what backward gets besides the inputs)."""
    inplace = {name for kind, name, *_ in promoe._core._fields()[op] if kind in ("INOUT", "INOPT")}
    forward = functools.partial(getattr(ops, f"{op}_forward"), compute=compute)
    outs = forward(**{k: v.copy() if k in inplace else v for k, v in inputs.items()})
    if way == "forward":
        return forward, inputs | {k: v for k, v in outs.items() if k not in inplace}, {}
    upstream = {"d" + name: rng.standard_normal(outs[name].shape).astype(np.float32) for name in ops.upstream(op)}
    backward = functools.partial(getattr(ops, f"{op}_backward"), compute=compute)
    grads = backward(**inputs, **outs, **upstream)
    return backward, inputs | outs | upstream | grads, upstream


def moved(op, arguments):
    """Bytes of the arrays of a call: once each, twice what is updated in place or added to."""
    twice = {name for kind, name, *_ in promoe._core._fields()[op] if kind in ("INOUT", "INOPT")}
    twice |= {"d" + name for _, name, _, _, grad, _ in promoe._core._fields()[op] if grad == "ADD"}
    total = sum(a.nbytes * (1 + (name in twice)) for name, a in arguments.items() if isinstance(a, np.ndarray))
    if op == "label_embedding":  # only the rows of the labels are touched
        table = arguments["table"]
        for name in ("table", "dtable"):
            if name in arguments:
                rows = len(arguments["y"]) * table.shape[1] * table.itemsize
                total -= (1 + (name in twice)) * (table.nbytes - rows)
    return total


def verify(op, way, compute, inputs, rng):
    """The result of one call against the float64 oracle: fp32 within what a naive computation errs, bf16 within its own."""
    fresh = {k: v.copy() if isinstance(v, np.ndarray) else v for k, v in inputs.items()}
    forward = way == "forward"
    got = getattr(ops, f"{op}_forward")(**fresh, compute=compute)
    upstream = {}
    if not forward:
        _, got, upstream = call(op, way, compute, inputs, rng)
    if compute != "fp32" or not forward or op in MIXED:
        truth = getattr(oracle(op), way)(**cast(inputs | upstream, np.float64))
    if compute != "fp32":
        assert_near(got, truth)
    elif not forward or op in MIXED:
        for name, value in truth.items():
            np.testing.assert_allclose(got[name], value, rtol=0, err_msg=name,
                                       atol=(1e-5 if forward else 1e-4) * (np.abs(value).max() + 1e-30))
    else:
        compare(op, got, inputs, floor=16)


# ---------------------------------------------------------------- the benchmark


@pytest.fixture(scope="module")
def head():
    return machine.describe()


def bench(benchmark, head, config, batch, name, way, compute):
    """Verify one case, time it, and leave its figures in `benchmark.extra_info`.

    Every round is a single call, right after another that warms it, between two measurements of the peaks."""
    rng = np.random.default_rng(0)
    op, make, _ = cases(config, 1)[name]
    verify(op, way, compute, make(rng), rng)
    op, make, operations = cases(config, batch)[name]
    run, arguments, _ = call(op, way, compute, make(rng), rng)
    gradient = arguments["grad"].copy() if op == "adamw" else None  # which adamw empties

    def refill():
        if gradient is not None:
            arguments["grad"][:] = gradient

    if operations:
        operations *= {"forward": 1, "backward": 2.5 if op == "attention" else 2}[way]
        piece = rounds.Piece(run, counts.by_compute({op: operations}, compute), head["threads"])
    else:
        piece = rounds.Piece(run, {}, head["threads"], moved(op, arguments))
    around = []

    def before_a_round():
        around.append(rounds.peaks(head["level"], piece.threads, piece.kinds))
        refill()
        run(**arguments)
        refill()

    benchmark.pedantic(lambda: run(**arguments), setup=before_a_round, rounds=ROUNDS, iterations=1)
    around.append(rounds.peaks(head["level"], piece.threads, piece.kinds))
    for seconds, before, after in zip(benchmark.stats.stats.data, around, around[1:]):
        piece.rows.append(rounds.row(piece, rounds.Timing(seconds), before, after))
    found = rounds.summary(piece)
    del found["rounds"]
    benchmark.extra_info |= {"op": op, "way": way, "compute": compute, "of": "peak" if operations else "bandwidth", **found}


@pytest.mark.parametrize("size, name, way, compute", CASES)
def test_op(benchmark, head, size, name, way, compute):
    if compute not in promoe.backend_info()["computes"]:
        pytest.skip(f"this CPU has no {compute} products")
    benchmark.group = f"ProMoE-{size}"
    bench(benchmark, head, PRESETS[size], BATCH, name, way, compute)
