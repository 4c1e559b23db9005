"""What a model is: sizes, router and objective, as frozen dataclasses.

``ModelConfig`` describes a DiT or a ProMoE (experts instead of the dense FFN in some blocks),
``RectifiedFlow`` the training objective. Both check every field when they are made: an impossible
model is refused here, by name, and not later inside a kernel. ``preset`` gives the rows of the
papers' tables; ``ModelConfig.from_official`` reads the names that the public PyTorch code uses.
"""

from __future__ import annotations

import dataclasses
import difflib
import math
import operator
import re
import warnings
from collections.abc import Mapping
from dataclasses import dataclass

__all__ = ["ModelConfig", "RectifiedFlow", "preset", "presets"]

TIME_FEATURES = 256  # width of the sinusoidal time embedding: cos and sin of 128 frequencies
GATES = ("identity", "sigmoid", "softmax")
ASSIGNMENTS = ("top1", "topk")
BALANCE_POOLS = ("batch", "sequence")
WIDEST, MANY = 2**24, 2**16  # bounds of widths and of counts, as in csrc/model/config.c
DENSITIES = ("logit_normal", "uniform", "mode")


# ---------------------------------------------------------------- checks of single fields


def nearest(name, known):
    """``" (did you mean 'x'?)"`` for the closest known name, or an empty string."""
    match = difflib.get_close_matches(str(name), [str(k) for k in known], n=1, cutoff=0.5)
    return f" (did you mean {match[0]!r}?)" if match else ""


def check_keys(what, given, known):
    """Raise TypeError for the first key of `given` not in `known`, with the nearest name."""
    for key in given:
        if key not in known:
            raise TypeError(f"{what}: unknown name {key!r}{nearest(key, known)}; "
                            f"known: {', '.join(known)}")


class _Fields:
    """Checks fields of one dataclass instance and stores them in their canonical type."""

    def __init__(self, instance, what=None):
        self.instance = instance
        self.what = what or type(instance).__name__

    def fail(self, name, must, error=ValueError):
        value = getattr(self.instance, name)
        raise error(f"{self.what}: {name} = {value!r}: {must}")

    def put(self, name, value):
        object.__setattr__(self.instance, name, value)

    def integer(self, name, least, most=2**31 - 1):
        value = getattr(self.instance, name)
        if not isinstance(value, bool):
            try:
                value = operator.index(value)
            except TypeError:
                value = None
        if value is None or isinstance(value, bool):
            self.fail(name, "must be an integer", TypeError)
        if not least <= value <= most:
            self.fail(name, f"must be an integer of at least {least}" if value < least
                      else f"is too large (at most {most})")
        self.put(name, value)

    def real(self, name, least=-math.inf, most=math.inf, above=None):
        value = getattr(self.instance, name)
        try:
            if isinstance(value, (bool, str, bytes)):
                raise TypeError
            value = float(value)
        except (TypeError, ValueError):
            self.fail(name, "must be a number", TypeError)
        if not math.isfinite(value):
            self.fail(name, "must be finite")
        if above is not None and value <= above:
            self.fail(name, f"must be greater than {above:g}")
        if not least <= value <= most:
            bounds = f"at least {least:g}" if math.isinf(most) else f"in {least:g}..{most:g}"
            self.fail(name, f"must be {bounds}")
        self.put(name, value)

    def flag(self, name):
        value = getattr(self.instance, name)
        if type(value).__name__ not in ("bool", "bool_"):
            self.fail(name, "must be True or False", TypeError)
        self.put(name, bool(value))

    def word(self, name, words):
        value = getattr(self.instance, name)
        if not isinstance(value, str):
            self.fail(name, f"must be one of {', '.join(words)}", TypeError)
        if value not in words:
            self.fail(name, f"must be one of {', '.join(words)}{nearest(value, words)}")

    def decays(self, name):
        """Two numbers in [0, 1)."""
        value = getattr(self.instance, name)
        try:
            first, second = (float(v) for v in value)
        except (TypeError, ValueError):
            self.fail(name, "must be two numbers", TypeError)
        if not (0 <= first < 1 and 0 <= second < 1):
            self.fail(name, "both must be at least 0 and below 1")
        return first, second

    def lengths(self, name):
        """An int, or a tuple of 1 to 3 ints, each at least 1."""
        value = getattr(self.instance, name)
        several = isinstance(value, (tuple, list))
        items = []
        for item in value if several else (value,):
            try:
                if isinstance(item, bool):
                    raise TypeError
                items.append(operator.index(item))
            except TypeError:
                self.fail(name, "must be an integer or a tuple of 1 to 3 integers", TypeError)
        if not 1 <= len(items) <= 3:
            self.fail(name, "must have 1 to 3 axes")
        if min(items) < 1 or max(items) > 2**20:
            self.fail(name, "every axis must be in 1..1048576")
        return tuple(items) if several else items[0]


def _replace(instance, changes):
    check_keys(f"{type(instance).__name__}.replace", changes,
               [f.name for f in dataclasses.fields(instance)])
    return dataclasses.replace(instance, **changes)


def _from_dict(cls, mapping):
    if not isinstance(mapping, Mapping):
        raise TypeError(f"{cls.__name__}.from_dict: a mapping is expected, "
                        f"not {type(mapping).__name__}")
    check_keys(f"{cls.__name__}.from_dict", mapping, [f.name for f in dataclasses.fields(cls)])
    return cls(**{k: tuple(v) if isinstance(v, list) else v for k, v in mapping.items()})


# ---------------------------------------------------------------- the model


@dataclass(frozen=True, kw_only=True)
class ModelConfig:
    """A diffusion transformer: DiT (arXiv 2212.09748), or ProMoE (arXiv 2510.24711).

    Parameters
    ----------
    input_size : int or tuple of 1 to 3 ints
        Pixels (voxels) per axis; an int means a square image.
    patch_size : int or tuple
        Pixels of a token per axis; an int holds for every axis.
    in_channels : int
        Channels C of the data; the output has 2 C of them with `learn_sigma`, else C.
    hidden_size, depth, num_heads : int
        Width D, blocks L, attention heads H. D is a multiple of H (unless `head_dim` is given), and
        of 2, 4 or 6 for 1, 2 or 3 axes (sin-cos positions).
    head_dim : int or None
        Width K of one attention head; None: D / H.
    mlp_ratio : float
        Hidden width of a dense FFN is ``int(hidden_size * mlp_ratio)``.
    num_classes : int
        Labels are 0..num_classes-1; index `num_classes` is "no class" (`null_label`).
    class_dropout_prob : float
        Probability that training replaces a label by `null_label`. With 0 the label table has no
        row for it, and unconditional labels are refused.
    learn_sigma : bool
        Keep the second half of the output channels (no loss reads them in rectified flow).
    qk_norm : bool
        LayerNorm with affine over each head of queries and keys.
    num_routed_experts : int
        Routed experts E = prototypes of an expert block; 0 makes a dense DiT, and everything
        below is then without effect.
    expert_hidden_size, shared_expert_hidden_size : int or None
        Hidden width of routed (and unconditional) experts, and of the shared one;
        None: ``2 * hidden_size``.
    use_shared_expert, use_uncond_expert : bool
        An expert that every token takes; an expert that all tokens without a class take, instead
        of a routed one.
    interleave : bool
        Experts in odd-indexed blocks only (True) or in every block.
    top_k : int
        Experts A that a token takes.
    router_gate : {"identity", "sigmoid", "softmax"}
        From cosine to score.
    contrastive_weight, contrastive_temperature, contrastive_assign
        Routing contrastive loss: weight (0: none), temperature, and whether a token belongs to the
        cluster of its first expert ("top1") or of each of its experts ("topk").
    load_balance_weight, load_balance_per
        Load-balance loss: weight (0: none), over the "batch" or per "sequence".

    Raises
    ------
    TypeError, ValueError
        Naming the field, the value given and what would be right.

    Examples
    --------
    >>> config = preset("ProMoE-S").replace(num_classes=10)
    >>> config.tokens, config.num_routed_experts
    (256, 12)
    """

    input_size: int | tuple[int, ...] = 32
    patch_size: int | tuple[int, ...] = 2
    in_channels: int = 4
    hidden_size: int = 384
    depth: int = 12
    num_heads: int = 6
    head_dim: int | None = None
    mlp_ratio: float = 4.0
    num_classes: int = 1000
    class_dropout_prob: float = 0.1
    learn_sigma: bool = True
    qk_norm: bool = False
    num_routed_experts: int = 0
    expert_hidden_size: int | None = None
    shared_expert_hidden_size: int | None = None
    use_shared_expert: bool = True
    use_uncond_expert: bool = True
    interleave: bool = True
    top_k: int = 1
    router_gate: str = "identity"
    contrastive_weight: float = 1.0
    contrastive_temperature: float = 0.07
    contrastive_assign: str = "topk"
    load_balance_weight: float = 0.0
    load_balance_per: str = "batch"

    def __post_init__(self):
        check = _Fields(self)
        for name in ("in_channels", "hidden_size"):
            check.integer(name, 1, WIDEST)
        for name in ("depth", "num_heads"):
            check.integer(name, 1, MANY)
        for name in ("num_classes", "top_k"):
            check.integer(name, 1)
        check.integer("num_routed_experts", 0, MANY)
        for name, most in (("head_dim", MANY), ("expert_hidden_size", WIDEST),
                           ("shared_expert_hidden_size", WIDEST)):
            if getattr(self, name) is not None:
                check.integer(name, 1, most)
        check.real("mlp_ratio", above=0)
        check.real("class_dropout_prob", 0, 1)
        for name in ("learn_sigma", "qk_norm", "use_shared_expert", "use_uncond_expert",
                     "interleave"):
            check.flag(name)
        check.real("contrastive_weight", 0)
        check.real("contrastive_temperature", above=0)
        check.real("load_balance_weight", 0)
        check.word("router_gate", GATES)
        check.word("contrastive_assign", ASSIGNMENTS)
        check.word("load_balance_per", BALANCE_POOLS)
        self._check_grid(check)
        self._check_width(check)
        if self.num_routed_experts and self.top_k > self.num_routed_experts:
            check.fail("top_k", f"a token cannot take more experts than there are: "
                                f"num_routed_experts = {self.num_routed_experts}")

    def _check_grid(self, check):
        """Sizes and patches in canonical form: an int for a square image or patch, else a tuple."""
        size, patch = check.lengths("input_size"), check.lengths("patch_size")
        sizes = size if isinstance(size, tuple) else (size, size)
        if isinstance(patch, tuple) and len(patch) != len(sizes):
            check.fail("patch_size", f"has {len(patch)} axes and input_size has {len(sizes)}: "
                                     f"give one patch length per axis, or an integer")
        patches = patch if isinstance(patch, tuple) else (patch,) * len(sizes)
        for axis, (s, p) in enumerate(zip(sizes, patches)):
            if s % p:
                check.fail("input_size", f"axis {axis} is {s} long, which is not a multiple of its "
                                         f"patch_size {p}")
        check.put("input_size", sizes[0] if sizes == (sizes[0],) * 2 else sizes)
        check.put("patch_size", patches[0] if len(set(patches)) == 1 else patches)

    def _check_width(self, check):
        if self.head_dim is None and self.hidden_size % self.num_heads:
            check.fail("hidden_size", f"must be a multiple of num_heads = {self.num_heads}, "
                                      f"or give head_dim")
        axes = len(self.sizes)
        unit = 2 * axes
        if self.hidden_size % unit:
            check.fail("hidden_size", f"sin-cos positions of {axes} axes need a multiple of {unit}")
        if self.hidden_size * self.mlp_ratio > WIDEST:
            check.fail("mlp_ratio", f"is too large: a dense FFN has at most {WIDEST} hidden units")
        if self.mlp_hidden_size < 1:
            check.fail("mlp_ratio", f"leaves no hidden unit with hidden_size = {self.hidden_size}")

    # ------------------------------------------------------------ derived sizes

    @property
    def sizes(self):
        """Pixels per axis, always a tuple."""
        return self.input_size if isinstance(self.input_size, tuple) else (self.input_size,) * 2

    @property
    def patches(self):
        """Pixels of a token per axis, always a tuple."""
        if isinstance(self.patch_size, tuple):
            return self.patch_size
        return (self.patch_size,) * len(self.sizes)

    @property
    def grid(self):
        """Tokens per axis."""
        return tuple(s // p for s, p in zip(self.sizes, self.patches))

    @property
    def tokens(self):
        """Tokens T of one sample."""
        return math.prod(self.grid)

    @property
    def out_channels(self):
        """Channels of the output: 2 C with `learn_sigma`, else C."""
        return 2 * self.in_channels if self.learn_sigma else self.in_channels

    @property
    def input_shape(self):
        """Shape of one sample: (C, *sizes)."""
        return (self.in_channels, *self.sizes)

    @property
    def output_shape(self):
        """Shape of the output for one sample: (out_channels, *sizes)."""
        return (self.out_channels, *self.sizes)

    @property
    def head_size(self):
        """Width K of one attention head."""
        return self.head_dim or self.hidden_size // self.num_heads

    @property
    def mlp_hidden_size(self):
        """Hidden width of a dense FFN."""
        return int(self.hidden_size * self.mlp_ratio)

    @property
    def expert_width(self):
        """Hidden width of a routed or unconditional expert."""
        return self.expert_hidden_size or 2 * self.hidden_size

    @property
    def shared_expert_width(self):
        """Hidden width of the shared expert."""
        return self.shared_expert_hidden_size or 2 * self.hidden_size

    @property
    def null_label(self):
        """The label that means "no class"."""
        return self.num_classes

    @property
    def has_null_label(self):
        """Whether the label table has a row for "no class"."""
        return self.class_dropout_prob > 0

    @property
    def label_rows(self):
        """Rows of the label table."""
        return self.num_classes + self.has_null_label

    @property
    def expert_blocks(self):
        """Indices of the blocks that have experts."""
        if not self.num_routed_experts:
            return ()
        return tuple(range(1, self.depth, 2)) if self.interleave else tuple(range(self.depth))

    @property
    def plan_groups(self):
        """Groups of a routing plan: the routed experts and the unconditional one."""
        return self.num_routed_experts + self.use_uncond_expert if self.num_routed_experts else 0

    @property
    def router(self):
        """The five choices that make the router, in words; an empty dict for a dense model."""
        if not self.num_routed_experts:
            return {}
        experts = "expert" if self.top_k == 1 else "experts"
        aux = []
        if self.contrastive_weight:
            aux.append(f"routing contrastive ({self.contrastive_assign}), weight "
                       f"{self.contrastive_weight:g}, temperature {self.contrastive_temperature:g}")
        if self.load_balance_weight:
            aux.append(f"load balance per {self.load_balance_per}, weight "
                       f"{self.load_balance_weight:g}")
        return {
            "partition": "tokens without a class to the unconditional expert"
                         if self.use_uncond_expert else "none",
            "score": f"cosine to {self.num_routed_experts} learned prototypes",
            "gate": self.router_gate,
            "select": f"each token its best {self.top_k} {experts}",
            "aux": "; ".join(aux) or "none",
        }

    # ------------------------------------------------------------ counts

    @property
    def num_params(self) -> int:
        """Numbers in the state dict, the frozen `pos_embed` included."""
        return self._count(experts=self.plan_groups)

    @property
    def num_active_params(self) -> int:
        """Parameters that work on one token that has a class: everything dense, the prototypes,
        its `top_k` routed experts and the shared one."""
        return self._count(experts=self.top_k)

    def _count(self, experts):
        def linear(rows, columns):
            return rows * columns + rows

        D, volume = self.hidden_size, math.prod(self.patches)
        heads = self.num_heads * self.head_size  # width of q, of k and of v

        def ffn(width):
            return linear(width, D) + linear(D, width)

        block = linear(3 * heads, D) + linear(D, heads) + linear(6 * D, D)
        block += 4 * self.head_size if self.qk_norm else 0
        routed = self.num_routed_experts * D + experts * ffn(self.expert_width)
        routed += ffn(self.shared_expert_width) if self.use_shared_expert else 0
        moe = len(self.expert_blocks)
        return (
            self.tokens * D  # pos_embed
            + linear(D, self.in_channels * volume)  # x_embedder
            + linear(D, TIME_FEATURES) + linear(D, D)  # t_embedder
            + self.label_rows * D  # y_embedder
            + self.depth * block
            + (self.depth - moe) * ffn(self.mlp_hidden_size) + moe * routed
            + linear(2 * D, D) + linear(volume * self.out_channels, D)  # final_layer
        )

    # ------------------------------------------------------------ making others

    def replace(self, **changes) -> ModelConfig:
        """A copy with some fields changed. Expert widths follow `hidden_size` unless given.

        Raises
        ------
        TypeError
            For an unknown field, with the nearest name.
        """
        return _replace(self, changes)

    def to_dict(self):
        """All fields as plain JSON types."""
        return {k: list(v) if isinstance(v, tuple) else v
                for k, v in dataclasses.asdict(self).items()}

    @classmethod
    def from_dict(cls, mapping):
        """The inverse of `to_dict`; missing fields take their defaults."""
        return _from_dict(cls, mapping)

    @classmethod
    def from_official(cls, mapping: Mapping) -> ModelConfig:
        """Read the names of the public PyTorch code (github.com/ali-vilab/ProMoE).

        Parameters
        ----------
        mapping : Mapping
            One of: constructor arguments with a ``model`` ("DiT" or "ProMoE_TC") and the routed
            part under ``moe`` or ``MoE_config``; or a whole YAML file of that project, with
            ``model_name`` and ``DiT_<size>_config``. A key that is absent has the default of the
            public constructor (top_k 2, softmax, no contrastive loss), not of ours.

        Raises
        ------
        TypeError
            For an unknown key, with the nearest name.
        ValueError
            For a model or flag that is not there.

        Notes
        -----
        The public router compares labels with the literal 1000; here "no class" is `num_classes`.
        `norm_topk_prob` is never read by the public code: True is ignored with a warning.
        """
        return _from_official(cls, mapping)


# ---------------------------------------------------------------- the objective


@dataclass(frozen=True, kw_only=True)
class RectifiedFlow:
    """Rectified-flow training: velocity ``noise - x0`` at ``(1 - s) x0 + s noise``.

    Parameters
    ----------
    density : {"logit_normal", "uniform", "mode"}
        How s is drawn (Esser et al., arXiv 2403.03206).
    logit_mean, logit_std, sigmoid_scale : float
        Of the logit-normal density: ``s = sigmoid(sigmoid_scale * N(logit_mean, logit_std))``.
    shift : float
        ``s <- shift s / (1 + (shift - 1) s)``; greater than 1 trains on noisier inputs.
    """

    density: str = "logit_normal"
    logit_mean: float = 0.0
    logit_std: float = 1.0
    sigmoid_scale: float = 1.0
    shift: float = 1.0

    def __post_init__(self):
        check = _Fields(self)
        check.word("density", DENSITIES)
        check.real("logit_mean")
        check.real("logit_std", 0)
        check.real("sigmoid_scale")
        check.real("shift", above=0)

    def replace(self, **changes):
        """A copy with some fields changed; an unknown one is a TypeError with the nearest name."""
        return _replace(self, changes)

    def to_dict(self):
        """All fields as plain JSON types."""
        return dataclasses.asdict(self)

    @classmethod
    def from_dict(cls, mapping):
        """The inverse of `to_dict`; missing fields take their defaults."""
        return _from_dict(cls, mapping)


# ---------------------------------------------------------------- training


@dataclass(frozen=True, kw_only=True)
class TrainSettings:
    """The numbers of `promoe.train`; its docstring says what they mean."""

    steps: int
    checkpoint_every: int
    keep_last: int
    log_every: int
    seed: int
    batch_size: int
    micro_batch: int
    lr: float
    betas: tuple[float, float]
    eps: float
    weight_decay: float
    clip: float
    ema: float | None
    ema_warmup: bool
    warmup: int
    flip: bool

    def __post_init__(self):
        check = _Fields(self, "train")
        for name, least in (("steps", 0), ("checkpoint_every", 1), ("keep_last", 1), ("warmup", 0),
                            ("log_every", 1), ("batch_size", 1), ("micro_batch", 1)):
            check.integer(name, least)
        check.integer("seed", 0, 2**63 - 1)
        for name in ("lr", "eps", "weight_decay", "clip"):
            check.real(name, 0)
        if self.ema is not None:
            check.real("ema", 0, 1)
        check.flag("flip")
        check.flag("ema_warmup")
        check.put("betas", check.decays("betas"))

    def to_dict(self):
        """What determines the weights at a given step, in JSON types; a resumed run must agree."""
        free = ("steps", "checkpoint_every", "keep_last", "log_every", "seed")
        return {k: list(v) if isinstance(v, tuple) else v
                for k, v in dataclasses.asdict(self).items() if k not in free}

    def rate(self, step):
        """Learning rate of the update after `step` updates: linear warm-up, then constant."""
        return self.lr * min(1.0, (step + 1) / self.warmup) if self.warmup else self.lr

    def decay(self, step):
        """Decay of the averaged weights in the update after `step` updates."""
        if self.ema is None or not self.ema_warmup:
            return self.ema
        return min(self.ema, (1 + step) / (10 + step))

    def optimizer(self, step):
        """Arguments of ``Model.update`` after `step` updates."""
        return dict(lr=self.rate(step), betas=self.betas, eps=self.eps, clip=self.clip,
                    weight_decay=self.weight_decay, ema=self.decay(step))


# ---------------------------------------------------------------- presets

_SIZES = {  # depth, width, heads: rows of table 1 of DiT and of table 9 of ProMoE
    "S": dict(depth=12, hidden_size=384, num_heads=6),
    "B": dict(depth=12, hidden_size=768, num_heads=12),
    "L": dict(depth=24, hidden_size=1024, num_heads=16),
    "XL": dict(depth=28, hidden_size=1152, num_heads=16),
}
_PRESETS = {
    **{f"ProMoE-{s}": ModelConfig(num_routed_experts=12, **sizes) for s, sizes in _SIZES.items()},
    **{f"DiT-{s}": ModelConfig(**sizes) for s, sizes in _SIZES.items()},
    # not of a paper: small enough to learn the embedded digits on a laptop in minutes
    "ProMoE-digits": ModelConfig(
        input_size=8, patch_size=2, in_channels=1, num_classes=10, learn_sigma=False,
        hidden_size=128, depth=4, num_heads=4, num_routed_experts=6),
}


def presets() -> tuple[str, ...]:
    """Names that `preset` knows: the papers' rows, and a small model for the embedded digits."""
    return tuple(_PRESETS)


def preset(name: str) -> ModelConfig:
    """The `ModelConfig` of a row of the papers, for 256 x 256 ImageNet latents (4, 32, 32).

    Raises
    ------
    ValueError
        For an unknown name, with the nearest one.
    """
    if isinstance(name, str) and name in _PRESETS:
        return _PRESETS[name]
    raise ValueError(f"preset: unknown name {name!r}{nearest(name, _PRESETS)}; "
                     f"known: {', '.join(_PRESETS)}")


# ---------------------------------------------------------------- names of the public code

_OFFICIAL = dict(  # arguments of the public DiT constructors, and their defaults
    input_size=32, patch_size=2, in_channels=4, hidden_size=1152, depth=28, num_heads=16,
    head_dim=None, mlp_ratio=4.0, num_classes=1000, class_dropout_prob=0.1,
    learn_sigma=True, qk_norm=False)
_OFFICIAL_MOE = dict(  # official name: (ours, default of the public constructor; ... = required)
    num_routed_experts=("num_routed_experts", ...),
    moe_intermediate_size=("expert_hidden_size", ...),
    shared_expert_intermediate_size=("shared_expert_hidden_size", ...),
    use_shared_expert=("use_shared_expert", True),
    use_uncond_expert=("use_uncond_expert", True),
    interleave=("interleave", True),  # True in every published configuration
    top_k=("top_k", 2),
    router_weight_mode=("router_gate", "softmax"),
    routing_contrastive_lam=("contrastive_weight", 0.0),
    routing_contrastive_temperature=("contrastive_temperature", 0.1),
    use_top_k_for_routing_contrastive=("contrastive_assign", False),
    load_balance_loss_coef=("load_balance_weight", 0.0),
    seq_aux=("load_balance_per", False),
)
_NOT_YET = ("ProMoE_EC", "TCDiT", "ECDiT", "DiffMoE", "DiT_MoE", "Diff_MoE_time")
_YAML_IGNORED = (  # keys of the public YAML files that do not describe the model
    "gpu_ids", "image_size", "total_train_batch_size", "lr", "weight_decay", "use_pre_latents",
    "resume_checkpoint", "resume_checkpoint_step", "log_interval", "step_list_for_sample",
    "sample_every_step", "num_fid_samples", "sample_batch_size", "sample_steps", "sample_shift",
    "guide_scale_list", "save_img_num", "save_inception_features")


def _from_official(cls, mapping):
    where = f"{cls.__name__}.from_official"
    if not isinstance(mapping, Mapping):
        raise TypeError(f"{where}: a mapping is expected, not {type(mapping).__name__}")
    given = dict(mapping)
    model = given.pop("model", given.pop("model_name", None))
    given = _flatten_yaml(where, given)
    moe = given.pop("moe", None) or given.pop("MoE_config", None)
    given.pop("MoE_config", None)
    model = _official_model(where, model, moe)

    known = (*_OFFICIAL, "use_swiglu")
    check_keys(where, given, known)
    if given.pop("use_swiglu", False):
        raise ValueError(f"{where}: use_swiglu = True: not there yet; the experts of the public "
                         f"ProMoE ignore it, and its published models have False")
    fields = {**_OFFICIAL, **given}
    for name in ("input_size", "patch_size"):
        if isinstance(fields[name], list):
            fields[name] = tuple(fields[name])
    if model == "ProMoE_TC":
        fields.update(_official_moe(where, moe))
    return cls(**fields)


def _flatten_yaml(where, given):
    """A whole YAML file has its model in DiT_<size>_config; the sizes come from its name."""
    parts = [key for key in given if re.fullmatch(r"\w*DiT\w*_config", key)]
    if not parts:
        return given
    if len(parts) > 1:
        raise ValueError(f"{where}: several models: {', '.join(parts)}")
    part = dict(given.pop(parts[0]) or {})
    check_keys(where, given, _YAML_IGNORED)
    size = re.fullmatch(r"DiT_(S|B|M|L|XL)_config", parts[0])
    medium = dict(depth=16, hidden_size=960, num_heads=16)
    return {**{**_SIZES, "M": medium}[size.group(1)], **part} if size else part


def _official_model(where, model, moe):
    if model is None:
        return "ProMoE_TC" if moe else "DiT"
    match = re.fullmatch(r"(\w+?)(_(S|B|M|L|XL)(_E\d+)?)?", str(model))
    family = match.group(1) if match else str(model)
    if family in _NOT_YET:
        raise ValueError(f"{where}: model {model!r} is not there yet; there are DiT and ProMoE_TC")
    if family not in ("DiT", "ProMoE_TC"):
        raise ValueError(f"{where}: unknown model {model!r}"
                         f"{nearest(model, ('DiT', 'ProMoE_TC', *_NOT_YET))}")
    if (family == "DiT") != (not moe):
        raise ValueError(f"{where}: model {model!r} "
                         + ("has no experts, but moe / MoE_config is given" if moe
                            else "needs its experts under moe or MoE_config"))
    return family


def _official_moe(where, moe):
    """Our fields of the routed part."""
    if not isinstance(moe, Mapping):
        raise TypeError(f"{where}: moe is a mapping, not {type(moe).__name__}")
    moe = dict(moe)
    if moe.pop("norm_topk_prob", False):
        warnings.warn(f"{where}: norm_topk_prob = True is ignored: the public code never reads it, "
                      f"so its weights were trained without", stacklevel=4)
    if moe.pop("init_MoeMLP", False):
        raise ValueError(f"{where}: init_MoeMLP = True: the public code cannot run it either")
    check_keys(f"{where}: moe", moe, (*_OFFICIAL_MOE, "norm_topk_prob", "init_MoeMLP"))
    fields = {}
    for name, (ours, default) in _OFFICIAL_MOE.items():
        if name == "shared_expert_intermediate_size" and not moe.get("use_shared_expert", True):
            default = None  # the width of an expert that is not there
        if default is ... and name not in moe:
            raise ValueError(f"{where}: {name} is missing in moe / MoE_config: the public "
                             f"constructor has no default for it")
        fields[ours] = moe.get(name, default)
    if fields["num_routed_experts"] == 0:
        raise ValueError(f"{where}: num_routed_experts = 0: use model 'DiT' for a dense network")
    fields["contrastive_assign"] = "topk" if fields["contrastive_assign"] else "top1"
    fields["load_balance_per"] = "sequence" if fields["load_balance_per"] else "batch"
    return fields
