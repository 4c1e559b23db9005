"""compute="bf16-emulated" and "bf16" on the CPU: what rounds, how much, and what must not.

Errors are measured against the float64 oracle as a norm: bfloat16 has 8 bits, so an operand is off by at most
2^-9 = 2e-3 and a product of two rounded operands by about as much, whatever its length.
"""

import numpy as np
import pytest

import promoe
from promoe import _core, ops
from tests.ops.common import cast, compare, make, make_upstream, oracle

PRODUCTS = ["attention", "experts", "linear", "patch_embed"]
REST = [op for op in ops.names() if op not in PRODUCTS]
BOUND = 1e-2
LEAST = 5e-5  # what nobody rounded would be off by 1e-7; a product of two numbers may be lucky
ROUNDED = {"y", "pre", "pre_shared", "dx", "dweight", "dup", "ddown", "dqkv"}  # sums of products of rounded operands


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


def assert_near(got, truth, rounded=(), bound=BOUND, cancels=1e-9):
    """Every array within `bound` of its norm; one that is zero by cancellation, of the largest norm. Those that are named
    as rounded are no nearer than LEAST."""
    truth = {k: np.asarray(v, np.float64) for k, v in truth.items()
             if np.asarray(v).dtype.kind == "f" and np.all(np.isfinite(v))}
    sizes = {k: np.linalg.norm(v) for k, v in truth.items()}
    largest = max(sizes.values(), default=0)
    for name, value in truth.items():
        size = sizes[name] if sizes[name] > cancels * largest else largest
        error = np.linalg.norm(got[name] - value)
        assert error <= bound * size, name
        if name in rounded and size:
            assert error >= LEAST * sizes[name], name


def cases(names):
    return [(op, case) for op in names for case in oracle(op).CASES]


@pytest.mark.parametrize("op, case", cases(PRODUCTS))
def test_as_exact_as_bfloat16_is(op, case):
    inputs = make(op, case)
    outs, upstream, grads = run(op, inputs, case, "bf16-emulated")
    loose = {}
    if op == "attention":  # an error of a score is one of the logarithm of its probability
        loose["bound"] = BOUND + 2**-9 * scores(inputs).std()
        loose["cancels"] = 0.05  # sums over all queries or keys: the gradients of LayerNorm
    assert_near(outs, oracle(op).forward(**cast(inputs, np.float64)), ROUNDED, **loose)
    assert_near(grads, oracle(op).backward(**cast({**inputs, **upstream}, np.float64)), ROUNDED, **loose)


def scores(inputs):
    """q k^T / sqrt(K) of all heads, without the LayerNorm (which makes them smaller)."""
    q, k, _ = np.moveaxis(inputs["qkv"].reshape(inputs["B"], -1, 3, inputs["H"], inputs["qkv"].shape[1] // (3 * inputs["H"])),
                           2, 0).astype(np.float64)
    return np.einsum("bthc,bshc->bhts", q, k) / np.sqrt(q.shape[-1])


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


NATIVE = pytest.mark.skipif("bf16" not in promoe.backend_info()["computes"], reason="this level has no bf16 products")


def linear_bits(inputs, dy, compute):
    outs = ops.linear_forward(**inputs, compute=compute)
    grads = ops.linear_backward(**inputs, **outs, dy=dy, compute=compute)
    return {name: value.view(np.uint32) for name, value in {**outs, **grads}.items()}


@pytest.fixture
def poisoned():
    """Scratch full of NaN: the zeros that fill up a tile must be written."""
    _core._poison(True)
    yield
    _core._poison(False)


@NATIVE
@pytest.mark.parametrize("N", [1, 2, 15, 16, 17, 31, 32, 33, 130, 600])
def test_odd_sizes(N, poisoned):
    """Blocks, tiles and words that are not whole: the bits of the emulation, with one thread and two."""
    rng = np.random.default_rng(N)
    for D in (*range(1, 35), 63, 64, 65, 100):
        F = int(rng.integers(1, 80))
        inputs = {"x": rng.standard_normal((N, D), np.float32), "weight": rng.standard_normal((F, D), np.float32),
                  "bias": rng.standard_normal(F, np.float32)}
        dy = rng.standard_normal((N, F), np.float32)
        native = linear_bits(inputs, dy, "bf16")
        for name, value in linear_bits(inputs, dy, "bf16-emulated").items():
            np.testing.assert_array_equal(value, native[name], err_msg=f"{name}, D = {D}, F = {F}")
        threads = promoe.get_num_threads()
        promoe.set_num_threads(1 if threads > 1 else 2)
        try:
            again = linear_bits(inputs, dy, "bf16")
        finally:
            promoe.set_num_threads(threads)
        for name, value in native.items():
            np.testing.assert_array_equal(value, again[name], err_msg=f"{name}, D = {D}, F = {F}, other threads")
        x, weight, dy = (a.astype(np.float64) for a in (inputs["x"], inputs["weight"], dy))
        for name, a, b in (("y", x, weight.T), ("dx", dy, weight), ("dweight", dy.T, x)):
            truth = a @ b + (inputs["bias"] if name == "y" else 0)
            error = np.abs(native[name].view(np.float32) - truth)
            assert np.all(error <= 2**-6.9 * (np.abs(a) @ np.abs(b)) + 1e-6), f"{name}, D = {D}, F = {F}"


def attention_bits(inputs, compute):
    outs = ops.attention_forward(**inputs, compute=compute)
    dy = np.random.default_rng(5).standard_normal(outs["y"].shape, np.float32)
    return {**outs, **ops.attention_backward(**inputs, **outs, dy=dy, compute=compute)}, dy


@pytest.mark.parametrize("norm", [False, True], ids=["", "norm"])
@pytest.mark.parametrize("T", [1, 2, 15, 16, 17, 31, 32, 33, 47, 65, 130, 600])
def test_odd_heads(T, norm, poisoned):
    """Panels, tiles and words of a head that are not whole, and several blocks: right, and the bits of the emulation."""
    rng = np.random.default_rng(T)
    for K in (1, 2, 15, 16, 17, 31, 33, 48, 63, 64, 72) if T < 600 else (40,):
        inputs = {"qkv": rng.standard_normal((2 * T, 3 * K), np.float32), "B": 2, "H": 1}
        if norm:
            inputs |= {f"{name}_{part}": (part == "weight") + rng.standard_normal(K, np.float32) / 9
                       for name in "qk" for part in ("weight", "bias")}
        emulated, dy = attention_bits(inputs, "bf16-emulated")
        if "bf16" in promoe.backend_info()["computes"]:
            for name, value in attention_bits(inputs, "bf16")[0].items():
                np.testing.assert_array_equal(value, emulated[name], err_msg=f"{name}, K = {K}")
        exact = cast({**inputs, "dy": dy}, np.float64)
        truth = oracle("attention").backward(**exact)
        del exact["dy"]
        assert_near(emulated, oracle("attention").forward(**exact) | truth, cancels=0.1)


@pytest.mark.parametrize("compute", [c for c in promoe.backend_info()["computes"] if c != "fp32"])
def test_a_row_does_not_depend_on_how_many_share_the_call(compute):
    rng = np.random.default_rng(3)
    x, weight = rng.standard_normal((300, 70), np.float32), rng.standard_normal((45, 70), np.float32)
    whole = ops.linear_forward(x=x, weight=weight, compute=compute)["y"]
    for begin, end in ((0, 1), (0, 33), (7, 24), (100, 300), (299, 300)):
        part = ops.linear_forward(x=x[begin:end], weight=weight, compute=compute)["y"]
        np.testing.assert_array_equal(part, whole[begin:end])


def documented_sum(x, weight, amx):
    """x weight^T in the order that docs/decisions say, in NumPy. Operands are bfloat16 of like sizes, so that a
    fused multiply-add is exact in float64 but for its one rounding to float32."""
    def add(total, k):
        return (total + np.outer(x[:, k], weight[:, k])).astype(np.float32).astype(np.float64)

    zero = np.zeros((len(x), len(weight)))
    total = zero
    if not amx:  # the odd one of a pair, then the even one
        for k in range(0, x.shape[1], 2):
            total = add(add(total, k + 1), k)
        return total.astype(np.float32)
    for block in range(0, x.shape[1], 32):  # even ones and odd ones, each from zero
        even, odd = zero, zero
        for k in range(block, block + 32, 2):
            even, odd = add(even, k), add(odd, k + 1)
        total = (total + (even + odd).astype(np.float32)).astype(np.float32).astype(np.float64)
    return total.astype(np.float32)


@pytest.mark.parametrize("compute", [c for c in promoe.backend_info()["computes"] if c != "fp32"])
def test_sums_are_in_the_documented_order(compute):
    rng = np.random.default_rng(4)
    x, weight = (bf16(np.ldexp(rng.uniform(-2, 2, (n, 128)), rng.integers(-6, 7, (n, 128)))) for n in (40, 50))
    y = ops.linear_forward(x=x, weight=weight, compute=compute)["y"]
    amx = promoe.backend_info()["level"] == "amx"
    truth = documented_sum(x.astype(np.float64), weight.astype(np.float64), amx)
    np.testing.assert_array_equal(y, truth)
    assert np.any(truth != documented_sum(x.astype(np.float64), weight.astype(np.float64), not amx))


@NATIVE
@pytest.mark.parametrize("centre", [-128, -64, -60, 0, 60, 64])
def test_extreme_numbers_have_the_bits_of_the_emulation(centre):
    """Denormals, and products and sums that are; overflows, infinities and NaN."""
    rng = np.random.default_rng(centre + 200)
    x, weight = (np.ldexp(rng.standard_normal((n, 90)), centre + rng.integers(-6, 7, (n, 90))).astype(np.float32)
                 for n in (50, 60))
    x[0, :5], x[1, 7], x[2, 8], weight[3, 9] = 0, np.inf, np.nan, -np.inf
    dy = np.ldexp(rng.standard_normal((50, 60)), centre).astype(np.float32)
    native = linear_bits({"x": x, "weight": weight}, dy, "bf16")
    for name, value in linear_bits({"x": x, "weight": weight}, dy, "bf16-emulated").items():
        np.testing.assert_array_equal(value, native[name], err_msg=name)


@NATIVE
@pytest.mark.parametrize("centre", [-140, -60, 0, 16, 40])
def test_attention_of_extreme_numbers_has_the_bits_of_the_emulation(centre):
    rng = np.random.default_rng(centre + 200)
    qkv = np.ldexp(rng.standard_normal((70, 3 * 40)), centre + rng.integers(-6, 7, (70, 3 * 40))).astype(np.float32)
    qkv[3, 5], qkv[9, 100] = np.inf, np.nan
    native, emulated = (attention_bits({"qkv": qkv, "B": 2, "H": 1}, c)[0] for c in ("bf16", "bf16-emulated"))
    for name, value in native.items():
        np.testing.assert_array_equal(value, emulated[name], err_msg=name)


@pytest.mark.parametrize("op, case", cases(REST))
def test_everything_else_is_float32(op, case):
    """The router above all: an expert is chosen by float32 cosines."""
    inputs = make(op, case)
    for exact, other in zip(run(op, inputs, case, "fp32"), run(op, inputs, case, "bf16-emulated")):
        for name, value in exact.items():
            np.testing.assert_array_equal(value, other[name], err_msg=name)
