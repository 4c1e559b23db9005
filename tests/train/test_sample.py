"""promoe.sample: labels, batches, guidance."""

import numpy as np
import pytest

import promoe
from tests.train.common import CONFIG, run

QUIET = dict(steps=3, progress=False)


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    return run(tmp_path_factory.mktemp("trained") / "run", 3)


def test_from_a_model_or_a_path(trained):
    x = promoe.sample(trained.model, [0, 3, 10], **QUIET)
    assert x.shape == (3, 1, 8, 8) and x.dtype == np.float32 and np.isfinite(x).all()
    assert np.array_equal(promoe.sample(trained.out, [0, 3, 10], **QUIET), x)
    assert np.array_equal(promoe.sample(trained.model, np.uint8([0, 3, 10]), **QUIET), x)


def test_batches_do_not_matter(trained):
    whole = promoe.sample(trained.model, per_class=2, cfg=2.0, **QUIET)
    assert whole.shape[0] == 20
    for size in (1, 7, 20):
        parts = promoe.sample(trained.model, per_class=2, cfg=2.0, batch_size=size, **QUIET)
        assert np.abs(parts - whole).max() < 1e-5


def test_what_changes_the_samples(trained):
    base = promoe.sample(trained.model, [4, 5], **QUIET)
    for change in (dict(seed=1), dict(cfg=3.0), dict(weights="live"), dict(steps=5)):
        other = promoe.sample(trained.model, [4, 5], **{**QUIET, **change})
        assert not np.array_equal(other, base), change


@pytest.mark.parametrize("arguments, error, message", [
    (dict(), TypeError, "either labels or per_class"),
    (dict(labels=[1], per_class=1), TypeError, "either labels or per_class"),
    (dict(labels=[1, 11]), ValueError, r"label 11 of sample 1: must be in 0\.\.10"),
    (dict(labels=[-1]), ValueError, "label -1"),
    (dict(labels=[0.5]), TypeError, "integers"),
    (dict(labels=[[1]]), TypeError, "shape"),
    (dict(per_class=0), ValueError, "per_class"),
    (dict(per_class="a"), ValueError, "per_class = 'a'"),
    (dict(labels=[]), ValueError, "labels is empty"),
    (dict(labels=[1], batch_size="a"), ValueError, "batch_size = 'a'"),
    (dict(labels=[1], batch_size=0), ValueError, "batch_size"),
    (dict(labels=[1], weights="best"), ValueError, "weights"),
    (dict(labels=[1], steps=0), ValueError, "steps"),
])
def test_bad_arguments(trained, arguments, error, message):
    with pytest.raises(error, match=message):
        promoe.sample(trained.model, **{**QUIET, **arguments})


def test_no_null_row(tmp_path):
    model = promoe.Model(CONFIG.replace(class_dropout_prob=0))
    with pytest.raises(ValueError, match="no row for no class"):
        promoe.sample(model, [10], **QUIET)
