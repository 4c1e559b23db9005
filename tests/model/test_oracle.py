"""The whole model against float64 NumPy (tests/model/oracle.py), on shapes that no preset has."""

import json

import numpy as np
import pytest

import promoe
from tests.model import oracle
from tests.model.common import CASES, assert_gradients, batch, golden, relative, small_model

BASE = dict(input_size=8, patch_size=2, in_channels=3, hidden_size=24, depth=2, num_heads=2,
            num_classes=7, num_routed_experts=3)

CONFIGS = {
    "dense": dict(num_routed_experts=0),
    "depth 1, every block": dict(depth=1, interleave=False, top_k=2, router_gate="sigmoid"),
    "width 40, seven experts, top 3": dict(hidden_size=40, num_heads=5, num_routed_experts=7, top_k=3,
                                           router_gate="softmax", contrastive_assign="top1"),
    "head size 72": dict(hidden_size=144, num_heads=2, input_size=4, depth=2),
    "head size that does not divide": dict(head_dim=10),
    "patch 1": dict(input_size=4, patch_size=1, learn_sigma=False),
    "patch 4, not square": dict(input_size=(4, 12), patch_size=4),
    "video": dict(input_size=(2, 4, 4), patch_size=(1, 2, 2)),
    "signal": dict(input_size=(12,), patch_size=(3,)),
    "qk-norm": dict(qk_norm=True, interleave=False),
    "no shared expert": dict(use_shared_expert=False, top_k=2),
    "no unconditional expert": dict(use_uncond_expert=False),
    "routed experts alone": dict(use_shared_expert=False, use_uncond_expert=False, interleave=False),
    "one expert": dict(num_routed_experts=1),
    "all experts": dict(top_k=3, router_gate="sigmoid"),
    "other widths": dict(expert_hidden_size=17, shared_expert_hidden_size=33, mlp_ratio=1.5),
    "no row for no class": dict(class_dropout_prob=0),
    "no contrastive loss": dict(contrastive_weight=0),
    "balance per batch, identity": dict(load_balance_weight=0.5, top_k=2, contrastive_weight=2.0),
    "balance per sequence, sigmoid": dict(load_balance_weight=0.5, load_balance_per="sequence",
                                          router_gate="sigmoid", contrastive_weight=0),
    "balance per batch, softmax": dict(load_balance_weight=0.5, router_gate="softmax", top_k=2),
}


def check(config, state, model, x, t, y, target):
    truth = oracle.Model(config, state)
    truth.run(x, t, y, target)
    layers = model.routing(x, t, y)
    assert len(layers) == len(truth.choices)
    for layer, choice in zip(layers, truth.choices):
        np.testing.assert_array_equal(layer.expert, choice)
        counts = np.bincount(choice[choice >= 0], minlength=config.plan_groups)
        np.testing.assert_array_equal(layer.load, counts)
    assert relative(model.forward(x, t, y), truth.out) <= 1e-6
    r = model.loss_and_grad(x, t, y, target)
    assert r.mse == pytest.approx(truth.mse, rel=1e-6)
    # the contrastive loss is a difference of logits, which go up to 1 / temperature
    ulps = float(4 * np.finfo(np.float32).eps / config.contrastive_temperature)
    assert r.aux == pytest.approx(truth.aux_loss, rel=1e-6, abs=ulps)
    assert set(r.grads) == set(truth.grads)
    assert_gradients(r.grads, truth.grads, 1e-5)


@pytest.mark.parametrize("name", CONFIGS)
def test_against_float64(name):
    config = promoe.ModelConfig(**{**BASE, **CONFIGS[name]})
    model = small_model(config=config)
    check(config, model.state_dict(), model, *batch(config))


@pytest.mark.parametrize("null", [0.0, 1.0], ids=["all with a class", "none with a class"])
def test_label_mixes(null):
    config = promoe.ModelConfig(**BASE, load_balance_weight=0.1, router_gate="sigmoid")
    model = small_model(config=config)
    x, t, y, target = batch(config, null=null)
    if null:
        y[:] = config.null_label
    check(config, model.state_dict(), model, x, t, y, target)


def test_small_heads_show_the_eps_of_the_qk_norm():
    config = promoe.ModelConfig(**BASE, qk_norm=True)
    model = small_model(config=config)
    state = model.state_dict()
    for i in range(config.depth):  # a variance of about eps in each head
        for part in ("weight", "bias"):
            state[f"blocks.{i}.attn.qkv.{part}"][:2 * config.hidden_size] *= 0.003
    model.load_state_dict(state)
    check(config, state, model, *batch(config))


@pytest.mark.parametrize("name", CASES)
def test_the_oracle_is_the_public_code(name):
    case = golden(name)
    config = promoe.ModelConfig.from_official(json.loads(str(case["config"])))
    truth = oracle.Model(config, {k[6:]: v for k, v in case.items() if k.startswith("param.")})
    assert relative(truth.run(case["x"], case["t"], case["y"], case["target"]), case["out_eval"]) <= 1e-7
    assert truth.mse == pytest.approx(float(case["mse"]), rel=1e-9)
    assert truth.aux_loss == pytest.approx(float(case["aux"]), rel=1e-9, abs=1e-12)
    assert_gradients(truth.grads, {k[5:]: v for k, v in case.items() if k.startswith("grad.")}, 2e-7)
