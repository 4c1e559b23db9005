"""Timing on a machine whose speed changes within seconds: short rounds, each between two measurements of the peaks.

A round's floor is what its work takes at the peaks before it and at those after it; where the two differ by more than
`STEADY`, the machine changed under the round and it is rejected. A share of the floor is taken within a round, and the
medians of the rounds that are left are reported, with the number of those that are not.
"""

import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import NamedTuple

from benchmarks import peak

STEADY = 0.10  # of the mean: by so much the two floors of a round may differ
SHORTEST = 0.05  # seconds of a timed piece: what is shorter is run several times in a row
COLD = 0.5  # seconds: what is shorter is run once more before, as in a loop: measuring bandwidth emptied the caches
MOST = 15  # rounds
PATIENCE = 3  # times the seconds asked for, at most, until there are enough steady rounds


class Timing(NamedTuple):
    """Of one run: seconds on the wall, CPU seconds per thread (NaN: unknown), and seconds of named parts of it."""

    seconds: float
    cpu: float = float("nan")
    parts: dict = {}


@dataclass
class Piece:
    """Something to time: what runs it, and what it does at least."""

    run: Callable[[], Timing]
    operations: dict  # {compute: operations}
    threads: int
    bytes: float = 0  # that move while nothing is multiplied, as in an optimizer's sweep
    rows: list = field(default_factory=list)

    @property
    def kinds(self):
        """The peaks that its floor is made of."""
        return (*self.operations, *(["update"] if self.bytes else []))


def clocked(function, threads):
    """A run of a Piece: `function`, which may return seconds of its parts, as often as it takes to fill SHORTEST."""

    def once():
        wall, cpu = time.perf_counter(), time.process_time()
        parts = function() or {}
        return Timing(time.perf_counter() - wall, (time.process_time() - cpu) / threads, parts)

    seconds = once().seconds  # warm
    times = max(1, int(SHORTEST / once().seconds)) if seconds < 1 else 1

    def several():
        if seconds < COLD:
            once()
        timings = [once() for _ in range(times)]
        mean = lambda values: sum(values) / times  # noqa: E731
        return Timing(mean([t.seconds for t in timings]), mean([t.cpu for t in timings]),
                      {name: mean([t.parts[name] for t in timings]) for name in timings[0].parts})

    return several


def peaks(level, threads, kinds):
    """{compute or "update": Rate} of the machine now."""
    found = {kind: peak.fma(level, threads, kind) for kind in kinds if kind != "update"}
    if "update" in kinds:
        found["update"] = peak.bandwidth(level, threads, 3, ("update",))["update"]
    return found


def _products(piece, found, clock="wall"):
    """Seconds of the operations alone."""
    return sum(count / getattr(found[kind], clock) for kind, count in piece.operations.items())


def floor(piece, found, clock="wall"):
    """Seconds that nothing can beat at the peaks found. Bandwidth is by the wall: memory has no CPU time."""
    seconds = _products(piece, found, clock)
    return seconds + piece.bytes / found["update"].wall if piece.bytes else seconds


def take(pieces, level, seconds, least=3):
    """Time the pieces in turns, round after round.

    Parameters
    ----------
    pieces : {name: Piece}
    level : str
        Of instructions, for the peaks.
    seconds : float
        Rounds are added for so long, until `least` of them are steady (at most PATIENCE times as long).

    Returns
    -------
    {name: dict}
        Medians of the steady rounds, of all when they are fewer than `least` ("steady" is false then); "rejected",
        and every round.
    """
    began, done, last = time.perf_counter(), 0, {}
    while done < MOST:
        elapsed = time.perf_counter() - began
        kept = min(sum(row["steady"] for row in piece.rows) for piece in pieces.values())
        if done >= least and elapsed > seconds and (kept >= least or elapsed > PATIENCE * seconds):
            break
        for piece in pieces.values():
            key = (piece.threads, piece.kinds)
            before = last.get(key) or peaks(level, *key)
            timing = piece.run()
            after = peaks(level, *key)
            last = {key: after}
            piece.rows.append(row(piece, timing, before, after))
        done += 1
    return {name: summary(piece, least) for name, piece in pieces.items()}


def row(piece, timing, before, after):
    """The figures of a round."""
    low, high = sorted((floor(piece, before), floor(piece, after)))
    middle = (low + high) / 2
    found = {"seconds": timing.seconds, "floor": middle, "share_of_floor": middle / timing.seconds,
             "steady": high - low <= STEADY * middle}
    if piece.operations:
        products = (_products(piece, before) + _products(piece, after)) / 2
        found["times_operations"] = timing.seconds / products
        if timing.cpu == timing.cpu:
            by_cpu = (floor(piece, before, "cpu") + floor(piece, after, "cpu")) / 2
            found["share_of_floor_cpu"] = by_cpu / timing.cpu
    for kind in piece.kinds:
        unit = "update_gb_s" if kind == "update" else f"{kind}_gflops"
        found[unit] = (before[kind].wall + after[kind].wall) / 2e9
    if piece.bytes:
        found["bytes_floor"] = piece.bytes / (1e9 * found["update_gb_s"])
    return found | timing.parts


def medians(rows):
    """Of every figure of some rounds."""
    return {name: statistics.median(row[name] for row in rows) for name in rows[0] if name != "steady"}


def summary(piece, least=3):
    """Medians of the steady rounds of a piece, and what else there is to say of them."""
    steady = [row for row in piece.rows if row["steady"]]
    enough = len(steady) >= least
    return {**medians(steady if enough else piece.rows), "steady": enough,
            "rejected": len(piece.rows) - len(steady), "gflop": sum(piece.operations.values()) / 1e9,
            "rounds": piece.rows}


def note(summary):
    """What has to be said beside a figure; empty when all is well."""
    words = []
    if not summary["steady"]:
        words.append("the machine was never steady")
    elif summary["rejected"]:
        words.append(f"{summary['rejected']} of {len(summary['rounds'])} rounds rejected")
    if summary["share_of_floor"] > 1 and summary.get("share_of_floor_cpu", 2) > 1:
        words.append("above its floor: a fault of this benchmark")
    return "; ".join(words)
