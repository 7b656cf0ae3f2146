"""What differs between runs: settings, and held-out prompts that one side answers and the other does not."""

import json
from collections.abc import Sequence
from dataclasses import dataclass, field

import msgspec
import numpy as np

from doctor.history import Seen
from launch.report.account import Account
from protocol.errors import UserError
from protocol.evaluation import Answered, Evaluation, compare
from protocol.recipe import Recipe
from protocol.rollout import Rollout
from sampler.rewards.pool import distinct

SHOWN = 5
"""Prompts won, and as many lost, with their answers."""


@dataclass(frozen=True, slots=True)
class Side:
    run: Account
    evaluation: Evaluation

    @property
    def name(self) -> str:
        return f"{self.run.name} at step {self.evaluation.step}"


@dataclass(frozen=True, slots=True)
class Prompt:
    row: int
    gold: str | None
    before: Rollout | None
    after: Rollout | None


@dataclass(frozen=True, slots=True)
class Match:
    """Two evaluations of the same prompts."""

    before: Side
    after: Side
    refused: str = ""
    """Why they cannot be compared; then there is nothing else."""
    figures: dict[str, float] = field(default_factory=dict)
    won: list[Prompt] = field(default_factory=list)
    lost: list[Prompt] = field(default_factory=list)


def matches(runs: Sequence[Account]) -> list[Match]:
    """Each run before and after, then the first run's end against every other's."""
    ends = [(Side(run, run.evaluations[0]), Side(run, run.evaluations[-1])) for run in runs if run.evaluations]
    inside = [match(before, after) for before, after in ends if before.evaluation is not after.evaluation]
    return inside + [match(ends[0][1], after) for _, after in ends[1:]]


def match(before: Side, after: Side) -> Match:
    if unlike := sampled_unlike(before.evaluation, after.evaluation):
        return Match(before, after, refused=unlike)
    try:
        figures = compare(before.evaluation, after.evaluation)
    except UserError as error:
        return Match(before, after, refused=str(error))
    pairs = list(zip(before.evaluation.prompts, after.evaluation.prompts, strict=True))
    won = [new for old, new in pairs if np.mean(new.correct) > np.mean(old.correct)]
    lost = [new for old, new in pairs if np.mean(new.correct) < np.mean(old.correct)]
    return Match(
        before,
        after,
        figures=figures,
        won=[prompt(one, before, after, True) for one in won[:SHOWN]],
        lost=[prompt(one, before, after, False) for one in lost[:SHOWN]],
    )


def sampled_unlike(before: Evaluation, after: Evaluation) -> str:
    """Why their difference is not that of the weights alone; "" where both were sampled in the same way."""
    sides = [msgspec.structs.asdict(side.sampling) for side in (before, after)]
    apart = [
        f"{name} {old} and {new}"
        for (name, old), new in zip(sides[0].items(), sides[1].values(), strict=True)
        if old != new
    ]
    if not apart:
        return ""
    return f"cannot compare: sampled with {', '.join(apart)}; evaluate both with the same settings"


def prompt(one: Answered, before: Side, after: Side, won: bool) -> Prompt:
    return Prompt(one.row, one.gold, answer(before, one.row, not won), answer(after, one.row, won))


def answer(side: Side, row: int, right: bool) -> Rollout | None:
    """A right (wrong) completion of the row by these weights; None where the rollouts are gone."""
    found = side.run.answers.get((row, side.evaluation.step), [])
    best: Seen | None = next((seen for seen in found if seen.right == right), found[0] if found else None)
    return side.run.text(best) if best else None


def different(runs: Sequence[Account]) -> dict[str, list[str]]:
    """Setting -> its value in each run, where they are not all the same."""
    return _apart([run.recipe for run in runs])


def changed(run: Account) -> dict[str, list[str]]:
    """Setting -> [value, default], where the recipe says something else than the default."""
    return _apart([run.recipe, Recipe()])


def _apart(recipes: Sequence[Recipe]) -> dict[str, list[str]]:
    tables = [settings(recipe) for recipe in recipes]
    keys = dict.fromkeys(key for table in tables for key in table)
    rows = {key: [table.get(key, "") for table in tables] for key in keys}
    return {key: row for key, row in rows.items() if len(set(row)) > 1}


def settings(recipe: Recipe) -> dict[str, str]:
    """`table.key` -> value as JSON; each reward function under its name in the record."""
    tables = msgspec.to_builtins(recipe)
    rewards = tables.pop("reward")
    names = distinct([one.pop("function") for one in rewards])
    for name, one in zip(names, rewards, strict=True):
        tables |= {f"reward.{name}.{key}": value for key, value in one.items()}
    flat = {key: value for key, value in tables.items() if not isinstance(value, dict)}
    for name, table in tables.items():
        if isinstance(table, dict):
            flat |= {f"{name}.{key}": value for key, value in table.items()}
    return {key: "not set" if value is None else json.dumps(value, ensure_ascii=False) for key, value in flat.items()}
