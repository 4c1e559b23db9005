"""compute="bf16" and "bf16-emulated": operands of products are rounded to bfloat16, all else is as in fp32."""

import os
import subprocess
import sys

import numpy as np
import pytest

import promoe
from tests.model.common import CASES, SMALL, batch, golden, golden_model, relative, small_model

NATIVE = pytest.mark.skipif("bf16" not in promoe.backend_info()["computes"], reason="this level has no bf16 products")
ODD = promoe.ModelConfig(  # odd contractions: 27 numbers in a patch, heads of 9, hidden layers of 15, 11 and 13
    input_size=6, patch_size=3, in_channels=3, hidden_size=36, depth=4, num_heads=4, num_classes=3, mlp_ratio=15 / 36,
    num_routed_experts=5, expert_hidden_size=11, shared_expert_hidden_size=13)


def everything(compute, config):
    model = small_model(config=config, compute=compute)
    x, t, y, target = batch(config, 7)
    grads = model.loss_and_grad(x, t, y, target).grads
    for position in range(3):
        model.accumulate(x, y.clip(0, config.num_classes - 1), position=7 * position)
        model.update(lr=1e-3)
    return {"out": model.forward(x, t, y), **{"d" + name: g for name, g in grads.items()}, **model.state_dict()}


@NATIVE
@pytest.mark.parametrize("config", [SMALL, ODD], ids=["small", "odd"])
def test_emulation_has_the_bits_of_the_instructions(config):
    native, emulated = everything("bf16", config), everything("bf16-emulated", config)
    for name, value in native.items():
        np.testing.assert_array_equal(value.view(np.int32), emulated[name].view(np.int32), err_msg=name)


@pytest.mark.parametrize("name", CASES)
def test_close_to_the_public_code(name):
    case = golden(name)
    x, t, y = case["x"], case["t"], case["y"]
    exact = golden_model(case)
    out, routing = exact.forward(x, t, y), exact.routing(x, t, y)
    rounded = golden_model(case, compute="bf16-emulated").forward(x, t, y, routing=routing or None)
    assert 1e-5 < relative(rounded, out) < 2e-2  # 2^-9 = 2e-3 per operand, and some depth


@pytest.mark.parametrize("config", [SMALL, ODD], ids=["small", "odd"])
def test_gradients_point_the_same_way(config):
    x, t, y, target = batch(config, 7)
    # dense, so that no rounding changes a choice
    dense = promoe.ModelConfig(**{**config.to_dict(), "num_routed_experts": 0})
    exact = small_model(config=dense).loss_and_grad(x, t, y, target)
    rounded = small_model(config=dense, compute="bf16-emulated").loss_and_grad(x, t, y, target)
    assert rounded.loss == pytest.approx(exact.loss, rel=5e-3)
    for name, g in exact.grads.items():
        r = rounded.grads[name]
        norm = np.linalg.norm(g)
        if norm:
            assert 1e-5 < np.linalg.norm(r - g) / norm < 3e-2, name


def test_refused_with_the_reason_where_there_are_no_instructions():
    script = ("import promoe\n"
              "assert promoe.backend_info()['computes'] == ['fp32', 'bf16-emulated']\n"
              "try: promoe.Model(promoe.preset('ProMoE-digits'), compute='bf16')\n"
              "except ValueError as error: print(error)")
    done = subprocess.run([sys.executable, "-c", script], env={**os.environ, "PROMOE_CPU": "generic"}, text=True,
                          stdout=subprocess.PIPE, stderr=subprocess.STDOUT)
    assert done.returncode == 0, done.stdout
    for words in ("Model: compute = 'bf16' needs", "AVX512_BF16", "this is another level", "'bf16-emulated'"):
        assert words in done.stdout


def test_bf16_weights_take_half_the_panels():
    exact, rounded = (promoe.memory_estimate(promoe.preset("ProMoE-S"), 1, compute=c)["derived"]
                      for c in ("fp32", "bf16-emulated"))
    assert rounded == pytest.approx(exact / 2, rel=1e-2)


def test_a_model_trains_on_and_is_saved_in_fp32(tmp_path):
    model = small_model(compute="bf16-emulated")
    x, _, y, _ = batch(SMALL)
    model.accumulate(x, y, position=0)
    model.update(lr=1e-3)
    promoe.save(model, tmp_path / "m.safetensors")
    other = promoe.load(tmp_path / "m.safetensors")
    assert other.compute == "fp32"
    for name, value in model.state_dict().items():
        assert value.dtype == np.float32
        np.testing.assert_array_equal(value, other.state_dict()[name])
