"""patch_embed against its oracle: values, gradients, accumulation, NULLs, sizes, threads."""

import numpy as np
import pytest

import promoe
from promoe import ops

from .common import ULP, check_backward, check_finite_differences, make, oracle

CASES = oracle("patch_embed").CASES


@pytest.mark.parametrize("case", CASES)
def test_values_and_gradients(case):
    check_backward("patch_embed", case)


@pytest.mark.parametrize("case", ["image", "no_pos", "video"])
def test_oracle_finite_differences(case):
    wrt = ["x", "weight", "bias"] + ["pos"] * (case != "no_pos")
    check_finite_differences("patch_embed", case, wrt)


def test_one_patch_by_hand():
    """The order inside a patch is (c, q0, q1, q2), that of tokens (i0, i1, i2)."""
    x = np.arange(2 * 2 * 4, dtype=np.float32).reshape(1, 2, 8)  # 2 channels of 2 x 4 voxels
    y = ops.patch_embed_forward(x=x, weight=np.eye(8, dtype=np.float32),
                                bias=np.zeros(8, np.float32), T=2, s1=2, s2=4, p1=2, p2=2)["y"]
    np.testing.assert_array_equal(y, [[0, 1, 4, 5, 8, 9, 12, 13], [2, 3, 6, 7, 10, 11, 14, 15]])


@pytest.mark.parametrize("case", ["many_tokens", "no_pos"])
def test_gradients_accumulate(case):
    """All are added to what is there but dx, which replaces it."""
    inputs, outs, upstream, first = check_backward("patch_embed", case)
    buffers = {name: np.full_like(value, 3) for name, value in first.items()}
    ops.patch_embed_backward(**inputs, **outs, **upstream, **buffers)
    for name, value in first.items():
        start = 0 if name == "dx" else 3
        np.testing.assert_allclose(buffers[name], start + value.astype(np.float64),
                                   atol=8 * ULP * (3 + np.abs(value).max()), err_msg=name)


def test_same_bits_for_any_thread_count():
    results = []
    before = promoe.get_num_threads()
    try:
        for threads in (1, 2, 3):
            promoe.set_num_threads(threads)
            _, outs, _, grads = check_backward("patch_embed", "many_tokens")
            results.append({**outs, **grads})
    finally:
        promoe.set_num_threads(before)
    for other in results[1:]:
        for name, value in results[0].items():
            np.testing.assert_array_equal(value, other[name], err_msg=name)


def test_without_images():
    inputs = make("patch_embed", "image")
    inputs["x"] = inputs["x"][:0].copy()
    outs = ops.patch_embed_forward(**inputs)
    assert outs["y"].shape == (0, 33)
    grads = ops.patch_embed_backward(**inputs, **outs, dy=np.zeros((0, 33), np.float32))
    assert not grads["dweight"].any() and not grads["dbias"].any() and not grads["dpos"].any()


@pytest.mark.parametrize("wrong", [{"s1": 7}, {"p1": 3}, {"s0": 0}, {"p2": 0}, {"p2": -2},
                                   {"s0": 2}, {"s0": 2**62, "s1": 2**62}, {"p1": 1}])
def test_sizes_that_do_not_fit(wrong):
    with pytest.raises(ValueError, match="patch_embed"):
        ops.patch_embed_forward(**make("patch_embed", "image") | wrong)


def test_not_a_number_stays_in_its_token():
    inputs = make("patch_embed", "image")
    inputs["x"][1, 2, 0] = np.nan
    y = ops.patch_embed_forward(**inputs)["y"]
    assert np.isnan(y[16]).all() and not np.isnan(np.delete(y, 16, axis=0)).any()
