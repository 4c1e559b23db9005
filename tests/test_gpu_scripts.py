"""benchmarks/gpu.py without a GPU: it says that there is none, and its jobs are run once, in several calls."""

import json
import os
import subprocess
import sys
import time
from pathlib import Path

import pytest

from benchmarks import gpu

ROOT = Path(__file__).parents[1]
ABOUT = {"commit": "abc", "gpu": "NVIDIA H200, 150.1 GB, driver for CUDA 13.0", "when": "2026-01-02T03:04:05Z"}


@pytest.mark.parametrize("what", ["test", "sanitize", "bench"])
def test_without_a_gpu_it_fails_with_the_reason(what):
    done = subprocess.run([sys.executable, "-m", "benchmarks.gpu", what], cwd=ROOT, capture_output=True, text=True,
                          env={**os.environ, "CUDA_VISIBLE_DEVICES": ""})
    assert done.returncode == 1 and done.stderr.startswith("no GPU to run on: device 'cuda': "), done.stderr
    assert len(done.stderr.splitlines()) == 1


def job(name, code, limit=60):
    return gpu.Job(name, [sys.executable, "-c", code], lambda status, text: {
        "status": gpu.FAILED if status else gpu.PASSED, "text": text.strip()}, limit)


@pytest.fixture
def results(tmp_path, monkeypatch):
    monkeypatch.setattr(gpu, "RESULTS", tmp_path)
    monkeypatch.setattr(gpu, "LEAST", 0.5)
    return tmp_path


def test_jobs_are_run_once_each_over_several_calls(results):
    log = results / "log"
    write = f"open({str(log)!r}, 'a').write"
    jobs = [job("one", f"{write}('1'); print('first')"),
            job("slow", f"import time; {write}('s'); time.sleep(3); {write}('2')"), job("three", f"{write}('3')")]
    assert gpu.run_jobs("gpu-test", jobs, ABOUT, seconds=2) == 3
    path, = results.glob("*.json")
    assert path.name == "2026-01-02-nvidia-h200-gpu-test-abc.json"
    content = json.loads(path.read_text())
    assert list(content["jobs"]) == ["one"] and not content["complete"]  # the time of the call ended, not that of the job
    assert gpu.run_jobs("gpu-test", jobs, ABOUT, seconds=30) == 0
    assert log.read_text() == "1ss23" and json.loads(path.read_text())["complete"]
    assert json.loads(path.read_text())["jobs"]["one"]["text"] == "first"
    assert gpu.run_jobs("gpu-test", jobs[:1], {**ABOUT, "commit": "def"}, seconds=30) == 0
    assert len(list(results.glob("*.json"))) == 2  # another commit is another file


def test_a_job_that_fails_or_takes_too_long_is_said(results, capsys):
    jobs = [job("wrong", "raise SystemExit(4)"), job("slow", "import time; time.sleep(9)", limit=1), job("right", "pass")]
    assert gpu.run_jobs("gpu-test", jobs, ABOUT, seconds=30) == 1
    content = json.loads(next(results.glob("*.json")).read_text())
    assert [content["jobs"][name]["status"] for name in ("wrong", "slow", "right")] == ["failed", "failed", "passed"]
    assert "not done after 1 s" in content["jobs"]["slow"]["why"] and content["complete"]
    assert "3 of 3 jobs done, 2 failed" in capsys.readouterr().out


@pytest.mark.parametrize("code, text, status, why", [
    (0, "========= COMPUTE-SANITIZER\n12 passed\n========= ERROR SUMMARY: 0 errors", "passed", None),
    (86, "========= Invalid __global__ read\n========= ERROR SUMMARY: 3 errors", "failed", "3 errors"),
    (86, "========= RACECHECK SUMMARY: 2 hazards displayed (2 errors, 0 warnings)", "failed", "2 errors"),
    (1, "1 failed\n========= ERROR SUMMARY: 0 errors", "failed", "exit status 1"),
    (1, "========= COMPUTE-SANITIZER\n========= Error: Device not supported. Please refer to ...", "not run",
     "Error: Device not supported"),
    (0, "there is no compute-sanitizer: it comes with the CUDA toolkit", "not run", "there is no compute-sanitizer"),
])
def test_what_the_sanitizer_says(code, text, status, why):
    found = gpu.read_sanitizer(code, text)
    assert found["status"] == status and (why is None or why in found["why"])


def test_what_a_measurement_says():
    assert gpu.read_measurement(0, 'note\n{"ms": 3.5}') == {"status": "passed", "ms": 3.5}
    assert gpu.read_measurement(0, '{"status": "not run", "why": "torch is not installed"}')["status"] == "not run"
    assert gpu.read_measurement(1, '{"ms": 3.5}')["status"] == "failed"
    assert gpu.read_measurement(0, "")["status"] == "failed"
    assert gpu.read_pytest(0, "...\n3 passed, 1 skipped in 2 s")["counts"] == {"passed": 3, "skipped": 1}
    assert gpu.read_pytest(0, "1 skipped in 2 s")["status"] == gpu.read_pytest(1, "1 failed, 3 passed")["status"] == "failed"


def test_every_op_has_its_jobs():
    from promoe import ops
    names = [j.name for j in gpu.test_jobs(None)]
    assert len(names) == len(set(names)) == 2 + 2 * len(ops.names())
    assert {Path(a).name for j in gpu.test_jobs(None) for a in j.command if a.endswith(".py")} <= {
        p.name for p in ROOT.glob("tests/**/*.py")}


def test_jobs_at_once_and_a_part_of_them(results, capsys):
    jobs = [job(name, "import time; time.sleep(1)") for name in ("one", "two", "three", "four")]
    began = time.perf_counter()
    assert gpu.run_jobs("gpu-test", jobs, ABOUT, 30, at_once=3, only="one|t") == 3
    assert time.perf_counter() - began < 2.5
    assert "3 of 4 jobs done, 0 failed" in capsys.readouterr().out
    assert gpu.run_jobs("gpu-test", jobs, ABOUT, 30) == 0
