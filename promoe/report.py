"""Pictures of a run: samples, losses, what the router did.

Every plot function returns a matplotlib figure and needs the extra `viz`. Figures of merit are in
evaluate.py.
"""

from __future__ import annotations

import itertools

import numpy as np

__all__ = ["loss_curve", "routing_map", "sample_grid", "save_png"]


def _figure(**options):
    """A figure without pyplot: no global state, no window, freed with its last reference."""
    try:
        from matplotlib.figure import Figure
    except ImportError as error:
        raise ImportError("figures need matplotlib: pip install 'promoe[viz]'") from error
    return Figure(layout="constrained", **options)


# ---------------------------------------------------------------- pictures


def sample_grid(x, columns=None, labels=None):
    """Samples side by side.

    Parameters
    ----------
    x : array (n, 1 or 3, height, width)
        In [-1, 1].
    columns : int, optional
    labels : sequence, optional
        A title of each row, when every row has one label.
    """
    x = _pictures("sample_grid", x)
    n, height, width, channels = x.shape
    columns = columns or int(np.ceil(np.sqrt(n)))
    rows = -(-n // columns)
    canvas = np.ones((rows, columns, height + 1, width + 1, channels))
    canvas.reshape(-1, *canvas.shape[2:])[:n, :height, :width] = x
    canvas = canvas.transpose(0, 2, 1, 3, 4).reshape(rows * (height + 1), -1, channels)[:-1, :-1]

    figure = _figure(figsize=(0.5 * columns + 0.5, 0.5 * rows))
    axes = figure.add_subplot()
    axes.imshow(canvas.squeeze(-1) if channels == 1 else canvas, cmap="gray", vmin=0, vmax=1,
                interpolation="nearest")
    axes.set_xticks([])
    axes.set_yticks([])
    axes.set_frame_on(False)
    if labels is not None:
        axes.set_yticks([(i + 0.5) * (height + 1) - 1 for i in range(rows)],
                        [str(labels[min(i * columns, n - 1)]) for i in range(rows)])
        axes.tick_params(length=0)
    return figure


def loss_curve(history, smooth=None):
    """Losses over updates, each with its mean over a window of the updates before.

    Parameters
    ----------
    history : list of dicts
        As of `TrainResult`.
    smooth : int, optional
        Records in the window; default: a fiftieth of them.
    """
    kept = [r for r in history if not r.get("skipped")]
    steps = np.array([r["step"] for r in kept])
    window = min(len(kept), smooth or max(1, len(kept) // 50))
    curves = [("mse", "tab:blue", "mean squared error", "linear"),
              ("aux", "tab:orange", "auxiliary losses of the routers", "log")]
    curves = [c for c in curves if c[0] == "mse" or any(r[c[0]] for r in kept)]
    figure = _figure(figsize=(5 * len(curves), 3.2))
    panels = figure.subplots(1, len(curves), squeeze=False)[0]
    for (name, colour, what, scale), axes in zip(curves, panels):
        values = np.array([r[name] for r in kept], np.float64)
        axes.plot(steps, values, color=colour, alpha=0.25, linewidth=0.7)
        if len(kept):
            mean = np.convolve(values, np.ones(window) / window, "valid")
            axes.plot(steps[window - 1:], mean, color=colour)
        axes.set_title(what, fontsize=10)
        axes.set_xlabel("updates")
        axes.set_yscale(scale)
        axes.grid(alpha=0.3)
    return figure


def routing_map(experts, x=None, *, grid=None, names=None, groups=None, titles=None, load=None,
                title=None):
    """Which expert took which token, per layer.

    Parameters
    ----------
    experts : int array (layers, n, T)
        Of each layer, sample and token: its expert; -1 for none, which is left white.
    x : array (n, 1 or 3, height, width), optional
        The samples: shown in the first row, and through the colours below it.
    grid : tuple of 2 ints, optional
        Tokens per axis; a square when absent.
    names : sequence of str, optional
        Of the layers: "block 1", ...
    groups : sequence of str, optional
        Names of the experts for the legend; "unconditional" is drawn grey, and what is named beyond
        the experts of `experts` (one that has every token) black.
    titles : sequence of str, optional
        Of the samples.
    load : array (layers, len(groups)), optional
        Share of the tokens that each expert took, drawn as bars beside each layer.
    title : str, optional
    """
    experts = np.asarray(experts)
    if experts.ndim != 3 or experts.dtype.kind not in "iu" or not experts.size:
        raise ValueError(f"routing_map: integers (layers, n, T) are expected, not "
                         f"{experts.dtype} {experts.shape}")
    layers, n, tokens = experts.shape
    side = int(round(np.sqrt(tokens)))
    grid = grid or (side, side)
    if np.prod(grid) != tokens:
        raise ValueError(f"routing_map: grid {grid} does not hold {tokens} tokens")
    groups = groups or [f"expert {i}" for i in range(int(experts.max()) + 1)]
    if experts.max() >= len(groups):
        raise ValueError(f"routing_map: expert {experts.max()} has no name in groups {groups}")
    colours = _expert_colours(groups)
    pictures = None if x is None else _pictures("routing_map", x)
    if pictures is not None and len(pictures) != n:
        raise ValueError(f"routing_map: {len(pictures)} samples and the experts of {n}")

    first = pictures is not None  # rows above the layers
    bars = 3 if load is not None else 0  # width in samples
    height = 0.85 * (layers + first) + 0.35 * (1 + bool(title) + bool(titles))
    figure = _figure(figsize=(0.8 * (n + bars) + 1.2, height))
    widths = [1] * n + [bars] * bool(bars)
    cells = figure.add_gridspec(layers + first, len(widths), width_ratios=widths)
    for row in range(-first, layers):
        for i in range(n):
            axes = figure.add_subplot(cells[row + first, i])
            axes.set_xticks([])
            axes.set_yticks([])
            if row < 0:
                _show(axes, pictures[i])
            else:
                shown = _tinted(experts[row, i].reshape(grid), colours,
                                pictures[i] if first else None)
                axes.imshow(shown, interpolation="nearest", extent=(0, grid[1], grid[0], 0))
                axes.vlines(range(1, grid[1]), 0, grid[0], color="white", linewidth=0.6)
                axes.hlines(range(1, grid[0]), 0, grid[1], color="white", linewidth=0.6)
            if i == 0:
                name = "input" if row < 0 else names[row] if names else f"layer {row}"
                axes.set_ylabel(name, rotation=0, ha="right", va="center")
            if titles and row == -first:
                axes.set_title(titles[i], fontsize=9)
        if bars and row >= 0:
            axes = figure.add_subplot(cells[row + first, n])
            _load_bars(axes, load[row], colours, row == layers - 1)
    figure.legend(handles=_legend(groups, colours), loc="outside lower center", fontsize=9,
                  ncols=min(len(groups), 10), frameon=False, handlelength=1, handleheight=1)
    if title:
        figure.suptitle(title, fontsize=10)
    return figure


def _pictures(where, x):
    """Samples in [-1, 1] as (n, height, width, 1 or 3) in [0, 1]."""
    x = np.asarray(x, np.float64)
    if x.ndim != 4 or x.shape[1] not in (1, 3) or not len(x):
        raise ValueError(f"{where}: (n, 1 or 3, height, width) is expected, not {x.shape}")
    return np.clip((x.transpose(0, 2, 3, 1) + 1) / 2, 0, 1)


def _show(axes, picture):
    axes.imshow(picture.squeeze(-1) if picture.shape[-1] == 1 else picture, cmap="gray", vmin=0,
                vmax=1, interpolation="nearest")


def _tinted(experts, colours, picture):
    """Each token in the colour of its expert, paler where the picture is dark: (h, w, 3)."""
    if picture is not None:
        times = [picture.shape[axis] // experts.shape[axis] for axis in (0, 1)]
        experts = experts.repeat(times[0], 0).repeat(times[1], 1)
    shown = colours[experts]
    if picture is not None:
        ink = picture[:len(experts), :experts.shape[1]].mean(-1, keepdims=True)
        shown = 1 - (1 - shown) * (0.4 + 0.6 * ink)
    return np.where(experts[..., None] < 0, 1.0, shown)


def _load_bars(axes, shares, colours, last):
    """Share of the tokens of each expert, from the top down."""
    shares = np.asarray(shares, np.float64)
    axes.barh(range(len(shares)), shares, color=colours[:len(shares)], height=0.8)
    axes.set_ylim(len(shares) - 0.5, -0.5)
    axes.set_xlim(0, 1)
    axes.set_yticks([])
    axes.set_xticks([0, 0.5, 1], ["0", "50 %", "100 %"] if last else [""] * 3, fontsize=8)
    for i, share in enumerate(shares):
        inside = share > 0.7
        axes.text(share - 0.02 if inside else share + 0.02, i, f"{share:.0%}", va="center",
                  ha="right" if inside else "left", color="white" if inside else "black", fontsize=6)
    axes.spines[["top", "right"]].set_visible(False)
    if last:
        axes.set_xlabel("share of the tokens", fontsize=9)


def _legend(groups, colours):
    from matplotlib.patches import Patch

    return [Patch(color=colour, label=name) for name, colour in zip(groups, colours)]


HUES = ("#1f77b4", "#ff7f0e", "#2ca02c", "#d62728", "#9467bd", "#bcbd22", "#17becf", "#e377c2",
        "#8c564b")
OTHERS = {"unconditional": "#666666", "shared": "#1a1a1a"}  # by the first word of the name


def _expert_colours(groups):
    """RGB of each expert, (len(groups), 3): routed ones by hue, again from the start after nine."""
    from matplotlib.colors import to_rgb

    hues = itertools.cycle(HUES)
    return np.array([to_rgb(OTHERS.get(name.split()[0]) or next(hues)) for name in groups])


def save_png(figure, path, dpi=150):
    """Write a figure as PNG."""
    figure.savefig(path, dpi=dpi, format="png")
