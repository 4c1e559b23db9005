"""The kernels under the address sanitizer, and watched for races: a case of every op, more of the experts, and a whole
model. The tests of the library that the others run on, in a process that loads another build of it."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

from tests.cuda.common import on_the_stand_in
from tests.cuda.host import build

ROOT = Path(__file__).parents[2]
pytestmark = pytest.mark.skipif(not on_the_stand_in(), reason="builds of the kernels for the CPU")

MODEL = ("test_golden_forward and cond or test_golden_with_rounded_operands and promoe_tc.mixed-bf16 or "
         "test_every_allocation_fails_once or test_two_runs_have_the_same_bits or test_copies and pickle or "
         "test_a_step_is_two_launches or test_sampling_in_bf16")
SUBSETS = {
    "ops": ["tests/cuda/test_ops.py", "-k", "test_two_runs_have_the_same_bits and not tf32"],  # the last case of each
    "arrays": ["tests/cuda/test_device_arrays.py"],
    "experts": ["tests/cuda/test_experts.py", "tests/cuda/test_adamw.py", "-k",
                "derived or shadows or as_a_loop and full_tiles and bf16"],
    "model": ["tests/cuda/test_model.py", "-k", MODEL],
}


def environment(variant):
    """Of a process that can load that build; the address sanitizer has to be there first."""
    library = build.plugin(variant)
    preload = {}
    if variant == "asan":
        found = [subprocess.run([build.compiler(), f"-print-file-name={name}"], capture_output=True, text=True, check=True)
                 .stdout.strip() for name in ("libasan.so", "libstdc++.so.6")]
        preload = {"LD_PRELOAD": " ".join(found), "ASAN_OPTIONS": "detect_leaks=0:quarantine_size_mb=16"}
    return {**os.environ, "PROMOE_CUDA_ON_CPU": str(library), **preload}


@pytest.mark.parametrize("subset", SUBSETS)
@pytest.mark.parametrize("variant", ["asan", "race"])
def test_sanitized(variant, subset):
    done = subprocess.run([sys.executable, "-m", "pytest", "-q", "-x", "-p", "no:cacheprovider", *SUBSETS[subset]],
                          cwd=ROOT, env=environment(variant), capture_output=True, text=True, timeout=900)
    assert done.returncode == 0, done.stdout[-4000:] + done.stderr[-4000:]
    assert " passed" in done.stdout
