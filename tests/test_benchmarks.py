"""What the benchmarks count, against totals that were counted independently."""

import pytest

import promoe
from benchmarks import counts


@pytest.mark.parametrize("size, gflop, training", [
    ("S", 12.13, 37.0), ("B", 46.04, 139.3), ("L", 161.47, 487.6), ("XL", 237.34, 716.3)])
def test_operations_of_the_papers_models(size, gflop, training):
    config = promoe.preset(f"ProMoE-{size}")
    assert round(sum(counts.forward(config).values()) / 1e9, 2) == gflop
    assert round(counts.training(config) / 1e9, 1) == training
    assert sum(counts.forward(config, 8).values()) == 8 * sum(counts.forward(config).values())


def test_operations_of_other_models():
    """By hand: 4 tokens of width 8, one block, a dense FFN of 32, patches of 4 voxels."""
    config = promoe.preset("DiT-S").replace(input_size=4, in_channels=1, hidden_size=8, depth=1, num_heads=2,
                                            learn_sigma=False)
    assert counts.forward(config) == {
        "patch_embed": 2 * 4 * 4 * 8,
        "linear": 2 * (256 * 8 + 8 * 8 + 48 * 8 + 16 * 8) + 2 * 4 * (24 * 8 + 8 * 8 + 8 * 4),
        "attention": 2 * 2 * 4 * 4 * 8,
        "experts": 2 * 2 * 4 * 8 * 32}
    moe = config.replace(num_routed_experts=4, top_k=2, interleave=False, use_shared_expert=False)
    assert counts.forward(moe)["experts"] == 2 * 2 * 4 * 8 * 2 * moe.expert_width


def test_floor():
    assert counts.floor(100, fma=50) == 2
    assert counts.floor(100, fma=50, parameters=10, update=400) == 3
    assert counts.floor(100, fma=50, parameters=10, update=480, compute="fp32") == 3
