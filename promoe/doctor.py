"""What promoe finds on this machine, and what it will use."""

from __future__ import annotations

import importlib.metadata
import os
import platform
import sys
from pathlib import Path

import numpy as np

from promoe import _core

__all__ = ["examine", "report"]

VARIABLES = ("PROMOE_CPU", "PROMOE_NUM_THREADS", "OMP_NUM_THREADS", "PROMOE_CUDA_GRAPHS", "CUDA_VISIBLE_DEVICES")
EXTRAS = {  # distribution: (extra, what it is for)
    "Pillow": ("data", "image folders"),
    "matplotlib": ("viz", "figures"),
    "scikit-learn": ("demo", "the classifier of the demo"),
}


def examine():
    """Everything that `report` prints.

    Returns
    -------
    dict
        JSON types; ``problems`` lists in words what is wrong, and is empty on a sound machine.
    """
    import promoe

    problems = []
    info = promoe.backend_info()
    found = {
        "promoe": promoe.__version__,
        "python": f"{platform.python_version()} ({sys.executable})",
        "system": f"{platform.system()} {platform.release()} {platform.machine()}",
        "requires": {name: _version(name) for name in ("numpy", "safetensors", "tqdm")},
        "extras": {name: _version(name) for name in EXTRAS},
        "cpu": info.get("cpu"), "level": info["level"], "amx": _core._lacks("amx"),
        "threads": promoe.get_num_threads(), "cpus": len(os.sched_getaffinity(0)),
        "environment": {name: os.environ[name] for name in VARIABLES if name in os.environ},
        "memory": _memory(),
        "huge_pages": _huge_pages(),
        "cuda": _cuda(),
    }
    for name, version in found["requires"].items():
        if version is None:
            problems.append(f"{name} is not installed: pip install {name}")
    problems += _self_test()
    found["problems"] = problems
    return found


def report(found):
    """The findings of `examine` as text."""
    lines = [f"promoe        {found['promoe']}",
             f"python        {found['python']}",
             f"system        {found['system']}",
             f"cpu           {found['cpu']}",
             f"instructions  {found['level']}",
             f"amx           {'no: ' + found['amx'] if found['amx'] else 'yes'}",
             f"threads       {found['threads']} (this process may use {found['cpus']} CPUs)"]
    lines += [f"              {name}={value}" for name, value in found["environment"].items()]
    if found["memory"]:
        total, free = (found["memory"][k] / 2**30 for k in ("total", "available"))
        lines.append(f"memory        {total:.1f} GiB, {free:.1f} GiB available")
    lines.append(f"huge pages    {found['huge_pages']}")
    lines.append("packages      " + ", ".join(f"{k} {v or 'missing'}"
                                             for k, v in found["requires"].items()))
    for name, version in found["extras"].items():
        extra, purpose = EXTRAS[name]
        lines.append(f"extra {extra:7} {name} {version}" if version else
                     f"extra {extra:7} {name} is missing ({purpose}): "
                     f"pip install 'promoe[{extra}]'")
    lines.append(f"cuda          {found['cuda']}")
    lines += [f"problem       {p}" for p in found["problems"]] or ["problems      none"]
    return "\n".join(lines)


def _version(name):
    try:
        return importlib.metadata.version(name)
    except importlib.metadata.PackageNotFoundError:
        return None


def _memory():
    """Bytes of memory in all and available, or None where the system does not say."""
    try:
        with open("/proc/meminfo") as file:
            lines = dict(line.split(":") for line in file)
        return {"total": int(lines["MemTotal"].split()[0]) * 1024,
                "available": int(lines["MemAvailable"].split()[0]) * 1024}
    except (OSError, KeyError, ValueError):
        return None


def _huge_pages():
    """The setting of transparent huge pages, in words."""
    try:
        with open("/sys/kernel/mm/transparent_hugepage/enabled") as file:
            setting = file.read().split("[")[1].split("]")[0]
    except (OSError, IndexError):
        return "not known"
    return {"always": "always", "madvise": "where asked for (promoe asks)"}.get(
        setting, f"{setting}: large models run slower; set transparent_hugepage to madvise")


def _cuda():
    """Whether the CUDA backend was built, and if not why; which GPU it finds, and if none why."""
    here = Path(__file__).parent
    said = (here / "_cuda.txt").read_text().strip() if (here / "_cuda.txt").exists() else None
    if not (here / "_cuda.so").exists():
        return said or "not built: this promoe was built with PROMOE_CUDA=0 (see \"CUDA\" in the README)"
    try:
        level, model = _core._device("cuda", "fp32")
    except ValueError as error:
        return f"{said or 'built'}; no GPU: {str(error).removeprefix('Model: ')}"
    return f"{said or 'built'}; {model}, {level}"


def _self_test():
    """A small product against NumPy: does the core compute?"""
    from promoe import ops

    rng = np.random.default_rng(0)
    x, weight = (rng.standard_normal(s).astype(np.float32) for s in ((33, 40), (50, 40)))
    error = np.abs(ops.linear_forward(x, weight)["y"] - x.astype(float) @ weight.T).max()
    return [] if error < 1e-4 else [f"the core computes a wrong product (error {error:.1e}): "
                                    f"please report it with this text"]
