"""make gpu-test | gpu-sanitize | gpu-bench: what needs an NVIDIA GPU, in jobs that are run once each.

    python -m benchmarks.gpu test|sanitize|bench [--seconds 480] [--at-once N] [--only WORDS] [--official PATH] [--again]

A call works for at most --seconds and ends; the next call of the same commit on the same GPU goes on with the jobs that are
left. All of them are in one file, benchmarks/results/DATE-GPU-WHAT-COMMIT.json, written after every job. Tests share the GPU,
measurements have it for themselves. Exit status: 0 all jobs are done and passed, 1 one failed, 3 some are left. Without a
GPU it says why there is none, and fails.
"""

import argparse
import json
import os
import re
import shutil
import subprocess
import sys
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))
RESULTS = ROOT / "benchmarks" / "results"
SECONDS, LEAST = 480, 20  # of a call; a job is not begun with less left
TOOLS = ("memcheck", "racecheck", "initcheck", "synccheck")
MODELS, IMAGES = ("S", "B", "L", "XL"), (64, 256)
PASSED, FAILED, NOT_RUN = "passed", "failed", "not run"


# ---------------------------------------------------------------- the machine


def gpu():
    """(architecture, "name, memory, driver") of the GPU; leaves with the reason when there is none."""
    from promoe import _core

    try:
        return _core._device("cuda", "fp32")
    except ValueError as error:
        raise SystemExit(f"no GPU to run on: {str(error).removeprefix('Model: ')}") from None


def head():
    from benchmarks import machine

    level, model = gpu()
    return {**machine.describe(), "level": level, "gpu": model}


# ---------------------------------------------------------------- jobs, one after the other


class Job:
    """A command, and how to read what it printed: read(exit status, text) -> {"status", ...}."""

    def __init__(self, name, command, read, limit=300, environment=None):
        self.name, self.command, self.read, self.limit = name, [str(word) for word in command], read, limit
        self.environment = environment or {}

    def run(self, seconds):
        """What it found; None when the call's time, not its own, was too short."""
        limit = min(self.limit, seconds)
        began = time.perf_counter()
        try:
            done = subprocess.run(self.command, cwd=ROOT, env={**os.environ, **self.environment}, text=True, timeout=limit,
                                  stdout=subprocess.PIPE, stderr=subprocess.STDOUT)
            found = self.read(done.returncode, done.stdout)
        except subprocess.TimeoutExpired as stopped:
            if limit < self.limit:
                return None
            text = stopped.stdout or b""
            found = {"status": FAILED, "why": f"not done after {limit:.0f} s", "tail": text[-2000:].decode(errors="replace")}
        return {**found, "seconds": round(time.perf_counter() - began, 1)}


def open_result(what, about, again):
    """(file, content): one that is not complete, of this commit and GPU, or a new one."""
    RESULTS.mkdir(exist_ok=True)
    for path in sorted(RESULTS.glob(f"*-{what}-*.json"), reverse=True):
        content = json.loads(path.read_text())
        same = content.get("what") == what and all(content["machine"].get(k) == about[k] for k in ("commit", "gpu"))
        if same and not content["complete"] and not again:
            return path, content
    name = re.sub(r"\W+", "-", about["gpu"].split(",")[0]).strip("-").lower()
    return RESULTS / f"{about['when'][:10]}-{name}-{what}-{about['commit']}.json", {
        "what": what, "machine": about, "complete": False, "jobs": {}}


def write(path, content):
    part = path.with_suffix(".part")
    part.write_text(json.dumps(content, indent=1) + "\n")
    part.replace(path)


def run_jobs(what, jobs, about, seconds=SECONDS, again=False, at_once=1, only=""):
    """Runs what is left of the jobs whose name has the pattern, some at once; the exit status."""
    deadline = time.monotonic() + seconds
    path, content = open_result(what, about, again)
    lock = threading.Lock()

    def run(job):
        left = deadline - time.monotonic()
        found = job.run(left) if left > LEAST or left >= job.limit else None
        if found is None:
            return
        with lock:
            content["jobs"][job.name] = found
            write(path, content)
            print(f"{found['status']:<8}{job.name:<40}{found['seconds']:7.1f} s  {found.get('why', '')}", flush=True)

    with ThreadPoolExecutor(at_once) as pool:
        list(pool.map(run, [job for job in jobs if job.name not in content["jobs"] and re.search(only, job.name)]))
    done = [job for job in jobs if job.name in content["jobs"]]
    content["complete"] = len(done) == len(jobs)
    write(path, content)
    failed = [job.name for job in done if content["jobs"][job.name]["status"] == FAILED]
    print(f"{len(done)} of {len(jobs)} jobs done, {len(failed)} failed: {path}"
          + ("" if content["complete"] else "; run it again to go on"))
    return 1 if failed else 0 if content["complete"] else 3


# ---------------------------------------------------------------- test


def read_pytest(code, text):
    counts = {word: int(n) for n, word in re.findall(r"(\d+) (passed|failed|skipped|error)", text.splitlines()[-1] if text else "")}
    ok = code == 0 and counts.get("passed", 0) > 0
    return {"status": PASSED if ok else FAILED, "counts": counts, **({} if ok else {"why": f"exit status {code}",
                                                                                  "tail": text[-4000:]})}


def pytest_job(name, *arguments, limit=300):
    return Job(name, [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", *arguments], read_pytest, limit,
               {"PROMOE_TEST_DEVICE": "cuda"})


def test_jobs(_):
    """The tests of make test-cuda that do not need the stand-in for a GPU, in pieces of a minute or so."""
    from promoe import ops

    jobs = [pytest_job("model", "tests/cuda/test_model.py"), pytest_job("arrays", "tests/cuda/test_device_arrays.py")]
    for op in ops.names():
        jobs.append(pytest_job(f"cases of {op}", "tests/cuda/test_ops.py", "-k", f"[{op}-"))
        jobs.append(pytest_job(f"tests of {op}", f"tests/ops/test_{op}.py"))
    return jobs


# ---------------------------------------------------------------- sanitize


def sanitizer():
    home = os.environ.get("CUDA_HOME", "/usr/local/cuda")
    return next((p for p in (f"{home}/bin/compute-sanitizer", shutil.which("compute-sanitizer"))
                 if p and os.access(p, os.X_OK)), None)


def read_sanitizer(code, text):
    """What compute-sanitizer found, or why it did not run."""
    errors = [int(n) for n in re.findall(r"ERROR SUMMARY: (\d+) error", text)]
    hazards = [int(n) for n in re.findall(r"RACECHECK SUMMARY: (\d+) hazard", text)]
    found = errors + hazards
    if not found or re.search(r"(?i)device not supported|is not supported on|unable to|failed to initialize", text):
        reason = [line for line in text.splitlines() if "=====" in line and "COMPUTE-SANITIZER" not in line]
        return {"status": NOT_RUN, "why": (reason or text.splitlines() or ["it printed nothing"])[-1].strip("= ")[:300]}
    ok = code == 0 and sum(found) == 0
    return {"status": PASSED if ok else FAILED, "errors": sum(found), **({} if ok else {
        "why": f"{sum(found)} errors, exit status {code}", "tail": text[-6000:]})}


def sanitize_jobs(_):
    """Small shapes only: a case of every op, and a model that trains and samples."""
    tool = sanitizer()
    parts = {"ops": ["tests/cuda/test_ops.py", "-k", "test_two_runs_have_the_same_bits and not tf32"],
             "model": ["tests/cuda/test_model.py", "-k", "test_copies and pickle or test_sampling_in_bf16 or test_graphs"]}
    jobs = []
    for which in TOOLS:
        for part, arguments in parts.items():
            if tool is None:
                command = [sys.executable, "-c", "print('there is no compute-sanitizer: it comes with the CUDA toolkit')"]
            else:
                command = [tool, "--tool", which, "--error-exitcode", "86", "--target-processes", "all", sys.executable, "-m",
                           "pytest", "-q", "-p", "no:cacheprovider", *arguments]
            jobs.append(Job(f"{which} {part}", command, read_sanitizer, 420, {"PROMOE_TEST_DEVICE": "cuda"}))
    return jobs


# ---------------------------------------------------------------- bench


def read_measurement(code, text):
    """The last line that a worker of gpu_bench prints."""
    last = text.splitlines()[-1] if text.strip() else ""
    if code or not last.startswith("{"):
        return {"status": FAILED, "why": f"exit status {code}", "tail": text[-4000:]}
    return {"status": PASSED, **json.loads(last)}


def bench_jobs(a):
    def job(name, *words, limit=240):
        return Job(name, [sys.executable, "-m", "benchmarks.gpu_bench", *words], read_measurement, limit)

    jobs = [job("peaks", "peaks")]
    jobs += [job(f"step {m} {n}", "step", m, n) for n in IMAGES for m in MODELS]
    jobs += [job(f"sample {m} {n}", "sample", m, n, limit=400) for m in MODELS for n in (1, 64)]
    for how in ("shipped", "best"):
        jobs += [job(f"public code, {how}: step {m} 64", "public", m, 64, how, a.official or "", limit=420) for m in MODELS]
        jobs.append(job(f"public code, {how}: sample XL 8", "public-sample", "XL", 8, how, a.official or "", limit=420))
    return jobs


# ---------------------------------------------------------------- the command


def main(argv=None):
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", choices=["test", "sanitize", "bench"])
    parser.add_argument("--seconds", type=float, default=SECONDS, help="of this call")
    parser.add_argument("--official", help="a checkout of the public code, to measure beside ours (needs torch)")
    parser.add_argument("--at-once", type=int, help="how many tests share the GPU (a third of the cores)")
    parser.add_argument("--only", default="", help="the jobs whose name matches this pattern")
    parser.add_argument("--again", action="store_true", help="from the beginning, into a new file")
    a = parser.parse_args(argv)
    about = head()
    jobs = {"test": test_jobs, "sanitize": sanitize_jobs, "bench": bench_jobs}[a.what](a)
    at_once = 1 if a.what == "bench" else a.at_once or max(1, (os.cpu_count() or 1) // 3)
    return run_jobs(f"gpu-{a.what}", jobs, about, a.seconds, a.again, at_once, a.only)


if __name__ == "__main__":
    sys.exit(main())
