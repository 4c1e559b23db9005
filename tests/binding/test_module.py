"""The extension as a Python module: threads, forks, leaks, reimport, stubs, exported symbols."""

import gc
import os
import re
import shutil
import subprocess
import sys
import threading
import time

import numpy as np
import pytest

import promoe
from promoe import _core, ops
from tests.binding import stubs
from tests.binding.calls import CASES, FUNCTIONS, call, valid, with_buffers


def python(code, **environment):
    """Runs code in a fresh interpreter."""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=120,
                          env={**os.environ, **environment})
    return done.returncode, done.stdout + done.stderr


# ---------------------------------------------------------------- what it says of itself


def test_stub_file_is_up_to_date():
    assert stubs.section() in stubs.PATH.read_text(), "run python -m tests.binding.stubs"


def test_docstrings():
    for op, which in FUNCTIONS:
        doc = getattr(ops, f"{op}_{which}").__doc__
        assert op in doc.split("\n\n")[0 if which == "forward" else 1]
        assert "Parameters\n----------" in doc and "Returns\n-------" in doc
        assert not re.search(r"\bPM_E|\bNULL\b", doc)


def test_backend_info():
    info = promoe.backend_info()
    assert info["device"] == "cpu" and info["level"] in _core.levels()
    assert info["threads"] == promoe.get_num_threads() and isinstance(info["cpu"], str)
    assert _core.levels()[-1] == "generic"


def test_level_by_environment():
    for level in _core.levels():
        assert python("import promoe; print(promoe.backend_info()['level'])", PROMOE_CPU=level) == (0, level + "\n")
    code, text = python("import promoe", PROMOE_CPU="mmx")
    assert code and "ImportError: PROMOE_CPU=mmx is not a level: one of generic, avx2, avx512, amx" in text


@pytest.mark.skipif("amx" not in _core.levels(), reason="needs AMX")
def test_a_system_that_refuses_tile_registers():
    """Linux does when a thread's signal stack has no room for them."""
    small = ("import ctypes\n"
             "class Stack(ctypes.Structure):\n"
             "    _fields_ = [('at', ctypes.c_void_p), ('flags', ctypes.c_int), ('size', ctypes.c_size_t)]\n"
             "memory = ctypes.create_string_buffer(6144)\n"
             "stack = Stack(ctypes.addressof(memory), 0, len(memory))\n"
             "assert not ctypes.CDLL(None).sigaltstack(ctypes.byref(stack), None)\n")
    code, text = python(small + "import promoe; print(promoe.backend_info()['level'], promoe._core.levels())\n"
                        "from promoe import doctor; print(doctor.report(doctor.examine()))", PROMOE_CPU="")
    assert code == 0 and text.startswith("avx512 ('avx512', 'avx2', 'generic')"), text
    assert "amx           no: the system does not grant its tile registers: " in text
    code, text = python(small + "import promoe", PROMOE_CPU="amx")
    assert code and "ImportError: PROMOE_CPU=amx, but the system does not grant its tile registers" in text


def test_exports_one_symbol():
    if not shutil.which("nm"):
        pytest.skip("needs nm")
    text = subprocess.run(["nm", "-D", "--defined-only", _core.__file__], capture_output=True, text=True,
                          check=True).stdout
    assert re.findall(r" T (\w+)", text) == ["PyInit__core"]


# ---------------------------------------------------------------- threads


@pytest.mark.parametrize("wrong", [0, -1, 1025, 2 ** 70, -2 ** 70])
def test_wrong_thread_count(wrong):
    with pytest.raises(ValueError, match=f"set_num_threads: threads must be 1 to 1024; got {wrong}"):
        promoe.set_num_threads(wrong)


@pytest.mark.parametrize("wrong", [None, True, 2.0, "2", np.ones(2)])
def test_thread_count_of_wrong_type(wrong):
    with pytest.raises(TypeError, match="set_num_threads: threads must be an int"):
        promoe.set_num_threads(wrong)


def test_thread_count():
    before = promoe.get_num_threads()
    try:
        for n in (1, 3, np.int64(2), 2):
            promoe.set_num_threads(n)
            assert promoe.get_num_threads() == n == promoe.backend_info()["threads"]
    finally:
        promoe.set_num_threads(before)


def test_default_thread_count():
    show = "import promoe; print(promoe.get_num_threads())"
    assert python(show, PROMOE_NUM_THREADS="1") == (0, "1\n")


NOISE = np.array([1, 0], np.int64)


def test_the_gil_is_released():
    """While one thread is inside an op, another gets on with Python."""
    big, ticks, running = np.empty((1, 1 << 24), np.float32), 0, threading.Event()

    def compute():
        running.set()
        for _ in range(3):
            ops.gaussian_noise_forward(NOISE, x=big)

    for _ in range(3):  # a loaded machine may not run us in the first
        thread = threading.Thread(target=compute)
        thread.start()
        running.wait()
        begin = time.perf_counter()
        longest = 0.0
        while thread.is_alive():
            at = time.perf_counter()
            time.sleep(0.001)
            longest = max(longest, time.perf_counter() - at)
            ticks += 1
        took = time.perf_counter() - begin
        thread.join()
        if ticks > 5 and longest < took / 4:
            return
    pytest.fail(f"{ticks} ticks; stood still for {longest:.3f} of {took:.3f} s")


def test_many_threads_at_once():
    """Computations wait for each other, and none is disturbed, not even by a change of the thread count."""
    expected = ops.gaussian_noise_forward(NOISE, B=3, M=5000)["x"].tobytes()
    before, wrong = promoe.get_num_threads(), []

    def compute():
        for _ in range(50):
            if ops.gaussian_noise_forward(NOISE, B=3, M=5000)["x"].tobytes() != expected:
                wrong.append(1)

    threads = [threading.Thread(target=compute) for _ in range(4)]
    for t in threads:
        t.start()
    for i in range(30):
        promoe.set_num_threads(1 + i % 3)
    for t in threads:
        t.join()
    promoe.set_num_threads(before)
    assert not wrong


@pytest.mark.skipif(not hasattr(os, "fork"), reason="needs fork")
def test_after_fork():
    code, text = python("""if True:
        import os, threading, numpy as np
        from promoe import ops
        key, stop = np.array([1, 0], np.int64), threading.Event()
        def compute():
            while not stop.is_set():
                ops.gaussian_noise_forward(key, B=4, M=100000)
        thread = threading.Thread(target=compute)
        thread.start()
        expected = ops.gaussian_noise_forward(key, B=4, M=1000)["x"].tobytes()
        for _ in range(10):  # while the other thread computes
            child = os.fork()
            if not child:
                same = ops.gaussian_noise_forward(key, B=4, M=1000)["x"].tobytes() == expected
                os._exit(0 if same else 1)
            assert os.waitpid(child, 0)[1] == 0
        stop.set()
        thread.join()
        print("done")""")
    assert (code, text.splitlines()[-1:]) == (0, ["done"]), text


# ---------------------------------------------------------------- life and death


def test_reimport():
    code, text = python("""if True:
        import gc, sys, numpy as np, promoe
        key, first = np.array([1, 0], np.int64), promoe.ops.gaussian_noise_forward
        expected = first(key, B=1, M=9)["x"].tobytes()
        for _ in range(3):
            for name in [m for m in sys.modules if m.startswith("promoe")]:
                del sys.modules[name]
            import promoe
            gc.collect()
            assert promoe.ops.gaussian_noise_forward is not first
            assert promoe.ops.gaussian_noise_forward(key, B=1, M=9)["x"].tobytes() == expected
        assert first(key, B=1, M=9)["x"].tobytes() == expected
        print("done")""")
    assert (code, text) == (0, "done\n")


def test_subinterpreter():
    """An import in a second interpreter works or is refused (by NumPy, too); it does not crash."""
    code, text = python("""if True:
        try:
            import _testcapi
        except ImportError:
            print("no _testcapi")
            raise SystemExit
        import numpy as np, promoe
        inside = '''if True:
            import warnings
            warnings.simplefilter("ignore")
            try:
                import numpy as np, promoe
            except ImportError as error:
                print("refused")
            else:
                promoe.ops.gaussian_noise_forward(np.array([1, 0], np.int64), B=1, M=9)
                print("works")
        '''
        assert _testcapi.run_in_subinterp(inside) == 0
        promoe.ops.gaussian_noise_forward(np.array([1, 0], np.int64), B=1, M=9)
        print("done")""")
    assert code == 0 and text.splitlines()[-1] in ("done", "no _testcapi"), text


def misused(op, which, arguments):
    """Calls that fail late: every argument has been read."""
    for name, value in arguments.items():
        if isinstance(value, np.ndarray):
            yield {**arguments, name: np.zeros((*value.shape, 1), value.dtype)}
    yield {**arguments, "zzz": None}


@pytest.mark.parametrize("op, which", FUNCTIONS)
def test_no_reference_is_lost_or_kept(op, which):
    case = next(c for o, w, c in CASES if (o, w) == (op, which))
    arguments = valid(op, which, case)
    buffers = with_buffers(op, which, arguments)
    spoilt = list(misused(op, which, arguments))

    def once():
        call(op, which, arguments)
        call(op, which, buffers)
        for wrong in spoilt:
            with pytest.raises((TypeError, ValueError)):
                call(op, which, wrong)
        _core._fail_allocation(1)
        try:
            call(op, which, buffers)
        except MemoryError:
            pass
        _core._fail_allocation(0)

    def counts():
        gc.collect()
        return [sys.getrefcount(v) for v in (*arguments.values(), *buffers.values())]

    once()
    before = counts()
    for _ in range(20):
        once()
    assert counts() == before


def test_memory_does_not_grow():
    """Blocks of Python memory after thousands of calls, good and bad."""
    x, weight = np.ones((4, 8), np.float32), np.ones((2, 8), np.float32)

    def many():
        for _ in range(2000):
            ops.linear_forward(x, weight)
            try:
                ops.linear_forward(x, weight, bias=x)
            except ValueError:
                pass
        gc.collect()
        return sys.getallocatedblocks()

    many()
    before = many()
    assert many() - before < 50


@pytest.mark.skipif(not os.path.exists("/proc/self/statm"), reason="needs Linux")
def test_scratch_is_given_back():
    x, weight = np.ones((8, 512), np.float32), np.ones((512, 512), np.float32)

    def resident():
        for _ in range(60):  # each packs 1 MiB of weights
            ops.linear_forward(x, weight)
        with open("/proc/self/statm") as file:
            return int(file.read().split()[1]) * os.sysconf("SC_PAGE_SIZE")

    resident()
    before = resident()
    assert resident() - before < 20 << 20


def test_arguments_by_position():
    x, weight = np.ones((4, 8), np.float32), np.ones((2, 8), np.float32)
    assert ops.linear_forward(x, weight, None)["y"].tolist() == [[8, 8]] * 4
