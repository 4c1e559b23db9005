"""Every argument of every op, misused in every way once. The message names the function and the argument."""

import re

import numpy as np
import pytest

from promoe import ops
from tests.binding.calls import (
    CASES,
    FUNCTIONS,
    call,
    dims,
    field,
    fields,
    valid,
    with_buffers,
    writes,
)

_cache = {}


def call_with(op, which, argument):
    """A valid call in which the argument is given (and not empty, if it is an array)."""
    for o, w, case in CASES:
        if (o, w) != (op, which):
            continue
        key = (op, which, case)
        if key not in _cache:
            _cache[key] = with_buffers(op, which, valid(op, which, case))
        arguments = _cache[key]
        if argument in arguments and (not isinstance(arguments[argument], np.ndarray)
                                      or arguments[argument].size):
            return dict(arguments)
    return None


def arguments_of(op, which):
    """The names of all arguments of a function."""
    names = []
    for f in fields(op):
        if f.kind != "LD":
            names.append(f.name)
        if which == "backward" and f.grad != "NONE":
            names.append("d" + f.name)
    return names


def spoilt_arrays(op, which, name, arguments):
    """(what is wrong, the wrong value) for one array argument."""
    array = arguments[name]
    f, gradient = field(op, name)
    other = np.float64 if array.dtype != np.float64 else np.float32
    yield "a list", array.tolist()
    yield "a str", "x"
    yield "another dtype", array.astype(other)
    yield "the other signedness or half", array.astype(np.float16 if array.dtype.kind == "f" else
                                                       np.dtype(f"u{array.dtype.itemsize}"))
    yield "objects", array.astype(object)
    yield "the other byte order", array.astype(array.dtype.newbyteorder())
    yield "a subclass", np.ma.masked_array(array)
    yield "an axis more", array[None]
    yield "no axis", array.ravel()[0].reshape(())
    misaligned = np.frombuffer(bytearray(array.nbytes + 1), np.uint8)[1:].view(array.dtype)
    yield "misaligned", misaligned.reshape(array.shape)
    wide = np.zeros((*array.shape[:-1], 2 * array.shape[-1]), array.dtype)[..., ::2]
    if array.shape[-1] > 1:
        wide[...] = array
        yield "strided", wide
    if writes(op, which, name):
        locked = array.copy()
        locked.flags.writeable = False
        yield "read-only", locked
    known = dims(op, arguments)
    for axis, text in enumerate(f.text.split(",")):
        if set(re.findall("[A-Z]", text)) <= set(known):
            shape = list(array.shape)
            shape[axis] += 1
            yield f"axis {axis} one longer", np.zeros(shape, array.dtype)
            shape[axis] -= 2
            yield f"axis {axis} one shorter", np.zeros(shape, array.dtype)
    if f.kind in ("IN", "INOUT") and not gradient:
        yield "None", None


SPOILT = {
    "DIM": [-1, True, 1.0, "1", 2 ** 64, np.zeros(1, np.int64), np.True_],
    "INT": [True, 1.0, "1", None, 2 ** 64, np.zeros(1, np.int64), np.True_, [1]],
    "REAL": [True, "1", None, float("nan"), float("inf"), np.float32("nan"), 1j, 10 ** 400, np.zeros(1), np.True_],
    "ENUM": [0, None, "", "nothing", b"none", "none|", "NONE", "\ud800", True],
}


def refused(op, which, arguments, name, what):
    with pytest.raises((TypeError, ValueError)) as error:
        call(op, which, arguments)
    words = re.findall(r"\w+", str(error.value))
    assert isinstance(error.value, UnicodeEncodeError) or (f"{op}_{which}" in words and name in words), \
        f"{what}: {error.value}"


@pytest.mark.parametrize("op, which", FUNCTIONS)
def test_every_argument_misused(op, which):
    for name in arguments_of(op, which):
        f, _ = field(op, name)
        if not f.is_array:
            arguments = call_with(op, which, next(f.name for f in fields(op) if f.kind in ("IN", "INOUT")))
            for wrong in SPOILT[f.kind]:
                refused(op, which, {**arguments, name: wrong}, name, repr(wrong))
            continue
        arguments = call_with(op, which, name)
        assert arguments, f"no case of the oracle gives {name}"
        explicit = {**arguments, **dims(op, arguments)}
        for what, wrong in spoilt_arrays(op, which, name, arguments):
            refused(op, which, {**explicit, name: wrong}, name, what)


@pytest.mark.parametrize("op, which", FUNCTIONS)
def test_every_required_argument_missing(op, which):
    first = next(f.name for f in fields(op) if f.kind in ("IN", "INOUT"))
    arguments = call_with(op, which, first)
    for f in fields(op):
        required = [f.name] if f.kind in ("IN", "INOUT") else []
        if which == "backward":
            required += ["d" + f.name] if f.grad == "GRAD" else []
            required += [f.name] if f.kind == "SAVED" and f.name in arguments else []
        for name in required:
            refused(op, which, {k: v for k, v in arguments.items() if k != name}, name, "missing")
            refused(op, which, {**arguments, name: None}, name, "None")


@pytest.mark.parametrize("op, which", FUNCTIONS)
def test_memory_shared_with_an_output(op, which):
    allowed = {("residual_layernorm_modulate", "forward", "xo", "x"), ("euler_step", "forward", "y", "x"),
               ("residual_layernorm_modulate", "backward", "dx", "dxo")}
    checked = 0
    for written in arguments_of(op, which):
        if not field(op, written)[0].is_array or not writes(op, which, written):
            continue
        for other in arguments_of(op, which):
            if other == written or not field(op, other)[0].is_array:
                continue
            arguments = call_with(op, which, written)
            if other not in arguments or not arguments[other].size:
                continue
            a, b = arguments[written], arguments[other]
            if a.dtype != b.dtype:
                continue
            memory = np.zeros(max(a.size, b.size), a.dtype)
            memory[:b.size] = b.ravel()
            shared = {**arguments, written: memory[:a.size].reshape(a.shape),
                      other: memory[:b.size].reshape(b.shape)}
            if (op, which, written, other) in allowed:
                call(op, which, shared)
                continue
            with pytest.raises(ValueError, match=rf"^{op}_{which}: .*(share|must)"):
                call(op, which, shared)
            checked += 1
    assert checked or op in ("conditional_routing", "gaussian_noise", "grad_norm", "adamw")


@pytest.mark.parametrize("op, which", FUNCTIONS)
def test_keywords(op, which):
    first = next(f.name for f in fields(op) if f.kind in ("IN", "INOUT"))
    arguments = call_with(op, which, first)
    with pytest.raises(TypeError, match=f"{op}_{which}: there is no argument 'zzzzzzzzz'$"):
        call(op, which, {**arguments, "zzzzzzzzz": 1})
    with pytest.raises(TypeError, match=f"no argument '{first}_'; did you mean '"):
        call(op, which, {**arguments, first + "_": 1})
    with pytest.raises(TypeError, match=f"{op}_{which}: {first} is given twice"):
        getattr(ops, f"{op}_{which}")(arguments[first], **arguments)
    with pytest.raises(TypeError, match=f"{op}_{which}: .* by position; got 30"):
        getattr(ops, f"{op}_{which}")(*range(30))
    with pytest.raises(TypeError, match=f"{op}_{which}: .* is missing"):
        getattr(ops, f"{op}_{which}")()


def test_too_large():
    key = np.zeros(2, np.int64)
    for B, M in ((2 ** 40, 2 ** 40), (2 ** 62, 2 ** 62), (0, 2 ** 62), (2 ** 63 - 1, 1)):
        with pytest.raises(ValueError, match="gaussian_noise_forward: x of shape .* is too large"):
            ops.gaussian_noise_forward(key, B=B, M=M)
    with pytest.raises(MemoryError):
        ops.gaussian_noise_forward(key, B=2 ** 20, M=2 ** 32)


def test_dims_and_their_origin():
    x, w = np.zeros((4, 8), np.float32), np.zeros((3, 9), np.float32)
    with pytest.raises(ValueError, match=r"linear_forward: weight must be a C-contiguous float32 array of shape "
                                         r"\(F, D\) = \(3, 8\), where F is 3 by weight, D is 8 by x; "
                                         r"got float32 \(3, 9\)"):
        ops.linear_forward(x, w)
    with pytest.raises(ValueError, match=r"x must be .*\(N, D\) = \(5, \?\), where N is 5 by keyword"):
        ops.linear_forward(x, w, N=5)
    qkv = np.zeros((6, 40), np.float32)
    with pytest.raises(TypeError, match="attention_forward: no array determines .: give it as a keyword"):
        ops.attention_forward(qkv)
    with pytest.raises(ValueError, match=r"attention_forward: qkv .*\(B\*T, 3\*H\*K\)"):
        ops.attention_forward(qkv, B=2, H=3)


def test_an_axis_too_short_for_its_constant():
    arguments = call_with("experts", "forward", "row_off")
    with pytest.raises(ValueError, match=r"experts_forward: row_off must be .*shape \(G\+1,\)"):
        call("experts", "forward", {**arguments, "row_off": np.zeros(0, np.int32)})


def test_negative_dim():
    with pytest.raises(ValueError, match="gaussian_noise_forward: B must be at least 0; got -1"):
        ops.gaussian_noise_forward(np.zeros(2, np.int64), B=-1, M=2)


def test_an_alias_is_the_same_array_not_a_shifted_one():
    memory, cond = np.arange(9, dtype=np.float32), np.ones((1, 2, 4), np.float32)
    schedule = np.array([1.0, 0.5, 1.0])
    x, shifted = memory[:8].reshape(1, 2, 4), memory[1:].reshape(1, 2, 4)
    with pytest.raises(ValueError, match="euler_step_forward: y shares memory with x"):
        ops.euler_step_forward(x, cond, schedule=schedule, y=shifted)
    expected = x - 0.5
    assert ops.euler_step_forward(x, cond, schedule=schedule, y=x)["y"] is x
    np.testing.assert_array_equal(x, expected)


def test_absent_inputs_have_no_gradient():
    x, weight = np.ones((4, 8), np.float32), np.ones((2, 8), np.float32)
    dy = np.ones((4, 2), np.float32)
    assert set(ops.linear_backward(x, weight, dy=dy)) == {"dx", "dweight"}
    assert set(ops.linear_backward(x, weight, dy=dy, dweight=None)) == {"dx"}


def test_ops_functions():
    assert ops.upstream("residual_layernorm_modulate") == ["xo", "y"]
    assert ops.names()[0] == "gaussian_noise" and len(ops.names()) >= 22
    assert "weight" in ops.signature("linear")
    for f in (ops.upstream, ops.signature):
        with pytest.raises(ValueError, match="there is no op 'conv'"):
            f("conv")
