"""How sure a share is, or the difference of two."""

import math
from collections.abc import Sequence

import numpy as np

Z95 = 1.959963984540054
RESAMPLES = 10_000


def wilson(successes: float, trials: float) -> tuple[float, float]:
    """The 95 % Wilson score interval of a share (Wilson 1927); (0, 1) without trials."""
    if not trials:
        return 0.0, 1.0
    share, z2 = successes / trials, Z95 * Z95 / trials
    center = (share + z2 / 2) / (1 + z2)
    half = Z95 / (1 + z2) * math.sqrt(share * (1 - share) / trials + z2 / (4 * trials))
    return max(0.0, center - half), min(1.0, center + half)


def clustered(successes: Sequence[int], trials: Sequence[int]) -> tuple[float, float]:
    """The 95 % interval of a share whose trials come in clusters (completions of one prompt), which are alike inside.

    successes, trials: of each cluster. Wilson's interval on as many independent trials as would give the variance
    of the cluster-robust estimate (Liang and Zeger 1986; Miller 2024, arXiv 2411.00640, eq. 4). They are at most the
    trials that there are (Korn and Graubard 1998), and as many as clusters where all trials end alike. With one trial
    a cluster this is `wilson`.
    """
    total = sum(trials)
    if not total:
        return 0.0, 1.0
    share = sum(successes) / total
    squares = math.fsum((won - share * tried) ** 2 for won, tried in zip(successes, trials, strict=True))
    if share in (0.0, 1.0):
        effective = sum(1 for tried in trials if tried)
    else:
        variance = squares / total**2
        effective = min(total, share * (1 - share) / variance) if variance else total
    return wilson(share * effective, effective)


def bootstrap(values: np.ndarray) -> tuple[float, float]:
    """The 95 % interval of the mean of values [n]: the middle of 10,000 seeded resamples (Efron 1979)."""
    random, n = np.random.default_rng(0), len(values)
    # In parts, so that thousands of prompts fit into memory.
    means = [values[random.integers(0, n, (RESAMPLES // 100, n))].mean(axis=1) for _ in range(100)]
    low, high = np.quantile(np.concatenate(means), [0.025, 0.975])
    return float(low), float(high)


def sign_test(wins: int, losses: int) -> float:
    """The chance of a result at least so uneven if both were equally likely, two-sided and exact."""
    tail = sum(math.comb(wins + losses, count) for count in range(min(wins, losses) + 1))
    return min(1.0, 2 * tail / 2 ** (wins + losses))
