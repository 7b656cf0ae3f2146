"""What a probe's completions foretell about a run: groups that teach nothing, the time of a step, lengths.

Everything is computed in float64 from what was drawn; each function says how, and where the formula comes from.
"""

import math
from collections import Counter
from collections.abc import Sequence

import numpy as np

from launch.probe.figures import Group
from protocol.recipe import Recipe

SIZES = (2, 4, 8, 16, 32, 64)
"""Group sizes that are looked at, beside the recipe's."""
FEW_DEAD = 1 / 3
"""Share of dead groups that a group size should stay below."""
CUT = 0.01
"""Share of completions that `max_tokens` may cut."""
ROUND = 32
"""Proposed lengths are multiples of it."""


def dead_share(groups: Sequence[Sequence[float]], size: int) -> float:
    """The share of groups of `size` completions whose rewards are all equal.

    groups: the rewards of each prompt, n draws each. Up to n it is estimated without a bias and without a model;
    beyond n, what was seen at n goes on as in a Dirichlet-multinomial with the same moments.
    """
    n = min(len(rewards) for rewards in groups)
    if size <= n:
        return float(np.mean([all_equal(list(Counter(rewards).values()), size) for rewards in groups]))
    model = DirichletMultinomial.of(groups)
    return dead_share(groups, n) * model.all_equal(size) / model.all_equal(n)


def all_equal(counts: Sequence[int], size: int) -> float:
    """The chance that `size` of the draws, without replacement, are all of one value: sum C(c, size) / C(n, size).

    counts: draws of each value. An unbiased estimate of sum p^size (a U-statistic, Hoeffding 1948; pass@k of Chen et
    al. 2021, arXiv 2107.03374, is the same for one value).
    """
    return sum(math.comb(count, size) for count in counts) / math.comb(sum(counts), size)


class DirichletMultinomial:
    """How chances of reward values differ between prompts: Dirichlet, with two values Beta (Skellam 1948).

    means: [values] the chance of each value. correlation: rho in [0, 1], how alike two draws of one prompt are; the
    sum of the Dirichlet's parameters is (1 - rho) / rho. Both by the method of moments (Mosimann 1962).
    """

    def __init__(self, means: Sequence[float], correlation: float) -> None:
        self.means, self.correlation = np.asarray(means, np.float64), correlation

    @classmethod
    def of(cls, groups: Sequence[Sequence[float]]) -> "DirichletMultinomial":
        """groups: the rewards of each prompt, at least two each."""
        totals = Counter(reward for rewards in groups for reward in rewards)
        means = np.array(list(totals.values())) / totals.total()
        chance, pairs = float((means**2).sum()), dead_share(groups, 2)
        correlation = (pairs - chance) / (1 - chance) if chance < 1 else 1.0
        return cls(means.tolist(), min(1.0, max(0.0, correlation)))

    def all_equal(self, size: int) -> float:
        """E[sum p^size] = sum of m * prod ((1 - rho) m + i rho) / ((1 - rho) + i rho) for i = 1 .. size - 1."""
        rho, steps = self.correlation, np.arange(1, size)
        factors = ((1 - rho) * self.means[:, None] + steps * rho) / ((1 - rho) + steps * rho)
        return float((self.means * factors.prod(axis=1)).sum())


def good_size(dead: dict[int, float]) -> int | None:
    """The smallest group size, from 4 on, with fewer than a third of the groups dead; None where none is.

    dead: the share by group size. The chance that a prompt teaches something grows with the size, and so does what a
    prompt costs; DAPO (arXiv 2503.14476, section 3.2) shows what dead groups take from a batch.
    """
    return next((size for size, share in sorted(dead.items()) if size >= 4 and share < FEW_DEAD), None)


def completions_for_one(size: int, dead: float) -> float:
    """Completions that are sampled for one group that teaches something, as an expected value."""
    return size / (1 - dead) if dead < 1 else math.inf


def groups_of_step(prompts: int, refill: float, dead: float) -> tuple[float, float]:
    """-> groups sampled in a step, and those of them that teach something, as expected values.

    With `trainer.refill` other prompts take the place of dead groups, up to refill * prompts of them.
    """
    most = prompts * (1 + refill)
    sampled = most if dead == 1 else min(most, prompts / (1 - dead))
    return sampled, sampled * (1 - dead)


def forecast(recipe: Recipe, groups: Sequence[Group], tokens_per_s: float) -> dict[str, object]:
    """What a step of this recipe will be, before anything is learned.

    dead (share of dead groups by group size), group_size (a good one, or None), groups and useful (sampled in a step,
    and of them teaching something), tokens (sampled in a step), sampler_s (seconds for them, all engines together),
    max_tokens (a good one, or None where nothing tells).
    """
    own, prompts, refill = recipe.sampling.group_size, recipe.trainer.prompts_per_step, recipe.trainer.refill
    drawn = [[one.reward for one in group] for group in groups]
    dead = {size: dead_share(drawn, size) for size in sorted({*SIZES, own})}
    every = [one for group in groups for one in group]
    lengths = [one.tokens for one in every]
    sampled, useful = groups_of_step(prompts, refill, dead[own])
    tokens = sampled * own * float(np.mean(lengths))
    engines = recipe.sampler.gpus // recipe.sampler.tensor_parallel
    needed = length_needed(lengths, [one.finish == "length" for one in every], recipe.sampling.max_tokens)
    return {
        "dead": dead,
        "group_size": good_size(dead),
        "groups": sampled,
        "useful": useful,
        "tokens": tokens,
        "sampler_s": tokens / max(tokens_per_s * engines, 1e-9),
        "max_tokens": None if needed is None else rounded(needed),
    }


def length_needed(lengths: Sequence[int], cut: Sequence[bool], limit: int, share: float = CUT) -> float | None:
    """Tokens within which all but `share` of the completions would end; None where nothing tells.

    Where at most `share` was cut at `limit`, a quantile of the lengths. Else completions are taken to go on ending as
    they do in the second half of `limit`: the tail is geometric with the censored maximum-likelihood rate, ends over
    tokens at risk (Kaplan and Meier 1958 inside, an exponential beyond).
    """
    tokens, truncated = np.asarray(lengths), np.asarray(cut)
    survivors = truncated.mean()
    if survivors <= share:
        return float(np.quantile(tokens, 1 - share))
    ended = int(((tokens > limit / 2) & ~truncated).sum())
    at_risk = float(np.clip(tokens - limit // 2, 0, None).sum())
    if not ended:
        return None
    return limit + (math.log(share / survivors) / math.log1p(-ended / at_risk) if ended < at_risk else 0.0)


def rounded(length: float) -> int:
    """Up to the next multiple of 32."""
    return ROUND * math.ceil(length / ROUND)
