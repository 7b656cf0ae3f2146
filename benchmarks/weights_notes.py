"""What the sampler of `benchmarks.weights` notes, and the arithmetic on it."""

import itertools
import math
import statistics
from collections.abc import Mapping, Sequence

NOTES = "switches.jsonl"
"""In the run directory; times are those of time.monotonic, which all processes of a machine share."""
PARTS = ("canary", "write", "announce", "read", "pause", "load", "first")
COLUMNS = (*PARTS, "switch", "checked", "stall", "usual step", "floor", "of floor")
P95_FROM = 20
"""Switches; of fewer the nearest rank of p95 is the largest."""


def stall(sampled_at: Sequence[float], begun: float, ended: float) -> tuple[float, float]:
    """Seconds between `begun` and `ended` in which decoding stood still, and the usual time of an engine step.

    sampled_at: when each engine step's tokens came, ascending. A pause between two steps counts by what it is longer
    than the median of those before `begun`, if it is longer than twice that.
    """
    gaps = [(later, later - earlier) for earlier, later in itertools.pairwise(sampled_at)]
    usual = statistics.median([gap for at, gap in gaps if at < begun][-100:])
    return sum(gap - usual for at, gap in gaps if begun < at <= ended and gap > 2 * usual), usual


def percentile(values: Sequence[float], share: float) -> float:
    """The smallest value that at least this share of all do not exceed (nearest rank)."""
    return sorted(values)[max(1, math.ceil(share * len(values))) - 1]


def parts(done: float, published: float, trainer: dict[str, float], note: dict) -> dict[str, float]:
    """The trainer's and the sampler's points in time -> durations."""
    names = ("announced", "read", "paused", "loaded", "first", "checked")
    announced, read, paused, loaded, first, checked = (note[name] for name in names)
    lost, usual = stall(note["sampled_at"], announced, checked)
    return {
        **trainer,
        "write": published - done - sum(trainer.values()),
        "announce": announced - published,
        "read": read - announced,
        "pause": paused - read,
        "load": loaded - paused,
        "first": first - loaded,
        "switch": first - done,
        "checked": checked - done,
        "stall": lost,
        "usual step": usual,
    }


def summary(switches: Sequence[Mapping[str, float]], named: dict[str, object]) -> list[dict[str, object]]:
    """A row for each share of the switches that no other row has."""
    shares = {"p50": 0.5, "p95": 0.95, "max": 1.0} if len(switches) >= P95_FROM else {"p50": 0.5, "max": 1.0}
    return [
        named | {"of": of} | {part: round(percentile([one[part] for one in switches], share), 3) for part in COLUMNS}
        for of, share in shares.items()
    ]


if __name__ == "__main__":
    raise SystemExit("a part of another benchmark: python -m benchmarks.weights")
