"""linear: y = x weight^T + bias, then the activation."""

import numpy as np

from .numeric import dgelu, gelu, mm, sigmoid, total


def forward(x, weight, bias=None, activation="none", dx_add=0):
    pre = mm(x, weight.T)
    if bias is not None:
        pre = pre + bias
    if activation == "none":
        return {"y": pre}
    return {"y": pre * sigmoid(pre) if activation == "silu" else gelu(pre), "pre": pre}


def backward(x, weight, dy, bias=None, activation="none", dx_add=0, dx=None):
    if activation != "none":
        pre = forward(x, weight, bias, activation)["pre"]
        s = sigmoid(pre)
        dy = dy * (s + pre * s * (1 - s) if activation == "silu" else dgelu(pre))
    grads = {"dx": mm(dy, weight), "dweight": mm(dy.T, x)}
    if bias is not None:
        grads["dbias"] = total(dy)
    return grads


def _case(N, D, F, activation="none", bias=True):
    def make(rng):
        normal = lambda *shape: rng.standard_normal(shape).astype(np.float32)  # noqa: E731
        values = {"x": normal(N, D), "weight": normal(F, D) / np.float32(np.sqrt(D)),
                  "activation": activation}
        return values | ({"bias": normal(F)} if bias else {})
    return make


CASES = {
    "one": _case(1, 1, 1),
    "one_token": _case(1, 40, 70),
    "no_bias": _case(9, 12, 20, bias=False),
    "silu": _case(17, 33, 31, "silu"),
    "gelu_tanh": _case(23, 16, 65, "gelu_tanh"),
    "rows_of_a_slice": _case(14, 8, 32),
    "rows_over_a_slice": _case(15, 8, 33),
    "row_blocks": _case(200, 24, 40, "gelu_tanh"),
    "long_rows": _case(5, 700, 9),
    "many_tokens": _case(600, 20, 37),  # over two packings of the weight gradient
    "gradient_ranges": _case(300, 320, 40),  # dweight in ranges and chunks
    "panel_ranges": _case(130, 160, 200, "silu"),  # more than one task in each direction
}
CASES |= {f"width_{D}": _case(4, D, 34 - D) for D in range(1, 34)}
