"""The tree keeps its promises: one stem per op everywhere, short files, includes that point one way."""

import re
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
OPS = re.findall(r"^PM_OP\((\w+), (\w+), (FORWARD|BOTH)\)", (ROOT / "csrc/ops.def").read_text(), re.M)
STEMS = [stem for stem, _, _ in OPS]

# Where an op has a file, and what else lives there.
PLACES = {
    "csrc/ops/{}.h": {"all"},
    "csrc/cpu/{}.c": {"backend", "guard"},
    "kernels/{}.cu": {"backend", "dense", "experts_loop"},
    "tests/oracle/{}.py": {"__init__", "numeric", "draws"},
    "tests/ops/test_{}.py": {"compute", "twins"},
}
C_FILES = sorted(p for p in (ROOT / "csrc").rglob("*") if p.suffix in (".c", ".h", ".def"))
PY_FILES = sorted(p for folder in ("promoe", "tests") for p in (ROOT / folder).rglob("*.py"))


def test_ops_def_is_read():
    assert len(STEMS) >= 22 and len(set(STEMS)) == len(STEMS)
    assert all(fields == stem.upper() for stem, fields, _ in OPS)


@pytest.mark.parametrize("place", PLACES)
def test_every_op_has_its_file(place):
    missing = [stem for stem in STEMS if not (ROOT / place.format(stem)).is_file()]
    assert not missing, f"{place}: missing {missing}"


@pytest.mark.parametrize("place", PLACES)
def test_no_file_without_an_op(place):
    pattern = re.compile(re.escape(Path(place.format("@")).name).replace("@", r"(\w+)"))
    stems = {m[1] for p in (ROOT / place).parent.iterdir() if (m := pattern.fullmatch(p.name))}
    left = stems - set(STEMS) - PLACES[place]
    assert not left, f"{place}: left over {sorted(left)}"


def test_ops_in_order_of_the_table():
    """all.h and level.h list the ops as ops.def does: one reading order."""
    for name, suffix in (("csrc/ops/all.h", "h"), ("csrc/cpu/level.h", "c")):
        included = re.findall(rf'#include "(\w+)\.{suffix}"', (ROOT / name).read_text())
        assert [stem for stem in included if stem in STEMS] == STEMS, name


@pytest.mark.parametrize("path", [*C_FILES, *PY_FILES], ids=lambda p: str(p.relative_to(ROOT)))
def test_short_files(path):
    lines = path.read_text().splitlines()
    assert len(lines) <= 800, f"{len(lines)} lines"
    assert not [i for i, line in enumerate(lines, 1) if "\t" in line or line != line.rstrip()]


def folder(path):
    """The part of csrc/ that a file belongs to: ops, base, cpu, model, python; "" for promoe.h."""
    parts = path.relative_to(ROOT / "csrc").parts
    return parts[0] if len(parts) > 1 else ""


# What each part may include. model/ reaches a backend through promoe.h alone; nothing includes python/.
MAY_INCLUDE = {
    "": {"", "ops"},
    "ops": {"ops"},
    "base": {"base", ""},
    "cpu": {"cpu", "base", ""},
    "model": {"model", "base", ""},
    "python": {"python", "model", "base", ""},
}


@pytest.mark.parametrize("path", C_FILES, ids=lambda p: str(p.relative_to(ROOT)))
def test_includes_point_one_way(path):
    for name in re.findall(r'^\s*#\s*include\s+"([^"]+)"', path.read_text(), re.M):
        if name == "contracts.def":  # setup.py makes it
            continue
        near, top = (path.parent / name).resolve(), (ROOT / "csrc" / name).resolve()
        target = next((p for p in (near, top) if p.is_file()), None)
        assert target, f'includes "{name}", which is not there'
        allowed = MAY_INCLUDE[folder(path)]
        assert folder(target) in allowed, f'{folder(path)}/ includes "{name}", of {folder(target)}/'
