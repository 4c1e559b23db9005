"""unpatchify against its oracle, exactly: it moves values and computes nothing."""

import numpy as np
import pytest

from promoe import ops

from .common import check_backward, check_finite_differences, make, oracle

CASES = oracle("unpatchify").CASES


@pytest.mark.parametrize("case", CASES)
def test_moves_every_value(case):
    inputs, outs, upstream, grads = check_backward("unpatchify", case)
    o = oracle("unpatchify")
    np.testing.assert_array_equal(outs["y"], o.forward(**inputs)["y"])
    np.testing.assert_array_equal(grads["dx"], o.backward(**inputs, **upstream)["dx"])


def test_oracle_finite_differences():
    check_finite_differences("unpatchify", "video", ["x"])


def test_one_token_by_hand():
    """The order inside a token is (q0, q1, q2, c)."""
    x = np.arange(16, dtype=np.float32).reshape(2, 8)  # two tokens of 2 x 2 voxels, 2 channels
    y = ops.unpatchify_forward(x=x, B=1, C=2, V=8, s1=2, s2=4, p1=2, p2=2)["y"]
    np.testing.assert_array_equal(y, [[[0, 2, 8, 10, 4, 6, 12, 14], [1, 3, 9, 11, 5, 7, 13, 15]]])


@pytest.mark.parametrize("case", ["image", "video", "voxels"])
def test_inverse_of_patches(case):
    """Cut by patch_embed (identity weight), reordered, put back: the same image."""
    inputs = make("unpatchify", case)
    sizes = {name: inputs[name] for name in ("s0", "s1", "s2", "p0", "p1", "p2")}
    B, C, V = (inputs[name] for name in "BCV")
    image = np.random.default_rng(0).standard_normal((B, C, V)).astype(np.float32)
    P = inputs["x"].shape[1]
    rows = ops.patch_embed_forward(x=image, weight=np.eye(P, dtype=np.float32),
                                   bias=np.zeros(P, np.float32), T=len(inputs["x"]) // B,
                                   **sizes)["y"]
    rows = np.ascontiguousarray(rows.reshape(-1, C, P // C).transpose(0, 2, 1)).reshape(-1, P)
    back = ops.unpatchify_forward(x=rows, B=B, C=C, V=V, **sizes)["y"]
    np.testing.assert_array_equal(back, image)


@pytest.mark.parametrize("wrong", [{"s1": 7}, {"p1": 3}, {"s0": 0}, {"p2": 0}, {"V": 32}])
def test_sizes_that_do_not_fit(wrong):
    with pytest.raises(ValueError, match="unpatchify"):
        ops.unpatchify_forward(**make("unpatchify", "image") | wrong)
