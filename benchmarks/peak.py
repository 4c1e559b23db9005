"""What the machine can do at most: FMA peak and memory bandwidth, measured beside what is compared with them.

    python benchmarks/peak.py [--threads 2] [--level avx512]

`peak.c` is compiled on the fly, at the level that promoe runs; for bf16, with the instructions that its products
use there. Two figures each: by the clock on the wall, which is what
counts on a machine that is alone, and by CPU time, for a rough idea of shares on one that is not.
"""

import argparse
import ctypes
import hashlib
import os
import statistics
import subprocess
import sys
from functools import cache
from pathlib import Path
from typing import NamedTuple

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

SOURCE = Path(__file__).with_name("peak.c")
FLAGS = {
    "amx": ["-DWIDTH=16", "-mavx512f", "-mfma", "-mprefer-vector-width=512"],
    "avx512": ["-DWIDTH=16", "-mavx512f", "-mfma", "-mprefer-vector-width=512"],
    "avx2": ["-DWIDTH=8", "-mavx2", "-mfma"],
    "generic": ["-DWIDTH=4"],
}
BF16_FLAGS = {  # beside those of fp32
    "amx": ["-DTILES", "-mamx-tile", "-mamx-bf16"],
    "avx512": ["-DDOT", "-mavx512bf16"],
}
BEYOND = 2  # times the last-level cache: so much memory is swept, at most a quarter of what is free
CACHE = 64 << 20  # bytes of a last-level cache that the system does not tell
SECONDS = 0.03  # of one measurement of the FMA peak


@cache
def _library(level, compute="fp32"):
    if level not in FLAGS:
        raise ValueError(f"peak: level {level!r}; there are {', '.join(FLAGS)}")
    if compute != "fp32" and (compute != "bf16" or level not in BF16_FLAGS):
        raise ValueError(f"peak: compute {compute!r} at level {level!r}; there is 'fp32', and 'bf16' at "
                         f"{', '.join(BF16_FLAGS)}")
    flags = FLAGS[level] + (BF16_FLAGS[level] if compute == "bf16" else [])
    cc = os.environ.get("CC", "cc").split()
    command = [*cc, "-O3", "-std=gnu11", "-ffp-contract=fast", "-shared", "-fPIC", "-pthread", *flags]
    key = hashlib.sha256(SOURCE.read_bytes() + repr(command).encode()).hexdigest()[:16]
    path = ROOT / "build" / "peak" / f"{level}-{compute}-{key}.so"
    if not path.exists():
        path.parent.mkdir(parents=True, exist_ok=True)
        part = path.with_suffix(f".{os.getpid()}")
        subprocess.run([*command, str(SOURCE), "-o", str(part)], check=True)
        part.replace(path)  # two benchmarks may begin at once
    library = ctypes.CDLL(str(path))
    library.peak_memory.restype = ctypes.c_void_p
    library.peak_memory.argtypes = [ctypes.c_int, ctypes.c_int64]
    library.peak_free.argtypes = [ctypes.c_void_p]
    seconds = ctypes.POINTER(ctypes.c_double)
    library.peak_operations.restype = ctypes.c_double
    library.peak_fma.restype = ctypes.c_double
    library.peak_fma.argtypes = [ctypes.c_int, ctypes.c_int64, seconds]
    for run in (library.peak_read, library.peak_copy, library.peak_update):
        run.restype, run.argtypes = ctypes.c_double, [ctypes.c_int, ctypes.c_int64, ctypes.c_void_p, seconds]
    return library


def here():
    """The level and the threads that promoe runs with."""
    import promoe

    return promoe.backend_info()["level"], promoe.get_num_threads()


class Rate(NamedTuple):
    """Per second of the clock on the wall, and per second of CPU time (summed over the threads)."""

    wall: float
    cpu: float


def _median(measure, *arguments, times):
    """The medians of `times` measurements."""
    cpu, rates = ctypes.c_double(), []
    for _ in range(times):
        wall = measure(*arguments, ctypes.byref(cpu))
        if wall < 0:
            raise MemoryError("peak: no memory for the threads, or no tile registers")
        rates.append(Rate(wall, cpu.value))
    return Rate(*(statistics.median(column) for column in zip(*rates)))


@cache
def _rounds(level, compute):
    """Of a measurement of SECONDS."""
    library = _library(level, compute)
    rate = _median(library.peak_fma, 1, 10_000, times=5).cpu
    return int(SECONDS * rate / library.peak_operations())


def fma(level, threads, compute="fp32", times=3):
    """Operations per second of the products of a compute, a multiply-add counted as two: the median of `times`
    short measurements."""
    return _median(_library(level, compute).peak_fma, threads, _rounds(level, compute), times=times)


def last_level_cache():
    """Bytes of the largest cache of a CPU."""
    sizes = Path("/sys/devices/system/cpu/cpu0/cache").glob("index*/size")
    return max((int(size.read_text().strip().removesuffix("K")) << 10 for size in sizes), default=CACHE)


def available():
    """Bytes of memory that are free or soon could be."""
    for line in Path("/proc/meminfo").read_text().splitlines():
        if line.startswith("MemAvailable:"):
            return int(line.split()[1]) << 10
    raise OSError("/proc/meminfo has no MemAvailable")


def floats(arrays):
    """Of each array, so that they are beyond the caches together; a multiple of a huge page's."""
    swept = min(BEYOND * last_level_cache(), available() // 4)
    page = 1 << 19
    return max(1, swept // (4 * arrays * page)) * page


def bandwidth(level, threads, times=5, kinds=("read", "copy", "update")):
    """Bytes per second, each read and each write counted, medians: {"read": once over memory, "copy": from one half to
    the other, "update": as AdamW's with twins, five arrays read and written and two streamed}."""
    library = _library(level)
    count = floats(threads * library.peak_arrays())
    memory = library.peak_memory(threads, count)
    if not memory:
        raise MemoryError("peak: no memory to measure the bandwidth")
    try:
        return {kind: _median(getattr(library, f"peak_{kind}"), threads, count, memory, times=times) for kind in kinds}
    finally:
        library.peak_free(memory)


def main():
    level, threads = here()
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--threads", type=int, default=threads)
    parser.add_argument("--level", choices=FLAGS, default=level)
    a = parser.parse_args()
    import promoe

    computes = promoe.backend_info()["computes"] if a.level == level else ["fp32"]
    speeds = {"FMA": fma(a.level, a.threads, times=9)}
    if "bf16" in computes:
        speeds["bf16"] = fma(a.level, a.threads, "bf16", times=9)
    speeds |= bandwidth(a.level, a.threads)
    for name, rate in speeds.items():
        unit = "GB/s" if name in ("read", "copy", "update") else "GFLOP/s"
        print(f"{a.level}, {a.threads} threads: {name:<6} {rate.wall / 1e9:7.1f} {unit}  "
              f"(by CPU time {rate.cpu / 1e9:.1f})")


if __name__ == "__main__":
    main()
