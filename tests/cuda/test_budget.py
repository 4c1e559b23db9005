"""benchmarks/cuda_budget.py counts what kernels move: of kernels whose bytes are known."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from tests.cuda.common import on_the_stand_in
from tests.cuda.host import build

ROOT = Path(__file__).parents[2]
CODE = """
import json
import numpy as np
from benchmarks import cuda_budget as budget
from promoe import ops

budget.library()
rng = np.random.default_rng(0)
draw = lambda *shape: rng.standard_normal(shape).astype(np.float32)
where = lambda compute: {"device": "cuda-on-cpu", "compute": compute}
x, qkv = draw(48, 64), draw(64, 3 * 2 * 64)
found = {compute: budget.counted(lambda: ops.silu_forward(x, **where(compute))) for compute in ("fp32", "bf16")}
found["linear"] = budget.counted(lambda: ops.linear_forward(x, draw(80, 64), **where("fp32")))
found["attention"] = budget.counted(lambda: ops.attention_forward(qkv, B=1, T=64, H=2, K=64, **where("bf16")))
found["nothing"] = budget.counted(lambda: None)
print(json.dumps({"found": found, "optimizer": budget.optimizer()}))
"""


@pytest.mark.skipif(not on_the_stand_in(), reason="by the build of the kernels that watches accesses")
def test_bytes_and_operations_of_known_kernels():
    done = subprocess.run([sys.executable, "-c", CODE], cwd=ROOT, capture_output=True, text=True,
                          env={**os.environ, "PROMOE_CUDA_ON_CPU": str(build.plugin("race"))})
    assert done.returncode == 0, done.stderr
    result = json.loads(done.stdout)
    found = result["found"]
    for compute, item in (("fp32", 4), ("bf16", 2)):
        row, = found[compute].values()
        bytes_ = 48 * 64 * item
        assert (row["launches"], row["tensor_operations"]) == (1, 0)
        assert row["read"] == row["written"] == row["read_once"] == row["written_once"] == bytes_
    product = found["linear"]["cublasLtMatmul"]
    assert product["launches"] == 1 and product["tensor_operations"] == 2 * 48 * 64 * 80
    assert product["read"] >= 4 * (48 * 64 + 64 * 80) and product["written"] == 4 * 48 * 80
    row, = (row for row in found["attention"].values() if row["tensor_operations"])
    assert row["tensor_operations"] >= 4 * 64 * 64 * 2 * 64 and row["tensor_operations"] % 4096 == 0
    assert row["read_once"] >= 2 * 64 * 3 * 2 * 64 and row["written_once"] >= 2 * 64 * 2 * 64
    assert found["nothing"] == {}
    # the norm reads the gradient; AdamW reads g, p, m, v, EMA and writes p, m, v, EMA, a gradient of zeros, and bf16 weights
    assert result["optimizer"]["bytes"] == pytest.approx(4 + 5 * 4 + 5 * 4 + 2, abs=1.5)
