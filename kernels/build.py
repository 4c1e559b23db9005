"""Builds promoe/_cuda.so, the CUDA backend, by nvcc. setup.py does it by PROMOE_CUDA; by hand:

    python kernels/build.py                    # promoe/_cuda.so
    python kernels/build.py --only silu        # compiles kernels/silu.cu and prints what ptxas says of it
    python kernels/build.py --resources FILE   # and writes registers, shared memory and spills of all kernels

Needs nvcc, and the headers and libraries of cuBLAS: of the toolkit, or of pip install nvidia-cublas.
CUDA_HOME says where the toolkit is, when nvcc is not on the PATH.
"""

import argparse
import json
import os
import re
import shutil
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
SOURCES = sorted((ROOT / "kernels").glob("*.cu"))
# Ampere and what is like it; Hopper with its own instructions; and PTX, which later GPUs translate.
TARGETS = ["-gencode", "arch=compute_80,code=[sm_80,compute_80]",
           "-gencode", "arch=compute_90a,code=sm_90a"]
FLAGS = ["-std=c++17", "-O3", "-Werror", "all-warnings", "-Xptxas", "-v",
         "-Xcompiler", "-fPIC,-fvisibility=hidden,-Wall,-Wextra,-Wno-address"]
# Where pip puts the libraries, seen from promoe/.
PIP = ["nvidia/cu13/lib", "nvidia/cublas/lib", "nvidia/cuda_runtime/lib"]


class Missing(Exception):
    """What the build needs and this machine does not have."""


def find_nvcc():
    home = os.environ.get("CUDA_HOME")
    places = [home and f"{home}/bin/nvcc", shutil.which("nvcc"), "/usr/local/cuda/bin/nvcc"]
    nvcc = next((p for p in places if p and os.access(p, os.X_OK)), None)
    if not nvcc:
        raise Missing("there is no nvcc: install the CUDA toolkit, and set CUDA_HOME where it is not on the PATH")
    said = subprocess.run([nvcc, "--dryrun", "-x", "cu", os.devnull], capture_output=True, text=True).stderr
    top = re.search(r"^#\$ TOP=(.*)$", said, re.M)
    return nvcc, Path(top[1]).resolve() if top else Path(nvcc).resolve().parents[1]


def find_cublas(toolkit):
    """The folder of cublasLt.h and the library beside it."""
    prefixes = [toolkit, toolkit / "targets/x86_64-linux", toolkit / "targets/sbsa-linux"]
    prefixes += [Path(p) / "nvidia" / name for p in sys.path for name in ("cu13", "cublas")]
    for prefix in prefixes:
        libraries = [f for lib in ("lib64", "lib") for f in sorted((prefix / lib).glob("libcublasLt.so*"))]
        if (prefix / "include/cublasLt.h").is_file() and libraries:
            return prefix / "include", libraries[0]
    raise Missing("there is no cublasLt.h: install cuBLAS with the toolkit, or pip install nvidia-cublas")


def find():
    """What the build takes: nvcc, its toolkit, the headers and the library of cuBLASLt."""
    nvcc, toolkit = find_nvcc()
    include, library = find_cublas(toolkit)
    return {"nvcc": nvcc, "toolkit": toolkit, "include": include, "library": library}


def version(nvcc):
    return re.search(r"release ([\d.]+)", subprocess.run([nvcc, "--version"], capture_output=True, text=True).stdout)[1]


# ---------------------------------------------------------------- compiling


def compile_one(source, found, folder):
    """The object of a source, and what ptxas said, made anew when something that it includes changed."""
    out, deps, log = (folder / f"{source.stem}.{s}" for s in ("o", "d", "log"))
    if all(p.exists() for p in (out, deps, log)):
        files = [Path(f) for f in deps.read_text().replace("\\\n", " ").split(":", 1)[1].split()]
        newest = max(f.stat().st_mtime_ns if f.exists() else sys.maxsize for f in [*files, Path(__file__)])
        if newest < out.stat().st_mtime_ns:
            return out, log.read_text()
    command = [found["nvcc"], *FLAGS, *TARGETS, "-I", found["include"], "-MD", "-MF", deps, "-c", source, "-o", out]
    done = subprocess.run([str(word) for word in command], capture_output=True, text=True)
    if done.returncode:
        out.unlink(missing_ok=True)
        raise RuntimeError(f"nvcc: {source.relative_to(ROOT)} does not compile:\n{done.stdout}{done.stderr}")
    log.write_text(done.stderr)
    return out, done.stderr


def compile_all(found, folder, sources=SOURCES):
    folder.mkdir(parents=True, exist_ok=True)
    with ThreadPoolExecutor(len(os.sched_getaffinity(0))) as pool:
        return list(pool.map(lambda s: compile_one(s, found, folder), sources))


def build(output, folder):
    """Compiles and links the library; returns what was found, and the logs."""
    found = find()
    made = compile_all(found, folder)
    status = folder / "status.o"
    subprocess.run([os.environ.get("CC", "cc"), "-O2", "-fPIC", "-fvisibility=hidden", "-c",
                    str(ROOT / "csrc/base/status.c"), "-o", str(status)], check=True)
    library = found["library"]
    folders = [f"$ORIGIN/../{p}" for p in PIP] + [str(library.parent)]
    folders += [str(p) for p in (found["toolkit"] / "lib64", found["toolkit"] / "lib") if p.is_dir()]
    command = [found["nvcc"], "-shared", "-cudart", "shared", "-o", output, *(o for o, _ in made), status,
               "-L", library.parent, f"-l:{library.name}", "-Xlinker", "-z,defs"]
    for f in folders:
        command += ["-Xlinker", f"-rpath,{f}"]
    Path(output).parent.mkdir(parents=True, exist_ok=True)
    subprocess.run([str(word) for word in command], check=True)
    return found, [log for _, log in made]


# ---------------------------------------------------------------- what ptxas says


def resources(logs, nvcc):
    """[{kernel, target, registers, shared, stack, spill_stores, spill_loads}] of every kernel."""
    rows, row = [], None
    for line in "\n".join(logs).splitlines():
        if m := re.search(r"Compiling entry function '(\w+)' for '(\w+)'", line):
            row = {"kernel": m[1], "target": m[2], "shared": 0}
        elif row and (m := re.search(r"(\d+) bytes stack frame, (\d+) bytes spill stores, (\d+) bytes spill loads", line)):
            row |= {"stack": int(m[1]), "spill_stores": int(m[2]), "spill_loads": int(m[3])}
        elif row and (m := re.search(r"Used (\d+) registers", line)):
            shared = re.search(r"(\d+) bytes smem", line)
            rows.append(row | {"registers": int(m[1]), "shared": int(shared[1]) if shared else 0})
            row = None
    names = "\n".join(r["kernel"] for r in rows)
    tool = next((t for t in (str(Path(nvcc).parent / "cu++filt"), "cu++filt", "c++filt") if shutil.which(t)), None)
    if tool and rows:
        plain = subprocess.run([tool], input=names, capture_output=True, text=True, check=True).stdout.splitlines()
        for r, name in zip(rows, plain, strict=True):
            r["kernel"] = re.sub(r"\(anonymous namespace\)::|_GLOBAL__N__\w+::|<unnamed>::", "", name).split("(")[0].removeprefix("void ")
    return sorted(rows, key=lambda r: (r["kernel"], r["target"]))


def table(rows):
    lines = [f"{'kernel':60} {'target':8} registers  shared  stack  spilled"]
    lines += [f"{r['kernel'][:60]:60} {r['target']:8} {r['registers']:9} {r['shared']:7} {r['stack']:6} "
              f"{r['spill_stores'] + r['spill_loads']:8}" for r in rows]
    return "\n".join(lines)


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--only", metavar="NAME", help="compile kernels/NAME.cu and stop")
    parser.add_argument("--resources", metavar="FILE", type=Path, help="where to write the table as JSON")
    parser.add_argument("--find", action="store_true", help="say what the build would take, and stop")
    arguments = parser.parse_args()
    if arguments.find:
        return print(*(f"{k}: {v}" for k, v in find().items()), sep="\n")
    folder = ROOT / "build/cuda"
    if arguments.only:
        found = find()
        logs = [log for _, log in compile_all(found, folder, [ROOT / f"kernels/{arguments.only}.cu"])]
    else:
        found, logs = build(ROOT / "promoe/_cuda.so", folder)
        (ROOT / "promoe/_cuda.txt").write_text(describe(found) + "\n")
    rows = resources(logs, found["nvcc"])
    print(table(rows))
    if arguments.resources:
        commit = subprocess.run(["git", "describe", "--always", "--dirty=+", "--abbrev=12"], cwd=ROOT,
                                capture_output=True, text=True).stdout.strip()
        held = {"nvcc": version(found["nvcc"]), "commit": commit or "unknown", "kernels": rows}
        arguments.resources.write_text(json.dumps(held, indent=1) + "\n")


def describe(found):
    return f"built by nvcc {version(found['nvcc'])} for sm_80, sm_90a and PTX, with {found['library'].name}"


if __name__ == "__main__":
    try:
        main()
    except (Missing, RuntimeError) as e:
        sys.exit(f"kernels/build.py: {e}")
