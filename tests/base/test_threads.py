"""The pool, through what Python sees of it."""

import ctypes
import os
import platform
import subprocess
import sys
import threading
import time

import numpy as np
import pytest

import promoe
from promoe import ops

KEY = np.array([3, 5], np.int64)


def draws():
    return ops.gaussian_noise_forward(key=KEY, B=8, M=9000)["x"]


@pytest.fixture(autouse=True)
def same_threads_after():
    threads = promoe.get_num_threads()
    yield
    promoe.set_num_threads(threads)


def python(code, **environment):
    """Runs code in a fresh interpreter: (exit status, what it printed)."""
    clean = {k: v for k, v in os.environ.items() if k not in ("PROMOE_NUM_THREADS", "OMP_NUM_THREADS")}
    done = subprocess.run([sys.executable, "-W", "ignore", "-c", code], env={**clean, **environment},
                          stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, timeout=120)
    return done.returncode, done.stdout.strip()


@pytest.mark.parametrize("threads", [1, 2, 3, 8, 40])
def test_same_bits(threads):
    promoe.set_num_threads(1)
    one = draws()
    promoe.set_num_threads(threads)
    assert promoe.get_num_threads() == threads
    for _ in range(20):
        np.testing.assert_array_equal(draws(), one)


def test_callers_at_the_same_time():
    promoe.set_num_threads(2)
    expected, wrong = draws(), []

    def call():
        wrong.extend(not np.array_equal(draws(), expected) for _ in range(20))

    callers = [threading.Thread(target=call) for _ in range(4)]
    for caller in callers:
        caller.start()
    for caller in callers:
        caller.join()
    assert wrong == [False] * 80


def test_the_callers_rounding_mode_does_not_matter():
    upward = {"x86_64": 0x800, "aarch64": 0x400000}.get(platform.machine())
    if upward is None or not sys.platform.startswith("linux"):
        pytest.skip("the number of FE_UPWARD is not known here")
    libm = ctypes.CDLL("libm.so.6")
    for threads in (1, 2):
        promoe.set_num_threads(threads)
        expected = draws()
        libm.fesetround(upward)
        try:
            assert libm.fegetround() == upward
            got = draws()
            still = libm.fegetround()
        finally:
            libm.fesetround(0)
        assert still == upward
        np.testing.assert_array_equal(got, expected)


FORK = """
import os, threading, time
import numpy as np, promoe
from promoe import ops
promoe.set_num_threads(3)
def draws():
    return ops.gaussian_noise_forward(key=np.array([3, 5]), B=8, M=9000)["x"]
expected, stop = draws(), []
def keep_busy():
    while not stop:
        draws()
caller = threading.Thread(target=keep_busy)
caller.start()
for i in range(10):
    child = os.fork()
    if not child:
        os._exit(0 if all(np.array_equal(draws(), expected) for _ in range(5))
                 and len(os.listdir("/proc/self/task")) == 3 else 1)
    assert os.waitpid(child, 0)[1] == 0, "child"
    assert np.array_equal(draws(), expected), "parent"
stop.append(1)
caller.join()
promoe.set_num_threads(2)
print("fine")
"""


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="counts threads in /proc")
def test_fork():
    """Children of a process that computes in another thread compute too, with threads of their own."""
    assert python(FORK) == (0, "fine")


COUNT = "import promoe; print(promoe.get_num_threads())"


@pytest.mark.parametrize("environment, threads", [
    ({"PROMOE_NUM_THREADS": "5"}, 5),
    ({"PROMOE_NUM_THREADS": "3", "OMP_NUM_THREADS": "7"}, 3),
    ({"OMP_NUM_THREADS": "7"}, 7),
    ({"OMP_NUM_THREADS": "4,2"}, 4),
    ({"PROMOE_NUM_THREADS": "", "OMP_NUM_THREADS": "6"}, 6),
])
def test_environment(environment, threads):
    assert python(COUNT, **environment) == (0, str(threads))


@pytest.mark.parametrize("text", ["0", "-1", "two", "2.5", "4,2", "99999", "3x"])
def test_wrong_environment(text):
    status, output = python(COUNT, PROMOE_NUM_THREADS=text)
    assert status and f"ImportError: PROMOE_NUM_THREADS={text} is not a number of threads" in output


@pytest.mark.skipif(not hasattr(os, "sched_setaffinity"), reason="no affinity masks here")
def test_affinity():
    one = min(os.sched_getaffinity(0))
    code = f"import os; os.sched_setaffinity(0, [{one}]); " + COUNT
    assert python(code) == (0, "1")
    assert python(code, OMP_NUM_THREADS="nonsense") == (0, "1")


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="reads /proc")
def test_workers_take_no_signals():
    promoe.set_num_threads(4)
    draws()
    workers, blocked = {"promoe-1", "promoe-2", "promoe-3"}, {}
    until = time.monotonic() + 30
    while not workers <= set(blocked) and time.monotonic() < until:  # they name themselves once they run
        for task in os.listdir("/proc/self/task"):
            with open(f"/proc/self/task/{task}/status") as file:
                status = dict(line.split(":", 1) for line in file)
            blocked[status["Name"].strip()] = int(status["SigBlk"], 16)
    for worker in workers:
        for signal in (1, 2, 10, 14, 15):
            assert blocked[worker] >> (signal - 1) & 1
