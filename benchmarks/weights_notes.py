"""What the sampler of `benchmarks.weights` notes, and the arithmetic on it."""

import itertools
import math
import statistics
from collections.abc import Sequence

NOTES = "switches.jsonl"
"""In the run directory; times are those of time.monotonic, which all processes of a machine share."""


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


if __name__ == "__main__":
    raise SystemExit("a part of another benchmark: python -m benchmarks.weights")
