"""The model: forward, training step and sampler, all computed by the C core.

``Model`` owns the memory and converts arrays; what is computed is in ``csrc/model``. Only
`Model.update` and the ``load_...`` methods change a model's state.
"""

from __future__ import annotations

import html
import math
import operator
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import ArrayLike, NDArray

from promoe import _core
from promoe._core import DeviceArray
from promoe.config import ModelConfig, RectifiedFlow

__all__ = ["LossAndGrad", "Model", "Routing", "StepInfo", "memory_estimate"]

State = Mapping[str, ArrayLike]
SLABS = {"param": "param", "ema": "ema", "exp_avg": "exp_avg", "exp_avg_sq": "exp_avg_sq"}
FLOAT32_MAX = float(np.finfo(np.float32).max)
SAMPLE_TOKENS = 65536  # tokens of one pass of the sampler, unless batch_size says otherwise


# ---------------------------------------------------------------- what calls return


@dataclass(frozen=True)
class StepInfo:
    """What `Model.update` did.

    Attributes
    ----------
    loss, mse, aux : float
        Mean over the micro-batches since the last update, weighted by their `scale`, with
        ``loss = mse + aux``; NaN when there was none.
    grad_norm : float
        Euclidean norm of the whole gradient, before the clip.
    skipped : bool
        The norm was not finite, so nothing changed (the gradients are emptied all the same).
    step : int
        Updates done so far.
    """

    loss: float
    mse: float
    aux: float
    grad_norm: float
    skipped: bool
    step: int


@dataclass(frozen=True)
class LossAndGrad:
    """What `Model.loss_and_grad` computed: ``loss = mse + aux``, and its gradient by name."""

    loss: float
    mse: float
    aux: float
    grads: dict[str, NDArray[np.float32]]


@dataclass(frozen=True, eq=False)
class Routing:
    """What the router of one block did.

    Attributes
    ----------
    block : int
        Index of the block.
    expert : int32 array (B, T, A)
        Expert of each slot of each token: 0..E-1 routed, E the unconditional one, -1 an empty slot.
    weight : float32 array (B, T, A)
        Mixing weight of each slot.
    load : int32 array (G,)
        Tokens of each expert, the unconditional one last.
    """

    block: int
    expert: NDArray[np.int32]
    weight: NDArray[np.float32]
    load: NDArray[np.int32]

    def _repr_html_(self):
        cells = "".join(f"<td>{n}</td>" for n in self.load)
        heads = "".join(f"<th>{i}</th>" for i in range(len(self.load)))
        return (f"<table><tr><th>block {self.block}, expert</th>{heads}</tr>"
                f"<tr><th>tokens</th>{cells}</tr></table>")


# ---------------------------------------------------------------- arrays


def _array(where, name, value):
    try:
        return np.asarray(value)
    except ValueError:  # nested sequences of different lengths
        raise ValueError(f"{where}: {name} is not an array: its rows have different lengths") \
            from None


def _floats(where, name, value, shape, integers=False):
    """`value` as a dense float32 array of `shape`; only finite real numbers are converted."""
    array = _array(where, name, value)
    if array.dtype.kind not in ("fiu" if integers else "f"):
        raise TypeError(f"{where}: {name} has dtype {array.dtype}; floating point is expected")
    if array.shape != shape:
        raise ValueError(f"{where}: {name} has shape {array.shape}; {shape} is expected")
    with np.errstate(over="ignore"):  # too large for float32 is infinite
        array = np.ascontiguousarray(array, np.float32)
    finite = np.isfinite(array)
    if not finite.all():
        place = [int(i) for i in np.argwhere(~finite)[0]]
        raise ValueError(f"{where}: {name}{place} = {array[tuple(place)]}: a number that is finite "
                         f"in float32 is expected")
    return array


def _batch(where, name, value, sample_shape):
    """(B, *sample_shape) as dense float32."""
    value = _array(where, name, value)
    shape = value.shape
    if len(shape) != len(sample_shape) + 1 or shape[1:] != sample_shape:
        wanted = ", ".join(map(str, sample_shape))
        raise ValueError(f"{where}: {name} has shape {shape}; (B, {wanted}) is expected")
    if shape[0] == 0:
        raise ValueError(f"{where}: {name} is empty; at least one sample is expected")
    return _floats(where, name, value, shape)


def _labels(where, name, value, config, count=None):
    """int64 labels, (count,), that `config` has; a single one holds for every sample."""
    array = _array(where, name, value)
    if array.size == 0:
        raise ValueError(f"{where}: {name} is empty; at least one label is expected")
    if array.dtype.kind not in "iu":
        raise TypeError(f"{where}: {name} has dtype {array.dtype}; integers are expected")
    if array.ndim == 0 and count is not None:
        array = np.full(count, array)
    if array.ndim != 1 or (count is not None and len(array) != count):
        raise ValueError(f"{where}: {name} has shape {array.shape}; "
                         f"({'n' if count is None else count},) is expected")
    rows = config.label_rows
    bad = np.flatnonzero((array < 0) | (array >= rows))
    if len(bad):
        raise ValueError(f"{where}: {name}[{bad[0]}] = {array[bad[0]]}: a label is 0 to {rows - 1}"
                         + (", the last one meaning no class" if config.has_null_label else
                            "; this model was made without a row for no class"))
    return np.ascontiguousarray(array, np.int64)


def _times(where, value, count):
    array = _array(where, "t", value)
    if array.ndim == 0 and array.dtype.kind in "fiu":
        array = np.full(count, array)
    return _floats(where, "t", array, (count,), integers=True)


def _integer(where, name, value, least=None):
    try:
        if isinstance(value, (bool, np.bool_)):
            raise TypeError
        value = operator.index(value)
    except TypeError:
        raise TypeError(f"{where}: {name} = {value!r}: an integer is expected") from None
    if not -(2**63) <= value < 2**63 or (least is not None and value < least):
        raise ValueError(f"{where}: {name} = {value}: an integer of at least "
                         f"{'-2**63' if least is None else least} and below 2**63 is expected")
    return value


def _real(where, name, value, least=-math.inf, below=math.inf, above=-math.inf):
    try:
        if isinstance(value, (bool, np.bool_, str, bytes)):
            raise TypeError
        value = float(value)
    except (TypeError, ValueError):
        raise TypeError(f"{where}: {name} = {value!r}: a number is expected") from None
    if not (math.isfinite(value) and least <= value < below and value > above):
        bounds = [f"at least {least:g}"] if least > -math.inf else []
        bounds += [f"greater than {above:g}"] if above > -math.inf else []
        bounds += [f"below {below:g}"] if below < math.inf else []
        raise ValueError(f"{where}: {name} = {value:g}: a finite number "
                         f"{' and '.join(bounds)} is expected".replace("  ", " "))
    return value


def _strings(where, **values):
    for name, value in values.items():
        if not isinstance(value, str):
            raise TypeError(f"{where}: {name} = {value!r}: a string is expected")


# ---------------------------------------------------------------- the configuration in C's words


def _core_config(config, objective):
    c, o = config, objective
    return {
        "size": c.sizes, "patch": c.patches,
        "channels": c.in_channels, "out_channels": c.out_channels,
        "hidden": c.hidden_size, "depth": c.depth, "heads": c.num_heads, "head": c.head_size,
        "mlp_hidden": c.mlp_hidden_size, "classes": c.num_classes, "null_label": c.has_null_label,
        "qk_norm": c.qk_norm, "experts": c.num_routed_experts,
        "unconditional": c.use_uncond_expert, "shared": c.use_shared_expert,
        "interleave": c.interleave, "expert_width": c.expert_width,
        "shared_width": c.shared_expert_width, "top_k": c.top_k, "gate": c.router_gate,
        "contrastive_weight": c.contrastive_weight,
        "contrastive_temperature": c.contrastive_temperature,
        "contrastive_assign": c.contrastive_assign, "balance_weight": c.load_balance_weight,
        "balance_per": c.load_balance_per, "density": o.density, "logit_mean": o.logit_mean,
        "logit_std": o.logit_std, "sigmoid_scale": o.sigmoid_scale, "shift": o.shift,
        "drop_prob": c.class_dropout_prob,
    }


def memory_estimate(config, batch, training=True, compute="fp32", device="cpu"):
    """Bytes that a model will take, computed without allocating them.

    Parameters
    ----------
    config : ModelConfig
    batch : int
        Samples per call.
    training : bool
        With gradients, moments, EMA and all activations; else for `Model.forward`.
    compute, device : str
        As for `Model`. A device has to be there, but takes nothing.

    Returns
    -------
    dict
        Bytes of "parameters", "derived" (the same weights packed for the CPU, or in bf16 for a GPU), "gradients",
        "moments", "ema", "activations", "scratch", and their "total".

    Notes
    -----
    Sampling with guidance runs 2 n samples at once where that is faster; sampling with the EMA
    keeps one more "derived".
    """
    if not isinstance(config, ModelConfig):
        raise TypeError(f"memory_estimate: config is a ModelConfig, not {type(config).__name__}")
    batch = _integer("memory_estimate", "batch", batch, 1)
    _strings("memory_estimate", device=device, compute=compute)
    parts = _core._memory_estimate(_core_config(config, RectifiedFlow()), batch, bool(training),
                                   device, compute)
    return {**parts, "total": sum(parts.values())}


# ---------------------------------------------------------------- the model


class Model:
    """A diffusion transformer in memory: DiT (arXiv 2212.09748) or ProMoE (arXiv 2510.24711).

    Parameters
    ----------
    config : ModelConfig
    seed : int
        Of the initial weights and of every draw of training (`accumulate`).
    device : str
        "cpu", or "cuda": the first NVIDIA GPU that this process sees. A device that is not there is
        an error that says why, never another device.
    compute : str
        What products multiply: "fp32"; "bf16": operands are rounded to bfloat16 and summed in
        float32, on a GPU or a CPU with AMX_BF16 or AVX512_BF16; "bf16-emulated": the results of such a
        CPU on any other, no faster than "fp32"; "tf32": operands are rounded to 11 bits, on a GPU.
        Weights, moments, the residual stream and the router's products stay float32; so do the other
        activations, but on a GPU in "bf16".
    objective : RectifiedFlow, optional
        What `accumulate` trains for.

    Attributes
    ----------
    config, objective, seed, device, compute
        As given.
    step : int
        Updates done.
    grad_index : dict
        Official name of each trained tensor -> its slice of `gradients()`.

    Notes
    -----
    Arrays are NumPy's, or whatever ``numpy.asarray`` takes: images are (B, C, *sizes) floating
    point, times (B,) on the scale 0..1000, labels (B,) integers 0..num_classes, the last meaning
    "no class". float64 and strided arrays are converted; objects, complex and boolean ones are
    refused. Calls release the GIL and answer Ctrl-C; a second call while one is running is a
    RuntimeError. A model can be pickled, copied (`copy.copy` copies everything too) and used in a
    ``with`` statement, which closes it.

    Examples
    --------
    >>> import numpy as np, promoe
    >>> m = promoe.Model(promoe.preset("ProMoE-digits"))
    >>> m.accumulate(np.zeros((4, 1, 8, 8)), [0, 1, 2, 3], position=0)
    >>> m.update(lr=1e-3).step
    1
    """

    def __init__(self, config: ModelConfig, seed: int = 0, device: str = "cpu",
                 compute: str = "fp32", objective: RectifiedFlow | None = None):
        if not isinstance(config, ModelConfig):
            raise TypeError(f"Model: config is a ModelConfig, not {type(config).__name__}; "
                            f"see promoe.preset and promoe.ModelConfig")
        objective = RectifiedFlow() if objective is None else objective
        if not isinstance(objective, RectifiedFlow):
            raise TypeError(f"Model: objective is a RectifiedFlow, not {type(objective).__name__}")
        _strings("Model", device=device, compute=compute)
        self.config, self.objective = config, objective
        self.seed = _integer("Model", "seed", seed)
        self.device, self.compute = device, compute
        self._core = _core._Model(_core_config(config, objective), self.seed, device, compute)
        self._index = self._core.index()
        self.grad_index = {name: slice(at, at + count)
                           for name, _, at, count, trained in self._index if trained}

    # ------------------------------------------------------------ life

    @property
    def step(self) -> int:
        """Updates done."""
        return self._core.step

    @property
    def level(self) -> str:
        """The instruction set of the CPU ("avx512"), or the architecture of the GPU ("sm_90")."""
        return self._core.level

    @property
    def skipped(self) -> int:
        """Updates left out because a gradient was not finite."""
        return self._core.skipped

    @property
    def closed(self) -> bool:
        """Whether `close` was called."""
        return self._core.closed

    def close(self) -> None:
        """Free the memory now. Views from `gradients` stay valid; every other call is an error."""
        self._core.close()

    def __enter__(self):
        return self

    def __exit__(self, *_):
        self.close()

    def __reduce__(self):
        moments = (self._core.read("exp_avg"), self._core.read("exp_avg_sq"))
        return _restore, (self.config, self.seed, self.device, self.compute, self.objective,
                          self._core.read("param"),
                          self._core.read("ema") if self._core.has_ema else None, *moments,
                          self.step)

    def __copy__(self):
        make, arguments = self.__reduce__()
        return make(*arguments)

    def __deepcopy__(self, memo):
        return self.__copy__()

    # ------------------------------------------------------------ looks

    def _facts(self):
        c = self.config
        facts = {
            "parameters": f"{c.num_params:,}",
            "active": f"{c.num_active_params:,}",
            "input": " x ".join(map(str, c.input_shape)) + f", {c.tokens} tokens",
            "blocks": f"{c.depth} of width {c.hidden_size}, {c.num_heads} heads of {c.head_size}",
        }
        if c.num_routed_experts:
            extra = ["1 unconditional"] * c.use_uncond_expert + ["1 shared"] * c.use_shared_expert
            kinds = ", ".join([f"{c.num_routed_experts} routed, top {c.top_k}", *extra])
            facts["experts"] = f"{kinds} in blocks {', '.join(map(str, c.expert_blocks)) or 'none'}"
        facts["state"] = "closed" if self.closed else \
            f"{self.step} updates, {self.device}, {self.compute}"
        return facts

    def __repr__(self):
        return "\n".join(["promoe.Model", *(f"  {k:<11}{v}" for k, v in self._facts().items())])

    def _repr_html_(self):
        rows = "".join(f"<tr><th style='text-align:left'>{k}</th><td style='text-align:left'>"
                       f"{html.escape(v)}</td></tr>" for k, v in self._facts().items())
        return f"<b>promoe.Model</b><table>{rows}</table>"

    # ------------------------------------------------------------ state

    def _cut(self, flat, trained_only=False):
        """Official names -> views of a flat slab."""
        return {name: flat[at:at + count].reshape(shape)
                for name, shape, at, count, trained in self._index if trained or not trained_only}

    def _join(self, where, state, names, size):
        """The flat slab of named tensors; every tensor that does not fit is listed in one error."""
        if not isinstance(state, Mapping):
            raise TypeError(f"{where}: a mapping of official names to arrays is expected, "
                            f"not {type(state).__name__}")
        shapes = {name: (shape, at, count)
                  for name, shape, at, count, _ in self._index if name in names}
        wrong = [f"  missing: {name}" for name in shapes if name not in state]
        wrong += [f"  unexpected: {name}" for name in state if name not in shapes]
        flat = np.zeros(size, np.float32)
        for name, (shape, at, count) in shapes.items():
            if name not in state:
                continue
            array = _array(where, name, state[name])
            if array.dtype.kind != "f":
                wrong.append(f"  dtype of {name}: {array.dtype}, expected floating point")
            elif array.shape != shape:
                wrong.append(f"  shape of {name}: {array.shape}, expected {shape}")
            else:
                with np.errstate(over="ignore"):
                    flat[at:at + count] = array.reshape(-1)
        if wrong:
            raise ValueError(f"{where}: nothing was loaded:\n" + "\n".join(wrong))
        return flat

    def _sizes(self):
        """Numbers in a slab of parameters, and in one of gradients."""
        ends = [(at + count, trained) for _, _, at, count, trained in self._index]
        pad = 64  # slabs end at a multiple of this
        total, train = max(e for e, _ in ends), max(e for e, trained in ends if trained)
        return -(-total // pad) * pad, -(-train // pad) * pad

    def state_dict(self, ema: bool = False) -> dict[str, NDArray[np.float32]]:
        """A copy of the parameters, or of their moving average, by official name.

        Returns
        -------
        dict
            Name -> float32 array, in the order of the public code.
        """
        return self._cut(self._core.read("ema" if ema else "param"))

    def load_state_dict(self, state: State, ema: State | None = None) -> None:
        """Replace the parameters; moments and gradients are emptied and `step` is 0.

        Parameters
        ----------
        state : mapping
            Every official name, and no other -> floating point array of the right shape.
        ema : mapping, optional
            The moving average; none by default, as in a new model.

        Raises
        ------
        ValueError
            Listing every missing, unexpected or misshaped tensor. Nothing has changed then.
        """
        total, _ = self._sizes()
        names = {row[0] for row in self._index}
        param = self._join("Model.load_state_dict", state, names, total)
        average = None if ema is None else \
            self._join("Model.load_state_dict: ema", ema, names, total)
        self._core.load(param, average, None, None, 0)

    def training_state(self) -> dict[str, NDArray[np.float32]]:
        """A copy of all that training needs to go on, but `step`.

        Returns
        -------
        dict
            "param.NAME" and, when there is an average (see `update`), "ema.NAME" of every tensor;
            "exp_avg.NAME" and "exp_avg_sq.NAME" (the moments of AdamW) of every trained one ->
            float32 array.
        """
        state = {}
        for slab in SLABS:
            if slab == "ema" and not self._core.has_ema:
                continue
            tensors = self._cut(self._core.read(slab), trained_only=slab.startswith("exp_avg"))
            state.update({f"{slab}.{name}": array for name, array in tensors.items()})
        return state

    def load_training_state(self, arrays: State, step: int) -> None:
        """The inverse of `training_state`; the gradients are emptied.

        Parameters
        ----------
        arrays : mapping
            As `training_state` gives it. Without any "ema." there is no average; without any moments they are zero. Moments of frozen tensors are ignored.
        step : int
            Updates done.

        Raises
        ------
        ValueError
            Listing every tensor that does not fit. Nothing has changed then.
        """
        where = "Model.load_training_state"
        step = _integer(where, "step", step, 0)
        parts: dict[str, dict[str, Any]] = {slab: {} for slab in SLABS}
        if not isinstance(arrays, Mapping):
            raise TypeError(f"{where}: a mapping is expected, not {type(arrays).__name__}")
        for key, array in arrays.items():
            slab, _, name = key.partition(".")
            if slab not in parts:
                raise ValueError(f"{where}: nothing was loaded: unexpected name {key}")
            parts[slab][name] = array
        total, train = self._sizes()
        trained = set(self.grad_index)
        names = {row[0] for row in self._index}
        flat = {}
        for slab, tensors in parts.items():
            moments = slab.startswith("exp_avg")
            if moments:
                tensors = {k: v for k, v in tensors.items() if k in trained or k not in names}
            wanted, size = (trained, train) if moments else (names, total)
            flat[slab] = None if not tensors and slab != "param" else \
                self._join(f"{where}: {slab}", tensors, wanted, size)
        if (flat["exp_avg"] is None) != (flat["exp_avg_sq"] is None):
            raise ValueError(f"{where}: nothing was loaded: exp_avg and exp_avg_sq belong together")
        self._core.load(flat["param"], flat["ema"], flat["exp_avg"], flat["exp_avg_sq"], step)

    # ------------------------------------------------------------ forward

    def _inputs(self, where, x, t, y):
        x = _batch(where, "x", x, self.config.input_shape)
        return x, _times(where, t, len(x)), _labels(where, "y", y, self.config, len(x))

    def forward(self, x: ArrayLike, t: ArrayLike, y: ArrayLike,
                routing: Sequence[Routing] | None = None) -> NDArray[np.float32]:
        """The network's output, in evaluation mode.

        Parameters
        ----------
        x : (B, C, *sizes) floating point
        t : (B,) or one number
            0..1000; may be fractional.
        y : (B,) integers or one
            0..num_classes; num_classes means "no class".
        routing : sequence of Routing, optional
            What `routing` returned: every token then goes where that says, with the weights that it
            says, and the router is not asked.

        Returns
        -------
        (B, out_channels, *sizes) float32
        """
        x, t, y = self._inputs("Model.forward", x, t, y)
        if routing is None:
            return self._core.forward(x, t, y, None, None)
        expert, weight = self._forced(routing, len(x))
        return self._core.forward(x, t, y, expert, weight)

    def _forced(self, routing, count):
        where = "Model.forward: routing"
        c = self.config
        if not c.expert_blocks:
            raise ValueError(f"{where}: a dense model has none")
        layers = list(routing) if isinstance(routing, Iterable) else [routing]
        for i, layer in enumerate(layers):
            if not (hasattr(layer, "expert") and hasattr(layer, "weight")):
                raise TypeError(f"{where}[{i}] is a {type(layer).__name__}; what Model.routing "
                                f"returns is expected: a Routing for each block with experts")
        if len(layers) != len(c.expert_blocks):
            raise ValueError(f"{where} has {len(layers)} layers; "
                             f"{len(c.expert_blocks)} are expected")
        shape = (count, c.tokens, c.top_k)
        experts = np.empty((len(layers), *shape), np.int32)
        weights = np.empty(experts.shape, np.float32)
        for i, layer in enumerate(layers):
            expert = _array(where, f"[{i}].expert", layer.expert)
            if expert.dtype.kind not in "iu":
                raise TypeError(f"{where}[{i}].expert has dtype {expert.dtype}; "
                                f"integers are expected")
            if expert.shape != shape:
                raise ValueError(f"{where}[{i}].expert has shape {expert.shape}; "
                                 f"{shape} is expected")
            if expert.min() < -1 or expert.max() >= c.plan_groups:
                raise ValueError(f"{where}[{i}].expert has values from {expert.min()} to "
                                 f"{expert.max()}; -1 to {c.plan_groups - 1} are expected")
            experts[i] = expert
            weights[i] = _floats("Model.forward", f"routing[{i}].weight", layer.weight, shape)
        return experts, weights

    def routing(self, x: ArrayLike, t: ArrayLike, y: ArrayLike) -> list[Routing]:
        """What the routers do with a batch (arguments as of `forward`).

        Returns
        -------
        list of Routing
            One for each block that has experts.
        """
        x, t, y = self._inputs("Model.routing", x, t, y)
        if not self.config.expert_blocks:
            return []
        expert, weight, load = self._core.routing(x, t, y)
        return [Routing(block, expert[i], weight[i], load[i])
                for i, block in enumerate(self.config.expert_blocks)]

    # ------------------------------------------------------------ training

    def loss_and_grad(self, x: ArrayLike, t: ArrayLike, y: ArrayLike, target: ArrayLike,
                      accumulate: bool = False) -> LossAndGrad:
        """Loss and gradient of given inputs: training mode, without draws and without label drop.

        Parameters
        ----------
        x, t, y
            As of `forward`.
        target : (B, C, *sizes) floating point
        accumulate : bool
            Also add the gradient to `gradients`, as `accumulate` does.

        Returns
        -------
        LossAndGrad
            loss = mse + aux (the sum of the auxiliary losses over the layers), and the gradient of
            this call alone.
        """
        where = "Model.loss_and_grad"
        x, t, y = self._inputs(where, x, t, y)
        target = _floats(where, "target", target, x.shape)
        mse, aux, flat = self._core.loss_and_grad(x, t, y, target, bool(accumulate))
        return LossAndGrad(mse + aux, mse, aux, self._cut(flat, trained_only=True))

    def accumulate(self, x0: ArrayLike, y: ArrayLike, position: int, scale: float = 1.0) -> None:
        """Draw times, noise and label drop for clean data, and add the gradient to `gradients`.

        Parameters
        ----------
        x0 : (B, C, *sizes) floating point
            Clean data, finite.
        y : (B,) integers or one
        position : int
            Global index of the first sample: sample i draws by (seed, position + i), whatever the
            batch is.
        scale : float
            Factor of the gradient; over micro-batches of one step the scales add up to 1.

        Raises
        ------
        ValueError
            For data that is not finite or a label out of range, naming the sample; nothing has
            changed then.
        KeyboardInterrupt
            When stopped before its first gradient, nothing has changed. When stopped after it, the
            gradients are incomplete: the next `accumulate` or `update` empties them and raises a
            RuntimeError, or call `zero_gradients`. Parameters are whole in either case.
        """
        where = "Model.accumulate"
        x0 = _batch(where, "x0", x0, self.config.input_shape)
        y = _labels(where, "y", y, self.config, len(x0))
        self._core.accumulate(x0, y, _integer(where, "position", position, 0),
                              _real(where, "scale", scale, above=0, below=FLOAT32_MAX))

    def gradients(self) -> NDArray[np.float32] | DeviceArray:
        """The gradient slab itself: one flat array, live and writable.

        On a GPU it is a `DeviceArray`, which PyTorch and CuPy take without a copy. Tensors lie at ``grad_index[name]``; what is between them is zero and has to stay zero.
        """
        return self._core.gradients()

    def zero_gradients(self) -> None:
        """Empty the gradients and forget the losses since the last update."""
        self._core.zero_gradients()

    def update(self, lr: float = 1e-4, betas: tuple[float, float] = (0.9, 0.999), eps: float = 1e-8,
               weight_decay: float = 0.0, clip: float | None = 0.5,
               ema: float | None = 0.9999) -> StepInfo:
        """Clip the gradient, take an AdamW step, follow it with the EMA, and empty the gradient.

        Parameters
        ----------
        lr, betas, eps, weight_decay : float
            Of AdamW (arXiv 1711.05101).
        clip : float or None
            Largest norm of the whole gradient; 0 or None: no clip.
        ema : float or None
            Decay of the moving average. None leaves it as it is; while there never was one it is
            the parameters, and takes no memory.

        Returns
        -------
        StepInfo

        Notes
        -----
        An absent gradient counts as zero (PyTorch would leave the tensor alone). The average begins
        as a copy of the parameters before the update. Never interrupted: Ctrl-C is answered
        afterwards.
        """
        where = "Model.update"
        try:
            beta1, beta2 = betas
        except (TypeError, ValueError):
            raise TypeError(f"{where}: betas = {betas!r}: two numbers are expected") from None
        mse, aux, norm, step, skipped = self._core.update(
            _real(where, "lr", lr, 0), _real(where, "betas[0]", beta1, 0, 1),
            _real(where, "betas[1]", beta2, 0, 1), _real(where, "eps", eps, 0),
            _real(where, "weight_decay", weight_decay, 0),
            0.0 if clip is None else _real(where, "clip", clip, 0),
            None if ema is None else _real(where, "ema", ema, 0, 1 + 1e-15))
        return StepInfo(mse + aux, mse, aux, norm, skipped, step)

    # ------------------------------------------------------------ sampling

    def sample(self, labels: ArrayLike, steps: int = 50, cfg: float = 1.0, seed: int = 0,
               weights: str = "ema", *, start: int = 0, shift: float | None = None,
               batch_size: int | None = None, noise: ArrayLike | None = None,
               callback: Callable[[int, NDArray[np.float32]], Any] | None = None,
               together: bool | None = None) -> NDArray[np.float32]:
        """Generate samples: Euler steps from noise, with classifier-free guidance on all channels.

        Parameters
        ----------
        labels : (n,) integers
            Class of each sample; num_classes means "no class".
        steps : int
            Euler steps (passes through the network, twice as many with guidance).
        cfg : float
            Guidance scale: v = uncond + cfg (cond - uncond). Up to 1: the conditional output alone.
        seed, start : int
            Sample i draws its noise by (seed, start + i), so that it does not depend on the batch.
        weights : {"ema", "live"}
        shift : float, optional
            Of the noise levels; that of the objective by default.
        batch_size : int, optional
            Samples per pass; about 65,536 tokens by default.
        noise : (n, C, *sizes) floating point, optional
            Where to start instead.
        callback : callable, optional
            Called as callback(steps done, latents so far) after each step of each batch.
        together : bool, optional
            Conditional and unconditional pass in one batch: the same result, faster for small n; by
            default as is best.

        Returns
        -------
        (n, C, *sizes) float32
        """
        where = "Model.sample"
        labels = _labels(where, "labels", labels, self.config)
        n = len(labels)
        if weights not in ("ema", "live"):
            raise ValueError(f"{where}: weights = {weights!r}: 'ema' or 'live' is expected")
        if callback is not None and not callable(callback):
            raise TypeError(f"{where}: callback = {callback!r}: a callable is expected")
        steps = _integer(where, "steps", steps, 1)
        cfg = _real(where, "cfg", cfg, 0)
        seed, start = _integer(where, "seed", seed), _integer(where, "start", start, 0)
        shift = self.objective.shift if shift is None else _real(where, "shift", shift, above=0)
        size = max(1, SAMPLE_TOKENS // self.config.tokens) if batch_size is None else \
            _integer(where, "batch_size", batch_size, 1)
        if noise is not None:
            noise = _floats(where, "noise", noise, (n, *self.config.input_shape))
        step_done = None if callback is None else lambda i, latents: callback(i + 1, latents)
        one_batch = -1 if together is None else int(bool(together))
        parts = [self._core.sample(labels[i:i + size], steps, cfg, shift, seed, start + i,
                                   weights == "ema", one_batch,
                                   None if noise is None else noise[i:i + size], step_done)
                 for i in range(0, n, size)]
        return parts[0] if len(parts) == 1 else np.concatenate(parts)

    # ------------------------------------------------------------ where the time goes

    def profile(self, on: bool | None = None) -> dict[str, dict[str, float]]:
        """Seconds in each op since `profile(True)`.

        Parameters
        ----------
        on : bool, optional
            True empties the counters and counts from now; False empties them and stops. By default
            nothing changes.

        Returns
        -------
        dict
            What was counted until now: "<op> forward", "<op> backward" and "derive" (packing the weights
            after a load) -> {"seconds", "calls"}, the slowest first.
        """
        rows = self._core.profile(None if on is None else bool(on))
        return {op if op == "derive" else f"{op} {'backward' if backward else 'forward'}":
                {"seconds": seconds, "calls": calls}
                for op, backward, seconds, calls in sorted(rows, key=lambda row: -row[2])}


def _restore(config, seed, device, compute, objective, param, ema, exp_avg, exp_avg_sq, step):
    """A pickled or copied model."""
    model = Model(config, seed, device, compute, objective)
    model._core.load(param, ema, exp_avg, exp_avg_sq, step)
    return model
