"""adamw: clip, AdamW (decoupled weight decay), EMA of the new weights; the gradient is emptied. Written as
PyTorch documents it, not as the kernel does."""

import numpy as np

NAMES = ("lr", "beta1", "beta2", "eps", "weight_decay", "clip", "ema", "step")


def hyper(**values):
    """The hyper array: float64, in the order of the contract."""
    chosen = {"lr": 1e-3, "beta1": 0.9, "beta2": 0.999, "eps": 1e-8, "weight_decay": 0.0, "clip": 0.0,
              "ema": 0.9999, "step": 1.0, **values}
    return np.array([chosen[name] for name in NAMES])


def forward(hyper, norm, grad, param, m, v, avg=None):
    kind = param.dtype.type
    lr, beta1, beta2, eps, decay, clip, ema, step = (float(h) for h in hyper)
    out = {"grad": np.zeros_like(grad), "param": param, "m": m, "v": v}
    if avg is not None:
        out["avg"] = avg
    if not np.isfinite(norm[0]):
        return out
    c = min(1.0, clip / (norm[0] + 1e-6)) if clip > 0 else 1.0
    g = kind(c) * grad
    p = param - kind(lr * decay) * param
    m = kind(beta1) * m + kind(1 - beta1) * g
    v = kind(beta2) * v + kind(1 - beta2) * g * g
    m_hat, v_hat = m / kind(1 - beta1**step), v / kind(1 - beta2**step)
    p = p - kind(lr) * m_hat / (np.sqrt(v_hat) + kind(eps))
    out.update(param=p, m=m, v=v)
    if avg is not None:
        out["avg"] = kind(ema) * avg + kind(1 - ema) * p
    return out


def _case(M, with_avg=True, **values):
    def case(rng):
        def draw():
            return rng.standard_normal(M).astype(np.float32)

        grad = draw()
        inputs = {"hyper": hyper(**values), "norm": np.array([np.linalg.norm(grad.astype(np.float64))]),
                  "grad": grad, "param": draw(), "m": 0.1 * draw(), "v": (0.1 * draw()) ** 2}
        if with_avg:
            inputs["avg"] = draw()
        return inputs

    return case


CASES = {
    "one": _case(1),
    "odd": _case(33, weight_decay=0.1, step=3),
    "clipped": _case(1000, clip=0.5, step=7),
    "below the clip": _case(40, clip=1e6),
    "no average": _case(70, with_avg=False, clip=0.5, weight_decay=0.01),
    "blocks": _case(40001, step=1e6),
    "copy": _case(17, ema=0.0),
    "frozen average": _case(17, ema=1.0),
    "none": _case(0),
}
