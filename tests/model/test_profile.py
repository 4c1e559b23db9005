"""Model.profile: where the time goes, by op."""

import numpy as np
import pytest

import promoe


@pytest.fixture
def model():
    with promoe.Model(promoe.preset("ProMoE-digits").replace(depth=2), seed=0) as m:
        yield m


def step(m):
    x = np.random.default_rng(0).standard_normal((4, *m.config.input_shape))
    m.accumulate(x, np.arange(4), position=0)
    m.update()


def test_counts_nothing_until_asked(model):
    step(model)
    assert model.profile() == {}


def test_counts_every_call(model):
    model.profile(True)
    step(model)
    step(model)
    seen = model.profile()
    assert {name: row["calls"] for name, row in seen.items() if "attention" in name} == {
        "attention forward": 4, "attention backward": 4}
    assert seen["adamw forward"]["calls"] == seen["rectified_flow forward"]["calls"] == 2
    assert "derive" not in seen  # an update packs the weights as it goes
    model.load_state_dict(model.state_dict())
    assert model.profile()["derive"]["calls"] == 1
    assert list(seen.values()) == sorted(seen.values(), key=lambda row: -row["seconds"])
    assert all(row["seconds"] > 0 for row in seen.values())


def test_starts_again_and_stops(model):
    model.profile(True)
    step(model)
    assert model.profile(True)["adamw forward"]["calls"] == 1
    step(model)
    assert model.profile(False)["adamw forward"]["calls"] == 1
    step(model)
    assert model.profile() == {}


def test_changes_no_bits():
    results = []
    for on in (False, True):
        with promoe.Model(promoe.preset("ProMoE-digits").replace(depth=2), seed=0) as m:
            m.profile(on)
            step(m)
            results.append(m.state_dict())
    for name, value in results[0].items():
        np.testing.assert_array_equal(results[1][name], value, err_msg=name)
