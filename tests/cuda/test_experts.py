"""The experts' own grouped product against a cuBLASLt product per expert (kernels/experts_loop.cu), and what
the op's oracle cases do not ask: tf32, derived twins, launches that do not depend on the routing."""

import ctypes
import os
import subprocess
import sys
from contextlib import contextmanager

import numpy as np
import pytest

from promoe import ops
from tests.ops.common import cast, make, make_upstream
from tests.oracle import experts as oracle

from .common import DEVICE, Backend, Weight, on_the_stand_in, stand_in

ARCH = 80 if "arch=80" in os.environ.get("PM_HOST", "") else 90
LIBRARY = stand_in() if on_the_stand_in() else None
pytestmark = pytest.mark.skipif(not LIBRARY, reason="looks into the library of cuda-on-cpu")

# Of the largest value. fp32: two orders of summation. tf32: operands have 11 bits. bf16: each way rounds its own
# intermediate results.
TOLERANCE = {"fp32": 2e-6, "tf32": 3e-3, "bf16": 2e-2}
CASES = ("promoe", "top3", "two_shared", "dense", "widths", "no_width", "empty_groups", "no_rows", "some_without",
         "some_without_no_shared", "rows_as_many_as_tokens", "room_for_one_row_each", "padded", "one_token",
         "full_tiles", "full_tiles_top2", "many_blocks", "no_biases", "swiglu", "swiglu_biases", "swiglu_dense",
         "swiglu_no_width", "swiglu_some_without", "swiglu_padded", "swiglu_full_tiles", "swiglu_full_tiles_top2",
         "swiglu_D7", "swiglu_D33")


def run(case, compute, inputs=None):
    """Forward and backward: everything the op writes."""
    inputs = make("experts", case) if inputs is None else inputs
    where = {"device": DEVICE, "compute": compute}
    outs = ops.experts_forward(**inputs, **where)
    return outs | ops.experts_backward(**inputs, **outs, **make_upstream("experts", case, outs), **where)


@contextmanager
def by_loop():
    LIBRARY.pm_experts_by_loop(ctypes.c_bool(True))
    try:
        yield
    finally:
        LIBRARY.pm_experts_by_loop(ctypes.c_bool(False))


def launches(name=None):
    return LIBRARY.pm_host_launches(name and name.encode())


def close(got, truth, tolerance):
    assert set(got) == set(truth)
    for name, value in truth.items():
        error = np.abs(got[name] - value).max(initial=0.0)
        largest = np.abs(value).max(initial=0.0)
        assert error <= tolerance * max(largest, 1e-3), f"{name}: error {error:.2e}, largest {largest:.2e}"


@pytest.mark.parametrize("compute", TOLERANCE)
@pytest.mark.parametrize("case", CASES)
def test_as_a_loop_over_the_experts(case, compute):
    own = run(case, compute)
    products = launches("single_kernel")
    with by_loop():
        loop = run(case, compute)
    assert launches("single_kernel") == products
    close(own, loop, TOLERANCE[compute])


@pytest.mark.parametrize("case", CASES)
def test_tf32(case):
    inputs = make("experts", case)
    got = run(case, "tf32")
    exact = cast(inputs, np.float64)
    upstream = cast(make_upstream("experts", case, got), np.float64)
    close(got, oracle.forward(**exact) | oracle.backward(**exact, **upstream), TOLERANCE["tf32"])


def test_tf32_is_not_fp32():
    assert (run("promoe", "tf32")["y"] != run("promoe", "fp32")["y"]).mean() > 0.9


MMA, WGMMA = "pm_shape<__nv_bfloat16, true, ", "pm_shape_wgmma<"
LARGE = {
    80: [("full_tiles", f"up_kernel<{MMA}128, 128, 32, 4, 2, 2, 2>, 1, __nv_bfloat16>"),
         ("swiglu_full_tiles", f"up_kernel<{MMA}128, 128, 32, 4, 2, 2, 2>, 2, __nv_bfloat16>"),
         ("swiglu_full_tiles", f"hidden_kernel<{MMA}128, 128, 32, 4, 2, 2, 2>, 2, __nv_bfloat16>"),
         ("full_tiles_top2", f"out_kernel<{MMA}128, 128, 64, 3, 2, 4, 1>, false, __nv_bfloat16>"),
         ("full_tiles", f"weights_kernel<{MMA}128, 192, 64, 3, 2, 4, 1>, __nv_bfloat16>")],
    90: [("full_tiles", f"up_kernel<{WGMMA}128, 128, 3, 2>, 1, __nv_bfloat16>"),
         ("swiglu_full_tiles", f"hidden_kernel<{WGMMA}128, 128, 3, 2>, 2, __nv_bfloat16>"),
         ("full_tiles_top2", f"out_kernel<{WGMMA}128, 128, 3, 2>, false, __nv_bfloat16>"),
         ("full_tiles", f"out_kernel<{WGMMA}128, 192, 4, 1>, true, __nv_bfloat16>"),
         ("full_tiles", f"weights_kernel<{WGMMA}128, 192, 4, 1>, __nv_bfloat16>")],
}


@pytest.mark.parametrize("compute, case, kernel", [
    *(("bf16", *case) for case in LARGE[ARCH]),
    ("tf32", "full_tiles", "up_kernel<pm_shape<float, true, 128, 128, 32, 3, 2, 4, 1>, 1, float>"),
    ("tf32", "swiglu_full_tiles", "up_kernel<pm_shape<float, true, 128, 128, 32, 3, 2, 4, 1>, 2, float>"),
    ("fp32", "full_tiles", "up_kernel<pm_shape<float, false, 128, 128, 16, 3, 4, 2, 1>, 1, float>"),
    ("fp32", "swiglu_full_tiles", "up_kernel<pm_shape<float, false, 128, 128, 16, 3, 4, 2, 1>, 2, float>")])
def test_the_large_shapes_ran(compute, case, kernel):
    before = launches(kernel)
    run(case, compute)
    assert launches(kernel) > before
    before = launches(kernel)
    run("promoe", compute)
    assert launches(kernel) == before


@pytest.mark.skipif(ARCH == 80, reason="is that run")
def test_before_hopper():
    """The stand-in for a GPU is an sm_90, which has its own shapes; the same tests on an sm_80."""
    tests = [f"{__file__}::{name}" for name in ("test_as_a_loop_over_the_experts", "test_the_large_shapes_ran")]
    done = subprocess.run([sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", *tests], text=True,
                          env={**os.environ, "PM_HOST": "arch=80"}, capture_output=True, check=False)
    assert done.returncode == 0 and " passed" in done.stdout, done.stdout[-3000:]


@pytest.mark.parametrize("case, split", [("many_blocks", 2), ("full_tiles", 0)])
def test_gradients_in_parts_ran(case, split):
    """dup and ddown of groups with many rows come in parts; the oracle's cases have some."""
    before = launches("parts_kernel<float>")
    run(case, "fp32")
    assert launches("parts_kernel<float>") - before == split


def test_launches_do_not_depend_on_the_routing():
    inputs, counts = make("experts", "promoe"), []
    N, G = len(inputs["x"]), len(inputs["row_off"]) - 1
    for choice in (np.arange(N) % G, np.zeros(N, int), np.full(N, -1)):
        routed = inputs | oracle.plan(choice[:, None].astype(np.int32), np.ones((N, 1), np.float32), G, N)
        before = launches()
        run("promoe", "bf16", routed)
        counts.append(launches() - before)
    assert counts[0] == counts[1] == counts[2]


# ---------------------------------------------------------------- derived twins


class Arguments(ctypes.Structure):
    """pm_experts_args"""
    DIMS = "N D G S F P R W Z".split()
    _fields_ = [*((name, ctypes.c_int64) for name in DIMS),
                *((name, Weight if name in ("up", "down") else ctypes.c_void_p) for name in
                  "x row_off row_token row_weight tok_off tok_row foff up up_bias down down_bias y pre pre_shared".split()),
                ("activation", ctypes.c_int)]


class Gradients(ctypes.Structure):
    """pm_experts_grads"""
    _fields_ = [(name, ctypes.c_void_p) for name in "dx drow_weight dup dup_bias ddown ddown_bias dy".split()]


def bf16(array):
    bits = np.ascontiguousarray(array).view(np.uint32)
    return ((bits + 0x7FFF + (bits >> 16 & 1)) >> 16).astype(np.uint16)


def twins(backend, weights, shapes):
    """The matrices of up or down, one after another, with twins that the backend made."""
    whole = backend.put(weights)
    sizes = [backend.derived_bytes(ctypes.c_int64(f), ctypes.c_int64(d)) for f, d in shapes]
    derived = ctypes.c_void_p(backend.alloc(ctypes.c_size_t(sum(sizes))))
    for i, (f, d) in enumerate(shapes):
        one = ctypes.c_void_p(whole.value + 4 * sum(f * d for f, d in shapes[:i]))
        twin = ctypes.c_void_p(derived.value + sum(sizes[:i]))
        assert backend.derive(ctypes.c_int64(f), ctypes.c_int64(d), one, twin) == 0
    return Weight(whole, derived)


@pytest.mark.parametrize("case", ["widths", "promoe", "full_tiles_top2", "swiglu_biases", "swiglu",
                                  "swiglu_full_tiles_top2"])
def test_derived_twins_begin_at_multiples_of_64_bytes(case):
    """y and dx by them have the bits that matrices one after another lead to."""
    backend, inputs = Backend("experts"), make("experts", case)
    N, D = inputs["x"].shape
    widths = np.diff(inputs["foff"]).tolist()
    G, gated = len(inputs["row_off"]) - 1, inputs.get("activation") == "swiglu"
    outs = ops.experts_forward(**inputs, device=DEVICE, compute="bf16")
    dy = np.random.default_rng(1).standard_normal((N, D)).astype(np.float32)
    expected = outs["y"], ops.experts_backward(**inputs, **outs, dy=dy, device=DEVICE, compute="bf16")["dx"]

    up = [(f, D) for f in widths for _ in range(1 + gated)]
    arguments = Arguments(N, D, G, len(widths) - G, sum(widths), len(inputs["up"]), len(inputs["row_token"]),
                          inputs["W"], inputs["Z"], activation=gated, x=backend.put(bf16(inputs["x"])),
                          y=backend.put(np.zeros((N, D), np.uint16)),
                          up=twins(backend, inputs["up"], up),
                          down=twins(backend, inputs["down"], [(D, f) for f in widths]),
                          **{name: backend.put(bf16(outs[name])) for name in ("pre", "pre_shared")},
                          **{name: backend.put(inputs[name]) for name, _ in Arguments._fields_
                             if name in inputs and name not in ("x", "up", "down", "W", "Z", "activation")})
    gradients = Gradients(dx=backend.put(np.zeros((N, D), np.uint16)), dy=backend.put(bf16(dy)))
    assert backend.run(arguments) == 0 and backend.run(arguments, gradients) == 0
    for place, truth in zip((arguments.y, gradients.dx), expected, strict=True):
        got = backend.get(place, np.zeros((N, D), np.uint16))
        np.testing.assert_array_equal((got.astype(np.uint32) << 16).view(np.float32), truth)
