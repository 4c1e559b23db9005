"""prototypical_routing: cosine of each token to E learned prototypes."""

import numpy as np

from .numeric import mm, total

EPS = 1e-12


def unit(u):
    """(u / max(|u|, EPS), |u|), row by row."""
    norm = np.sqrt(total(u * u, axis=1))
    return u / np.maximum(norm, u.dtype.type(EPS))[:, None], norm


def unit_backward(u, dunit):
    """The gradient of u, given that of its unit vector; a norm below EPS is a constant."""
    hat, norm = unit(u)
    along = np.where(norm < EPS, 0, total(hat * dunit, axis=1)).astype(u.dtype)
    return (dunit - hat * along[:, None]) / np.maximum(norm, u.dtype.type(EPS))[:, None]


def forward(x, proto, part=None):
    routable = np.ones(len(x), bool) if part is None else part == -1
    x = np.where(routable[:, None], x, 0)
    (xhat, xnorm), (phat, pnorm) = unit(x), unit(proto)
    return {"z": mm(xhat, phat.T), "xnorm": xnorm, "pnorm": pnorm}


def backward(x, proto, dz, part=None):
    routable = np.ones(len(x), bool) if part is None else part == -1
    x, dz = np.where(routable[:, None], x, 0), np.where(routable[:, None], dz, 0)
    return {"dx": unit_backward(x, mm(dz, unit(proto)[0])),
            "dproto": unit_backward(proto, mm(dz.T, unit(x)[0]))}


def _case(N, D, E, part=None, edit=None):
    """part: None, or the share of tokens that are forced or absent."""
    def make(rng):
        values = {"x": rng.standard_normal((N, D)).astype(np.float32),
                  "proto": (0.02 * rng.standard_normal((E, D))).astype(np.float32)}
        if part is not None:
            away = rng.random(N) < part
            values["part"] = np.where(away, rng.choice([-2, E, E + 1], N), -1).astype(np.int32)
        if edit:
            edit(values)
        return values
    return make


def _zeros(values):
    values["x"][[0, 5]] = 0
    values["x"][2] *= np.float32(1e-13)  # below EPS, and not zero
    values["proto"][[1, 3]] = 0
    values["proto"][2] *= np.float32(5e-12)


def _small(values):  # a scale changes nothing but the size of the gradients
    values["x"][::2] *= np.float32(1e-8)
    values["proto"][::3] *= np.float32(1e-6)


def _along(values):  # cosines 1 and -1: the tangent is all rounding
    values["x"][:4] = 7 * values["proto"][:4]
    values["x"][4] = -values["proto"][0]


CASES = {
    "one": _case(1, 1, 1),
    "one_token": _case(1, 40, 12),
    "one_prototype": _case(50, 24, 1),
    "mixed": _case(60, 24, 12, part=0.4),
    "all_forced": _case(20, 8, 4, part=1),
    "zero_norms": _case(9, 20, 5, edit=_zeros),
    "small_norms": _case(12, 20, 7, edit=_small),
    "along": _case(8, 48, 6, edit=_along),
    "many_prototypes": _case(40, 20, 256, part=0.2),
    "slots": _case(700, 36, 12, part=0.1),  # three partial sums of dproto
    "wide": _case(30, 700, 13, part=0.1),
}
CASES |= {f"width_{D}": _case(5, D, 34 - D) for D in range(1, 34)}
OWN_BOUNDS = ("one", "width_1", "zero_norms", "small_norms", "along")
