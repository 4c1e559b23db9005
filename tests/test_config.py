"""ModelConfig, RectifiedFlow, presets and the names of the public code."""

import dataclasses
import json
from pathlib import Path

import numpy as np
import pytest

import promoe
from promoe import ModelConfig, RectifiedFlow

GOLDENS = sorted((Path(__file__).parent / "golden").glob("*.npz"))
SMALL = ModelConfig(input_size=8, hidden_size=48, depth=4, num_heads=2, num_routed_experts=5)


@pytest.mark.parametrize("name, total, active", [
    ("ProMoE-S", 75_543_584, 32_993_312),
    ("ProMoE-B", 300_607_520, 130_572_320),
    ("ProMoE-L", 1_062_684_704, 458_262_560),
    ("ProMoE-XL", 1_567_733_792, 675_339_296),
    ("DiT-S", 32_963_360, 32_963_360),
    ("DiT-B", 130_512_416, 130_512_416),
    ("DiT-L", 458_102_816, 458_102_816),
    ("DiT-XL", 675_129_632, 675_129_632),
])
def test_counts_of_the_papers(name, total, active):
    config = promoe.preset(name)
    assert (config.num_params, config.num_active_params) == (total, active)
    assert name in promoe.presets()


@pytest.mark.parametrize("name, active", [("S", 40_085_024), ("B", 158_911_520), ("L", 558_999_584),
                                          ("XL", 824_071_712)])
def test_active_at_three_experts(name, active):
    assert promoe.preset(f"ProMoE-{name}").replace(top_k=3).num_active_params == active


@pytest.mark.parametrize("experts, millions", [(2, 158.9), (6, 215.6), (10, 272.3), (14, 329.0)])
def test_counts_by_experts(experts, millions):
    config = promoe.preset("ProMoE-B").replace(num_routed_experts=experts)
    assert round(config.num_params / 1e6, 1) == millions


@pytest.mark.parametrize("path", GOLDENS, ids=lambda p: p.stem)
def test_golden_configs(path):
    with np.load(path) as file:
        numbers = sum(file[k].size for k in file.files if k.startswith("param."))
        official = json.loads(str(file["config"]))
    config = ModelConfig.from_official(official)
    assert config.num_params == numbers
    assert bool(config.num_routed_experts) == (official["model"] == "ProMoE_TC")
    assert ModelConfig.from_dict(json.loads(json.dumps(config.to_dict()))) == config


def test_unknown_preset_names_the_nearest():
    with pytest.raises(ValueError, match="'promoe-s'.*did you mean 'ProMoE-S'"):
        promoe.preset("promoe-s")
    with pytest.raises(ValueError, match="known: ProMoE-S"):
        promoe.preset("nothing at all")


def test_frozen_and_keyword_only():
    with pytest.raises(dataclasses.FrozenInstanceError):
        SMALL.depth = 3
    with pytest.raises(TypeError):
        ModelConfig(32)


def test_replace():
    wide = SMALL.replace(hidden_size=96, num_heads=4)
    assert wide.expert_width == wide.shared_expert_width == 192
    assert SMALL.replace(expert_hidden_size=7, hidden_size=96).expert_width == 7
    with pytest.raises(TypeError, match="'hiden_size'.*did you mean 'hidden_size'"):
        SMALL.replace(hiden_size=3)
    with pytest.raises(TypeError, match="did you mean 'depth'"):
        ModelConfig.from_dict({"dpth": 3})
    with pytest.raises(TypeError, match="did you mean 'shift'"):
        RectifiedFlow().replace(shfit=2)


@pytest.mark.parametrize("changes, message", [
    (dict(hidden_size=50, num_heads=4), "hidden_size = 50.*multiple of num_heads = 4"),
    (dict(hidden_size=46), "hidden_size = 46.*2 axes need a multiple of 4"),
    (dict(input_size=(8,), hidden_size=9, num_heads=1), "1 axes need a multiple of 2"),
    (dict(input_size=(4, 4, 4), hidden_size=16), "3 axes need a multiple of 6"),
    (dict(input_size=9), "input_size = 9: axis 0 is 9 long.*patch_size 2"),
    (dict(input_size=(8, 6), patch_size=(2, 4)), "axis 1 is 6 long"),
    (dict(patch_size=(2, 2, 2)), "patch_size.*has 3 axes and input_size has 2"),
    (dict(input_size=(2, 2, 2, 2)), "1 to 3 axes"),
    (dict(input_size=0), "every axis"),
    (dict(input_size="8"), "input_size = '8'"),
    (dict(input_size=8.0), "must be an integer"),
    (dict(depth=0), "depth = 0.*at least 1"),
    (dict(depth=True), "depth = True: must be an integer"),
    (dict(depth=2.0), "depth = 2.0: must be an integer"),
    (dict(hidden_size=2**40), "too large"),
    (dict(num_routed_experts=-1), "at least 0"),
    (dict(top_k=6), "top_k = 6.*num_routed_experts = 5"),
    (dict(top_k=0), "top_k = 0"),
    (dict(mlp_ratio=0), "mlp_ratio"),
    (dict(mlp_ratio="4"), "must be a number"),
    (dict(mlp_ratio=float("nan")), "finite"),
    (dict(mlp_ratio=0.001), "no hidden unit"),
    (dict(class_dropout_prob=1.5), "in 0..1"),
    (dict(router_gate="sigmod"), "did you mean 'sigmoid'"),
    (dict(router_gate=3), "router_gate = 3"),
    (dict(contrastive_assign="top2"), "top1, topk"),
    (dict(contrastive_temperature=0), "greater than 0"),
    (dict(contrastive_weight=-1), "at least 0"),
    (dict(load_balance_per="token"), "batch, sequence"),
    (dict(learn_sigma=1), "True or False"),
    (dict(expert_hidden_size=0), "expert_hidden_size = 0"),
])
def test_impossible_models_are_refused(changes, message):
    with pytest.raises((TypeError, ValueError), match=message):
        SMALL.replace(**changes)


@pytest.mark.parametrize("fields, message", [
    (dict(density="cosine"), "logit_normal, uniform, mode"), (dict(shift=0), "shift = 0: must"),
    (dict(logit_std=-1), "logit_std"), (dict(logit_mean=float("inf")), "finite")])
def test_impossible_objectives_are_refused(fields, message):
    with pytest.raises(ValueError, match=message):
        RectifiedFlow(**fields)


def test_derived_sizes():
    config = ModelConfig(input_size=(4, 8, 6), patch_size=(1, 2, 3), in_channels=3, hidden_size=24,
                         depth=5, num_heads=2, num_routed_experts=3, class_dropout_prob=0)
    assert config.grid == (4, 4, 2) and config.tokens == 32
    assert config.input_shape == (3, 4, 8, 6) and config.output_shape == (6, 4, 8, 6)
    assert config.expert_blocks == (1, 3) and config.plan_groups == 4
    assert config.replace(interleave=False).expert_blocks == (0, 1, 2, 3, 4)
    assert config.null_label == config.label_rows == 1000 and not config.has_null_label
    assert SMALL.label_rows == 1001 and SMALL.replace(num_routed_experts=0).expert_blocks == ()
    assert SMALL.replace(input_size=(8, 8), patch_size=(2, 2)) == SMALL
    assert SMALL.replace(depth=np.int64(3)).depth == 3


def test_router_in_words():
    assert list(SMALL.router) == ["partition", "score", "gate", "select", "aux"]
    assert "5 learned prototypes" in SMALL.router["score"]
    assert SMALL.replace(num_routed_experts=0).router == {}


# ---------------------------------------------------------------- the public code's names

MOE = dict(num_routed_experts=4, moe_intermediate_size=10, shared_expert_intermediate_size=12)
SIZES = dict(hidden_size=32, depth=2, num_heads=2)


def test_official_defaults_are_the_public_ones():
    config = ModelConfig.from_official(dict(model="ProMoE_TC", moe=MOE))
    assert (config.hidden_size, config.depth, config.num_heads) == (1152, 28, 16)
    assert (config.top_k, config.router_gate) == (2, "softmax")
    assert (config.contrastive_weight, config.contrastive_temperature) == (0, 0.1)
    assert (config.contrastive_assign, config.load_balance_per) == ("top1", "batch")
    assert (config.expert_width, config.shared_expert_width) == (10, 12)


def test_official_yaml():
    yaml = {"model_name": "ProMoE_TC_S", "gpu_ids": [0], "lr": 1e-4, "DiT_S_config": {
        "qk_norm": False, "MoE_config": dict(
            num_routed_experts=12, moe_intermediate_size=768, shared_expert_intermediate_size=768,
            load_balance_loss_coef=0, norm_topk_prob=False, seq_aux=False, use_shared_expert=True,
            interleave=True, init_MoeMLP=False, top_k=1, router_weight_mode="identity",
            routing_contrastive_lam=1, use_top_k_for_routing_contrastive=True,
            routing_contrastive_temperature=0.07)}}
    config = ModelConfig.from_official(yaml)
    assert config.replace(expert_hidden_size=None, shared_expert_hidden_size=None) \
        == promoe.preset("ProMoE-S")
    assert ModelConfig.from_official({"model_name": "DiT_B", "DiT_B_config": {"qk_norm": False}}) \
        == promoe.preset("DiT-B")
    with pytest.raises(TypeError, match="gpu_idz"):
        ModelConfig.from_official({**yaml, "gpu_idz": 1})


@pytest.mark.parametrize("mapping, error, message", [
    (dict(model="ProMoE_EC", moe=MOE), ValueError, "not there yet"),
    (dict(model="DiffMoE", moe=MOE), ValueError, "not there yet"),
    (dict(model="TCDiT_L_E8", moe=MOE), ValueError, "not there yet"),
    (dict(model="UNet"), ValueError, "unknown model"),
    (dict(model="ProMoE_TC"), ValueError, "needs its experts"),
    (dict(model="DiT", moe=MOE), ValueError, "has no experts"),
    (dict(model="DiT", hidden=3), TypeError, "did you mean 'hidden_size'"),
    (dict(model="ProMoE_TC", moe={**MOE, "topk": 1}), TypeError, "did you mean 'top_k'"),
    (dict(model="ProMoE_TC", moe=dict(num_routed_experts=4)), ValueError,
     "moe_intermediate_size is missing"),
    (dict(model="DiT", use_swiglu=True), ValueError, "use_swiglu"),
    (dict(model="DiT", head_dim=0, **SIZES), ValueError, "head_dim = 0"),
    (dict(model="ProMoE_TC", moe={**MOE, "init_MoeMLP": True}), ValueError, "init_MoeMLP"),
    ("DiT", TypeError, "mapping"),
])
def test_official_errors(mapping, error, message):
    with pytest.raises(error, match=message):
        ModelConfig.from_official(mapping)


def test_head_dim_counts():
    plain = ModelConfig(input_size=8, hidden_size=32, depth=1, num_heads=2)
    wide = plain.replace(head_dim=20)
    # qkv and proj: 8 more rows of q, k and v, and 8 more columns of proj
    assert wide.head_size == 20 and wide.num_params - plain.num_params == 3 * 8 * 33 + 8 * 32
    assert ModelConfig.from_official(dict(model="DiT", head_dim=20, **SIZES)).head_size == 20


def test_norm_topk_prob_is_said_to_be_ignored():
    plain = ModelConfig.from_official(dict(model="ProMoE_TC", moe=MOE))
    with pytest.warns(UserWarning, match="never reads it"):
        config = ModelConfig.from_official(dict(model="ProMoE_TC", moe={**MOE, "norm_topk_prob": True}))
    assert config == plain


@pytest.mark.parametrize("changes, words", [
    (dict(mlp_ratio=1e300), "mlp_ratio"), (dict(depth=10**6), "depth"), (dict(num_heads=10**6), "num_heads"),
    (dict(num_routed_experts=10**6), "num_routed_experts"), (dict(hidden_size=2**30), "hidden_size"),
    (dict(expert_hidden_size=2**30), "expert_hidden_size")])
def test_what_the_core_would_refuse_is_refused_by_name(changes, words):
    with pytest.raises(ValueError, match=f"ModelConfig: {words} = .* too large"):
        promoe.ModelConfig(num_routed_experts=2).replace(**changes)


def test_names_of_another_kind():
    with pytest.raises(ValueError, match="preset: unknown name"):
        promoe.preset([])
    with pytest.raises(TypeError, match="moe is a mapping"):
        promoe.ModelConfig.from_official({"model": "ProMoE_TC", "moe": 3})
