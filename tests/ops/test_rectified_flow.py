from math import sqrt

import numpy as np
import pytest

import promoe
from promoe import ops
from tests.oracle import rectified_flow as oracle

from .common import check_forward, make


@pytest.mark.parametrize("case", oracle.CASES)
def test_matches_oracle(case):
    check_forward("rectified_flow", case)


def run(B=4, C=2, V=9, seed=1, position=0, **changes):
    inputs = {"x0": np.ones((B, C, V), np.float32), "y": np.arange(B) % 10,
              "key": np.array([seed, position], np.int64), **changes}
    return ops.rectified_flow_forward(**inputs)


def test_split_of_a_batch_does_not_matter():
    inputs = make("rectified_flow", "shifted")
    whole = ops.rectified_flow_forward(**inputs)
    for begin, end in [(0, 1), (1, 18), (18, 40)]:
        part = {**inputs, "x0": inputs["x0"][begin:end], "y": inputs["y"][begin:end],
                "key": inputs["key"] + np.array([0, begin])}
        for name, value in ops.rectified_flow_forward(**part).items():
            np.testing.assert_array_equal(value, whole[name][begin:end], err_msg=name)


def test_time_does_not_depend_on_the_data():
    np.testing.assert_array_equal(run(B=6, C=1, V=3)["t"], run(B=6, C=5, V=100)["t"])


def test_labels_are_dropped_at_the_rate_asked():
    n = 20000
    for prob in (0.1, 0.5):
        label = run(B=n, C=1, V=1, y=np.full(n, 3), drop_prob=prob, null_label=7)["label"]
        assert set(label) == {3, 7}
        assert abs((label == 7).mean() - prob) < 4 * sqrt(prob * (1 - prob) / n)
    assert np.all(run(B=n, C=1, V=1, y=np.full(n, 3), drop_prob=0.0)["label"] == 3)
    assert np.all(run(B=n, C=1, V=1, y=np.full(n, 3), drop_prob=1.0)["label"] == 1000)


def test_density_of_logit_normal():
    """logit(t / 1000) is normal with the mean and deviation asked."""
    n = 40000
    t = run(B=n, C=1, V=1, logit_mean=-0.7, logit_std=1.4)["t"].astype(np.float64) / 1000
    z = (np.log(t / (1 - t)) + 0.7) / 1.4
    assert abs(z.mean()) < 4 / sqrt(n) and abs(z.var() - 1) < 4 * sqrt(2 / n)


def test_density_of_mode():
    """t is a decreasing function of the uniform draw, so its distribution function is known: with
    f(u) = 1 - u - 1.29 (cos^2(pi u / 2) - 1 + u), P(t <= 1000 f(u)) = 1 - u."""
    n = 40000
    t = run(B=n, C=1, V=1, density="mode")["t"].astype(np.float64) / 1000
    assert t.min() >= 0 and t.max() <= 1
    for u in np.linspace(0.05, 0.95, 19):
        f = 1 - u - 1.29 * (np.cos(np.pi * u / 2) ** 2 - 1 + u)
        assert abs((t <= f).mean() - (1 - u)) < 4 * sqrt(u * (1 - u) / n)


def test_far_out_times_are_still_times():
    """A density so wide that the sigmoid is 0 or 1 in float32."""
    out = run(B=500, logit_std=1e3)
    assert out["t"].min() >= 0 and out["t"].min() < 1e-30 and out["t"].max() == 1000
    assert np.all(np.isfinite(out["xt"]))
    assert np.all(np.isfinite(run(B=50, logit_std=1e300, logit_mean=-1e300)["t"]))


@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
@pytest.mark.parametrize("sample, element", [(0, 0), (1, 4095), (1, 4096), (2, 8999)])
def test_data_that_is_not_finite(bad, sample, element):
    """Named, and nothing is written."""
    x0 = np.ones((3, 3, 3000), np.float32)
    x0.reshape(3, -1)[sample:, element] = bad
    out = {"xt": np.full_like(x0, 5), "target": np.full_like(x0, 5), "t": np.full(3, 5, np.float32),
           "label": np.full(3, 5)}
    with pytest.raises(ValueError, match=rf"x0\[{sample}\] has an element that is not finite"):
        run(x0=x0, y=np.zeros(3, np.int64), **out)
    assert all(np.all(value == 5) for value in out.values())


def test_largest_floats_are_finite():
    assert np.isfinite(run(x0=np.full((4, 1, 5), -3e38, np.float32))["xt"]).all()


@pytest.mark.parametrize("changes, message", [
    ({"y": np.array([0, 1, 2, 1001])}, r"y\[3\] is (1001, )?not in 0..(1000|null_label)"),
    ({"y": np.array([0, -1, 2, 3])}, r"y\[1\] is (-1|not in)"),
    ({"y": np.array([0, 1, 2, 11]), "null_label": 10}, r"y\[3\] is (11, )?not in 0..(10|null_label)"),
    ({"drop_prob": 1.5}, "drop_prob"), ({"drop_prob": -0.1}, "drop_prob"), ({"drop_prob": np.nan}, "drop_prob"),
    ({"shift": 0.0}, "shift"), ({"shift": np.inf}, "shift"), ({"logit_mean": np.nan}, "logit_mean"),
    ({"logit_std": np.inf}, "logit_std"), ({"sigmoid_scale": np.nan}, "sigmoid_scale"),
    ({"density": "cosine"}, "density"),
])
def test_wrong_arguments(changes, message):
    with pytest.raises(ValueError, match=message):
        run(**changes)


def test_same_bits_for_any_thread_count():
    results = []
    for threads in (1, 2):
        promoe.set_num_threads(threads)
        results.append([ops.rectified_flow_forward(**make("rectified_flow", c)) for c in ("digits", "video")])
    for one, two in zip(*results):
        for name in one:
            np.testing.assert_array_equal(one[name], two[name], err_msg=name)
