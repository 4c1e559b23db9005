"""Operations of a model, counted from its configuration: what a floor is made of. A multiply-add is two.

Only products count. LayerNorm, softmax, GELU and the like are work too, but on a CPU they hide behind memory or
behind the products, and a floor must not be too high.
"""

from promoe.config import TIME_FEATURES

NORM_BYTES = 4  # a parameter: the gradient is read for its norm
ADAMW_BYTES = 4 * 10  # p, m, v, EMA and the gradient (which is emptied), each read and written
TWIN_BYTES = {"fp32": 2 * 4, "bf16": 2 * 2}  # its packed twins, for the forward and the backward product: written


def forward(config, batch=1):
    """Operations of one evaluation, by op: {"linear": ..., "attention": ..., ...}.

    Every token is taken to have a label: `top_k` routed experts (one without a label is sent to a single one, of
    the same width).
    """
    c, D, T = config, config.hidden_size, config.tokens
    heads = c.num_heads * c.head_size
    volume = 1
    for p in c.patches:
        volume *= p
    moe = len(c.expert_blocks)

    conditioning = TIME_FEATURES * D + D * D + c.depth * 6 * D * D + 2 * D * D  # of one image
    token = c.depth * (3 * heads * D + heads * D) + D * volume * c.out_channels
    ffn = (c.depth - moe) * c.mlp_hidden_size
    if moe:
        ffn += moe * (c.top_k * c.expert_width + c.use_shared_expert * c.shared_expert_width)
    ops = {
        "patch_embed": 2 * T * c.in_channels * volume * D,
        "linear": 2 * (conditioning + T * token),
        "attention": c.depth * 4 * T * T * heads,
        "experts": T * 4 * D * ffn,
        "prototypical_routing": moe * T * 2 * D * c.num_routed_experts if moe else 0,
    }
    return {op: batch * count for op, count in ops.items() if count}


def backward(config, batch=1):
    """Operations of a backward pass, by op: two products for each of forward; attention computes its scores again."""
    ops = {op: 2 * count for op, count in forward(config, batch).items()}
    ops["attention"] += ops["attention"] // 4
    return ops


def training(config, batch=1):
    """Operations of a training step."""
    return sum(forward(config, batch).values()) + sum(backward(config, batch).values())


# The ops whose products are of the kind that `compute` names; the router's are fp32 in any case (docs/decisions/0006).
FOLLOW_COMPUTE = ("patch_embed", "linear", "attention", "experts")


def by_compute(ops, compute):
    """Operations by op -> {kind of product: operations}: each kind has a peak of its own."""
    totals = {}
    for op, count in ops.items():
        kind = compute if op in FOLLOW_COMPUTE else "fp32"
        totals[kind] = totals.get(kind, 0) + count
    return totals


def step(config, batch=1):
    """Operations of a training step, by op."""
    back = backward(config, batch)
    return {op: count + back[op] for op, count in forward(config, batch).items()}


def optimizer_bytes(parameters, compute=None):
    """Bytes that an update moves; with compute, so have the weights packed for the products."""
    return floor(0, 1.0, parameters, update=1.0, compute=compute)


def floor(operations, fma, parameters=0, update=1.0, compute=None):
    """Seconds that nothing can beat: operations / FMA peak + the optimizer's bytes / bandwidth of an update.

    With compute, so have the weights packed for the products. All other bytes can move while the products run.
    """
    return operations / fma + parameters * (NORM_BYTES + ADAMW_BYTES + TWIN_BYTES.get(compute, 0)) / update
