"""A wheel, built from a copy of the tree, installed in an empty environment and used from another folder."""

import shutil
import subprocess
import sys
import venv
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent

USE = """
import pathlib, sys
import numpy as np
import promoe
assert "site-packages" in promoe.__file__, promoe.__file__
config = promoe.preset("ProMoE-digits").replace(hidden_size=32, depth=2)
run = promoe.train(config, "digits", out="run", steps=2, batch_size=8, progress=False)
assert len(run.history) == 2
x = promoe.sample(promoe.load("run"), np.arange(10), steps=2, progress=False)
assert x.shape == (10, 1, 8, 8) and np.isfinite(x).all()
assert not any(m in sys.modules for m in ("torch", "matplotlib", "PIL", "sklearn"))
"""


def run(*command, cwd):
    done = subprocess.run([str(c) for c in command], cwd=cwd, text=True, stdout=subprocess.PIPE,
                          stderr=subprocess.STDOUT, timeout=600)
    assert done.returncode == 0, f"{command}:\n{done.stdout[-4000:]}"
    return done.stdout


@pytest.mark.slow
def test_wheel(tmp_path):
    if not (ROOT / "setup.py").is_file() or "asan" in ROOT.parts:
        pytest.skip("needs the tree of the project, built without sanitizers")
    tree = tmp_path / "tree"
    shutil.copytree(ROOT, tree, ignore=shutil.ignore_patterns(
        ".git", ".venv", "build", "runs", "*.so", "*.egg-info", "tests"))
    pip = ("-m", "pip", "--quiet", "--disable-pip-version-check")
    run(sys.executable, *pip, "wheel", "--no-build-isolation", "--no-deps", "-w", tmp_path, tree, cwd=tmp_path)
    wheel, = tmp_path.glob("promoe-*.whl")
    venv.create(tmp_path / "empty", with_pip=True)
    python = tmp_path / "empty" / "bin" / "python"
    run(python, *pip, "install", wheel, cwd=tmp_path)  # with the three packages it needs
    elsewhere = tmp_path / "elsewhere"
    elsewhere.mkdir()
    run(python, "-c", USE, cwd=elsewhere)
    assert "updates                    2" in run(python, "-m", "promoe", "info", "run", cwd=elsewhere)
    run(tmp_path / "empty" / "bin" / "promoe", "doctor", cwd=elsewhere)
