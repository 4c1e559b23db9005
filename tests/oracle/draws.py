"""The draws of csrc/base/rng.h: Philox4x32-10 exactly; what is made of its words in float64 (the formula
without rounding) or in float32 (as NumPy's own log, sin and cos round)."""

import numpy as np

NOISE, TIME, DROP, SAMPLER, INIT, DATA = range(1, 7)


def philox(key, counter):
    """Ten rounds on (n, 4) counters under one key of two words: (n, 4) uint32."""
    mask = np.uint64(0xFFFFFFFF)
    k0, k1 = (np.uint64(int(k)) for k in key)
    a, b, c, d = (np.asarray(counter, np.uint64)[:, i] for i in range(4))
    for _ in range(10):
        p, q = np.uint64(0xD2511F53) * a, np.uint64(0xCD9E8D57) * c
        a, b, c, d = (q >> np.uint64(32)) ^ b ^ k0, q & mask, (p >> np.uint64(32)) ^ d ^ k1, p & mask
        k0, k1 = (k0 + np.uint64(0x9E3779B9)) & mask, (k1 + np.uint64(0xBB67AE85)) & mask
    return np.stack([a, b, c, d], 1).astype(np.uint32)


def words(seed, stream, position, n):
    """The first n words of (seed, stream, position)."""
    seed, position = int(seed) % 2**64, int(position) % 2**64
    blocks = -(-n // 4)
    counter = np.zeros((blocks, 4), np.uint64)
    counter[:, 0], counter[:, 1], counter[:, 2] = position % 2**32, position >> 32, stream
    counter[:, 3] = np.arange(blocks)
    return philox((seed % 2**32, seed >> 32), counter).reshape(-1)[:n]


def uniform(seed, stream, position, n):
    """float32, exactly."""
    return ((words(seed, stream, position, n) >> 9).astype(np.float64) * 2.0**-23 + 2.0**-24).astype(np.float32)


def normal(seed, stream, position, n, dtype=np.float64):
    """Box-Muller on pairs of words."""
    pairs = words(seed, stream, position, n + n % 2).reshape(-1, 2)
    u = (pairs[:, 0].astype(np.float32).astype(np.float64) * 2.0**-32 + 2.0**-33).astype(np.float32).astype(dtype)
    angle = dtype(2 * np.pi) * ((pairs[:, 1] >> 8).astype(dtype) * dtype(2.0**-24))
    radius = np.sqrt(-2 * np.log(u))
    return np.stack([radius * np.cos(angle), radius * np.sin(angle)], 1).reshape(-1)[:n]
