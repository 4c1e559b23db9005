"""Every op on the CUDA backend, whose kernels run on the CPU here: all cases of its oracle, in fp32 with the
CPU's tolerances and in bf16. (PROMOE_TEST_DEVICE=cuda-on-cpu runs the rest of the ops' tests there, too.)"""

import copy
import importlib
import os
import re
from pathlib import Path

import numpy as np
import pytest

from promoe import ops
from tests.ops.common import (
    cast,
    compare,
    finite,
    floor_of,
    make,
    make_upstream,
    oracle,
    own_bounds,
)

DEVICE = os.environ.get("PROMOE_TEST_DEVICE", "cuda-on-cpu")
KERNELS = Path(__file__).parents[2] / "kernels"
CASES = [(op, case) for op in ops.names() for case in oracle(op).CASES]
BF16 = 2e-2  # of the largest value: two roundings to 8 bits and what they lead to


def functions(op, compute):
    def call(which, arguments):
        return getattr(ops, f"{op}_{which}")(**arguments, device=DEVICE, compute=compute)
    return call


def floors(op, inputs, upstream):
    """What cancels in an op's gradients (tests/ops/test_<op>.py)."""
    own = getattr(importlib.import_module(f"tests.ops.test_{op}"), "floors", None)
    return own(inputs, **upstream) if own else {}


def run(op, case, compute):
    """(inputs, outputs, upstream gradients, gradients or None)."""
    call, inputs = functions(op, compute), make(op, case)
    outs = call("forward", copy.deepcopy(inputs))  # some are updated in place
    if not hasattr(ops, f"{op}_backward"):
        return inputs, outs, {}, None
    upstream = make_upstream(op, case, outs)
    return inputs, outs, upstream, call("backward", {**inputs, **outs, **upstream})


@pytest.mark.parametrize("op, case", CASES)
def test_fp32(op, case):
    inputs, outs, upstream, grads = run(op, case, "fp32")
    floor = floor_of(op, inputs)
    compare(op, outs, inputs, floor)
    if grads is not None and case not in own_bounds(op):
        own = floors(op, inputs, upstream)
        compare(op, grads, inputs, own or floor, which="backward", **upstream)


def close_in_bf16(op, got, truth, floor=None):
    """Against the largest value; floor: in units of 4 of it, where larger terms cancel."""
    for name, value in truth.items():
        value = np.asarray(value)
        if value.dtype.kind in "iu":
            continue
        there = finite(f"{op} {name}", got[name], value)
        largest = np.abs(value[there]).max(initial=0.0) * (floor or {}).get(name, 4.0) / 4.0
        error = np.abs(got[name][there] - value[there]).max(initial=0.0)
        assert error <= BF16 * max(largest, 1e-3), f"{op} {name}: error {error:.2e}, largest {largest:.2e}"


def round_bf16(array):
    bits = np.ascontiguousarray(array, np.float32).view(np.uint32)
    return ((bits + 0x7FFF + (bits >> 16 & 1)) & 0xFFFF0000).astype(np.uint32).view(np.float32)


def as_kept(op, arrays):
    """In float64, activations as a GPU keeps them: what they lose on their way there is no error of the op."""
    contract = (KERNELS.parent / f"csrc/ops/{op}.h").read_text()
    kept = set(re.findall(r"X\(\w+, (\w+), act,", contract))
    kept |= {"d" + name for name in kept}
    return cast({k: round_bf16(v) if k in kept else v for k, v in arrays.items()}, np.float64)


@pytest.mark.parametrize("op, case", CASES)
def test_bf16(op, case):
    inputs, outs, upstream, grads = run(op, case, "bf16")
    exact = as_kept(op, inputs)
    close_in_bf16(op, outs, oracle(op).forward(**exact))
    if grads is not None and case not in own_bounds(op):
        truth = oracle(op).backward(**exact, **as_kept(op, upstream))
        close_in_bf16(op, grads, truth, floors(op, inputs, upstream))


@pytest.mark.parametrize("compute", ["fp32", "tf32", "bf16"])
@pytest.mark.parametrize("op, case", [(op, case) for op, case in CASES if case == list(oracle(op).CASES)[-1]])
def test_two_runs_have_the_same_bits(op, case, compute):
    runs = [run(op, case, compute) for _ in range(2)]
    for first, second in zip(runs[0][1::2], runs[1][1::2]):
        for name in first or ():
            assert first[name].tobytes() == second[name].tobytes(), name


def test_bf16_rounds_activations_and_nothing_else():
    """What an op returns as an activation has 8 bits; what is float32 in its contract has them all."""
    _, outs, _, grads = run("linear", "many_tokens", "bf16")
    assert (round_bf16(outs["y"]) == outs["y"]).all() and (round_bf16(grads["dx"]) == grads["dx"]).all()
    assert (round_bf16(grads["dweight"]) != grads["dweight"]).any()
