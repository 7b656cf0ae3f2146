"""The completions of a probe, in numbers."""

from collections.abc import Iterable, Sequence

import numpy as np

from doctor.lengths import LOOP
from doctor.text import repetition, tail_after_answer
from protocol.intervals import clustered, wilson
from protocol.messages import without_signal
from protocol.recipe import Extractor, Recipe
from protocol.rollout import Rollout
from sampler.rewards.answers import extracted

Group = list[Rollout]
"""Completions of one prompt."""


def grouped(rollouts: Iterable[Rollout]) -> list[Group]:
    """By prompt, in the order in which prompts were begun."""
    groups: dict[int, Group] = {}
    for rollout in rollouts:
        groups.setdefault(rollout.group, []).append(rollout)
    return [groups[key] for key in sorted(groups)]


def right(rollout: Rollout) -> bool:
    """The first reward function gave more than 0."""
    return (next(iter(rollout.rewards.values())) or 0.0) > 0


def figures(groups: Sequence[Group]) -> dict[str, float]:
    """Figures by name, of at least one group. Shares are in [0, 1]; NAME/low and /high bound a 95 % interval.

    pass_rate, and always, sometimes, never (shares of prompts); dead (prompts whose rewards are all equal) and of them
    dead/right and dead/wrong; truncated, specials (special tokens before the last one), after (text behind a final
    answer), repeats (texts that repeat themselves) as shares of completions; truncated/specials, truncated/after,
    truncated/repeats as shares of those that were cut; length/mean, p50, p95, p99, max (tokens).
    """
    every = [one for group in groups for one in group]
    cut = [one for one in every if one.finish == "length"]
    solved = [sum(right(one) for one in group) for group in groups]
    dead = [without_signal([one.reward for one in group]) for group in groups]
    found = {
        **_share("pass_rate", groups, right),
        "always": float(np.mean([won == len(group) for won, group in zip(solved, groups, strict=True)])),
        "never": float(np.mean([won == 0 for won in solved])),
        "dead": float(np.mean(dead)),
        **dict(zip(("dead/low", "dead/high"), wilson(sum(dead), len(dead)), strict=True)),
        **_dead_by_kind(groups, dead, solved),
        **_share("truncated", groups, lambda one: one.finish == "length"),
        **_texts("", every),
        **_texts("truncated/", cut),
        **_lengths(every),
    }
    return found | {"sometimes": 1 - found["always"] - found["never"]}


def answers(groups: Sequence[Group], extractors: Sequence[Extractor]) -> dict[str, float]:
    """answered/HOW (share of completions in which a number was found) and right/HOW (share whose number is the gold
    one) for each extractor, `last` among them; extraction_failures: right by `last`, not by the first. What needs a
    gold answer counts only completions that have one, and is missing where none has.
    """
    found = [(extracted(one.completion, extractors), one.gold) for group in groups for one in group]
    shares = {f"answered/{how}": float(np.mean([given[how] is not None for given, _ in found])) for how in extractors}
    rights = {how: np.array([given[how] == gold for given, gold in found if gold is not None]) for how in extractors}
    if rights[extractors[0]].size:
        shares |= {f"right/{how}": float(values.mean()) for how, values in rights.items()}
        shares["extraction_failures"] = float((rights["last"] & ~rights[extractors[0]]).mean())
    return shares


def looked_for(recipe: Recipe) -> list[Extractor]:
    """The recipe's ways to find an answer, and in any case the last number."""
    return list(dict.fromkeys([*recipe.eval.extractors, "last"]))


def histogram(groups: Sequence[Group]) -> list[int]:
    """Prompts by how many of their completions are right: [group_size + 1]."""
    counts = [sum(right(one) for one in group) for group in groups]
    return np.bincount(counts, minlength=max(len(group) for group in groups) + 1).tolist()


def rewards(groups: Sequence[Group]) -> dict[str, dict[str, float]]:
    """By function, before weighting: mean, std, and within (share of prompts whose completions it tells apart). Last,
    as `sum`, the same of the weighted sum that is learned from."""
    names = groups[0][0].rewards
    found = {name: _spread([[one.rewards[name] for one in group] for group in groups]) for name in names}
    return found | {"sum": _spread([[one.reward for one in group] for group in groups])}


def _spread(values: list[list[float | None]]) -> dict[str, float]:
    applied = [value for group in values for value in group if value is not None]
    if not applied:
        return {}
    within = [len({value for value in group if value is not None}) > 1 for group in values]
    return {"mean": float(np.mean(applied)), "std": float(np.std(applied)), "within": float(np.mean(within))}


def _share(name: str, groups: Sequence[Group], test) -> dict[str, float]:
    counts = [sum(map(test, group)) for group in groups]
    low, high = clustered(counts, [len(group) for group in groups])
    return {name: sum(counts) / sum(map(len, groups)), f"{name}/low": low, f"{name}/high": high}


def _dead_by_kind(groups: Sequence[Group], dead: list[bool], solved: list[int]) -> dict[str, float]:
    of_dead = [(won, len(group)) for group, won, flat in zip(groups, solved, dead, strict=True) if flat]
    return {
        "dead/right": sum(won == size for won, size in of_dead) / len(groups),
        "dead/wrong": sum(won == 0 for won, _ in of_dead) / len(groups),
    }


def _texts(prefix: str, rollouts: Sequence[Rollout]) -> dict[str, float]:
    tests = {
        "specials": lambda one: one.specials > 0,
        "after": lambda one: tail_after_answer(one.completion) > 0,
        "repeats": lambda one: repetition(one.completion) > LOOP,
    }
    return {f"{prefix}{name}": float(np.mean([test(one) for one in rollouts] or [0])) for name, test in tests.items()}


def _lengths(rollouts: Sequence[Rollout]) -> dict[str, float]:
    lengths = np.array([one.tokens for one in rollouts])
    quantiles = {f"length/p{number}": float(np.percentile(lengths, number)) for number in (50, 95, 99)}
    return {"length/mean": float(lengths.mean()), **quantiles, "length/max": float(lengths.max())}
