"""Oracle of `experts`: the feed-forward layer over a routing plan, one row after another.

The inputs are those of csrc/ops/experts.h; groups may have different widths (foff).
"""

import numpy as np

from .numeric import dgelu, dsilu, gelu, mm, silu, total


def groups(row_off, row_token, row_weight, foff, N, dtype):
    """(expert number, plan rows or None when shared, tokens, weights) of every group."""
    plan = 0 if row_off is None else len(row_off) - 1
    for e in range(len(foff) - 1):
        if e < plan:
            rows = slice(row_off[e], row_off[e + 1])
            yield e, rows, row_token[rows], row_weight[rows]
        else:
            yield e, None, np.arange(N), np.ones(N, dtype)


def block(e, foff, up, down, D, activation):
    """Of one group: its rows of up, those rows (F_g, D), with a gate (2 F_g, D), and down (D, F_g)."""
    lo, hi = foff[e], foff[e + 1]
    rows = slice(2 * lo, 2 * hi) if activation == "swiglu" else slice(lo, hi)
    return rows, up[rows], down[lo * D:hi * D].reshape(D, hi - lo)


def hidden(p, activation):
    """h of the pre-activations."""
    if activation == "gelu_tanh":
        return gelu(p)
    gate, up = np.split(p, 2, axis=1)
    return silu(gate) * up


def dhidden(p, dh, activation):
    """The gradient of the pre-activations."""
    if activation == "gelu_tanh":
        return dh * dgelu(p)
    gate, up = np.split(p, 2, axis=1)
    return np.concatenate([dh * up * dsilu(gate), dh * silu(gate)], axis=1)


def forward(x, foff, up, down, up_bias=None, down_bias=None, row_off=None, row_token=None, row_weight=None,
            tok_off=None, tok_row=None, W=0, Z=0, G=None, R=0, activation="gelu_tanh"):
    N, D = x.shape
    up_bias = np.zeros(len(up), x.dtype) if up_bias is None else up_bias
    down_bias = np.zeros((len(foff) - 1, D), x.dtype) if down_bias is None else down_bias
    plan = 0 if row_off is None else len(row_off) - 1
    R = R if row_token is None else len(row_token)
    y = np.zeros_like(x)
    pre, pre_shared = np.zeros((R, W), x.dtype), np.zeros(((len(foff) - 1 - plan) * N, Z), x.dtype)
    for e, rows, tokens, weight in groups(row_off, row_token, row_weight, foff, N, x.dtype):
        f, U, V = block(e, foff, up, down, D, activation)
        p = mm(x[tokens], U.T) + up_bias[f]
        if rows is None:
            pre_shared[(e - plan) * N:(e - plan + 1) * N, :len(U)] = p
        else:
            pre[rows, :len(U)] = p
        np.add.at(y, tokens, weight[:, None] * (mm(hidden(p, activation), V.T) + down_bias[e]))
    return {"y": y, "pre": pre, "pre_shared": pre_shared}


def backward(x, foff, up, down, dy, up_bias=None, down_bias=None, row_off=None, row_token=None, row_weight=None,
             tok_off=None, tok_row=None, W=0, Z=0, G=None, R=0, activation="gelu_tanh"):
    N, D = x.shape
    given = {"dup_bias": up_bias, "ddown_bias": down_bias}
    up_bias = np.zeros(len(up), x.dtype) if up_bias is None else up_bias
    down_bias = np.zeros((len(foff) - 1, D), x.dtype) if down_bias is None else down_bias
    d = {"dx": np.zeros_like(x), "dup": np.zeros_like(up), "dup_bias": np.zeros_like(up_bias),
         "ddown": np.zeros_like(down), "ddown_bias": np.zeros_like(down_bias)}
    if row_weight is not None:
        d["drow_weight"] = np.zeros_like(row_weight)
    for e, rows, tokens, weight in groups(row_off, row_token, row_weight, foff, N, x.dtype):
        f, U, V = block(e, foff, up, down, D, activation)
        p = mm(x[tokens], U.T) + up_bias[f]
        h, dout = hidden(p, activation), dy[tokens]
        if rows is not None:
            d["drow_weight"][rows] = (dout * (mm(h, V.T) + down_bias[e])).sum(axis=1)
        dout = weight[:, None] * dout
        dp = dhidden(p, mm(dout, V), activation)
        np.add.at(d["dx"], tokens, mm(dp, U))
        if len(tokens):
            d["dup"][f] = mm(dp.T, x[tokens])
            d["dup_bias"][f] = total(dp)
            d["ddown"][foff[e] * D:foff[e + 1] * D] = mm(dout.T, h).reshape(-1)
            d["ddown_bias"][e] = total(dout)
    return {name: value for name, value in d.items() if given.get(name, value) is not None}


def plan(choice, weight, G, R=None):
    """The CSR plan (as `routing_plan` makes it) of choice (N, A) with weight (N, A); -1 is an empty slot.

    R, the size of the row arrays, may be larger than the rows in use."""
    N, A = choice.shape
    rows = sorted((g, n) for n in range(N) for g in set(choice[n]) if g >= 0)
    R = R if R is not None else N * A
    number = {pair: r for r, pair in enumerate(rows)}
    row_token, row_weight = np.full(R, -1, np.int32), np.zeros(R, np.float32)
    for (g, n), r in number.items():
        row_token[r], row_weight[r] = n, weight[n][choice[n] == g].sum()
    tok_off, tok_row = np.zeros(N + 1, np.int32), np.full(R, -1, np.int32)
    for n in range(N):
        mine = [number[g, n] for g in dict.fromkeys(choice[n]) if g >= 0]
        tok_off[n + 1] = tok_off[n] + len(mine)
        tok_row[tok_off[n]:tok_off[n + 1]] = mine
    row_off = np.searchsorted([g for g, _ in rows], np.arange(G + 1)).astype(np.int32)
    return {"row_off": row_off, "row_token": row_token, "row_weight": row_weight,
            "tok_off": tok_off, "tok_row": tok_row}


def weights(rng, N, D, widths, activation="gelu_tanh", biases=True):
    """x and the parameters of groups of the given widths; no bias is zero."""
    F = sum(widths)
    P = 2 * F if activation == "swiglu" else F
    normal = lambda *shape: rng.standard_normal(shape).astype(np.float32)
    made = {"x": normal(N, D), "foff": np.cumsum([0, *widths]).astype(np.int32),
            "up": normal(P, D) / np.float32(np.sqrt(D)), "up_bias": normal(P),
            "down": normal(D * F) / np.float32(np.sqrt(F / len(widths))),
            "down_bias": normal(len(widths), D)}
    if activation != "gelu_tanh":
        made["activation"] = activation
    return made if biases else {name: value for name, value in made.items() if "bias" not in name}


def case(N, D, routed, shared=(), A=1, choose=None, spare=0, R=None, pad=0, activation="gelu_tanh", biases=True):
    """A case: N tokens of D, plan groups and shared groups of the given widths, A choices per token.

    choose(rng, N, A, G) gives the choices (uniform, without an empty slot, when None); spare rows beyond
    those in use, or R in all; W and Z wider than the widest group by pad."""
    def make(rng):
        G, inputs = len(routed), weights(rng, N, D, [*routed, *shared], activation, biases)
        halves = 1 + (activation == "swiglu")
        inputs |= {"W": halves * max(routed, default=0) + pad, "Z": halves * max(shared, default=0) + pad}
        if not G:
            return inputs | {"G": 0, "R": 0}
        choice = np.array([rng.permutation(G)[:A] for _ in range(N)], np.int32).reshape(N, A)
        if choose:
            choice = np.asarray(choose(rng, N, A, G), np.int32).reshape(N, A)
        used = sum(len(set(c) - {-1}) for c in choice)
        return inputs | plan(choice, rng.standard_normal((N, A)).astype(np.float32), G, R or used + spare)
    return make


def floor(inputs):
    """tests/ops/test_experts.py says why."""
    return 8.0


def some_without(rng, N, A, G):
    """A third of the tokens has no row, and no slot is sure to be taken."""
    choice = np.array([rng.permutation(G)[:A] for _ in range(N)])
    choice[rng.random((N, A)) < 0.3] = -1
    choice[rng.permutation(N)[:N // 3]] = -1
    return choice


def none_to_two(rng, N, A, G):
    """Two rows, none and one, in turn: as many rows as tokens."""
    choice = np.array([rng.permutation(G)[:2] for _ in range(N)])
    choice[np.arange(N) % 3 > 0, 0] = -1
    choice[np.arange(N) % 3 == 1, 1] = -1
    return choice


def skewed(rng, N, A, G):
    """Some groups with most rows, some with none."""
    return np.minimum(rng.geometric(0.6, (N, A)) - 1, G - 1)


CASES = {
    "promoe": case(70, 24, (48,) * 5, (48,)),
    "top2": case(41, 20, (40,) * 4, (40,), A=2),
    "top3": case(37, 17, (23,) * 4, (31,), A=3),
    "no_shared": case(33, 16, (32,) * 3, A=2),
    "two_shared": case(29, 12, (24,) * 3, (24, 24), A=2),
    "dense": case(90, 32, (), (128,)),
    "two_dense": case(19, 9, (), (17, 40)),
    "widths": case(60, 33, (5, 64, 1, 37), (70, 3), A=2),
    "no_width": case(20, 9, (0, 12, 7), (0, 11), A=2),
    "empty_groups": case(40, 16, (16,) * 6, (16,), choose=lambda rng, N, A, G: 2 + 2 * rng.integers(2, size=(N, A))),
    "all_on_one": case(200, 16, (24,) * 4, (24,), choose=lambda rng, N, A, G: np.full((N, A), 1)),
    "all_on_last": case(50, 16, (24,) * 4, (24,), choose=lambda rng, N, A, G: np.full((N, A), G - 1)),
    "no_rows": case(21, 8, (8,) * 2, (8,), choose=lambda rng, N, A, G: np.full((N, A), -1)),
    "no_rows_no_shared": case(21, 8, (8,) * 2, choose=lambda rng, N, A, G: np.full((N, A), -1), spare=3),
    "some_without": case(50, 16, (16,) * 4, (20,), A=3, choose=some_without, spare=9),
    "some_without_no_shared": case(50, 16, (16,) * 4, A=2, choose=some_without),
    "skewed": case(300, 8, (12,) * 6, (8,), choose=skewed),
    "padded": case(30, 10, (14, 6), (9, 5), pad=7, spare=5),
    "one_token": case(1, 16, (32,) * 3, (32,)),
    "one_token_top2": case(1, 7, (5,) * 3, A=2),
    "no_token": case(0, 8, (16,) * 3, (16,)),
    "one_of_all": case(1, 1, (1,), (1,)),
    "slices": case(25, 200, (400, 17), (210,)),
    "wide": case(6, 400, (20, 5), (7,)),
    "blocks": case(500, 40, (80,) * 4, (60,), A=2),
    "rows_as_many_as_tokens": case(45, 16, (16,) * 3, (20,), A=2, choose=none_to_two),
    "room_for_one_row_each": case(40, 16, (16,) * 3, (20,), choose=some_without, R=40),
    "full_tiles": case(800, 136, (128, 120), (112,)),
    "full_tiles_top2": case(200, 101, (150, 97, 33), (97, 130), A=2),
    "many_blocks": case(2600, 5, (6, 7), (8,), choose=skewed),
}
CASES |= {f"D{D}": case(13, D, (2 * D, D + 3), (D,), A=1 + D % 2) for D in range(1, 34)}
# With a gate: bias-free, as DiT-MoE and Nucleus have it, and with biases.
GATED = {
    "swiglu": case(70, 24, (48,) * 5, (48,), A=2, activation="swiglu", biases=False),
    "swiglu_biases": case(60, 33, (5, 64, 1, 37), (70, 3), A=2, activation="swiglu"),
    "swiglu_dense": case(90, 32, (), (83,), activation="swiglu", biases=False),
    "swiglu_no_shared": case(41, 17, (23,) * 4, A=3, activation="swiglu", biases=False),
    "swiglu_no_width": case(20, 9, (0, 12, 7), (0, 11), A=2, activation="swiglu"),
    "swiglu_some_without": case(50, 16, (16,) * 4, (20,), A=3, choose=some_without, spare=9, activation="swiglu",
                                biases=False),
    "swiglu_padded": case(30, 10, (14, 6), (9, 5), pad=7, spare=5, activation="swiglu"),
    "swiglu_blocks": case(500, 40, (80,) * 4, (60,), A=2, activation="swiglu", biases=False),
    "swiglu_slices": case(25, 200, (400, 17), (210,), activation="swiglu", biases=False),
    "swiglu_full_tiles": case(800, 136, (128, 120), (112,), activation="swiglu", biases=False),
    "swiglu_full_tiles_top2": case(200, 101, (150, 97, 33), (97, 130), A=2, activation="swiglu"),
    "swiglu_one": case(1, 1, (1,), (1,), activation="swiglu", biases=False),
    "swiglu_no_token": case(0, 8, (16,) * 3, (16,), activation="swiglu", biases=False),
}
GATED |= {f"swiglu_D{D}": case(13, D, (2 * D, D + 3), (D,), A=1 + D % 2, activation="swiglu", biases=D % 3 > 0)
          for D in (1, 2, 3, 7, 8, 15, 16, 31, 32, 33)}
CASES |= GATED | {
    "no_biases": case(45, 20, (33,) * 4, (19,), A=2, biases=False),
    "dense_no_biases": case(23, 16, (), (40,), biases=False),
}
SMALL = ("top3", "two_shared", "widths", "some_without", "two_dense", "no_shared", "one_token", "no_biases", "swiglu_biases",
         "swiglu_no_shared", "swiglu_some_without")
