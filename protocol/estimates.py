"""What more than one completion a prompt would give: any of them right, or most of them."""

import math
from collections.abc import Sequence

import numpy as np

SUBSETS = 256
"""At least so many are looked at for each prompt and k of maj@k."""


def pass_at(samples: int, right: int, k: int) -> float:
    """The chance that one of k completions, drawn from `samples` of which some are right, is right.

    1 - C(samples - right, k) / C(samples, k): Chen et al. 2021 (arXiv 2107.03374), eq. 1, as a product of shares.
    """
    return 1.0 - math.prod(1.0 - k / number for number in range(samples - right + 1, samples + 1))


def majority_at(
    answers: Sequence[str | None], gold: str, k: int, random: np.random.Generator, subsets: int = SUBSETS
) -> float:
    """The chance that the most frequent answer of k completions is `gold` (self-consistency, arXiv 2203.11171).

    A tie is decided by lot; completions without an answer do not vote. Estimated without a bias on random subsets of
    the answers [n]: to count all of them grows too fast with n. Subsets are all the runs of k around random rings, so
    that each completion is used equally often: exact for k = 1, n - 1 and n. Between them the error of a mean over
    prompts is below a twentieth of the one that the choice of prompts brings (measured for n = 16).
    """
    names = [gold, *sorted({answer for answer in answers if answer not in (None, gold)})]
    codes = np.array([-1 if answer is None else names.index(answer) for answer in answers])
    n = len(codes)
    rings = random.permuted(np.tile(codes, (math.ceil(subsets / n), 1)), axis=1)
    drawn = rings[:, (np.arange(n)[:, None] + np.arange(k)) % n].reshape(-1, k)
    votes = np.stack([(drawn == code).sum(axis=1) for code in range(len(names))])  # [names, subsets]
    most = votes.max(axis=0)
    tied = (votes == most).sum(axis=0)
    return float(np.mean(np.where((votes[0] == most) & (most > 0), 1.0 / tied, 0.0)))
