"""Names, shapes, counts and initial values of the parameters."""

import numpy as np
import pytest

import promoe
from promoe import _core
from promoe.model import _core_config
from tests.model.common import CASES, SMALL, batch, golden, golden_model

# methods of the papers: all parameters, and those of them that are trained (without pos_embed)
TOTALS = {
    "DiT-S": (32_963_360, 32_963_360 - 256 * 384), "DiT-B": (130_512_416, 130_512_416 - 256 * 768),
    "DiT-L": (458_102_816, 458_102_816 - 256 * 1024), "DiT-XL": (675_129_632, 675_129_632 - 256 * 1152),
    "ProMoE-S": (75_543_584, 75_445_280), "ProMoE-B": (300_607_520, 300_410_912),
    "ProMoE-L": (1_062_684_704, 1_062_422_560), "ProMoE-XL": (1_567_733_792, 1_567_438_880),
}


def index(config):
    """The walk over the parameters, without the memory of a model."""
    return _core._index(_core_config(config, promoe.RectifiedFlow()))


@pytest.mark.parametrize("name", TOTALS)
def test_exact_totals(name):
    rows = index(promoe.preset(name))
    assert sum(count for *_, count, _ in rows) == TOTALS[name][0] == promoe.preset(name).num_params
    assert sum(count for *_, count, trained in rows if trained) == TOTALS[name][1]


@pytest.mark.parametrize("name", [*TOTALS, "ProMoE-digits"])
def test_tensors_lie_apart_and_trained_ones_come_first(name):
    rows = index(promoe.preset(name))
    assert all(np.prod(shape) == count for _, shape, _, count, _ in rows)
    assert len({row[0] for row in rows}) == len(rows)
    places = sorted((at, at + count, trained) for _, _, at, count, trained in rows)
    assert places[0][0] == 0
    for (_, end, trained), (begin, _, next_trained) in zip(places, places[1:]):
        assert 0 <= begin - end < 64 and trained >= next_trained


@pytest.mark.parametrize("name", CASES)
def test_official_names_in_official_order(name):
    case = golden(name)
    names = [k[6:] for k in case if k.startswith("param.")]
    state = golden_model(case).state_dict()
    assert list(state) == names
    assert all(state[n].shape == case["param." + n].shape for n in names)
    assert all(np.array_equal(state[n], case["param." + n]) for n in names)


def test_names_of_every_option():
    config = SMALL.replace(qk_norm=True, use_shared_expert=False, use_uncond_expert=False, depth=2)
    names = [n for n in promoe.Model(config).state_dict() if n.startswith("blocks.1.")]
    assert [n.removeprefix("blocks.1.") for n in names] == [
        "attn.qkv.weight", "attn.qkv.bias", "attn.q_norm.weight", "attn.q_norm.bias",
        "attn.k_norm.weight", "attn.k_norm.bias", "attn.proj.weight", "attn.proj.bias",
        "mlp.cluster_centers",
        *(f"mlp.experts.{j}.{p}_proj.{k}" for j in range(3) for p in ("up", "down")
          for k in ("weight", "bias")),
        "adaLN_modulation.1.weight", "adaLN_modulation.1.bias"]


def test_initial_values():
    config = promoe.preset("ProMoE-digits").replace(qk_norm=True, hidden_size=192)
    state = promoe.Model(config, seed=3).state_dict()
    normal = ("t_embedder.mlp.0.weight", "t_embedder.mlp.2.weight", "y_embedder.embedding_table.weight")
    for name, array in state.items():
        if name == "pos_embed":
            continue
        elif "_norm.weight" in name:
            assert (array == 1).all(), name
        elif "adaLN" in name or "final_layer" in name or name.endswith("bias"):
            assert not array.any(), name
        elif name in normal or "cluster_centers" in name:
            assert abs(array.std() / 0.02 - 1) < 0.1 and abs(array.mean()) < 0.003, name
        else:
            bound = np.sqrt(6 / (len(array) + array[0].size))
            assert np.abs(array).max() <= bound and np.abs(array).max() > 0.97 * bound, name
            assert abs(array.std() / (bound / np.sqrt(3)) - 1) < 0.1, name
    weights = [a.ravel()[:16] for n, a in state.items() if n.endswith("weight") and a.any() and a.ndim > 1]
    assert len({w.tobytes() for w in weights}) == len(weights)  # every tensor has its own draws


def test_initial_values_are_a_function_of_the_seed():
    a, b, c = (promoe.Model(SMALL, seed=s).state_dict() for s in (5, 5, 6))
    assert all(np.array_equal(a[n], b[n]) for n in a)
    assert not np.array_equal(a["x_embedder.proj.weight"], c["x_embedder.proj.weight"])


@pytest.mark.parametrize("sizes, patch", [((8, 12), 2), ((6,), 2), ((2, 4, 6), (1, 2, 2))])
def test_positions(sizes, patch):
    """Each axis has an equal part of the width, the last axis first: [sin | cos]."""
    config = SMALL.replace(input_size=sizes, patch_size=patch)
    got = promoe.Model(config).state_dict()["pos_embed"]
    part = config.hidden_size // len(config.grid)
    omega = 10000.0 ** -(np.arange(part // 2) / (part // 2))
    axes = np.meshgrid(*(np.arange(n) for n in config.grid), indexing="ij")
    angles = [a.reshape(-1, 1) * omega for a in axes[::-1]]
    wanted = np.concatenate([np.concatenate([np.sin(a), np.cos(a)], axis=1) for a in angles], axis=1)
    np.testing.assert_allclose(got, wanted[None], rtol=0, atol=1e-7)
    assert got.shape == (1, config.tokens, config.hidden_size)


def test_positions_of_the_public_code():
    case = golden(CASES[0])
    assert np.array_equal(promoe.Model(golden_model(case).config).state_dict()["pos_embed"],
                          case["param.pos_embed"])


def test_an_initial_model_outputs_zero_and_its_loss_is_the_variance_of_the_target():
    x, t, y, target = batch(SMALL)
    model = promoe.Model(SMALL)
    assert not model.forward(x, t, y).any()
    r = model.loss_and_grad(x, t, y, target)
    assert r.mse == pytest.approx(np.mean(target.astype(float) ** 2), rel=1e-6)
    model.accumulate(x, y, 0)
    assert model.update().mse == pytest.approx(2, rel=0.3)  # the target is noise - x0
