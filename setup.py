"""Builds promoe._core: the C core and the extension, with nothing but a C compiler and NumPy.

And promoe/_cuda.so, the CUDA backend, as PROMOE_CUDA says: auto (when nvcc and cuBLAS are there), 1 (or
fail), 0 (never). promoe/_cuda.txt says what came of it.
"""

import json
import os
import re
import runpy
from concurrent.futures import ThreadPoolExecutor
from glob import glob
from pathlib import Path

import numpy
from setuptools import Extension, setup
from setuptools.command.build_ext import build_ext

SOURCES = sorted(
    glob("csrc/base/*.c")
    + ["csrc/backends.c", "csrc/cpu/backend.c", "csrc/cpu/guard.c"]
    + glob("csrc/cpu/levels/*.c")  # these include cpu/<op>.c, once per instruction-set level
    + glob("csrc/model/*.c")
    + glob("csrc/python/*.c")
)
HEADERS = sorted(glob("csrc/**/*.h", recursive=True) + glob("csrc/ops.def") + glob("csrc/cpu/*.c"))


def contract(op):
    """The comment that opens csrc/ops/<op>.h, in Python's words: the docstrings show it."""
    text = re.match(r"/\* (.*?) ?\*/", Path(f"csrc/ops/{op}.h").read_text(), re.S)[1]
    text = re.sub(r"\n \* ?", "\n", text)
    for c, python in {"NULL": "None", "PM_EINVAL": "ValueError", "PM_EDATA": "ValueError"}.items():
        text = text.replace(c, python)
    return text


def write_contracts(path):
    """PM_CONTRACT(op, "text") for every op, for csrc/python/docs.c."""
    ops = re.findall(r"^PM_OP\((\w+)", Path("csrc/ops.def").read_text(), re.M)
    lines = [f"PM_CONTRACT({op}, {json.dumps(contract(op))})\n" for op in ops]
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(lines))


def build_cuda(folder, temporary):
    """folder/_cuda.so, or the reason why not, in folder/_cuda.txt."""
    wish = os.environ.get("PROMOE_CUDA", "auto")
    if wish not in ("auto", "1", "0"):
        raise ValueError(f"PROMOE_CUDA={wish}: one of auto, 1, 0")
    if wish == "0":
        return
    cuda = runpy.run_path("kernels/build.py")
    library, said = folder / "_cuda.so", folder / "_cuda.txt"
    folder.mkdir(parents=True, exist_ok=True)
    try:
        found, _ = cuda["build"](library, temporary)
        said.write_text(cuda["describe"](found) + "\n")
    except cuda["Missing"] as e:
        if wish == "1":
            raise RuntimeError(f"PROMOE_CUDA=1, but the CUDA backend cannot be built: {e}") from None
        said.write_text(f"not built: {e}\n")
        print(f"promoe: without the CUDA backend: {e}")


class ParallelBuild(build_ext):
    """Compiles the files of the extension side by side, one per CPU."""

    def build_extensions(self):
        write_contracts(Path(self.build_temp) / "contracts.def")
        self.extensions[0].include_dirs.append(self.build_temp)
        compile_one_by_one = self.compiler.compile

        def compile_side_by_side(sources, **keywords):
            jobs = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
            with ThreadPoolExecutor(jobs or 1) as pool:
                objects = pool.map(lambda source: compile_one_by_one([source], **keywords), sources)
                return [o for group in objects for o in group]

        self.compiler.compile = compile_side_by_side
        super().build_extensions()
        build_cuda(Path(self.get_ext_fullpath("promoe._core")).parent, Path(self.build_temp) / "cuda")


setup(
    ext_modules=[
        Extension(
            "promoe._core",
            sources=SOURCES,
            depends=HEADERS,
            include_dirs=[numpy.get_include()],
            define_macros=[("NPY_NO_DEPRECATED_API", "NPY_1_22_API_VERSION"),
                           ("NPY_TARGET_VERSION", "NPY_1_22_API_VERSION")],
            extra_compile_args=[
                "-std=gnu11", "-O3", "-ffp-contract=off", "-fno-math-errno", "-fno-trapping-math",
                "-fvisibility=hidden", "-Wall", "-Wextra", "-Wno-unused-function", "-Wno-psabi",
            ] + os.environ.get("PROMOE_CFLAGS", "").split(),
            extra_link_args=["-pthread", "-lm", "-ldl"] + os.environ.get("PROMOE_LDFLAGS", "").split(),
        )
    ],
    cmdclass={"build_ext": ParallelBuild},
)
