"""The packed twins of weights on a CPU: whether made by a load, by an update or by an op that has none, they are the
layout of csrc/cpu/product.h, which is written down here in NumPy, with zeros behind every edge."""

import ctypes
import os
import subprocess
from pathlib import Path

import numpy as np
import pytest

import promoe

from .test_compute import bf16

CSRC = Path(__file__).parents[2] / "csrc"
LEVEL = promoe.backend_info()["level"]
COMPUTES = promoe.backend_info()["computes"]

# (F, D, at) in a slab of M: rows and columns around 16, 32 and their multiples, more panels than a task has, gaps, no
# rows, and up to the end.
MATRICES = [(3, 5, 2), (1, 1, 17), (1, 1, 18), (0, 4, 40), (15, 31, 64), (17, 33, 600), (32, 32, 1200), (16, 64, 2300),
            (300, 37, 3400), (33, 100, 15001), (257, 3, 18400), (48, 96, 20000)]
M = 20000 + 48 * 96
SLABS = "grad param m v avg".split()


class Twin(ctypes.Structure):
    _fields_ = [(name, ctypes.c_int64) for name in "F D at derived".split()]


class Arguments(ctypes.Structure):
    """pm_adamw_args"""
    _fields_ = [("M", ctypes.c_int64), *((name, ctypes.c_void_p) for name in ("hyper", "norm", *SLABS)),
                ("count", ctypes.c_int64), ("list", ctypes.c_void_p), ("derived", ctypes.c_void_p)]


@pytest.fixture(scope="session")
def library(tmp_path_factory):
    source = CSRC / "cpu" / "levels" / f"{'avx512' if LEVEL == 'amx' else LEVEL}.c"
    path = tmp_path_factory.mktemp("twins") / "twins.so"
    subprocess.run([*os.environ.get("CC", "cc").split(), "-O1", "-std=gnu11", "-ffp-contract=off", "-w", "-shared", "-fPIC",
                    "-pthread", f'-DLEVEL="{source}"', str(Path(__file__).with_name("twins.c")),
                    *(str(CSRC / "base" / f"{stem}.c") for stem in ("cpuid", "os", "rng", "status", "threads")), "-lm",
                    "-o", str(path)], check=True)
    found = ctypes.CDLL(str(path))
    found.twins_bytes.restype = ctypes.c_size_t
    return found


@pytest.fixture(params=COMPUTES)
def table(request, library):
    """(the level's backend, whether its operands are bfloat16)"""
    kind = {"fp32": "", "bf16": "bf16_", "bf16-emulated": "emulated_"}[request.param]
    return ctypes.byref(ctypes.c_char.in_dll(library, f"pm_cpu_{kind}{LEVEL}")), request.param != "fp32"


def address(array):
    return array.ctypes.data_as(ctypes.c_void_p)


def untouched(size):
    """Memory of `size` bytes on a line of the cache, full of NaN."""
    memory = np.full(size + 64, 0xFF, np.uint8)
    return memory[-memory.ctypes.data % 64:][:size]


def panels(columns, width, multiple, rounded):
    """The columns (n, k) of a right operand: [panel][word along k][column], zeros behind n and k."""
    n, k = columns.shape
    if not n * k:
        return b""
    padded = np.zeros((-(-n // width) * width, -(-k // multiple) * multiple), np.float32)
    padded[:n, :k] = columns
    if not rounded:
        return padded.reshape(len(padded) // width, width, -1).transpose(0, 2, 1).tobytes()
    high = (bf16(padded).view(np.uint32) >> 16).astype(np.uint16)  # pairs along k, the first in the low half
    return high.reshape(len(padded) // width, width, -1, 2).transpose(0, 2, 1, 3).tobytes()


def twin(library, table, w):
    """What the twin of a weight should be, in memory that was full of NaN."""
    backend, rounded = table
    F, D = w.shape
    width, multiple = ctypes.c_int.in_dll(library, "twins_panel").value, library.twins_multiple(backend)
    truth = untouched(size(library, backend, F, D))
    forward = panels(w, width, multiple, rounded)
    backward = panels(w.T, width, multiple, rounded)
    begin = -(-len(forward) // 64) * 64
    truth[:len(forward)] = np.frombuffer(forward, np.uint8)
    truth[begin:begin + len(backward)] = np.frombuffer(backward, np.uint8)
    return truth


def size(library, backend, F, D):
    return library.twins_bytes(backend, ctypes.c_int64(F), ctypes.c_int64(D))


@pytest.mark.parametrize("maker", ["twins_derive", "twins_pack"])
def test_twins_have_the_documented_layout(library, table, maker):
    rng = np.random.default_rng(0)
    for F, D in ((1, 1), (2, 3), (15, 31), (16, 32), (17, 33), (31, 16), (33, 40), (64, 64), (65, 7), (100, 129)):
        w = rng.standard_normal((F, D), np.float32)
        got = untouched(size(library, table[0], F, D))
        getattr(library, maker)(table[0], ctypes.c_int64(F), ctypes.c_int64(D), address(w), address(got))
        np.testing.assert_array_equal(got, twin(library, table, w), err_msg=f"F = {F}, D = {D}")


def update(library, table, threads, norm, avg=True):
    """(slabs before, slabs after, places of the twins, the memory of the twins)"""
    rng = np.random.default_rng(1)
    before = {name: rng.uniform(0.1, 1, M).astype(np.float32) for name in SLABS}
    after = {name: values.copy() for name, values in before.items()}
    places, total = [], 0
    for F, D, at in MATRICES:
        places.append(Twin(F, D, at, total))
        total += size(library, table[0], F, D)
    derived, hyper, norm = untouched(total), np.array([0.1, 0.9, 0.999, 1e-8, 0.01, 1, 0.9, 3.0]), np.array([norm])
    listed = (Twin * len(places))(*places)
    arguments = Arguments(M=M, hyper=address(hyper), norm=address(norm), count=len(places),
                          list=ctypes.cast(listed, ctypes.c_void_p), derived=address(derived),
                          **{name: address(values) for name, values in after.items() if avg or name != "avg"})
    assert library.twins_update(table[0], threads, ctypes.byref(arguments)) == 0
    return before, after, places, derived


@pytest.mark.parametrize("threads", [1, 3])
@pytest.mark.parametrize("avg", [True, False])
def test_an_update_writes_the_twins_of_the_new_weights(library, table, threads, avg):
    before, after, places, derived = update(library, table, threads, 2.0, avg)
    assert (after["param"] != before["param"]).all() and not after["grad"].any()
    for t in places:
        truth = twin(library, table, after["param"][t.at:t.at + t.F * t.D].reshape(t.F, t.D))
        np.testing.assert_array_equal(derived[t.derived:t.derived + len(truth)], truth, err_msg=f"F = {t.F}, D = {t.D}")


def test_with_twins_the_slabs_are_moved_as_without(library, table):
    before, after, _, _ = update(library, table, 2, 2.0)
    hyper = np.array([0.1, 0.9, 0.999, 1e-8, 0.01, 1, 0.9, 3.0])
    for name, value in promoe.ops.adamw_forward(hyper=hyper, norm=np.array([2.0]), **before).items():
        np.testing.assert_array_equal(after[name], value, err_msg=name)


def test_a_skipped_update_leaves_the_twins(library, table):
    before, after, _, derived = update(library, table, 2, np.inf)
    np.testing.assert_array_equal(derived, 0xFF)
    assert not after["grad"].any()
    for name in ("param", "m", "v", "avg"):
        np.testing.assert_array_equal(after[name], before[name])
