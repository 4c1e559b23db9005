import numpy as np
import pytest

import promoe
from promoe import ops
from tests.oracle import attention as oracle

from .common import assert_close, cast, check_finite_differences, check_forward, make


@pytest.mark.parametrize("case", oracle.CASES)
def test_matches_oracle(case):
    inputs, outs = check_forward("attention", case)
    rng = np.random.default_rng(1)
    dy = rng.standard_normal(outs["y"].shape).astype(np.float32)
    got = ops.attention_backward(**inputs, **outs, dy=dy)
    exact, plain = cast({**inputs, "dy": dy}, np.float64), {**inputs, "dy": dy}
    truth, naive = oracle.backward(**exact), oracle.backward(**plain)
    assert set(got) == set(truth)
    floor = floors(inputs, dy=dy)
    for name, value in truth.items():
        assert_close(f"attention backward {name}", got[name], value, naive[name], floor.get(name, 4.0))


def floors(inputs, dy):
    """In ulp of the largest value of each gradient, where terms larger than it cancel."""
    exact = cast({**inputs, "dy": dy}, np.float64)
    if "q_weight" not in inputs:
        return {}
    truth = oracle.backward(**exact)
    largest = {name: np.abs(truth[name]).max() for name in truth}
    return {name: 4.0 * max(1.0, term / largest[name]) if largest[name] else 4.0
            for name, term in norm_terms(exact).items()}


def norm_terms(inputs):
    """What cancels in the gradients around the LayerNorms, so that 4 ulp are 4 ulp of the terms.

    The gradients of the parameters are sums over images, heads and tokens: the largest sum of absolute
    terms. (That of k_bias is 0: it moves all scores of a row alike.) In dqkv the LayerNorm takes 2 of the
    K directions out of rstd * weight * (dq or dk)."""
    B, H, dy, eps = inputs["B"], inputs["H"], inputs["dy"], inputs.get("eps", 1e-5)
    x = inputs["qkv"].reshape(dy.shape[0], 3, H, -1).copy()
    xhat, rstd = {}, {}
    for part, name in enumerate("qk"):
        rows = x[:, part].reshape(-1, x.shape[-1])
        rows, xhat[name], rstd[name] = oracle._layernorm(
            rows, inputs[name + "_weight"], inputs[name + "_bias"], eps)
        x[:, part] = rows.reshape(x[:, part].shape)
    d = oracle.backward(qkv=x.reshape(inputs["qkv"].shape), B=B, H=H, dy=dy)["dqkv"].reshape(x.shape)
    terms = {"dqkv": 0.0}
    for part, name in enumerate("qk"):
        up = np.abs(d[:, part].reshape(xhat[name].shape))
        terms[f"d{name}_bias"] = up.sum(axis=0).max()
        terms[f"d{name}_weight"] = (up * np.abs(xhat[name])).sum(axis=0).max()
        inside = (up * np.abs(inputs[name + "_weight"]) * rstd[name]).max()
        terms["dqkv"] = max(terms["dqkv"], inside)
    return terms


@pytest.mark.parametrize("case", ["T=5 K=3", "T=16 K=8", "one head"])
def test_finite_differences(case):
    check_finite_differences("attention", case, ["qkv"])


def test_finite_differences_norm():
    check_finite_differences("attention", "one head norm", ["qkv", "q_weight", "q_bias", "k_weight", "k_bias"])


def step(inputs, **buffers):
    outs = ops.attention_forward(**inputs)
    dy = np.random.default_rng(4).standard_normal(outs["y"].shape).astype(np.float32)
    return outs, ops.attention_backward(**inputs, **outs, dy=dy, **buffers)


def test_one_token_copies_v():
    inputs = make("attention", "T=1 K=64")
    outs, grads = step(inputs)
    np.testing.assert_allclose(outs["y"], inputs["qkv"][:, 256:], rtol=1e-6)
    np.testing.assert_allclose(grads["dqkv"][:, :256], 0, atol=1e-6)


@pytest.mark.parametrize("size", [30, 1e10, 1e18])
def test_large_scores_do_not_overflow(size):
    """Scores up to 1e36: each row gives all its weight to the largest score."""
    q = np.eye(5, dtype=np.float32) * np.float32(size)
    v = np.arange(25, dtype=np.float32).reshape(5, 5)
    outs, grads = step({"qkv": np.hstack([q, q, v]), "B": 1, "H": 1})
    np.testing.assert_allclose(outs["y"], v, rtol=1e-5, atol=1e-30)
    assert np.isfinite(outs["lse"]).all() and np.isfinite(grads["dqkv"]).all()


@pytest.mark.parametrize("case", ["T=33 K=8", "T=33 K=8 norm"])
@pytest.mark.parametrize("part", range(3), ids="qkv")
def test_nan_reaches_what_depends_on_it_and_nothing_else(case, part):
    """A NaN in token 7 of image 0, head 1: in q its row, in k all rows, in v a channel of all rows."""
    inputs = make("attention", case)
    inputs["qkv"].reshape(2, 33, 3, 2, 8)[0, 7, part, 1, 3] = np.nan
    outs, grads = step(inputs)
    y, dqkv = outs["y"].reshape(2, 33, 2, 8), grads["dqkv"].reshape(2, 33, 3, 2, 8)
    expected = np.zeros(y.shape, bool)
    if part == 0:
        expected[0, 7, 1] = True
    elif part == 1:
        expected[0, :, 1] = True
    else:
        expected[0, :, 1, 3] = True
    np.testing.assert_array_equal(np.isnan(y), expected)
    assert np.isnan(dqkv[0, 7, :, 1]).any()
    assert np.isfinite(dqkv[1]).all() and np.isfinite(dqkv[0, :, :, 0]).all()


def test_infinite_scores_are_nan_not_a_crash():
    qkv = np.full((3, 12), np.inf, np.float32)
    assert np.isnan(ops.attention_forward(qkv=qkv, B=1, H=1)["y"]).all()


def test_gradients_of_the_norms_accumulate():
    inputs = make("attention", "T=33 K=8 norm")
    names = ["dq_weight", "dq_bias", "dk_weight", "dk_bias"]
    _, fresh = step(inputs)
    given = {name: np.full(8, 3, np.float32) for name in names}
    _, got = step(inputs, **given)
    for name in names:
        assert got[name] is given[name]
        np.testing.assert_allclose(given[name], 3 + fresh[name], rtol=1e-5, atol=1e-5)


def test_heads_and_images_are_independent():
    """The same bits alone and beside others, where the query rows are cut in the same way."""
    inputs = make("attention", "T=33 K=64")
    whole = ops.attention_forward(**inputs)["y"].reshape(2, 33, 2, 64)
    qkv = inputs["qkv"].reshape(2, 33, 3, 2, 64)
    for b in range(2):
        for h in range(2):
            alone = np.ascontiguousarray(qkv[b, :, :, h]).reshape(33, 192)
            np.testing.assert_array_equal(ops.attention_forward(qkv=alone, B=1, H=1)["y"], whole[b, :, h])


@pytest.mark.parametrize("case", ["many small heads norm", "row blocks norm", "T=70 K=72"])
def test_same_bits_for_any_thread_count(case):
    inputs = make("attention", case)
    results = []
    for threads in (1, 2):
        promoe.set_num_threads(threads)
        outs, grads = step(inputs)
        results.append({**outs, **grads})
    for name, value in results[0].items():
        np.testing.assert_array_equal(value, results[1][name], err_msg=name)


# ---------------------------------------------------------------- bf16


def bf16(x):
    """To the nearest bfloat16, ties to even."""
    bits = np.ascontiguousarray(x, np.float32).view(np.uint32)
    return ((bits + 0x7FFF + (bits >> 16 & 1)) & np.uint32(0xFFFF0000)).view(np.float32).astype(np.float64)


def rounded(qkv, B, H, dy, q_weight=None, q_bias=None, k_weight=None, k_bias=None, eps=1e-5, exact=()):
    """y, lse and dqkv (before the LayerNorm) in float64, with operands rounded as csrc/cpu/attention_bf16.h says, except
    those named in `exact`."""
    def operand(name, x):
        return x if name in exact else bf16(x)

    T, K = qkv.shape[0] // B, qkv.shape[1] // (3 * H)
    scale, dy = np.float32(1 / np.sqrt(K)), dy.reshape(B, T, H, K)
    y, lse, dqkv = np.empty((B, T, H, K)), np.empty((B, H, T)), np.empty((B, T, 3, H, K))
    for b, h, q, k, v in oracle._heads(qkv.astype(np.float64), B, H):
        if q_weight is not None:
            q, k = oracle._layernorm(q, q_weight, q_bias, eps)[0], oracle._layernorm(k, k_weight, k_bias, eps)[0]
        q_, k_, v_, up = operand("q", q), operand("k", k), operand("v", v), operand("dy", dy[b, :, h])
        s = q_ @ operand("k", k * scale).T
        top = s.max(axis=1, keepdims=True)
        e = np.exp(s - top)
        z = e.sum(axis=1, keepdims=True)
        y[b, :, h], lse[b, h] = operand("e", e) @ v_ / z, (top + np.log(z))[:, 0]
        p = e / z
        ds = operand("ds", p * scale * (up @ v_.T - (up * y[b, :, h]).sum(axis=1, keepdims=True)))
        dqkv[b, :, 0, h], dqkv[b, :, 1, h], dqkv[b, :, 2, h] = ds @ k_, ds.T @ q_, operand("p", p).T @ up
    return {"y": y, "lse": lse, "dqkv": dqkv}


ROUNDED = ["T=33 K=64", "T=70 K=72", "T=70 K=64", "six heads", "row blocks", "head of 40", "head of 128"]


@pytest.mark.parametrize("compute", [c for c in promoe.backend_info()["computes"] if c != "fp32"])
@pytest.mark.parametrize("case", ROUNDED)
def test_bf16_rounds_every_operand_and_nothing_else(case, compute):
    """As products of rounded operands are, and not as they are where one of the operands is exact."""
    inputs = make("attention", case)
    outs = ops.attention_forward(**inputs, compute=compute)
    dy = np.random.default_rng(1).standard_normal(outs["y"].shape).astype(np.float32)
    got = {**outs, **ops.attention_backward(**inputs, **outs, dy=dy, compute=compute)}

    def far(**exact):
        """Of each array: the distance to the rounded truth, of q, k and v by themselves."""
        truth = rounded(**inputs, dy=dy, **exact)
        parts = {name: (got[name].reshape(truth[name].shape), truth[name]) for name in ("y", "lse")}
        mine = got["dqkv"].reshape(truth["dqkv"].shape)
        parts |= {f"d{name}": (mine[:, :, i], truth["dqkv"][:, :, i]) for i, name in enumerate("qkv")}
        return {name: np.linalg.norm(a - b) / np.linalg.norm(b) for name, (a, b) in parts.items()}

    # float32 sums lead to another rounding now and then; a rounding left out moves the array behind it by 2^-10 or more
    assert max(far().values()) < 3e-4
    for name in ("q", "k", "v", "e", "dy", "p", "ds"):
        assert max(far(exact=[name]).values()) > 1e-3, name


@pytest.mark.parametrize("case", ["T=33 K=64", "T=70 K=72 norm", "many small heads norm", "row blocks norm"])
def test_bf16_has_the_same_bits_for_any_thread_count(case):
    inputs = make("attention", case)
    results = []
    for threads in (1, 2):
        promoe.set_num_threads(threads)
        outs = ops.attention_forward(**inputs, compute="bf16-emulated")
        dy = np.random.default_rng(4).standard_normal(outs["y"].shape).astype(np.float32)
        results.append({**outs, **ops.attention_backward(**inputs, **outs, dy=dy, compute="bf16-emulated")})
    for name, value in results[0].items():
        np.testing.assert_array_equal(value, results[1][name], err_msg=name)
