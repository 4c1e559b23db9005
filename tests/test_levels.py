"""Ops, model and draws at every other instruction-set level that this CPU has.

The suite itself runs at the best one (or at PROMOE_CPU); here the same tests run once more at each of the others.
"""

import os
import subprocess
import sys
from pathlib import Path

import pytest

import promoe
from promoe import _core

ROOT = Path(__file__).resolve().parent.parent
OTHERS = [level for level in _core.levels() if level != promoe.backend_info()["level"]]


@pytest.mark.slow
@pytest.mark.parametrize("level", OTHERS)
def test_level(level):
    done = subprocess.run([sys.executable, "-m", "pytest", "-q", "-x", "-p", "no:cacheprovider", "tests/ops", "tests/model",
                           "tests/base"], cwd=ROOT, env={**os.environ, "PROMOE_CPU": level}, text=True,
                          stdout=subprocess.PIPE, stderr=subprocess.STDOUT, timeout=900)
    print(done.stdout[-4000:])
    assert done.returncode == 0, f"at {level}: the failures are above"
    assert " passed" in done.stdout
