"""What every op promises, on every case of its oracle: it writes its outputs whole and nothing else, needs
nothing of its scratch, and gives the same bits for any thread count and any choice of gradients."""

import numpy as np
import pytest

import promoe
from promoe import _core
from tests.binding.calls import (
    CASES,
    FUNCTIONS,
    RAGGED,
    alike,
    call,
    copied,
    field,
    fields,
    same_bits,
    valid,
    writes,
)


@pytest.fixture
def poisoned():
    _core._poison(True)
    yield
    _core._poison(False)


@pytest.fixture
def threads():
    before = promoe.get_num_threads()
    yield
    promoe.set_num_threads(before)


@pytest.mark.parametrize("op, which, case", CASES)
def test_reads_nothing_that_it_did_not_write(op, which, case, poisoned):
    arguments = valid(op, which, case)
    if which == "backward" and arguments.get("dx_add"):
        arguments["dx"] = np.zeros_like(arguments["x"])  # += needs something to add to
    poisoned = call(op, which, copied(arguments))
    _core._poison(False)
    same_bits(poisoned, call(op, which, copied(arguments)), RAGGED.get(op, ()))


@pytest.mark.parametrize("op, which, case", CASES)
def test_leaves_its_inputs_alone(op, which, case):
    arguments = valid(op, which, case)
    before = copied(arguments)
    call(op, which, arguments)
    for name, array in before.items():
        if isinstance(array, np.ndarray) and not writes(op, which, name):
            assert arguments[name].tobytes() == array.tobytes(), name


@pytest.mark.parametrize("op, which, case", CASES)
def test_same_bits_for_any_thread_count(op, which, case, threads):
    arguments, results = valid(op, which, case), []
    for n in (1, 2, 3):
        promoe.set_num_threads(n)
        results.append(call(op, which, copied(arguments)))
    same_bits(results[1], results[0])
    same_bits(results[2], results[0])


@pytest.mark.parametrize("op, which, case", CASES)
def test_writes_inside_buffers_of_any_alignment(op, which, case):
    """Buffers at an odd multiple of their item size, between two guards."""
    arguments = valid(op, which, case)
    expected = call(op, which, copied(arguments))
    guard, memory, buffers = 33, {}, {}
    for name, array in expected.items():
        memory[name] = np.frombuffer(bytearray(b"\xa5") * ((array.size + 2 * guard) * array.itemsize), array.dtype)
        buffers[name] = memory[name][guard:guard + array.size].reshape(array.shape)
        f, gradient = field(op, name)
        if name in arguments:  # updated in place
            buffers[name][...] = arguments[name]
        elif gradient and (f.grad == "ADD" or arguments.get("dx_add")):
            buffers[name][...] = 0
    got = call(op, which, {**copied(arguments), **buffers})
    for name, array in expected.items():
        assert got[name] is buffers[name], f"{name}: another array"
        edges = np.concatenate([memory[name][:guard], memory[name][guard + array.size:]])
        assert set(edges.tobytes()) == {0xA5}, f"{name}: written out of bounds"
    same_bits(got, expected, RAGGED.get(op, ()))


@pytest.mark.parametrize("op, case", [(o, c) for o, w, c in CASES if w == "forward"])
def test_forward_without_saving(op, case):
    arguments = valid(op, "forward", case)
    expected = call(op, "forward", copied(arguments))
    saved = {f.name for f in fields(op) if f.kind == "SAVED"}
    got = call(op, "forward", {**copied(arguments), **dict.fromkeys(saved)})
    alike(got, {k: v for k, v in expected.items() if k not in saved})


@pytest.mark.parametrize("op, case", [(o, c) for o, w, c in CASES if w == "backward"])
def test_each_gradient_alone(op, case):
    arguments = valid(op, "backward", case)
    expected = call(op, "backward", copied(arguments))
    for name in expected:
        others = dict.fromkeys(k for k in expected if k != name)
        alike(call(op, "backward", {**copied(arguments), **others}), {name: expected[name]})
    assert call(op, "backward", {**copied(arguments), **dict.fromkeys(expected)}) == {}


@pytest.mark.parametrize("op, case", [(o, c) for o, w, c in CASES if w == "backward"])
def test_set_and_add(op, case):
    """Gradients marked SET overwrite their buffer, those marked ADD are added to it."""
    arguments = valid(op, "backward", case)
    arguments.pop("dx_add", None)
    expected = call(op, "backward", copied(arguments))
    rng = np.random.default_rng(5)
    before = {k: rng.standard_normal(v.shape).astype(np.float32) for k, v in expected.items()}
    got = call(op, "backward", {**copied(arguments), **copied(before)})
    for name, array in expected.items():
        if field(op, name)[0].grad == "SET":
            assert got[name].tobytes() == array.tobytes(), f"{name} is not overwritten"
        elif array.size:
            size = np.nanmax(np.abs(array)) + np.abs(before[name]).max()
            np.testing.assert_allclose(got[name], array + before[name], rtol=0, atol=1e-5 * size, err_msg=name)


@pytest.mark.parametrize("op, case", [(o, c) for o, w, c in CASES if w == "backward"])
def test_backward_without_the_outputs_it_does_not_read(op, case):
    arguments = valid(op, "backward", case)
    expected = call(op, "backward", copied(arguments))
    for f in fields(op):
        if f.kind != "OUT" or (op, f.name) in READ or (f.name == "xo" and "branch" in arguments):
            continue
        arguments.pop(f.name)
    same_bits(call(op, "backward", copied(arguments)), expected)


# The outputs that backward reads, besides those that are saved for it.
READ = {("attention", "y"), ("prototypical_routing", "z"), ("router_gate", "s"), ("token_choice", "choice")}


@pytest.mark.parametrize("op, which", FUNCTIONS)
def test_out_of_memory(op, which):
    """Scratch that cannot be had is a MemoryError; the next call is right."""
    case = next(c for o, w, c in CASES if (o, w) == (op, which))
    arguments = valid(op, which, case)
    expected = call(op, which, copied(arguments))
    before = _core._allocations()
    call(op, which, copied(arguments))
    assert _core._allocations() - before <= 1, "an op allocates"
    if _core._allocations() > before:
        _core._fail_allocation(1)
        with pytest.raises(MemoryError):
            call(op, which, copied(arguments))
    same_bits(call(op, which, copied(arguments)), expected)
