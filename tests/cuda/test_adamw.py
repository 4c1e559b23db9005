"""The bf16 shadows that adamw rewrites on a GPU within its sweep (kernels/adamw.cu): those that `derive` makes of the
new weights, wherever the matrices lie in the slab."""

import ctypes

import numpy as np
import pytest

from .common import Backend, on_the_stand_in

pytestmark = pytest.mark.skipif(not on_the_stand_in(), reason="looks into the library of cuda-on-cpu")

# A thread has four numbers, a block 1024. (F, D, at): within four numbers of another, several in one thread's four,
# aligned, one of nothing, more than a block, up to the slab's end; and gaps, where there is no shadow.
MATRICES = [(3, 5, 2), (1, 1, 17), (1, 1, 18), (2, 3, 19), (7, 9, 64), (5, 5, 127), (0, 4, 200), (16, 64, 256),
            (40, 41, 1281), (1, 6, 2995)]
M = 3001


class Twin(ctypes.Structure):
    _fields_ = [(name, ctypes.c_int64) for name in "F D at derived".split()]


class Twins(ctypes.Structure):
    _fields_ = [("count", ctypes.c_int64), ("list", ctypes.c_void_p), ("derived", ctypes.c_void_p)]


class Arguments(ctypes.Structure):
    """pm_adamw_args"""
    SLABS = "grad param m v avg".split()
    _fields_ = [("M", ctypes.c_int64), *((name, ctypes.c_void_p) for name in ("hyper", "norm", *SLABS)), ("twins", Twins)]


def update(offset, norm, avg):
    """(shadows, those that derive makes of the new weights); the slabs begin `offset` numbers behind an aligned place."""
    backend, rng = Backend("adamw"), np.random.default_rng(0)
    slabs = {name: rng.uniform(0.1, 1, M + offset).astype(np.float32) for name in Arguments.SLABS}
    memory = {name: backend.put(values).value + 4 * offset for name, values in slabs.items() if avg or name != "avg"}
    places, size = [], 0
    for F, D, at in MATRICES:
        places.append(Twin(F, D, at, size))
        size += backend.derived_bytes(ctypes.c_int64(F), ctypes.c_int64(D))
    before = rng.integers(0, 1 << 16, size // 2).astype(np.uint16)
    derived = backend.put(before)
    twins = Twins(len(places), backend.put(np.frombuffer((Twin * len(places))(*places), np.int64)), derived)
    arguments = Arguments(M=M, hyper=backend.put(np.array([0.1, 0.9, 0.999, 1e-8, 0.01, 1, 0.9, 3.0])),
                          norm=backend.put(np.array([norm])), twins=twins, **memory)
    assert backend.run(arguments) == 0
    got = backend.get(derived, before)

    other = backend.put(before)
    for t in places:
        assert backend.derive(ctypes.c_int64(t.F), ctypes.c_int64(t.D), ctypes.c_void_p(memory["param"] + 4 * t.at),
                              ctypes.c_void_p(other.value + t.derived)) == 0
    moved = backend.get(memory["param"], slabs["param"][offset:]) != slabs["param"][offset:]
    assert moved.all() == np.isfinite(norm)
    return before, got, backend.get(other, before)


@pytest.mark.parametrize("avg", [False, True])
@pytest.mark.parametrize("offset", [0, 1, 4])
def test_shadows_are_those_of_the_new_weights(offset, avg):
    before, got, truth = update(offset, 2.0, avg)
    assert (truth != before).any()
    np.testing.assert_array_equal(got, truth)


def test_a_skipped_update_leaves_the_shadows():
    before, got, _ = update(0, np.inf, True)
    np.testing.assert_array_equal(got, before)
