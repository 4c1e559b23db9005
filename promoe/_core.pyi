from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray

F32 = NDArray[np.float32]
F64 = NDArray[np.float64]
I32 = NDArray[np.int32]
I64 = NDArray[np.int64]
Arrays = dict[str, NDArray[Any]]

def set_num_threads(threads: int, /) -> None: ...
def get_num_threads() -> int: ...
def backend_info() -> dict[str, Any]: ...
def _device(device: str, compute: str, /) -> tuple[str, str]: ...
def levels() -> tuple[str, ...]: ...
def _fields() -> dict[str, tuple[tuple[str, str, str, str | None, str, float], ...]]: ...
def _lacks(level: str, /) -> str | None: ...
def _fail_allocation(nth: int, /) -> None: ...
def _allocations() -> int: ...
def _ops_device(device: str, compute: str, /) -> None: ...
def _poison(on: bool, /) -> None: ...
def _index(config: dict[str, Any], /) -> list[tuple[str, tuple[int, ...], int, int, bool]]: ...
def _memory_estimate(config: dict[str, Any], batch: int, training: bool, device: str, compute: str,
                     /) -> dict[str, int]: ...

class DeviceArray:
    shape: tuple[int, ...]
    dtype: str
    device: str
    __cuda_array_interface__: dict[str, Any]
    def __new__(cls, array: NDArray[Any], device: str = "cuda", dtype: str | None = None) -> DeviceArray: ...
    def numpy(self) -> NDArray[Any]: ...
    def __dlpack__(self, *, stream: int | None = None, **other: Any) -> Any: ...
    def __dlpack_device__(self) -> tuple[int, int]: ...

class _Model:
    step: int
    skipped: int
    closed: bool
    level: str
    has_ema: bool
    def __new__(cls, config: dict[str, Any], seed: int, device: str, compute: str, /) -> _Model: ...
    def index(self) -> list[tuple[str, tuple[int, ...], int, int, bool]]: ...
    def read(self, slab: Literal["param", "ema", "grad", "exp_avg", "exp_avg_sq"], /) -> F32: ...
    def load(self, param: F32, ema: F32 | None, exp_avg: F32 | None, exp_avg_sq: F32 | None,
             step: int, /) -> None: ...
    def gradients(self) -> F32 | DeviceArray: ...
    def forward(self, x: F32, t: F32, y: I64, choice: I32 | None, weight: F32 | None, /) -> F32: ...
    def routing(self, x: F32, t: F32, y: I64, /) -> tuple[I32, F32, I32]: ...
    def loss_and_grad(self, x: F32, t: F32, y: I64, target: F32, accumulate: bool,
                      /) -> tuple[float, float, F32]: ...
    def accumulate(self, x0: F32, y: I64, position: int, scale: float, /) -> None: ...
    def update(self, lr: float, beta1: float, beta2: float, eps: float, weight_decay: float,
               clip: float, ema: float | None, /) -> tuple[float, float, float, int, bool]: ...
    def zero_gradients(self) -> None: ...
    def sample(self, labels: I64, steps: int, cfg: float, shift: float, seed: int, first: int,
               ema: bool, one_batch: int, noise: F32 | None, callback: Any, /) -> F32: ...
    def profile(self, on: bool | None, /) -> list[tuple[str, bool, float, int]]: ...
    def close(self) -> None: ...

# --- the ops, by python -m tests.binding.stubs
def gaussian_noise_forward(
    key: I64, *, x: F32 | None = None, B: int | None = None, M: int | None = None,
    device: str = "cpu", compute: str = "fp32",
) -> Arrays: ...
def rectified_flow_forward(
    x0: F32, y: I64, key: I64, *, xt: F32 | None = None, target: F32 | None = None,
    t: F32 | None = None, label: I64 | None = None,
    density: Literal["logit_normal", "uniform", "mode"] = "logit_normal", logit_mean: float = 0.0,
    logit_std: float = 1.0, sigmoid_scale: float = 1.0, shift: float = 1.0,
    drop_prob: float = 0.1, null_label: int = 1000, B: int | None = None, C: int | None = None,
    V: int | None = None, device: str = "cpu", compute: str = "fp32",
) -> Arrays: ...
def patch_embed_forward(
    x: F32, weight: F32, bias: F32, pos: F32 | None = None, *, y: F32 | None = None, s0: int = 1,
    s1: int = 1, s2: int = 1, p0: int = 1, p1: int = 1, p2: int = 1, B: int | None = None,
    C: int | None = None, V: int | None = None, T: int | None = None, P: int | None = None,
    D: int | None = None, device: str = "cpu", compute: str = "fp32",
) -> Arrays: ...
def patch_embed_backward(
    x: F32, weight: F32, bias: F32, pos: F32 | None = None, *, y: F32 | None = None, dy: F32,
    dx: F32 | None = None, dweight: F32 | None = None, dbias: F32 | None = None,
    dpos: F32 | None = None, s0: int = 1, s1: int = 1, s2: int = 1, p0: int = 1, p1: int = 1,
    p2: int = 1, B: int | None = None, C: int | None = None, V: int | None = None,
    T: int | None = None, P: int | None = None, D: int | None = None, device: str = "cpu",
    compute: str = "fp32",
) -> Arrays: ...
def timestep_embedding_forward(
    t: F32, *, e: F32 | None = None, max_period: float = 10000.0, B: int | None = None,
    F: int | None = None, device: str = "cpu", compute: str = "fp32",
) -> Arrays: ...
def linear_forward(
    x: F32, weight: F32, bias: F32 | None = None, *, y: F32 | None = None, pre: F32 | None = None,
    activation: Literal["none", "silu", "gelu_tanh"] = "none", dx_add: int = 0,
    N: int | None = None, D: int | None = None, F: int | None = None, device: str = "cpu",
    compute: str = "fp32",
) -> Arrays: ...
def linear_backward(
    x: F32, weight: F32, bias: F32 | None = None, *, y: F32 | None = None, pre: F32 | None = None,
    dy: F32, dx: F32 | None = None, dweight: F32 | None = None, dbias: F32 | None = None,
    activation: Literal["none", "silu", "gelu_tanh"] = "none", dx_add: int = 0,
    N: int | None = None, D: int | None = None, F: int | None = None, device: str = "cpu",
    compute: str = "fp32",
) -> Arrays: ...
def label_embedding_forward(
    y: I64, table: F32, add: F32 | None = None, *, c: F32 | None = None, B: int | None = None,
    Y: int | None = None, D: int | None = None, device: str = "cpu", compute: str = "fp32",
) -> Arrays: ...
def label_embedding_backward(
    y: I64, table: F32, add: F32 | None = None, *, c: F32 | None = None, dc: F32,
    dtable: F32 | None = None, dadd: F32 | None = None, B: int | None = None,
    Y: int | None = None, D: int | None = None, device: str = "cpu", compute: str = "fp32",
) -> Arrays: ...
def silu_forward(
    x: F32, *, y: F32 | None = None, N: int | None = None, D: int | None = None,
    device: str = "cpu", compute: str = "fp32",
) -> Arrays: ...
def silu_backward(
    x: F32, *, y: F32 | None = None, dy: F32, dx: F32 | None = None, N: int | None = None,
    D: int | None = None, device: str = "cpu", compute: str = "fp32",
) -> Arrays: ...
def residual_layernorm_modulate_forward(
    x: F32, branch: F32 | None = None, gate: F32 | None = None, shift: F32 | None = None,
    scale: F32 | None = None, cond: I32 | None = None, *, xo: F32 | None = None,
    y: F32 | None = None, mean: F32 | None = None, rstd: F32 | None = None, eps: float = 1e-06,
    B: int | None = None, C: int | None = None, T: int | None = None, D: int | None = None,
    device: str = "cpu", compute: str = "fp32",
) -> Arrays: ...
def residual_layernorm_modulate_backward(
    x: F32, branch: F32 | None = None, gate: F32 | None = None, shift: F32 | None = None,
    scale: F32 | None = None, cond: I32 | None = None, *, xo: F32 | None = None,
    y: F32 | None = None, mean: F32, rstd: F32, dxo: F32 | None = None, dy: F32,
    dx: F32 | None = None, dbranch: F32 | None = None, dgate: F32 | None = None,
    dshift: F32 | None = None, dscale: F32 | None = None, eps: float = 1e-06,
    B: int | None = None, C: int | None = None, T: int | None = None, D: int | None = None,
    device: str = "cpu", compute: str = "fp32",
) -> Arrays: ...
def attention_forward(
    qkv: F32, q_weight: F32 | None = None, q_bias: F32 | None = None, k_weight: F32 | None = None,
    k_bias: F32 | None = None, *, y: F32 | None = None, lse: F32 | None = None,
    eps: float = 1e-05, B: int | None = None, T: int | None = None, H: int | None = None,
    K: int | None = None, device: str = "cpu", compute: str = "fp32",
) -> Arrays: ...
def attention_backward(
    qkv: F32, q_weight: F32 | None = None, q_bias: F32 | None = None, k_weight: F32 | None = None,
    k_bias: F32 | None = None, *, y: F32, lse: F32, dy: F32, dqkv: F32 | None = None,
    dq_weight: F32 | None = None, dq_bias: F32 | None = None, dk_weight: F32 | None = None,
    dk_bias: F32 | None = None, eps: float = 1e-05, B: int | None = None, T: int | None = None,
    H: int | None = None, K: int | None = None, device: str = "cpu", compute: str = "fp32",
) -> Arrays: ...
def conditional_routing_forward(
    y: I64, *, part: I32 | None = None, null_label: int = 1000, group: int = -1,
    B: int | None = None, T: int | None = None, device: str = "cpu", compute: str = "fp32",
) -> Arrays: ...
def prototypical_routing_forward(
    x: F32, proto: F32, part: I32 | None = None, *, z: F32 | None = None,
    xnorm: F32 | None = None, pnorm: F32 | None = None, N: int | None = None,
    D: int | None = None, E: int | None = None, device: str = "cpu", compute: str = "fp32",
) -> Arrays: ...
def prototypical_routing_backward(
    x: F32, proto: F32, part: I32 | None = None, *, z: F32, xnorm: F32, pnorm: F32, dz: F32,
    dx: F32 | None = None, dproto: F32 | None = None, N: int | None = None, D: int | None = None,
    E: int | None = None, device: str = "cpu", compute: str = "fp32",
) -> Arrays: ...
def router_gate_forward(
    z: F32, part: I32 | None = None, *, s: F32 | None = None,
    gate: Literal["identity", "sigmoid", "softmax"] = "identity", N: int | None = None,
    E: int | None = None, device: str = "cpu", compute: str = "fp32",
) -> Arrays: ...
def router_gate_backward(
    z: F32, part: I32 | None = None, *, s: F32, ds: F32, dz: F32 | None = None,
    gate: Literal["identity", "sigmoid", "softmax"] = "identity", N: int | None = None,
    E: int | None = None, device: str = "cpu", compute: str = "fp32",
) -> Arrays: ...
def token_choice_forward(
    s: F32, part: I32 | None = None, *, choice: I32 | None = None, weight: F32 | None = None,
    N: int | None = None, E: int | None = None, A: int | None = None, device: str = "cpu",
    compute: str = "fp32",
) -> Arrays: ...
def token_choice_backward(
    s: F32, part: I32 | None = None, *, choice: I32, weight: F32 | None = None, dweight: F32,
    ds: F32 | None = None, N: int | None = None, E: int | None = None, A: int | None = None,
    device: str = "cpu", compute: str = "fp32",
) -> Arrays: ...
def routing_plan_forward(
    choice: I32, weight: F32, *, row_off: I32 | None = None, row_token: I32 | None = None,
    row_weight: F32 | None = None, tok_off: I32 | None = None, tok_row: I32 | None = None,
    choice_row: I32 | None = None, N: int | None = None, A: int | None = None,
    G: int | None = None, device: str = "cpu", compute: str = "fp32",
) -> Arrays: ...
def routing_plan_backward(
    choice: I32, weight: F32, *, row_off: I32 | None = None, row_token: I32 | None = None,
    row_weight: F32 | None = None, tok_off: I32 | None = None, tok_row: I32 | None = None,
    choice_row: I32, drow_weight: F32, dweight: F32 | None = None, N: int | None = None,
    A: int | None = None, G: int | None = None, device: str = "cpu", compute: str = "fp32",
) -> Arrays: ...
def routing_contrastive_loss_forward(
    x: F32, proto: F32, choice: I32, *, loss: F32 | None = None, centroid: F32 | None = None,
    count: I32 | None = None, prob: F32 | None = None, assign: Literal["top1", "topk"] = "top1",
    temperature: float = 0.1, weight: float = 1.0, N: int | None = None, D: int | None = None,
    E: int | None = None, A: int | None = None, device: str = "cpu", compute: str = "fp32",
) -> Arrays: ...
def routing_contrastive_loss_backward(
    x: F32, proto: F32, choice: I32, *, loss: F32 | None = None, centroid: F32, count: I32,
    prob: F32, dloss: F32, dx: F32 | None = None, dproto: F32 | None = None,
    assign: Literal["top1", "topk"] = "top1", temperature: float = 0.1, weight: float = 1.0,
    N: int | None = None, D: int | None = None, E: int | None = None, A: int | None = None,
    device: str = "cpu", compute: str = "fp32",
) -> Arrays: ...
def load_balance_loss_forward(
    p: F32, choice: I32, part: I32 | None = None, *, loss: F32 | None = None,
    frac: F32 | None = None, per: Literal["batch", "sequence"] = "batch", weight: float = 0.01,
    B: int | None = None, T: int | None = None, E: int | None = None, A: int | None = None,
    device: str = "cpu", compute: str = "fp32",
) -> Arrays: ...
def load_balance_loss_backward(
    p: F32, choice: I32, part: I32 | None = None, *, loss: F32 | None = None, frac: F32,
    dloss: F32, dp: F32 | None = None, per: Literal["batch", "sequence"] = "batch",
    weight: float = 0.01, B: int | None = None, T: int | None = None, E: int | None = None,
    A: int | None = None, device: str = "cpu", compute: str = "fp32",
) -> Arrays: ...
def experts_forward(
    x: F32, row_off: I32 | None = None, row_token: I32 | None = None,
    row_weight: F32 | None = None, tok_off: I32 | None = None, tok_row: I32 | None = None, *,
    foff: I32, up: F32, up_bias: F32 | None = None, down: F32, down_bias: F32 | None = None,
    y: F32 | None = None, pre: F32 | None = None, pre_shared: F32 | None = None,
    activation: Literal["gelu_tanh", "swiglu"] = "gelu_tanh", N: int | None = None,
    D: int | None = None, G: int | None = None, S: int | None = None, F: int | None = None,
    P: int | None = None, R: int | None = None, W: int | None = None, Z: int | None = None,
    device: str = "cpu", compute: str = "fp32",
) -> Arrays: ...
def experts_backward(
    x: F32, row_off: I32 | None = None, row_token: I32 | None = None,
    row_weight: F32 | None = None, tok_off: I32 | None = None, tok_row: I32 | None = None, *,
    foff: I32, up: F32, up_bias: F32 | None = None, down: F32, down_bias: F32 | None = None,
    y: F32 | None = None, pre: F32, pre_shared: F32, dy: F32, dx: F32 | None = None,
    drow_weight: F32 | None = None, dup: F32 | None = None, dup_bias: F32 | None = None,
    ddown: F32 | None = None, ddown_bias: F32 | None = None,
    activation: Literal["gelu_tanh", "swiglu"] = "gelu_tanh", N: int | None = None,
    D: int | None = None, G: int | None = None, S: int | None = None, F: int | None = None,
    P: int | None = None, R: int | None = None, W: int | None = None, Z: int | None = None,
    device: str = "cpu", compute: str = "fp32",
) -> Arrays: ...
def unpatchify_forward(
    x: F32, *, y: F32 | None = None, s0: int = 1, s1: int = 1, s2: int = 1, p0: int = 1,
    p1: int = 1, p2: int = 1, B: int | None = None, T: int | None = None, P: int | None = None,
    C: int | None = None, V: int | None = None, device: str = "cpu", compute: str = "fp32",
) -> Arrays: ...
def unpatchify_backward(
    x: F32, *, y: F32 | None = None, dy: F32, dx: F32 | None = None, s0: int = 1, s1: int = 1,
    s2: int = 1, p0: int = 1, p1: int = 1, p2: int = 1, B: int | None = None,
    T: int | None = None, P: int | None = None, C: int | None = None, V: int | None = None,
    device: str = "cpu", compute: str = "fp32",
) -> Arrays: ...
def mse_loss_forward(
    pred: F32, target: F32, *, loss: F32 | None = None, B: int | None = None,
    M: int | None = None, C: int | None = None, V: int | None = None, device: str = "cpu",
    compute: str = "fp32",
) -> Arrays: ...
def mse_loss_backward(
    pred: F32, target: F32, *, loss: F32 | None = None, dloss: F32, dpred: F32 | None = None,
    B: int | None = None, M: int | None = None, C: int | None = None, V: int | None = None,
    device: str = "cpu", compute: str = "fp32",
) -> Arrays: ...
def grad_norm_forward(
    g: F32, *, norm: F64 | None = None, M: int | None = None, device: str = "cpu",
    compute: str = "fp32",
) -> Arrays: ...
def adamw_forward(
    hyper: F64, norm: F64, grad: F32, param: F32, m: F32, v: F32, avg: F32 | None = None, *,
    M: int | None = None, device: str = "cpu", compute: str = "fp32",
) -> Arrays: ...
def euler_step_forward(
    x: F32, cond: F32, uncond: F32 | None = None, *, schedule: F64, y: F32 | None = None,
    B: int | None = None, C: int | None = None, M: int | None = None, V: int | None = None,
    device: str = "cpu", compute: str = "fp32",
) -> Arrays: ...
# --- the end of the ops
