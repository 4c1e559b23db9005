"""How every op is tested against its float64 oracle.

An oracle module tests/oracle/<op>.py has

    forward(**inputs)  -> {output or saved name: array}
    backward(**inputs, **{"d" + output: array}) -> {"d" + input: array}     (ops with gradients)
    CASES: {case name: function of a numpy Generator -> dict of inputs and attributes, float32}
    OWN_BOUNDS: cases whose gradients are (almost) all rounding, which tests/ops/test_<op>.py bounds  (optional)
    floor(inputs): the ulp that assert_close allows (optional: 4)

and computes in the dtype of its float inputs. Index arrays and attributes pass unchanged.
"""

import importlib

import numpy as np

from promoe import ops

ULP = np.finfo(np.float32).eps


def oracle(op):
    return importlib.import_module(f"tests.oracle.{op}")


def own_bounds(op):
    return getattr(oracle(op), "OWN_BOUNDS", ())


def floor_of(op, inputs):
    return getattr(oracle(op), "floor", lambda _: 4.0)(inputs)


def cast(values, dtype):
    """float32 arrays to dtype; float64 arrays (hyper-parameters), integers and attributes unchanged."""
    return {k: v.astype(dtype) if isinstance(v, np.ndarray) and v.dtype == np.float32 else v
            for k, v in values.items()}


def make(op, case, seed=0):
    """The inputs of one case: the generator depends only on op, case and seed."""
    rng = np.random.default_rng([seed, *f"{op}:{case}".encode()])
    return oracle(op).CASES[case](rng)


def finite(name, got, truth):
    """Where truth is finite; elsewhere (NaN, infinity) and nowhere else got is the same."""
    there = np.isfinite(truth)
    assert np.array_equal(there, np.isfinite(got)) and np.array_equal(got[~there], truth[~there], equal_nan=True), \
        f"{name}: NaN or infinity in other places"
    return there


def assert_close(name, got, truth, naive, floor=4.0):
    """|got - truth| is at most twice that of a naive float32 computation, with a floor of `floor` ulp of the
    largest value."""
    got, truth, naive = (np.asarray(a, np.float64) for a in (got, truth, naive))
    assert got.shape == truth.shape, f"{name}: shape {got.shape}, expected {truth.shape}"
    there = finite(name, got, truth)
    got, truth, naive = got[there], truth[there], naive[there]
    largest = np.abs(truth).max(initial=0.0)
    bound = max(2 * np.nanmax(np.abs(naive - truth), initial=0.0), floor * ULP * largest)
    error = np.abs(got - truth).max(initial=0.0)
    assert error <= bound, f"{name}: error {error:.3e} over {bound:.3e} (largest value {largest:.3e})"


def compare(op, got, inputs, floor=4.0, which="forward", **extra):
    """Every output of `got` against the oracle; integers exactly. floor: of all, or {name: its own} beside 4."""
    run = getattr(oracle(op), which)
    truth, naive = run(**cast({**inputs, **extra}, np.float64)), run(**cast({**inputs, **extra}, np.float32))
    assert set(got) == set(truth), f"{op} {which}: outputs {sorted(got)}, oracle has {sorted(truth)}"
    for name, value in truth.items():
        if np.asarray(value).dtype.kind in "iu":
            np.testing.assert_array_equal(got[name], value, err_msg=f"{op}.{name}")
        else:
            own = floor.get(name, 4.0) if isinstance(floor, dict) else floor
            assert_close(f"{op} {which} {name}", got[name], value, naive[name], own)


def check_forward(op, case, floor=4.0):
    """Runs one case and compares it; returns (inputs, what the op returned)."""
    inputs = make(op, case)
    got = getattr(ops, f"{op}_forward")(**inputs)
    compare(op, got, inputs, floor)
    return inputs, got


def make_upstream(op, case, outs):
    """Random gradients of the outputs that have one."""
    rng = np.random.default_rng([1, *f"{op}:{case}".encode()])
    return {"d" + n: rng.standard_normal(np.shape(outs[n])).astype(np.float32) for n in ops.upstream(op)}


def run(op, case):
    """Everything that forward and backward write."""
    inputs = make(op, case)
    outs = getattr(ops, f"{op}_forward")(**inputs)
    return outs | getattr(ops, f"{op}_backward")(**inputs, **outs, **make_upstream(op, case, outs))


def check_backward(op, case, floor=4.0):
    """Forward, then backward with random upstream gradients, against the oracle's backward."""
    inputs, outs = check_forward(op, case, floor)
    upstream = make_upstream(op, case, outs)
    got = getattr(ops, f"{op}_backward")(**inputs, **outs, **upstream)
    compare(op, got, inputs, floor, which="backward", **upstream)
    return inputs, outs, upstream, got


def check_finite_differences(op, case, wrt, step=1e-5, tolerance=1e-6):
    """The oracle's own backward against central differences of its forward, in float64."""
    o, inputs = oracle(op), cast(make(op, case), np.float64)
    outs = o.forward(**inputs)
    rng = np.random.default_rng(2)
    upstream = {"d" + n: rng.standard_normal(np.shape(outs[n])) for n in ops.upstream(op)}
    grads = o.backward(**inputs, **upstream)
    for name in wrt:
        direction = rng.standard_normal(inputs[name].shape)
        value = {}
        for sign in (-1, 1):
            moved = o.forward(**{**inputs, name: inputs[name] + sign * step * direction})
            value[sign] = sum((upstream[k] * moved[k[1:]]).sum() for k in upstream)
        numeric = (value[1] - value[-1]) / (2 * step)
        analytic = (grads["d" + name] * direction).sum()
        scale = max(abs(numeric), abs(analytic), 1e-3)
        assert abs(numeric - analytic) <= tolerance * scale, f"{op} d{name}: {analytic} vs {numeric}"
