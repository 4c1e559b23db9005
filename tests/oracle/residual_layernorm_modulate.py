"""residual_layernorm_modulate: xo = x + gate * branch, LayerNorm over D, y = xhat (1 + scale) + shift.

gate, shift and scale have one row per condition; image b has condition cond[b], or b."""

import numpy as np

from .numeric import total


def _tokens(row, T, cond):
    """(C, D) -> (B*T, D)"""
    return np.repeat(row if cond is None else row[cond], T, axis=0)


def forward(x, B, branch=None, gate=None, shift=None, scale=None, cond=None, eps=1e-6):
    T, D = x.shape[0] // B, x.dtype.type(x.shape[1])
    xo = x
    if branch is not None:
        xo = x + (branch if gate is None else _tokens(gate, T, cond) * branch)
    mean = total(xo, 1) / D
    centred = xo - mean[:, None]
    rstd = 1 / np.sqrt(total(centred * centred, 1) / D + x.dtype.type(eps))
    y = centred * rstd[:, None]
    if scale is not None:
        y = y * (1 + _tokens(scale, T, cond))
    if shift is not None:
        y = y + _tokens(shift, T, cond)
    return {"xo": xo, "y": y, "mean": mean, "rstd": rstd}


def backward(x, B, dy, dxo=None, branch=None, gate=None, shift=None, scale=None, cond=None, eps=1e-6):
    T, D = x.shape[0] // B, x.dtype.type(x.shape[1])
    saved = forward(x, B, branch, gate, cond=cond, eps=eps)
    xhat, rstd = saved["y"], saved["rstd"][:, None]

    def over_tokens(a, row):
        """Sums over the images of each condition."""
        sums = total(a.reshape(B, T, -1), 1)
        if cond is None:
            return sums
        out = np.zeros_like(row)
        for b, c in enumerate(cond):
            out[c] += sums[b]
        return out

    dxhat = dy if scale is None else dy * (1 + _tokens(scale, T, cond))
    dx = rstd * (dxhat - total(dxhat, 1)[:, None] / D - xhat * total(dxhat * xhat, 1)[:, None] / D)
    if dxo is not None:
        dx = dx + dxo
    out = {"dx": dx}
    if branch is not None:
        out["dbranch"] = dx if gate is None else _tokens(gate, T, cond) * dx
    if gate is not None:
        out["dgate"] = over_tokens(dx * branch, gate) if branch is not None else np.zeros_like(gate)
    if shift is not None:
        out["dshift"] = over_tokens(dy, shift)
    if scale is not None:
        out["dscale"] = over_tokens(dy * xhat, scale)
    return out


def _case(B, T, D, optionals="branch gate shift scale", offset=0.0, eps=1e-6, cond=None):
    def case(rng):
        def normal(*shape):
            return rng.standard_normal(shape).astype(np.float32)

        inputs = {"x": normal(B * T, D) + np.float32(offset), "B": B, "eps": eps}
        C = B
        if cond is not None:
            inputs["cond"], C = np.array(cond, np.int32), max(cond) + 2  # the last one has no image
        for name in optionals.split():
            inputs[name] = normal(B * T, D) if name == "branch" else normal(C, D)
        return inputs

    return case


CASES = {
    "all": _case(2, 5, 24),
    "layernorm alone": _case(2, 3, 16, ""),
    "first of the network": _case(3, 4, 40, "shift scale"),
    "last residual": _case(2, 4, 40, "branch gate"),
    "no gate": _case(2, 4, 17, "branch shift scale"),
    "gate without branch": _case(2, 2, 9, "gate scale"),
    "scale alone": _case(2, 4, 12, "branch gate scale"),
    "shift alone": _case(2, 4, 12, "branch gate shift"),
    "one channel": _case(2, 3, 1),
    "one token": _case(4, 1, 33),
    "far from zero": _case(1, 4, 130, offset=1000.0),
    "large eps": _case(1, 3, 20, eps=0.5),
    "chunks": _case(3, 70, 600),
    "one image": _case(1, 128, 384),
    "conditions": _case(5, 3, 24, cond=[2, 0, 2, 0, 0]),
    "conditions in chunks": _case(3, 70, 600, cond=[1, 0, 1]),
    "one condition": _case(4, 2, 33, "branch gate shift scale", cond=[0] * 4),
    # every width that a GPU has a kernel of its own for, the most of the other, and one that is too wide
    **{f"wide D={D}": _case(1, 5, D) for D in (768, 1024, 1152, 2048, 2056)},
    **{f"D={D}": _case(2, 2, D) for D in (2, 3, 7, 8, 15, 16, 31, 32)},
}
