"""Builds kernels for the CPU: .cu files by the host's C++ compiler, with the headers of this folder.

python -m tests.cuda.host.build [plain|asan|race] builds the backend of device="cuda-on-cpu" and
prints where it is. plain: what the tests use. asan: with the address sanitizer. race: every access
to memory is watched for two threads that touch the same word without a barrier between.
"""

import hashlib
import json
import os
import shutil
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

ROOT = Path(__file__).parents[3]
HOST = Path(__file__).parent
BUILD = ROOT / "build/cuda_on_cpu"
ENGINE = sorted(HOST.glob("*.cpp"))

COMMON = ["-O2", "-g", "-march=native", "-fPIC", "-fvisibility=hidden", "-ffp-contract=off",
          "-fno-math-errno", "-fno-trapping-math", "-Wall", "-Wextra", "-Wno-unused-function",
          "-Wno-unused-parameter", "-I", HOST, "-I", ROOT / "csrc", "-I", ROOT / "kernels"]
CXX = ["-std=gnu++17", "-fno-strict-aliasing", "-fno-ipa-icf"]
# Type punning through pointers is CUDA's way; unknown pragmas are unroll; no address, index or shift
# of a kernel goes unchecked (host/ubsan.cpp says where).
KERNEL = ["-x", "c++", "-fno-extern-tls-init", "-Wno-unknown-pragmas", "-fstack-clash-protection",
          "-fsanitize=alignment,bounds,shift-exponent,integer-divide-by-zero",
          "-fno-sanitize-recover=all"]
VARIANTS = {
    "plain": {"all": [], "kernel": [], "link": []},
    "asan": {"all": ["-fsanitize=address", "-fno-omit-frame-pointer"], "kernel": [],
             "link": ["-fsanitize=address"]},
    "race": {"all": ["-DPM_HOST_RACE"],
             "kernel": ["-fsanitize=thread", "--param=tsan-instrument-func-entry-exit=0"],
             "link": []},
}


def compiler():
    """The C++ compiler, or None."""
    return shutil.which(os.environ.get("CXX", "g++"))


def flags(source, variant):
    v = VARIANTS[variant]
    if source.suffix == ".c":
        return [*COMMON, *v["all"], "-std=gnu11", "-x", "c"]
    if source.suffix == ".cu":
        return [*COMMON, *CXX, *KERNEL, *v["all"], *v["kernel"]]
    fast = ["-O3", "-ffp-contract=fast"] if source.stem in ("collectives", "cublaslt", "wgmma") else []
    return [*COMMON, *CXX, *v["all"], *fast]


def digest(command, files):
    h = hashlib.sha256(repr([str(word) for word in command]).encode())
    for f in files:
        h.update(Path(f).read_bytes())
    return h.hexdigest()


def compile_one(source, variant):
    """The object file of a source, made anew when the command or a file it includes changed."""
    folder = BUILD / variant
    folder.mkdir(parents=True, exist_ok=True)
    name = hashlib.sha256(str(source).encode()).hexdigest()[:8]
    stem = folder / f"{source.stem}-{name}"
    out, deps, stamp = (stem.with_suffix(s) for s in (".o", f".{os.getpid()}.d", ".json"))
    command = [compiler(), *flags(source, variant)]
    if out.exists() and stamp.exists():
        old = json.loads(stamp.read_text())
        if all(Path(f).exists() for f in old["files"]) and old["digest"] == digest(command, old["files"]):
            return out
    made = stem.with_suffix(f".{os.getpid()}.o")  # two processes may build the same library at once
    done = subprocess.run([*map(str, command), "-MMD", "-MF", str(deps), "-c", str(source),
                           "-o", str(made)], capture_output=True, text=True)
    if done.returncode:
        raise RuntimeError(f"{source.name} does not compile for the CPU:\n{done.stderr}")
    if done.stderr:
        sys.stderr.write(done.stderr)
    made.replace(out)
    files = deps.read_text().replace("\\\n", " ").split(":", 1)[1].split()
    deps.unlink()
    stamp.write_text(json.dumps({"digest": digest(command, files), "files": files}))
    return out


def build(output, sources, variant="plain", program=False):
    """Compiles and links sources and the engine into a shared library, or a program."""
    sources = [Path(s).resolve() for s in (*sources, *ENGINE)]
    output = BUILD / variant / output
    with ThreadPoolExecutor(len(os.sched_getaffinity(0))) as pool:
        objects = list(pool.map(lambda s: compile_one(s, variant), sources))
    if output.exists() and all(o.stat().st_mtime_ns < output.stat().st_mtime_ns for o in objects):
        return output
    kind = [] if program else ["-shared", "-Wl,-z,defs"]
    made = output.with_suffix(f".{os.getpid()}")
    subprocess.run([compiler(), *map(str, objects), *kind, *VARIANTS[variant]["link"], "-pthread",
                    "-ldl", "-lm", "-o", str(made)], check=True)
    made.replace(output)  # a library that is in use stays as it is
    return output


def plugin(variant="plain"):
    """The library of device="cuda-on-cpu"."""
    sources = [*sorted((ROOT / "kernels").glob("*.cu")), ROOT / "csrc/base/status.c"]
    return build("cuda_on_cpu.so", sources, variant)


if __name__ == "__main__":
    print(plugin(*sys.argv[1:]))
