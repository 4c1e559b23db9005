"""The ops of promoe, one by one: ``<op>_forward`` and, for those with gradients, ``<op>_backward``.

Every op takes C-contiguous arrays of exactly the type that its docstring says, and converts nothing.
``forward`` returns a dict of its outputs and of what backward needs; ``backward`` takes the same arguments
plus those outputs, plus ``d<output>`` for the gradient of each output that has one, and returns a dict
of ``d<input>``. An output or gradient that is passed by name is written (or added to) in place.

With ``device="cuda"`` NumPy arrays are copied to the GPU and back. Arrays that are there already are used
where they are: a `promoe.DeviceArray`, or what shows its memory by DLPack or ``__cuda_array_interface__`` (PyTorch,
CuPy). Then what the op makes is a `promoe.DeviceArray`, which those libraries take without a copy. The type is
exact here, too; with ``compute="bf16"`` activations on the GPU are bfloat16.

    >>> import numpy as np
    >>> from promoe import ops
    >>> x, weight = np.ones((4, 8), np.float32), np.ones((2, 8), np.float32)
    >>> ops.linear_forward(x, weight)["y"].shape
    (4, 2)
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from promoe import _core

if TYPE_CHECKING:
    from promoe._core import *  # noqa: F403

_FIELDS = _core._fields()

globals().update({f: getattr(_core, f) for op in _FIELDS for f in (f"{op}_forward", f"{op}_backward")
                  if hasattr(_core, f)})

__all__ = ["names", "upstream", "signature",
           *(f for op in _FIELDS for f in (f"{op}_forward", f"{op}_backward") if hasattr(_core, f))]


def _fields_of(op: str):
    if op not in _FIELDS:
        raise ValueError(f"there is no op {op!r}; the ops are {', '.join(_FIELDS)}")
    return _FIELDS[op]


def names() -> list[str]:
    """The ops, in the order of the data flow."""
    return list(_FIELDS)


def upstream(op: str) -> list[str]:
    """The outputs of an op whose gradients its backward takes as ``d<output>``."""
    return [name for _, name, _, _, grad, _ in _fields_of(op) if grad in ("GRAD", "MAYBE")]


def signature(op: str) -> str:
    """The fields of an op, one a line: kind, name, type, shape, gradient."""
    lines = [op]
    for kind, name, type_, text, grad, default in _fields_of(op):
        if kind == "ENUM":
            detail = f"{text}, default {text.split('|')[int(default)]}"
        elif kind in ("INT", "REAL"):
            detail = f"default {default:g}"
        elif kind == "DIM":
            detail = ""
        elif kind == "LD":
            detail = f"dense {text}"
        else:
            detail = f"{type_} ({text.replace(',', ', ')}) {grad if grad != 'NONE' else ''}"
        lines.append(f"  {kind:<6}{name:<14}{detail}".rstrip())
    return "\n".join(lines)
