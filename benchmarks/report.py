"""A result file as tables in Markdown and as pictures.

    python -m benchmarks.report [FILE] [--into README.md] [--images docs/images]

Without FILE: the latest of benchmarks/results/. The tables go to standard output; --into puts them between the lines
`<!-- benchmarks -->` and `<!-- /benchmarks -->` of a file. cpu.png has the shares of the floor of every model, batch and
compute; scaling.png the cost against experts and tokens.
"""

import argparse
import sys
from pathlib import Path

from benchmarks import results
from promoe.report import _figure

IMAGES = results.FOLDER.parent.parent / "docs" / "images"
MARKS = "<!-- benchmarks -->", "<!-- /benchmarks -->"
COLOURS = {"fp32": "#1f77b4", "bf16": "#ff7f0e"}
PARTS = {"train": "training step", "evaluation": "one evaluation"}


MODELS = ("S", "B", "L", "XL")  # and then all others


def in_order(rows):
    """By model, batch and compute, in whatever order they were measured."""
    sizes = [f"ProMoE-{model}" for model in MODELS]
    place = lambda row: sizes.index(row["model"]) if row["model"] in sizes else len(sizes)  # noqa: E731
    return sorted(rows, key=lambda row: (place(row), row["batch"], list(COLOURS).index(row["compute"])))


# ---------------------------------------------------------------- tables


def _table(head, rows):
    lines = [head, ["---", *["---:"] * (len(head) - 1)], *rows]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)


def _seconds(value):
    return f"{1e3 * value:.1f} ms" if value < 0.1 else f"{value:.3f} s" if value < 10 else f"{value:.1f} s"


def _percent(share):
    return f"{100 * share:.0f}"


def _mark(*parts):
    """A star on what was measured while the machine was not steady."""
    return "" if all(part["steady"] for part in parts) else " \\*"


def _name(row):
    return f"{row['model']}, batch {row['batch']}, {row['compute']}"


def machine_line(held):
    m = held["machine"]
    alone = "" if m["alone"] else f"; **not alone**: others used {100 * m['others']:.0f} % of the cores"
    return (f"{m['processor']}, level {m['level']}, {m['threads']} threads of {m['cores']} cores, {m['when'][:10]}, "
            f"commit {m['commit']}{alone}.")


def step_table(steps):
    rows = []
    for row in in_order(steps.values()):
        train, evaluation, memory = row.get("train"), row["evaluation"], row["memory"]
        cells = ["does not fit", "", "", ""] if not train else \
            [_seconds(train["seconds"]) + _mark(train), f"{train['images_per_second']:.2f}",
             _percent(train["share_of_floor"]), _percent(train["share_of_bandwidth"])]
        rows.append([_name(row), *cells, _seconds(evaluation["seconds"]) + _mark(evaluation),
                     _percent(evaluation["share_of_floor"]), f"{memory['ratio']:.2f}"])
    return _table(["", "training step", "images/s", "% of floor", "update, % of bandwidth", "one evaluation", "% of floor",
                   "memory / estimate"], rows)


def guided_table(steps):
    rows = [[_name(row), _seconds(g["seconds"]) + _mark(g), _percent(g["share_of_floor"]), f"{g['times_operations']:.2f}"]
            for row in in_order(steps.values()) if (g := row.get("guided"))]
    if not rows:
        return ""
    few = {row["guided"]["steps"] for row in steps.values() if "guided" in row}
    return _table([f"`sample`, {'/'.join(map(str, sorted(few)))} steps with guidance", "a call", "% of floor",
                   "times its operations"], rows)


def small_table(steps):
    """Models whose floor is their operations: the optimizer's bytes stay in a cache."""
    rows = [[_name(row), _seconds(row["train"]["seconds"]) + _mark(row["train"]),
             f"{row['train']['times_operations']:.2f}", _seconds(row["evaluation"]["seconds"]),
             f"{row['evaluation']['times_operations']:.2f}"]
            for row in steps.values() if row["parameters"] < 1e7 and "train" in row]
    return _table(["small models", "training step", "times its operations", "one evaluation", "times its operations"],
                  rows) if rows else ""


def official_table(comparisons):
    rows = []
    for row in in_order(comparisons.values()):
        for what in ("step", "evaluation", "guided"):
            if what not in row:
                continue
            ours = row[what]["promoe"]
            for way in ("eager", "compiled"):
                if way in row[what]:
                    side = row[what][way]
                    rows.append([f"{_name(row)}, {what}", way, _seconds(side["seconds"]) + _mark(side),
                                 _percent(side["share_of_floor"]), _seconds(ours["seconds"]) + _mark(ours),
                                 _percent(ours["share_of_floor"]), f"**{side['ratio']:.2f}**"])
    version = next(iter(comparisons.values()))["official"]["torch"]
    return _table(["", f"public code (torch {version})", "seconds", "% of floor", "promoe", "% of floor", "ratio"], rows)


def threads_table(scaled):
    rows = [[f"{_name(row)}, {what}", *(_seconds(row[what][n]["seconds"]) for n in ("1", str(row["threads"]))),
             f"{row[what]['speedup']:.2f}", f"{row[what]['peak_speedup']:.2f}"]
            for row in scaled.values() for what in ("step", "evaluation")]
    count = next(iter(scaled.values()))["threads"]
    return _table(["", "one thread", f"{count} threads", "speedup", "of the peak"], rows)


def ops_table(ops):
    rows = [[name, _seconds(row["seconds"]) if row["seconds"] >= 1e-3 else f"{1e6 * row['seconds']:.0f} us",
             f"{_percent(row['share_of_floor'])} of the {row['of']}{_mark(row)}"] for name, row in ops.items()]
    return _table(["op", "seconds", "%"], rows)


def scaling_table(points):
    rows = [[f"{row['value']} {row['curve']}, {row['compute']}", f"{row['parameters'] / 1e6:.0f} M",
             f"{1e3 * row['train']['seconds'] / row['batch']:.1f} ms" + _mark(row["train"]),
             f"{1e6 * row['train']['seconds'] / row['batch'] / row['tokens']:.1f} us", _percent(row["train"]["share_of_floor"]),
             f"{1e3 * row['train']['update_seconds']:.0f} ms"] for row in points.values()]
    return _table(["", "parameters", "training, an image", "a token", "% of floor", "update"], rows)


def markdown(held, every_op=True):
    """All tables of a result file; that of the ops is long."""
    parts = [machine_line(held)]
    steps = held.get("steps", {})
    if steps:
        parts += [step_table(steps), small_table(steps), guided_table(steps)]
    for section, table in (("official", official_table), ("threads", threads_table), ("scaling", scaling_table),
                           ("ops", ops_table)):
        if held.get(section) and (every_op or section != "ops"):
            parts.append(table(held[section]))
    text = "\n\n".join(part for part in parts if part)
    return text + ("\n\n\\* The machine was not steady: the peaks around a round differed by more than 10 %.\n"
                   if "\\*" in text else "\n")


def put_into(path, text):
    """Replace what stands between the marks of a file."""
    page = Path(path).read_text()
    if any(page.count(mark) != 1 for mark in MARKS) or page.index(MARKS[0]) > page.index(MARKS[1]):
        raise SystemExit(f"{path}: a line {MARKS[0]} and after it a line {MARKS[1]} are expected, once each")
    before, rest = page.split(MARKS[0])
    after = rest.split(MARKS[1])[1]
    Path(path).write_text(f"{before}{MARKS[0]}\n{text.strip()}\n{MARKS[1]}{after}")


# ---------------------------------------------------------------- pictures


def shares(held):
    """Bars: the share of the floor of every model, batch and compute."""
    figure = _figure(figsize=(9, 3.4))
    cells = {}
    for row in in_order(held["steps"].values()):
        cells.setdefault((row["model"].removeprefix("ProMoE-"), row["batch"]), {})[row["compute"]] = row
    computes = [c for c in COLOURS if any(c in cell for cell in cells.values())]
    for axes, (part, title) in zip(figure.subplots(1, 2, sharey=True), PARTS.items()):
        shown = [(name, cell) for name, cell in cells.items() if any(part in row for row in cell.values())]
        width = 0.8 / len(computes)
        for i, compute in enumerate(computes):
            at = [x + (i - (len(computes) - 1) / 2) * width if len(cell) > 1 else x
                  for x, (_, cell) in enumerate(shown) if part in cell.get(compute, {})]
            high = [100 * cell[compute][part]["share_of_floor"] for _, cell in shown if part in cell.get(compute, {})]
            axes.bar(at, high, 0.92 * width, color=COLOURS[compute], label=compute)
            for x, y in zip(at, high):
                axes.text(x, y + 1, f"{y:.0f}", ha="center", va="bottom", fontsize=7)
        axes.set_xticks(range(len(shown)), [f"{model}\n{batch}" for (model, batch), _ in shown])
        axes.tick_params(axis="x", length=0)
        axes.axhline(100, color="black", linewidth=0.8)
        axes.set_ylim(0, 110)
        axes.set_title(title, fontsize=10)
        axes.grid(axis="y", alpha=0.3)
        axes.set_axisbelow(True)
        axes.spines[["top", "right"]].set_visible(False)
    figure.axes[0].set_ylabel("% of floor")
    figure.supxlabel("model and images in a batch", fontsize=9)
    figure.legend(*figure.axes[0].get_legend_handles_labels(), loc="outside upper right", ncols=len(computes), frameon=False)
    figure.suptitle(f"{held['machine']['processor']}, {held['machine']['threads']} threads", fontsize=9, x=0.02, ha="left")
    return figure


def scaling(held):
    """Lines: the cost of a training step against the number of experts and against tokens, with its floor."""
    figure = _figure(figsize=(9, 3.4))
    left, right = figure.subplots(1, 2)
    for axes, curve, label, unit, scale in (
            (left, "experts", "routed experts (one is taken by each token)", "ms an image", lambda r: 1e3 / r["batch"]),
            (right, "tokens", "tokens of an image", "us a token", lambda r: 1e6 / r["batch"] / r["tokens"])):
        rows = [row for row in held["scaling"].values() if row["curve"] == curve]
        for compute, colour in COLOURS.items():
            mine = [row for row in rows if row["compute"] == compute]
            if not mine:
                continue
            x = [row["value"] for row in mine]
            line = lambda value: [scale(row) * value(row["train"]) for row in mine]  # noqa: B023, E731
            axes.plot(x, line(lambda t: t["seconds"]), "o-", color=colour, markersize=4, label=f"training step, {compute}")
            axes.plot(x, line(lambda t: t["floor"]), ":", color=colour, linewidth=1.2, label=f"its floor, {compute}")
            if curve == "experts":
                axes.plot(x, line(lambda t: t["update_seconds"]), "--", color=colour, linewidth=1,
                          label=f"update in it, {compute}")
        axes.set_xscale("log", base=2)
        values = sorted({row["value"] for row in rows})
        axes.set_xticks(values, [str(v) for v in values])
        axes.minorticks_off()
        axes.set_ylim(bottom=0)
        axes.set_xlabel(label)
        axes.set_ylabel(unit)
        axes.grid(alpha=0.3)
        axes.spines[["top", "right"]].set_visible(False)
        if rows:
            axes.legend(fontsize=7, frameon=False)
    left.set_title("cost against experts: ProMoE-S, batch 8", fontsize=10)
    right.set_title("cost against tokens: ProMoE-S, 2048 a step", fontsize=10)
    return figure


def pictures(held, folder=IMAGES):
    """Draw what the file has figures for; the paths."""
    drawn = []
    for section, name, draw in (("steps", "cpu.png", shares), ("scaling", "scaling.png", scaling)):
        if held.get(section):
            path = Path(folder) / name
            path.parent.mkdir(parents=True, exist_ok=True)
            draw(held).savefig(path, dpi=160)
            drawn.append(path)
    return drawn


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("file", nargs="?", type=Path)
    parser.add_argument("--into", type=Path, help="a file with the two marks")
    parser.add_argument("--images", type=Path, help="draw the pictures into this folder")
    a = parser.parse_args()
    held = results.read(a.file or results.newest())
    text = markdown(held)
    print(text, end="")
    if a.into:
        put_into(a.into, markdown(held, every_op=False))
    if a.images:
        for path in pictures(held, a.images):
            print(f"written: {path}", file=sys.stderr)


if __name__ == "__main__":
    main()
