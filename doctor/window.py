"""The part of a history that a rule looks at: the last steps, and what was sampled for them."""

import math
import statistics
from bisect import bisect_left, bisect_right
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from functools import cached_property
from typing import Self

from doctor.history import History, Seen, version_of
from protocol.recipe import Recipe, Reward

SIZE = 8
"""Steps in a window: enough to tell a trend from one bad batch, few enough to speak within the first minutes."""
LEAST = 3
"""Steps, or fewer completions than `ENOUGH`, of which nothing is said: a first batch may be anything."""
ENOUGH = 32
PARTIAL = 0.5
"""Of the full score; what is above is nearly right, not a consolation."""
SOLVED = 0.1
"""Share of right completions below which answers are not being learned."""
ERRORS = 2.0
"""Standard errors above which a difference of two means is no noise."""


@dataclass(frozen=True, kw_only=True)
class Window:
    """All lists are in the order of their steps."""

    recipe: Recipe
    steps: list[dict]
    """The last records of kind `step`, at most `SIZE`; none where the first step was not finite."""
    begin: list[dict]
    """The first `LEAST` records of the run: what the newest are compared with."""
    train: list[Seen]
    """Training completions by the weights that these steps learned from."""
    exams: list[dict]
    """All up to the last step."""
    held_out: list[Seen]
    """Completions of the last exam."""
    skipped: list[dict]
    scores: tuple[float, float]
    """The least and the most that the first reward function gave since the run began; (0, 0) before."""
    samplers: list[list[dict]]
    """For each session its records under these weights, and the one before as a base of its counters."""

    @classmethod
    def at(cls, history: History, end: int) -> Self:
        """The window that ends with step record number `end`, counted from 1; 0: before the first."""
        steps = history.steps[max(0, end - SIZE) : end]
        last = steps[-1]["step"] if steps else 0
        first = steps[0]["step"] - 1 if steps else 0
        oldest = first - history.recipe.trainer.max_staleness
        after = last if end < len(history.steps) else math.inf
        exams = [exam for exam in history.exams if exam["step"] <= last]
        return cls(
            recipe=history.recipe,
            steps=steps,
            begin=history.steps[: min(LEAST, end)],
            train=between(history.train, oldest, last - 1, lambda seen: seen.version),
            exams=exams,
            held_out=held_out(history, exams),
            scores=extremes(history, last - 1),
            skipped=[skip for skip in history.skipped if first <= skip["step"] < after],
            samplers=[with_base(records, oldest, last) for records in history.samplers.values()],
        )

    @property
    def full(self) -> bool:
        return len(self.steps) == SIZE

    @property
    def enough(self) -> bool:
        """Steps and sampled completions to judge rewards, lengths and texts by."""
        return self.grouped and len(self.steps) >= LEAST and len(self.train) >= ENOUGH

    @property
    def grouped(self) -> bool:
        """Whether completions are sampled and compared with one another, which demonstrations are not."""
        return self.recipe.objective.name != "sft" and self.recipe.sampling.group_size > 1

    @cached_property
    def full_score(self) -> float | None:
        """What the first reward function gives at best, or has given so far where nobody says; None while such a
        function gave the same to all and few of these were right."""
        known = best_value(self.recipe.reward[0])
        if known is not None and known > 0:
            return known
        low, high = self.scores
        return high if high > 0 and (low < high or self.share(solved) > SOLVED) else None

    @property
    def partial(self) -> float:
        """Above this the first reward function has found more than a consolation."""
        return PARTIAL * (self.full_score or 0.0)

    @property
    def loss_note(self) -> str:
        """For the evidence of what makes the loss 0."""
        return ", and so the loss is 0" if self.steps[-1].get("grad_norm") == 0 else ""

    @cached_property
    def groups(self) -> list[list[Seen]]:
        """Whole groups; of one that a sampler did again after a restart of the trainer, the newest completions."""
        size = self.recipe.sampling.group_size
        found: dict[tuple, list[Seen]] = {}
        for seen in self.train:
            found.setdefault((seen.file, seen.group), []).append(seen)
        return [group[-size:] for group in found.values() if len(group) >= size]

    @cached_property
    def reward_names(self) -> list[str]:
        """Of the reward functions, in the order of the recipe."""
        return list(self.train[0].rewards) if self.train else []

    def mean(self, name: str) -> float:
        """Of a figure over the steps; NaN where no record has it."""
        return mean(self.steps, name)

    def share(self, holds: Callable[[Seen], bool]) -> float:
        """Of the training completions, in [0, 1]."""
        return sum(map(holds, self.train)) / max(1, len(self.train))

    def newest(self, holds: Callable[[Seen], bool]) -> list[Seen]:
        """Up to three training completions that show something, of prompts that differ, the newest first."""
        return newest(self.train, holds)


def best_value(reward: Reward) -> float | None:
    """The most that a function gives; None for a user's own without an option `correct`."""
    correct = reward.options.get("correct")
    if isinstance(correct, int | float):
        return float(correct)
    if ":" in reward.function:
        return None
    return 0.0 if reward.function in ("overlong", "repetition") else 1.0  # those two only take off


def solved(seen: Seen) -> bool:
    """One of its numbers is right, whatever it earns."""
    return seen.gold is not None and seen.gold in seen.answers.values()


def accuracy_error(window: Window) -> float:
    """Standard error of the mean accuracy, with groups as clusters, whose completions are alike."""
    shares = [sum(seen.right for seen in group) / len(group) for group in window.groups]
    return statistics.stdev(shares) / math.sqrt(len(shares)) if len(shares) > 1 else 1.0


def extremes(history: History, version: int) -> tuple[float, float]:
    """Of the first function's scores by weights up to `version`."""
    found = [score for scores in history.scores.items() if scores[0] <= version for score in scores[1]]
    return (min(found), max(found)) if found else (0.0, 0.0)


def held_out(history: History, exams: list[dict]) -> list[Seen]:
    version = exams[-1]["step"] if exams else -1
    return between(history.held_out, version, version, lambda seen: seen.version)


def mean(steps: Iterable[dict], name: str) -> float:
    """Of one figure; NaN where no record has it as a number."""
    values = [step[name] for step in steps if isinstance(step.get(name), int | float)]
    return statistics.fmean(values) if values else math.nan


def halves(steps: list[dict], name: str) -> tuple[float, float]:
    """The means of the earlier and of the later half of the steps."""
    middle = len(steps) // 2
    return mean(steps[:middle], name), mean(steps[middle:], name)


def newest(completions: list[Seen], holds: Callable[[Seen], bool]) -> list[Seen]:
    found: dict[int, Seen] = {}
    for seen in reversed(completions):
        if holds(seen) and seen.row not in found:
            found[seen.row] = seen
            if len(found) == 3:
                break
    return list(found.values())


def between(items: list, low: int, high: int, key: Callable) -> list:
    """Those whose key is in [low, high], of items in the order of their keys."""
    return items[bisect_left(items, low, key=key) : bisect_right(items, high, key=key)]


def with_base(records: list[dict], low: int, high: int) -> list[dict]:
    start = bisect_left(records, low, key=version_of)
    return records[max(0, start - 1) : bisect_right(records, high, key=version_of)]


def risen(window: Window, name: str) -> float:
    """How far a counter of the samplers went up within the window, all of them together."""
    return sum(max(0, records[-1].get(name, 0) - records[0].get(name, 0)) for records in window.samplers if records)
