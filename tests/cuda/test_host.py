"""The machine that runs CUDA kernels on a CPU, shown by kernels that are sabotaged on purpose.

host/cases/*.cu has right kernels and, by number, their sabotaged forms. The right ones pass in every
build and every order of threads; each sabotage goes red, and says what and where.
"""

import re
import subprocess

import pytest

from .host.build import COMMON, CXX, HOST, KERNEL, VARIANTS, build, compiler

pytestmark = pytest.mark.skipif(not compiler(), reason="needs a C++ compiler (g++)")

CASES = sorted((HOST / "cases").glob("*.cu"))
ORDERS = ("forward", "reverse", "shuffled")
WRONG = "wrong: "  # the result differs: what plain runs show of a race
AT = r"kernel {}, block \(\d+, \d+, \d+\), thread \({}, 0, 0\): "

# case -> the builds and orders in which a sabotage number gives what. "plain" holds in all three orders.
PLAIN = {
    "barrier_missing": {1: WRONG, 2: WRONG},
    "barrier_divergent": {
        1: AT.format("divergent", r"\d+") + r"divergent barrier: this thread is at __syncthreads "
        r"\(barriers.cu:\d+\), thread \(\d+, 0, 0\) at __syncthreads \(barriers.cu:\d+\)",
        2: r"kernel divergent, .*: deadlock: 32 threads, the first .*, at __sync.* \(barriers.cu:\d+\); "
        r"32 threads, the first .*, at __sync.* \(barriers.cu:\d+\); 0 of 64 threads have returned",
    },
    "shared_unwritten": {
        1: WRONG,
        2: AT.format("total", 0) + r"out of bounds \(barriers.cu:\d+\): index 64 of an array of type "
        r"'float \[64\]'",
    },
    "dynamic_shared_overrun": {
        1: r"kernel dynamic_total, .*: out of bounds: somebody wrote 0 bytes behind the end of the 256 "
        "bytes of dynamic shared memory",
        2: WRONG,
    },
    "race_in_global_memory": {1: WRONG, 2: WRONG, 3: WRONG},
    "faults": {
        1: AT.format("faulty", 40) + "still running after 0.5 s",
        2: AT.format("faulty", 41) + "invalid access at address 0x",
        3: AT.format("faulty", 42) + r"division of a 'int' by zero.*\(barriers.cu:\d+\)",
        4: AT.format("faulty", 43) + "the thread's stack overflowed",
        5: AT.format("faulty", 44) + "__trap",
        6: AT.format("faulty", 45) + r"shift of a 'int' by 40 \(barriers.cu:\d+\)",
    },
    "shuffle_masks": {
        1: AT.format("warp_sum", r"\d+") + r"__shfl_xor_sync: lane \d+ reads lane 5, which is not in the "
        "mask or has returned",
        2: r"kernel warp_sum, .*: deadlock: 32 threads, .* at __shfl_xor_sync with mask 0xffffffff "
        r"\(warps.cu:\d+\); 32 threads",
        3: AT.format("warp_sum", r"\d+") + r"(__shfl_xor_sync \(warps.cu:\d+\): the mask 0xffffffdf does not "
        "name the calling lane 5|deadlock)",
    },
    "syncwarp_missing": {1: WRONG, 2: WRONG},
    "shuffle_is_no_block_barrier": {1: WRONG},
    "mma_bf16": {
        1: WRONG,
        2: r"kernel one_mma<1, 1>, .*: mma_m16n8k16 \(tensor.cu:\d+\) needs all 32 lanes of warp 0; those "
        "there: 0xfffffdff",
    },
    "ldmatrix": {
        1: AT.format("load<1, false>", 3) + r"misaligned: a row of ldmatrix at shared s \+ 146 bytes needs "
        "an address that is a multiple of 16",
        2: AT.format("load<1, false>", 4) + r"out of bounds: a row of ldmatrix at device memory \+ 0 bytes "
        r"\(of 512\) is not in the block's shared memory",
    },
    **{f"cp_async_{n}": {
        1: WRONG, 2: WRONG, 3: WRONG, 4: WRONG,
        5: AT.format(f"copies<{n}>", 33) + rf"misaligned: the source of cp.async at device memory \+ \d+ "
        rf"bytes \(of {n * 256}\) needs an address that is a multiple of {n}",
        6: AT.format(f"copies<{n}>", r"\d+") + r"returned with a cp.async \(tensor.cu:\d+\) that nobody "
        "waited for",
    } for n in (4, 8, 16)},
    "cp_async_pipeline": {1: WRONG, 2: WRONG},
    "tiled_product": {1: WRONG, 2: WRONG},
    **{case: {
        1: r"wgmma \(tensor.cu:\d+\): lane 0 has waited for copies without fence_proxy_async behind it",
        2: r"wgmma \(tensor.cu:\d+\): dynamic shared memory \+ \d+ bytes .*was written before wgmma_wait",
        3: f"({WRONG}|was written before wgmma_wait)",
        4: r"wgmma \(tensor.cu:\d+\) without wgmma_begin since the last wgmma_wait",
        5: WRONG,
        6: r"returned with a wgmma \(tensor.cu:\d+\) that nobody waited for",
    } for case in ("wgmma", "wgmma_across")},
    "misaligned_vectors": {
        1: AT.format("vectors", 3) + r"misaligned access \(tensor.cu:\d+\) to a 'const struct float4' at "
        r"device memory \+ 52 bytes \(of 272\): it needs an address that is a multiple of 16",
        2: AT.format("vectors", 5) + r"misaligned access \(tensor.cu:\d+\) to a 'const struct float2'",
        3: AT.format("vectors", 7) + r"misaligned access \(tensor.cu:\d+\) to a 'struct float4' at shared s "
        r"\+ 116 bytes",
        4: AT.format("vectors", 9) + r"misaligned access \(tensor.cu:\d+\) to a 'struct float4'",
    },
    "launch_limits": {
        1: r"kernel small: a block of \(1025, 1, 1\) threads",
        2: r"kernel small: a block of \(1, 1, 65\) threads",
        3: r"kernel small: a grid of \(1, 65536, 1\) blocks",
        4: r"kernel small: a grid of \(0, 1, 1\) blocks",
        5: "kernel uses_dynamic: 49153 bytes of dynamic shared memory, allowed 49152",
        6: r"167936 bytes of dynamic \+ 0 of static shared memory; sm_80 has 166912",
        7: r"192512 bytes of dynamic \+ 40960 of static shared memory; sm_90 has 232448",
        8: "invalid resource handle: no such stream",
    },
    "memory": {
        1: r"cudaMemcpy: the destination .* \+ 36 bytes is not within an allocation of the device",
        2: "cudaMemcpy: the destination .* is not within host memory",
        3: r"cudaMemset: .* \+ 32 bytes is not within an allocation",
        4: "cudaFree.*: not from cudaMalloc, or freed before",
        5: "cudaFree.*: not from cudaMalloc, or freed before",
        6: "out of memory: cudaMalloc of 4 bytes",
        7: "cudaMemcpy: the destination .* is not within an allocation of the device",
    },
    "streams": {1: WRONG, 2: WRONG, 3: "cudaStreamSynchronize: no such stream"},
    "staging": {1: WRONG},
    "graphs": {
        1: "capturing stream has unjoined work",
        2: "cudaStreamSynchronize while a stream is being captured",
        3: "cudaMemcpy while a stream is being captured",
        4: "cudaMalloc while a stream is being captured",
        5: "the stream is captured already",
    },
    "blas_wrong": {
        1: "layout of A: leading dimension 23 is less than the 24 rows",
        2: "A, at .*, reaches over the end of its allocation",
        3: r"shapes do not fit: op\(A\) \(40, 24\), op\(B\) \(40, 10\)",
        4: "the workspace is null; it needs 4096 bytes",
        5: "A is at .*; the algorithm was chosen for an alignment of 256 bytes",
        6: "the algorithm was chosen for another product",
        7: "B, at .*, reaches over the end of its allocation",
        8: "the leading dimension of the auxiliary matrix is 36: it has to be a multiple of 8",
        9: "the bias, at .*, is not 24 numbers of device memory",
        10: "the workspace is not aligned to 16 bytes",
        11: "alpha or beta is null",
        12: "the heuristic was told to offer nothing",
        13: WRONG,
    },
    "blas_square": {3: WRONG},
}

# What the race build says of the sabotages that plain runs only show as wrong results, or not at all.
PLACE = r"\(\w+.cu:\d+[^)]*\)"
BETWEEN = rf"(reads|writes) .* {PLACE}, which thread \(\d+, 0, 0\) (wrote|reads) {PLACE} without a barrier between"
UNWRITTEN = rf"uninitialised: reads shared s \+ \d+ bytes {PLACE}, which no thread has written"
RACE_OR_UNWRITTEN = rf"(race: {BETWEEN}|{UNWRITTEN})"
FLYING = r"reads shared s \+ \d+ bytes \(tensor.cu:\d+\), where a cp.async of thread \(\d+, 0, 0\) " \
         r"\(tensor.cu:\d+\) has not arrived"
RACE = {
    "barrier_missing": {1: RACE_OR_UNWRITTEN, 2: "race: " + BETWEEN},
    "shared_unwritten": {1: AT.format("total", 0) + UNWRITTEN},
    "dynamic_shared_overrun": {
        1: AT.format("dynamic_total", 63) + r"out of bounds: writes 4 bytes at dynamic shared memory \+ 256 "
        r"bytes \(of 256\)",
        2: AT.format("dynamic_total", 0) + "out of bounds: reads 4 bytes at dynamic shared memory",
    },
    "race_in_global_memory": {
        1: r"race: writes device memory \+ \d+ bytes \(of 516\) \(barriers.cu:\d+\), which thread "
        r"\(\d+, 0, 0\) wrote",
        2: r"block \([01], 0, 0\), .* race: writes device memory \+ \d+ bytes \(of 516\) \(barriers.cu:\d+\), "
        r"which block \([01], 0, 0\) wrote",
        3: r"race: (reads|writes) device memory \+ 512 bytes",
    },
    "global_overrun": {
        1: AT.format("overrun", 4) + r"out of bounds: (reads|writes) 4 bytes at device memory \+ 400 bytes",
        2: AT.format("overrun", 3) + r"out of bounds: reads 4 bytes at device memory \+ 400 bytes",
    },
    "syncwarp_missing": {1: RACE_OR_UNWRITTEN, 2: "race: " + BETWEEN},
    "shuffle_is_no_block_barrier": {1: RACE_OR_UNWRITTEN},
    **{f"cp_async_{n}": {1: FLYING, 2: FLYING, 3: FLYING, 4: f"({FLYING}|{RACE_OR_UNWRITTEN})"}
       for n in (4, 8, 16)},
    "cp_async_pipeline": {1: FLYING, 2: f"({FLYING}|race: writes shared s)"},
    "tiled_product": {1: "(race: |uninitialised: |has not arrived)"},
    "wgmma": {3: "(race: |uninitialised: |has not arrived)"},
}

ASAN = {
    "global_overrun": {1: "heap-buffer-overflow", 2: "heap-buffer-overflow"},
    "dynamic_shared_overrun": {1: "AddressSanitizer", 2: "AddressSanitizer"},
}


@pytest.fixture(scope="module")
def programs():
    made = {}

    def program(variant):
        if variant not in made:
            made[variant] = build("cases", CASES, variant, program=True)
        return made[variant]

    return program


def run(program, case, sabotage, order="forward"):
    """The exit status and the text of a case, which must end."""
    done = subprocess.run([program, case, str(sabotage)], capture_output=True, text=True, timeout=60,
                          env={"PM_HOST": f"order={order}", "ASAN_OPTIONS": "detect_leaks=0"})
    assert done.returncode >= 0, f"killed by signal {-done.returncode}: {done.stderr}"
    return done.returncode, done.stdout + done.stderr


def names():
    text = "".join(f.read_text() for f in CASES)
    return re.findall(r"^CASE\((\w+)\)", text, re.M)


@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize("case", names())
def test_right_kernels_pass(programs, case, variant):
    for order in ORDERS:
        status, text = run(programs(variant), case, 0, order)
        assert status == 0, f"{order}: {text}"


def sabotages(table):
    return [(case, sabotage) for case in table for sabotage in table[case]]


@pytest.mark.parametrize("case,sabotage", sabotages(PLAIN))
def test_sabotage_is_seen(programs, case, sabotage):
    for order in ORDERS:
        status, text = run(programs("plain"), case, sabotage, order)
        assert status in (1, 2) and re.search(PLAIN[case][sabotage], text, re.S), f"{order}: {text}"


@pytest.mark.parametrize("case,sabotage", sabotages(RACE))
def test_sabotage_is_named(programs, case, sabotage):
    for order in ORDERS:
        status, text = run(programs("race"), case, sabotage, order)
        assert status == 2 and re.search(RACE[case][sabotage], text, re.S), f"{order}: {text}"


@pytest.mark.parametrize("case,sabotage", sabotages(ASAN))
def test_address_sanitizer(programs, case, sabotage):
    status, text = run(programs("asan"), case, sabotage)
    assert status and re.search(ASAN[case][sabotage], text), text


REFUSED = {
    "float atomics": ("__global__ void f(float *x) { atomicAdd(x, 1.0f); }", "no atomics on floats"),
    "active mask": ("__global__ void f(unsigned *x) { *x = __activemask(); }", "deleted function"),
    "arguments": ("__global__ void f(int) {}\nvoid g() { PM_LAUNCH(f, 1, 1, 0, nullptr, 1, 2); }",
                  "another number of arguments"),
    "copy size": ("__global__ void f(void *s, void *g) { cp_async<12>(s, g); }", "copies 4, 8 or 16 bytes"),
}


@pytest.mark.parametrize("what", REFUSED)
def test_does_not_compile(what, tmp_path):
    code, message = REFUSED[what]
    source = tmp_path / "refused.cu"
    source.write_text('#include <cuda_runtime.h>\n#include "ptx.cuh"\n' + code)
    done = subprocess.run([compiler(), *map(str, [*COMMON, *CXX, *KERNEL]), "-fsyntax-only", str(source)],
                          capture_output=True, text=True)
    assert done.returncode and message in done.stderr


def test_settings_are_read_once(programs):
    """A setting that is unknown ends the program, and says so."""
    done = subprocess.run([programs("plain")], capture_output=True, text=True, env={"PM_HOST": "odrer=1"})
    assert done.returncode and "PM_HOST: unknown setting odrer" in done.stderr
