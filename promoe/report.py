"""What came out of a run: pictures and figures of merit.

Every plot function returns a matplotlib figure and needs the extra `viz`; `digit_classifier` needs
scikit-learn (extra `demo`). The figures of merit are NumPy in float64.
"""

from __future__ import annotations

import numpy as np

__all__ = ["classify", "digit_classifier", "frechet_distance", "loss_curve", "nearest_distances",
           "routing_map", "sample_grid", "save_png"]


def _figure(**options):
    """A figure without pyplot: no global state, no window, freed with its last reference."""
    try:
        from matplotlib.figure import Figure
    except ImportError as error:
        raise ImportError("figures need matplotlib: pip install 'promoe[viz]'") from error
    return Figure(layout="constrained", **options)


# ---------------------------------------------------------------- figures of merit


def frechet_distance(a, b):
    """Frechet distance between Gaussians fitted to two sets of features.

        |mean_a - mean_b|^2 + trace(C_a + C_b - 2 (C_a^1/2 C_b C_a^1/2)^1/2)

    Parameters
    ----------
    a, b : array (n, d), (m, d)
        Features; more than two axes are flattened. At least two of each.

    Returns
    -------
    float
    """
    a, b = _features("a", a, 2), _features("b", b, 2)
    _same_width(a, b)
    root = _root(np.cov(a, rowvar=False).reshape(a.shape[1], -1))
    cov_b = np.cov(b, rowvar=False).reshape(b.shape[1], -1)
    shared = np.linalg.eigvalsh(root @ cov_b @ root)
    cross = np.sqrt(np.clip(shared, 0, None)).sum()
    between = np.square(a.mean(0) - b.mean(0)).sum()
    return float(max(0.0, between + np.square(root).sum() + np.trace(cov_b) - 2 * cross))


def _root(covariance):
    """The symmetric square root of a covariance matrix."""
    values, vectors = np.linalg.eigh(covariance)
    return (vectors * np.sqrt(np.clip(values, 0, None))) @ vectors.T


def nearest_distances(a, b):
    """Euclidean distance of each row of `a` to its nearest row of `b`: float64 (n,).

    Samples much nearer to the training data than held-out data are were memorised.
    """
    a, b = _features("a", a, 1), _features("b", b, 1)
    _same_width(a, b)
    squares = np.square(b).sum(1)
    nearest = np.empty(len(a), np.int64)
    for i in range(0, len(a), 1024):
        nearest[i:i + 1024] = np.argmin(squares - 2 * a[i:i + 1024] @ b.T, axis=1)
    return np.sqrt(np.square(a - b[nearest]).sum(1))


def _features(name, values, least):
    values = np.asarray(values, np.float64)
    if values.ndim < 2 or len(values) < least:
        raise ValueError(f"{name}: at least {least} rows of features are needed, not an array of "
                         f"shape {values.shape}")
    if not np.isfinite(values).all():
        raise ValueError(f"{name}: there are values that are not finite")
    return values.reshape(len(values), -1)


def _same_width(a, b):
    if a.shape[1] != b.shape[1]:
        raise ValueError(f"a has {a.shape[1]} features and b {b.shape[1]}")


def digit_classifier():
    """A classifier of the embedded digits that knows nothing of diffusion.

    A support vector machine fitted to the training digits only.

    Returns
    -------
    classifier : scikit-learn estimator
        For `classify`.
    accuracy : float
        On the held-out digits.
    """
    from promoe.data import load_digits

    try:
        from sklearn.svm import SVC
    except ImportError as error:
        raise ImportError("the classifier needs scikit-learn: pip install 'promoe[demo]'") from error
    x, y = load_digits("train")
    classifier = SVC(C=10.0, gamma=0.064).fit(x.reshape(len(x), -1), y)
    x, y = load_digits("heldout")
    return classifier, float((classify(classifier, x) == y).mean())


def classify(classifier, x):
    """The class of each sample, int64 (n,); samples are brought into [-1, 1] first."""
    x = np.clip(np.asarray(x, np.float64), -1, 1)
    return classifier.predict(x.reshape(len(x), -1)).astype(np.int64)


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
