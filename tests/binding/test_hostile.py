"""Contents that no well-meaning caller sends: an op computes something or raises ValueError, and touches
nothing that is not its own (`make asan` watches)."""

import numpy as np
import pytest

from tests.binding.calls import CASES, call, copied, fields, valid

# The first cases of each op have the most of its arguments; the rest vary sizes.
FEW = [(op, which, case) for op, which, case in CASES
       if [c for o, w, c in CASES if (o, w) == (op, which)].index(case) < 4]


def attempt(op, which, arguments):
    try:
        call(op, which, arguments)
    except (ValueError, TypeError, MemoryError) as error:
        assert op in str(error)


@pytest.mark.parametrize("op, which, case", FEW)
def test_wild_indices(op, which, case):
    """Every integer array, with one entry or all of them replaced."""
    arguments, rng = valid(op, which, case), np.random.default_rng(3)
    for name, array in arguments.items():
        if not isinstance(array, np.ndarray) or array.dtype.kind != "i" or not array.size:
            continue
        limits = np.iinfo(array.dtype)
        for wild in (-1, -2, -3, 1, array.size, array.size + 1, 1 << 20, limits.max, limits.max - 1, limits.min):
            for everywhere in (False, True):
                spoilt = copied(arguments)
                at = slice(None) if everywhere else rng.integers(array.size)
                spoilt[name].reshape(-1)[at] = wild
                attempt(op, which, spoilt)
        for _ in range(5):
            spoilt = copied(arguments)
            rng.shuffle(spoilt[name].reshape(-1))
            attempt(op, which, spoilt)


@pytest.mark.parametrize("op, which, case", FEW)
def test_wild_floats(op, which, case):
    """Every float array full of one value."""
    arguments = valid(op, which, case)
    for name, array in arguments.items():
        if not isinstance(array, np.ndarray) or array.dtype.kind != "f":
            continue
        for wild in (np.nan, np.inf, -np.inf, 3e38, 1e-45, 0.0, -0.0):
            spoilt = copied(arguments)
            spoilt[name][...] = wild
            attempt(op, which, spoilt)


@pytest.mark.parametrize("op, which, case", FEW)
def test_wild_attributes(op, which, case):
    arguments = valid(op, which, case)
    for f in fields(op):
        if f.kind == "INT":
            values = (-1, 0, 1, 2, 3, 2 ** 31, 2 ** 62, 2 ** 63 - 1, -2 ** 63)
        elif f.kind == "REAL":
            values = (0.0, -1.0, 1e308, -1e308, 5e-324)
        elif f.kind == "DIM":
            values = (0, 1, 2, 100, 2 ** 63 - 1)
        else:
            continue
        for value in values:
            attempt(op, which, {**copied(arguments), f.name: value})
