"""benchmarks/gpu_bench.py measures what it says: on the CPU, a model of a few thousand parameters in place of S."""

import numpy as np
import pytest

import promoe
from benchmarks import counts, gpu_bench
from promoe import ops
from tests.cuda.common import DEVICE
from tests.cuda.test_model import MICRO


@pytest.fixture
def tiny(monkeypatch):
    monkeypatch.setattr(gpu_bench, "DEVICE", DEVICE)
    monkeypatch.setattr(gpu_bench, "SAMPLE_STEPS", 3)
    monkeypatch.setattr(promoe, "preset", lambda name: MICRO)
    monkeypatch.setattr(gpu_bench, "copy_bandwidth", lambda *_: 1e9)
    monkeypatch.setattr(gpu_bench, "product_peak", lambda *_: 1e9)


def test_a_step(tiny, monkeypatch):
    monkeypatch.setattr(gpu_bench, "budget_of", lambda name: {"attention forward": 1e6})
    found = gpu_bench.step("S", 256 // 64, rounds=2)
    forward = sum(counts.forward(MICRO, 4).values())
    assert found["tflops"] == pytest.approx(3 * forward / found["ms"] / 1e9) and np.isfinite(found["loss"])
    assert found["images_per_second"] == pytest.approx(4e3 / found["ms"])
    rows = {row["op"]: row for row in found["ops_one_by_one"]}
    assert {f"{op} forward" for op in ("attention", "experts", "linear", "adamw", "grad_norm")} <= set(rows)
    assert {"attention backward", "experts backward"} <= set(rows)
    linear = rows["linear forward"]
    assert linear["tflops"] * linear["ms"] == pytest.approx(counts.forward(MICRO, 4)["linear"] / 1e9)
    assert linear["share_of_product_peak"] == pytest.approx(1e3 * linear["tflops"]) and "gb_per_s" not in linear


def test_a_sample(tiny):
    found = gpu_bench.sample("S", 2)
    assert found["images_per_second"] == pytest.approx(2e3 / found["ms"])
    assert found["ms_per_step"] == pytest.approx(found["ms"] / 3)


def test_the_product_that_is_timed(monkeypatch):
    monkeypatch.setattr(gpu_bench, "DEVICE", DEVICE)
    calls = []
    whole = ops.linear_forward
    monkeypatch.setattr(ops, "linear_forward", lambda *a, **k: calls.append(k) or whole(*a, **k))
    assert gpu_bench.product_peak(64, 32, 48, rounds=2) > 0
    assert len(calls) == 5 and all(k["compute"] == "bf16" for k in calls)


def test_peaks_of_the_data_sheets():
    for name, peak in (("NVIDIA H200, 150.1 GB", 989e12), ("NVIDIA H100 80GB HBM3", 989e12), ("NVIDIA A100-SXM4-80GB", 312e12),
                       ("NVIDIA GeForce RTX 4090", 165e12), ("CPU in place of sm_90", None)):
        assert gpu_bench.datasheet(name) == peak
