"""Random configurations against the public PyTorch code in float64: `pytest tests/peer --official PATH`.

Not part of `make test`: it needs torch and a checkout of the public code. The golden cases are of the same kind.
"""

import numpy as np
import pytest

import promoe


def random_case(seed):
    """One configuration with the public names: other widths, depths, head sizes, experts, gates, label mixes."""
    rng = np.random.default_rng(seed)
    heads = int(rng.choice([1, 2, 3, 4]))
    width = heads * int(rng.choice([4, 8, 12, 24, 72])) * (2 if heads % 2 else 1)
    patch = int(rng.choice([1, 2, 4]))
    arguments = dict(input_size=patch * int(rng.integers(2, 6)), patch_size=patch, in_channels=int(rng.integers(1, 5)),
                     hidden_size=width, depth=int(rng.integers(1, 5)), num_heads=heads, qk_norm=bool(rng.integers(2)),
                     mlp_ratio=int(rng.choice([2, 4])), learn_sigma=bool(rng.integers(2)),
                     head_dim=[None, None, 5, 36][rng.integers(4)])
    if rng.integers(4) == 0:
        return "DiT", None, arguments
    experts = int(rng.integers(2, 8))
    moe = dict(num_routed_experts=experts, moe_intermediate_size=int(rng.integers(8, 70)),
               shared_expert_intermediate_size=int(rng.integers(8, 70)),
               load_balance_loss_coef=float(rng.choice([0, 0, 0.3])), seq_aux=bool(rng.integers(2)),
               use_shared_expert=bool(rng.integers(4)), use_uncond_expert=bool(rng.integers(4)), interleave=bool(rng.integers(2)),
               top_k=int(rng.integers(1, min(experts, 3) + 1)),
               router_weight_mode=str(rng.choice(["identity", "sigmoid", "softmax"])),
               routing_contrastive_lam=float(rng.choice([0, 1, 3])),
               use_top_k_for_routing_contrastive=bool(rng.integers(2)),
               routing_contrastive_temperature=float(rng.choice([0.07, 0.5])))
    if not moe["use_uncond_expert"]:
        moe["load_balance_loss_coef"] = 0.0  # the public code mistakes its own token count there
    return "ProMoE_TC", moe, arguments


@pytest.mark.parametrize("seed", range(40))
def test_random_configuration(official_repo, seed):
    torch = pytest.importorskip("torch")
    from benchmarks import official

    model, moe, arguments = random_case(seed)
    torch.manual_seed(seed)
    torch.set_default_dtype(torch.float64)
    try:
        theirs = official.load(official_repo, model, moe, **arguments).double()
        with torch.no_grad():
            for p in theirs.parameters():
                if p.requires_grad:
                    p.copy_(torch.randn_like(p) * (0.3 if p.ndim < 2 else p[0].numel() ** -0.5))
                p.copy_(p.float().double())
        theirs.y_embedder.dropout_prob = 0  # no further label drop
        theirs.t_embedder.timestep_embedding = sinusoid64
        rng = np.random.default_rng(seed + 1000)
        n, c, s = 5, arguments["in_channels"], arguments["input_size"]
        x = rng.standard_normal((n, c, s, s)).astype(np.float32)
        target = rng.standard_normal((n, c, s, s)).astype(np.float32)
        t = rng.uniform(0, 1000, n).astype(np.float32)
        y = rng.integers(0, 1000, n)
        y[rng.uniform(size=n) < rng.choice([0, 0.4, 1])] = 1000
        if moe and moe["load_balance_loss_coef"] and (y == 1000).all():
            y[0] = 3  # the public code cannot take the balance loss of no token
        auxiliary = capture_auxiliary_losses(theirs)
        theirs.train()
        out = theirs(torch.from_numpy(x).double(), torch.from_numpy(t).double(), torch.from_numpy(y))
        mse = ((out[:, :c] - torch.from_numpy(target)) ** 2).mean()
        mse.backward()
        mse, aux = float(mse.detach()), sum(float(a.detach()) for a in auxiliary)
    finally:
        torch.set_default_dtype(torch.float32)

    config = promoe.ModelConfig.from_official({"model": model, "moe": moe, "num_classes": 1000, **arguments})
    ours = promoe.Model(config)
    ours.load_state_dict({k: v.detach().numpy() for k, v in theirs.state_dict().items()})
    close("forward", ours.forward(x, t, y), out.detach().numpy(), 2e-6)
    r = ours.loss_and_grad(x, t, y, target)
    assert abs(r.mse - mse) <= 2e-6 * mse
    assert abs(r.aux - aux) <= 2e-6 * max(abs(aux), 1e-3)
    assert r.loss == pytest.approx(r.mse + r.aux)
    wanted = {k: p.grad for k, p in theirs.named_parameters() if p.requires_grad}
    assert set(r.grads) == set(wanted)
    scale = max(float(g.abs().max()) for g in wanted.values() if g is not None)
    for name, grad in wanted.items():
        grad = np.zeros(r.grads[name].shape) if grad is None else grad.numpy()
        close(name, r.grads[name], grad, 2e-5, floor=1e-7 * scale)


def close(name, got, truth, tolerance, floor=0.0):
    error, largest = np.abs(got - truth).max(), np.abs(truth).max()
    assert error <= tolerance * largest + floor, f"{name}: {error:.2e}, largest value {largest:.2e}"


def sinusoid64(t, dim, max_period=10000):
    """The public sinusoid in float64; theirs is float32, which moves phases by up to 6e-5 at t near 1000."""
    import torch

    half = dim // 2
    f = torch.exp(-np.log(max_period) * torch.arange(half, dtype=torch.float64) / half)
    a = t[:, None].double() * f[None]
    return torch.cat([torch.cos(a), torch.sin(a)], -1)


def capture_auxiliary_losses(model):
    """A list that the forward pass of the public code fills with each layer's auxiliary loss."""
    found = []
    for block in getattr(model, "blocks", []):
        if hasattr(block.mlp, "cluster_centers"):
            block.mlp.register_forward_hook(lambda _, __, result: found.append(result[1]) if result[1] is not None
                                            else None)
    return found


@pytest.mark.parametrize("compute", ["fp32", "bf16"])
def test_the_comparison_of_speeds_runs(official_repo, compute):
    """benchmarks/vs_official.py on a tiny model: it verifies, then it times."""
    pytest.importorskip("torch")
    import sys

    from benchmarks import vs_official

    if compute not in promoe.backend_info()["computes"]:
        pytest.skip(f"this CPU has no {compute} products")
    found = vs_official.compare(official_repo, sys.executable, "tiny", 2, compute, 1, 0.0)
    for what in vs_official.WHAT:
        assert found[what]["eager"]["ratio"] > 0
