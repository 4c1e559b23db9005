"""The stub file promoe/_core.pyi, made from the signatures: `python -m tests.binding.stubs` rewrites it."""

import inspect
from pathlib import Path

from promoe import _core, ops

PATH = Path(__file__).parents[2] / "promoe/_core.pyi"
BEGIN, END = "# --- the ops, by python -m tests.binding.stubs\n", "# --- the end of the ops\n"
NUMPY = {"float32": "F32", "float64": "F64", "int32": "I32", "int64": "I64", "weight": "F32"}


def types(op):
    """{argument name: its type} for both functions of an op."""
    found = {"device": "str", "compute": "str"}
    for kind, name, type_, text, grad, _ in _core._fields()[op]:
        if kind == "INT":
            found[name] = "int"
        elif kind == "REAL":
            found[name] = "float"
        elif kind == "ENUM":
            found[name] = "Literal[" + ", ".join(f'"{word}"' for word in text.split("|")) + "]"
        elif kind == "DIM":
            found[name] = "int | None"
        elif kind != "LD":
            found[name] = NUMPY[type_]
            if grad != "NONE":
                found["d" + name] = "F32"
    return found


def stub(op, which):
    """The stub of one function."""
    name, kinds = f"{op}_{which}", types(op)
    parameters, keyword_only = [], False
    for p in inspect.signature(getattr(_core, name)).parameters.values():
        if p.kind is p.KEYWORD_ONLY and not keyword_only:
            parameters.append("*")
            keyword_only = True
        kind = kinds[p.name]
        optional = p.default is None and not kind.endswith("None")
        parameters.append(f"{p.name}: {kind}{' | None' if optional else ''}"
                          + ("" if p.default is p.empty else f" = {p.default!r}".replace("'", '"')))
    lines, line = [], "   "
    for parameter in parameters:
        if len(line) + len(parameter) > 96:
            lines.append(line)
            line = "   "
        line += f" {parameter},"
    return "\n".join([f"def {name}(", *lines, line, ") -> Arrays: ..."]) + "\n"


def section():
    """The whole section of promoe/_core.pyi."""
    functions = [stub(op, which) for op in ops.names() for which in ("forward", "backward")
                 if hasattr(_core, f"{op}_{which}")]
    return BEGIN + "".join(functions) + END


if __name__ == "__main__":
    text = PATH.read_text()
    head, rest = text.split(BEGIN)
    PATH.write_text(head + section() + rest.split(END)[1])
