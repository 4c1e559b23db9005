"""Pictures of a run: samples, losses, what the router did.

Every plot function returns a matplotlib figure and needs the extra `viz`. Figures of merit are in
evaluate.py.
"""

from __future__ import annotations

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
    x = np.clip((np.asarray(x, np.float64) + 1) / 2, 0, 1)
    if x.ndim != 4 or x.shape[1] not in (1, 3) or not len(x):
        raise ValueError(f"sample_grid: (n, 1 or 3, height, width) is expected, not {x.shape}")
    n, channels, height, width = x.shape
    columns = columns or int(np.ceil(np.sqrt(n)))
    rows = -(-n // columns)
    canvas = np.ones((rows, columns, height + 1, width + 1, channels))
    canvas.reshape(-1, *canvas.shape[2:])[:n, :height, :width] = x.transpose(0, 2, 3, 1)
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
    """Loss over updates, and the mean over a window.

    Parameters
    ----------
    history : list of dicts
        As of `TrainResult`.
    smooth : int, optional
        Records in the window; default: a fiftieth of them.
    """
    figure = _figure(figsize=(7, 4))
    axes = figure.add_subplot()
    kept = [r for r in history if not r.get("skipped")]
    steps = np.array([r["step"] for r in kept])
    window = min(len(kept), smooth or max(1, len(kept) // 50))
    for name, colour, what in (("mse", "tab:blue", "mean squared error"),
                               ("aux", "tab:orange", "auxiliary losses of the routers")):
        values = np.array([r[name] for r in kept], np.float64)
        if not values.any():
            continue
        axes.plot(steps, values, color=colour, alpha=0.25, linewidth=0.7)
        mean = np.convolve(values, np.ones(window) / window, "valid")
        axes.plot(steps[window - 1:], mean, color=colour, label=what)
    axes.set_xlabel("updates")
    axes.set_ylabel("loss")
    axes.set_yscale("log")
    axes.grid(alpha=0.3)
    if kept:
        axes.legend()
    return figure


def routing_map(experts, x=None, grid=None, names=None):
    """Which expert took which token, per layer.

    Parameters
    ----------
    experts : int array (layers, n, T)
        Of each layer, sample and token: its expert; -1 for none.
    x : array (n, 1 or 3, height, width), optional
        The samples, shown in the first row.
    grid : tuple of 2 ints, optional
        Tokens per axis; a square when absent.
    names : sequence of str, optional
        Of the rows after that of the samples: "block 1", ...
    """
    experts = np.asarray(experts)
    if experts.ndim != 3 or experts.dtype.kind not in "iu":
        raise ValueError(f"routing_map: integers (layers, n, T) are expected, not "
                         f"{experts.dtype} {experts.shape}")
    layers, n, tokens = experts.shape
    side = int(round(np.sqrt(tokens)))
    grid = grid or (side, side)
    if np.prod(grid) != tokens:
        raise ValueError(f"routing_map: grid {grid} does not hold {tokens} tokens")
    figure = _figure(figsize=(0.8 * n + 1.6, 0.8 * (layers + (x is not None))))
    rows = ([("samples", None)] if x is not None else []) + [
        (names[i] if names else f"layer {i}", experts[i]) for i in range(layers)]
    panels = figure.subplots(len(rows), n, squeeze=False)
    groups = int(experts.max(initial=0)) + 1
    colours = _colours(groups)
    for (name, layer), line in zip(rows, panels):
        for i, axes in enumerate(line):
            axes.set_xticks([])
            axes.set_yticks([])
            if layer is None:
                image = np.clip((np.asarray(x[i], np.float64) + 1) / 2, 0, 1).transpose(1, 2, 0)
                axes.imshow(image.squeeze(-1) if image.shape[2] == 1 else image, cmap="gray",
                            vmin=0, vmax=1, interpolation="nearest")
            else:
                shown = np.ma.masked_less(layer[i].reshape(grid), 0)  # no expert: left white
                drawn = axes.imshow(shown, cmap=colours, vmin=-0.5,
                                    vmax=groups - 0.5, interpolation="nearest")
        line[0].set_ylabel(name, rotation=0, ha="right", va="center")
    if layers:
        figure.colorbar(drawn, ax=panels, ticks=range(groups), label="expert", shrink=0.8)
    return figure


def _colours(groups):
    from matplotlib import colormaps
    from matplotlib.colors import ListedColormap

    table = colormaps["tab20"].colors
    return ListedColormap([table[i % len(table)] for i in range(groups)])


def save_png(figure, path, dpi=150):
    """Write a figure as PNG."""
    figure.savefig(path, dpi=dpi, format="png")
