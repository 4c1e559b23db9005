"""compute="bf16-emulated" and "bf16" on the CPU: what rounds, how much, and what must not.

Errors are measured against the float64 oracle as a norm: bfloat16 has 8 bits, so an operand is off by at most
2^-9 = 2e-3 and a product of two rounded operands by about as much, whatever its length.
"""

import numpy as np
import pytest

import promoe
from promoe import ops
from tests.ops.common import cast, compare, make, make_upstream, oracle

PRODUCTS = ["attention", "experts", "linear", "patch_embed"]
REST = [op for op in ops.names() if op not in PRODUCTS]
BOUND = 1e-2


def bf16(x):
    """To the nearest bfloat16, ties to even."""
    bits = np.ascontiguousarray(x, np.float32).view(np.uint32)
    return ((bits + 0x7FFF + (bits >> 16 & 1)) & np.uint32(0xFFFF0000)).view(np.float32)


def run(op, inputs, case, compute):
    outs = getattr(ops, f"{op}_forward")(**inputs, compute=compute)
    if not hasattr(ops, f"{op}_backward"):
        return outs, {}, {}
    upstream = make_upstream(op, case, outs)
    return outs, upstream, getattr(ops, f"{op}_backward")(**inputs, **outs, **upstream, compute=compute)


def assert_near(got, truth):
    """Every array within BOUND of its norm; one that is zero by cancellation, of the largest norm."""
    truth = {k: np.asarray(v, np.float64) for k, v in truth.items()
             if np.asarray(v).dtype.kind == "f" and np.all(np.isfinite(v))}
    sizes = {k: np.linalg.norm(v) for k, v in truth.items()}
    largest = max(sizes.values(), default=0)
    for name, value in truth.items():
        size = sizes[name] if sizes[name] > 1e-9 * largest else largest
        assert np.linalg.norm(got[name] - value) <= BOUND * size, name


def cases(names):
    return [(op, case) for op in names for case in oracle(op).CASES]


@pytest.mark.parametrize("op, case", cases(PRODUCTS))
def test_as_exact_as_bfloat16_is(op, case):
    inputs = make(op, case)
    outs, upstream, grads = run(op, inputs, case, "bf16-emulated")
    assert_near(outs, oracle(op).forward(**cast(inputs, np.float64)))
    assert_near(grads, oracle(op).backward(**cast({**inputs, **upstream}, np.float64)))


@pytest.mark.parametrize("case", [c for c in oracle("linear").CASES if make("linear", c).get("activation", "none") == "none"])
def test_the_sum_of_rounded_operands_is_that_of_float32(case):
    """Operands that are bfloat16 already: nothing but the order of a float32 sum is left."""
    inputs = make("linear", case)
    inputs = {k: bf16(v) if k in ("x", "weight") else v for k, v in inputs.items()}
    outs = ops.linear_forward(**inputs, compute="bf16-emulated")
    compare("linear", outs, inputs)
    dy = bf16(make_upstream("linear", case, outs)["dy"])
    grads = ops.linear_backward(**inputs, **outs, dy=dy, compute="bf16-emulated")
    compare("linear", grads, inputs, which="backward", dy=dy)


def test_operands_are_rounded_to_nearest_even():
    """One product at a time: 1 + 2^-8 lies between two bfloat16, as does 1 + 3 * 2^-8."""
    x = np.float32([[1 + 2**-8], [1 + 3 * 2**-8], [1 + 2**-8 + 2**-20], [-1 - 2**-8], [1e-40]])
    y = ops.linear_forward(x=x, weight=np.float32([[1]]), compute="bf16-emulated")["y"]
    assert y[:, 0].tolist() == [1, 1 + 2**-6, 1 + 2**-7, -1, 0]


def test_what_is_not_finite_stays_so():
    x = np.float32([[np.nan, 1], [np.inf, 1], [-np.inf, 0], [3.3e38, 3.3e38], [1, 2]])
    y = ops.linear_forward(x=x, weight=np.float32([[1, 1]]), compute="bf16-emulated")["y"][:, 0]
    assert np.isnan(y[0]) and y[1] == np.inf and y[2] == -np.inf and y[3] == np.inf and y[4] == 3


@pytest.mark.parametrize("op, case", cases(PRODUCTS))
def test_emulation_has_the_bits_of_the_instructions(op, case):
    if "bf16" not in promoe.backend_info()["computes"]:
        pytest.skip("this level has no bf16 products")
    inputs = make(op, case)
    for emulated, native in zip(run(op, inputs, case, "bf16-emulated"), run(op, inputs, case, "bf16")):
        for name, value in emulated.items():
            np.testing.assert_array_equal(value, native[name], err_msg=name)


@pytest.mark.parametrize("op, case", cases(REST))
def test_everything_else_is_float32(op, case):
    """The router above all: an expert is chosen by float32 cosines."""
    inputs = make(op, case)
    for exact, other in zip(run(op, inputs, case, "fp32"), run(op, inputs, case, "bf16-emulated")):
        for name, value in exact.items():
            np.testing.assert_array_equal(value, other[name], err_msg=name)
