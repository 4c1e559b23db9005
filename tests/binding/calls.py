"""Valid calls of every op, from the cases of its oracle, for the tests that spoil or repeat them."""

import os
import re
from importlib.util import find_spec

import numpy as np

from promoe import _core, ops
from tests.ops.common import ULP, make, oracle

ARRAYS = ("IN", "OPT", "OUT", "SAVED", "INOUT", "INOPT")
FUNCTIONS = [(op, which) for op in ops.names() for which in ("forward", "backward")
             if hasattr(ops, f"{op}_{which}") and find_spec(f"tests.oracle.{op}")]
CASES = [(op, which, case) for op, which in FUNCTIONS for case in oracle(op).CASES]


class Field:
    """One row of _core._fields()."""

    def __init__(self, row):
        self.kind, self.name, self.type, self.text, self.grad, self.default = row

    @property
    def is_array(self):
        return self.kind in ARRAYS


def fields(op):
    return [Field(row) for row in _core._fields()[op]]


def field(op, argument):
    """The field of an argument, and whether the argument is its gradient."""
    for f in fields(op):
        if f.name == argument:
            return f, False
    return next(f for f in fields(op) if "d" + f.name == argument), True


def copied(arguments):
    return {k: v.copy() if isinstance(v, np.ndarray) else v for k, v in arguments.items()}


def call(op, which, arguments):
    return getattr(ops, f"{op}_{which}")(**arguments)


def valid(op, which, case):
    """Keyword arguments of a call that succeeds."""
    inputs = make(op, case)
    if which == "forward":
        return inputs
    outs = call(op, "forward", copied(inputs))
    rng = np.random.default_rng(1)
    return {**inputs, **outs, **{"d" + n: rng.standard_normal(outs[n].shape).astype(np.float32)
                                 for n in ops.upstream(op) if n in outs}}


def writes(op, which, argument):
    """Whether the function writes that argument."""
    f, gradient = field(op, argument)
    if gradient:
        return f.grad in ("SET", "ADD")
    return f.kind in ("INOUT", "INOPT") or (which == "forward" and f.kind in ("OUT", "SAVED"))


def with_buffers(op, which, arguments):
    """The same call with a buffer for everything that it writes."""
    arguments = copied(arguments)
    for name, array in call(op, which, copied(arguments)).items():
        arguments.setdefault(name, np.zeros_like(array))
    return arguments


def dims(op, arguments):
    """The dimensions that follow from the shapes and the keywords: {letter: size}."""
    known = {k: v for k, v in arguments.items() if re.fullmatch("[A-Z]", k)}
    for _ in range(4):
        for name, array in arguments.items():
            if not isinstance(array, np.ndarray):
                continue
            for size, text in zip(array.shape, field(op, name)[0].text.split(",")):
                letters = set(re.findall("[A-Z]", text)) - set(known)
                if len(letters) == 1:
                    letter = letters.pop()
                    at = [eval(text, {}, {**known, letter: x}) for x in (0, 1)]
                    if at[1] > at[0]:
                        known[letter] = (size - at[0]) // (at[1] - at[0])
    return known


# Rows of these are as long as the widest group; a narrower group leaves the rest of its rows as it was.
RAGGED = {"experts": ("pre", "pre_shared")}


def same_bits(got, expected, ragged=()):
    """The same arrays, to the last bit; of those in `ragged` only the shapes."""
    assert set(got) == set(expected)
    for name in expected:
        assert got[name].dtype == expected[name].dtype and got[name].shape == expected[name].shape
        assert name in ragged or got[name].tobytes() == expected[name].tobytes(), f"{name} differs"


def alike(got, expected, ragged=()):
    """For calls that want less: the same bits on a CPU. A GPU may have another product for them, with other roundings."""
    if os.environ.get("PROMOE_TEST_DEVICE", "cpu") == "cpu":
        return same_bits(got, expected, ragged)
    assert set(got) == set(expected)
    for name, value in expected.items():
        largest = np.abs(value[np.isfinite(value)]).max(initial=0)
        np.testing.assert_allclose(got[name], value, rtol=0, atol=32 * ULP * largest, err_msg=name)
