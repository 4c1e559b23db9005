"""Figures of merit: how good samples are, and how evenly the experts work.

Distances between sets of features (pixels, or those of any network) are NumPy in float64;
`digit_classifier` needs scikit-learn (extra `demo`).
"""

from __future__ import annotations

import numpy as np

from promoe.data import load_digits

__all__ = ["classify", "digit_classifier", "expert_load", "expert_names", "frechet_distance",
           "load_balance", "nearest_distances", "score_digits"]


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
    try:
        from sklearn.svm import SVC
    except ImportError as error:
        raise ImportError("the classifier needs scikit-learn: "
                          "pip install 'promoe[demo]'") from error
    x, y = load_digits("train")
    classifier = SVC(C=10.0, gamma="scale").fit(x.reshape(len(x), -1), y)
    x, y = load_digits("heldout")
    return classifier, float((classify(classifier, x) == y).mean())


def classify(classifier, x):
    """The class of each sample, int64 (n,); samples are brought into [-1, 1] first."""
    x = np.clip(np.asarray(x, np.float64), -1, 1)
    return classifier.predict(x.reshape(len(x), -1)).astype(np.int64)


def score_digits(x, labels, seed=0):
    """How good samples of the embedded digits are.

    Parameters
    ----------
    x : array (n, 1, 8, 8)
        In [-1, 1].
    labels : int array (n,)
        The classes that were asked for.
    seed : int
        Picks the training digits of `frechet_train`.

    Returns
    -------
    dict
        samples, the number n; recognised, the share that `digit_classifier` takes for the class
        that was asked for; classifier_accuracy, its own on the held-out digits; frechet_samples,
        distance of the samples to the held-out digits, in pixels, and frechet_train, that of as
        many training digits (of all, when n is more); nearest_train, mean distance of a sample to
        its nearest training digit, and nearest_heldout, that of a held-out digit.
    """
    labels = np.asarray(labels)
    classifier, accuracy = digit_classifier()
    (train, _), (heldout, _) = load_digits("train"), load_digits("heldout")
    some = np.random.default_rng(seed).permutation(len(train))[:len(x)]
    return {
        "samples": len(labels),
        "recognised": float((classify(classifier, x) == labels).mean()),
        "classifier_accuracy": accuracy,
        "frechet_samples": frechet_distance(x, heldout),
        "frechet_train": frechet_distance(train[some], heldout),
        "nearest_train": float(nearest_distances(x, train).mean()),
        "nearest_heldout": float(nearest_distances(heldout, train).mean()),
    }


# ---------------------------------------------------------------- experts


def expert_names(config):
    """Of the experts of a block, as in `Routing.load`: "expert 0", ..., "unconditional"."""
    names = [f"expert {i}" for i in range(config.num_routed_experts)]
    return names + ["unconditional"] * (config.plan_groups - config.num_routed_experts)


def expert_load(layers, config):
    """Tokens of each expert, per block.

    Parameters
    ----------
    layers : list of Routing
        What `Model.routing` returned.
    config : ModelConfig

    Returns
    -------
    dict
        {"block 1": {"expert 0": tokens, ..., "unconditional": tokens, "shared": tokens}, ...}
    """
    load = {}
    for layer in layers:
        counts = dict(zip(expert_names(config), map(int, layer.load)))
        if config.use_shared_expert:
            counts["shared"] = int(np.prod(layer.expert.shape[:2]))  # it has every token
        load[f"block {layer.block}"] = counts
    return load


def load_balance(layers, config):
    """How evenly the routed experts work, per block.

    Returns
    -------
    dict
        {"block 1": {"largest_over_mean": ..., "effective_experts": ...}, ...}: the largest load
        over the mean (1 is even), and exp(entropy of the shares), from 1 to num_routed_experts;
        both 0 where no token was routed.
    """
    balance = {}
    for layer in layers:
        load = np.asarray(layer.load[:config.num_routed_experts], np.float64)
        share = load[load > 0] / max(load.sum(), 1)
        entropy = -(share * np.log(share)).sum()
        balance[f"block {layer.block}"] = {
            "largest_over_mean": float(load.max() / load.mean()) if load.any() else 0.0,
            "effective_experts": float(np.exp(entropy)) if load.any() else 0.0,
        }
    return balance
