"""attention: y = softmax(q k^T / sqrt(K)) v for each image and head; optionally LayerNorm of q and k.

qkv rows are [q | k | v], each H heads of K."""

import numpy as np

from .numeric import mm, total


def _layernorm(x, weight, bias, eps):
    """Over the last axis of (T, K): the value, xhat and rstd."""
    K = x.dtype.type(x.shape[1])
    centred = x - (total(x, 1) / K)[:, None]
    rstd = 1 / np.sqrt(total(centred * centred, 1) / K + x.dtype.type(eps))[:, None]
    return centred * rstd * weight + bias, centred * rstd, rstd


def _layernorm_backward(dy, weight, xhat, rstd):
    g, K = dy * weight, dy.dtype.type(dy.shape[1])
    return rstd * (g - total(g, 1)[:, None] / K - xhat * total(g * xhat, 1)[:, None] / K)


def _heads(qkv, B, H):
    """(b, h, views (T, K) of q, k and v) of each image and head."""
    x = qkv.reshape(B, qkv.shape[0] // B, 3, H, -1)
    for b in range(B):
        for h in range(H):
            yield b, h, x[b, :, 0, h], x[b, :, 1, h], x[b, :, 2, h]


def _scores(q, k):
    return mm(q, np.ascontiguousarray(k.T)) * (1 / np.sqrt(q.dtype.type(q.shape[1])))


def forward(qkv, B, H, q_weight=None, q_bias=None, k_weight=None, k_bias=None, eps=1e-5):
    T, K = qkv.shape[0] // B, qkv.shape[1] // (3 * H)
    y, lse = np.empty((B, T, H, K), qkv.dtype), np.empty((B, H, T), qkv.dtype)
    for b, h, q, k, v in _heads(qkv, B, H):
        if q_weight is not None:
            q, k = _layernorm(q, q_weight, q_bias, eps)[0], _layernorm(k, k_weight, k_bias, eps)[0]
        s = _scores(q, k)
        top = s.max(axis=1, keepdims=True)
        e = np.exp(s - top)
        z = total(e, 1)[:, None]
        y[b, :, h] = mm(e / z, v)
        lse[b, h] = (top + np.log(z))[:, 0]
    return {"y": y.reshape(B * T, H * K), "lse": lse}


def backward(qkv, B, H, dy, q_weight=None, q_bias=None, k_weight=None, k_bias=None, eps=1e-5):
    T, K = qkv.shape[0] // B, qkv.shape[1] // (3 * H)
    norm = q_weight is not None
    scale = 1 / np.sqrt(qkv.dtype.type(K))
    dqkv = np.empty((B, T, 3, H, K), qkv.dtype)
    sums = {"dq_weight": 0, "dq_bias": 0, "dk_weight": 0, "dk_bias": 0} if norm else {}
    dy = dy.reshape(B, T, H, K)
    for b, h, q, k, v in _heads(qkv, B, H):
        if norm:
            q, q_hat, q_rstd = _layernorm(q, q_weight, q_bias, eps)
            k, k_hat, k_rstd = _layernorm(k, k_weight, k_bias, eps)
        s, up = _scores(q, k), dy[b, :, h]
        e = np.exp(s - s.max(axis=1, keepdims=True))
        p = e / total(e, 1)[:, None]
        dp = mm(up, np.ascontiguousarray(v.T))
        ds = p * (dp - total(p * dp, 1)[:, None])
        dq, dk = mm(ds, k) * scale, mm(np.ascontiguousarray(ds.T), q) * scale
        if norm:
            for name, value in [("dq_weight", dq * q_hat), ("dq_bias", dq),
                                ("dk_weight", dk * k_hat), ("dk_bias", dk)]:
                sums[name] = sums[name] + total(value)
            dq, dk = (_layernorm_backward(dq, q_weight, q_hat, q_rstd),
                      _layernorm_backward(dk, k_weight, k_hat, k_rstd))
        dqkv[b, :, 0, h], dqkv[b, :, 1, h] = dq, dk
        dqkv[b, :, 2, h] = mm(np.ascontiguousarray(p.T), up)
    return {"dqkv": dqkv.reshape(B * T, 3 * H * K), **sums}


def _case(B, T, H, K, norm=False, size=1.0, apart=0.0, **attributes):
    """apart: q and k point away from each other, so that a key that is not there (score 0) would win."""
    def case(rng):
        def normal(*shape):
            return rng.standard_normal(shape).astype(np.float32)

        inputs = {"qkv": np.float32(size) * normal(B * T, 3 * H * K), "B": B, "H": H, **attributes}
        if apart:
            inputs["qkv"].reshape(B * T, 3, H * K)[:, :2] += np.array([[apart], [-apart]], np.float32)
        if norm:
            for name in ("q", "k"):
                inputs[name + "_weight"] = 1 + np.float32(0.3) * normal(K)
                inputs[name + "_bias"] = np.float32(0.3) * normal(K)
        return inputs

    return case


CASES = {
    **{f"T={T} K={K}": _case(2, T, 2, K) for T in (1, 2, 5, 16, 33, 70) for K in (1, 3, 8, 64, 72)},
    **{f"T={T} K={K} norm": _case(2, T, 2, K, norm=True) for T in (1, 5, 33, 70) for K in (3, 8, 64, 72)},
    "six heads": _case(1, 16, 6, 16),
    "one head": _case(3, 9, 1, 20),
    "one head norm": _case(3, 9, 1, 20, norm=True, eps=1e-2),
    "many small heads": _case(9, 3, 6, 4),
    "many small heads norm": _case(9, 3, 6, 4, norm=True),
    "row blocks": _case(1, 300, 1, 24),
    "row blocks norm": _case(1, 300, 1, 24, norm=True),
    "one key short of a tile": _case(1, 63, 2, 16, apart=2.0),
    "image of XL": _case(1, 256, 1, 72),
    "more keys than a block has": _case(1, 290, 1, 72, norm=True),
    "head of 40": _case(1, 65, 2, 40),
    "head of 128": _case(1, 150, 1, 128),
    "head of 132": _case(1, 70, 1, 132, norm=True),
    "head of 201": _case(2, 20, 1, 201, norm=True),
    "peaked": _case(1, 40, 2, 16, size=4.0),
}
