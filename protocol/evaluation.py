"""One evaluation: what is kept of each held-out prompt, and the figures that follow from it.

    Evaluation.from_groups(groups, ...).write(rundir.evals / "s00000042.i0001.json")
    summary(read(path)) -> {"accuracy": 0.64, "low": 0.59, "high": 0.69, "n": 400, ...}
    compare(read(before), read(after)) -> {"difference": 0.54, "low": ..., "high": ..., "p": ...}

Everything is counted by prompt: completions of one prompt are no independent trials.
"""

import math
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Annotated, Literal, Self

import msgspec
import numpy as np
from msgspec import Meta, Struct

from protocol.codec import unpack
from protocol.disk import write_atomic
from protocol.errors import UserError
from protocol.estimates import majority_at, pass_at
from protocol.intervals import bootstrap, clustered, sign_test
from protocol.messages import Count, Group
from protocol.recipe import Extractor, Recipe


class Record(Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """What lies in the file."""


class Sampling(Record, frozen=True, kw_only=True):
    temperature: float
    top_p: float
    samples: int
    max_tokens: int


class Answered(Record, frozen=True, kw_only=True):
    """One held-out prompt; each list has one entry a completion."""

    row: Count
    rewards: Annotated[list[float], Meta(min_length=1)]
    """Weighted sums."""
    correct: list[bool]
    """Whether the first reward function gave more than 0."""
    answers: dict[str, list[str | None]]
    """By extractor, the number as a fraction; None where it found none."""
    gold: str | None
    truncated: list[bool]
    tokens: list[Count]

    def __post_init__(self) -> None:
        lists = [self.correct, self.truncated, self.tokens, *self.answers.values()]
        if any(len(one) != len(self.rewards) for one in lists):
            raise ValueError(f"row {self.row}: its lists have different lengths")

    @classmethod
    def of(cls, group: Group, extractors: Sequence[Extractor]) -> Self:
        completions = group.completions
        first = next(iter(completions[0].rewards))
        return cls(
            row=group.row,
            rewards=[one.reward for one in completions],
            correct=[(one.rewards.get(first) or 0.0) > 0 for one in completions],
            answers={how: [one.answers.get(how) for one in completions] for how in extractors},
            gold=group.gold,
            truncated=[one.finish == "length" for one in completions],
            tokens=[len(unpack(one.tokens)) for one in completions],
        )

    def right(self, how: str) -> list[bool]:
        """Whether the number that the extractor found is the gold one."""
        return [answer == self.gold for answer in self.answers[how]]


class Evaluation(Record, frozen=True, kw_only=True):
    format: Literal[1] = 1
    step: int | None
    """Optimizer steps of the weights; None for a model that is no snapshot."""
    snapshot: str
    """Or the model as the user named it."""
    data: str
    fingerprint: str
    """Of the rendered prompts, as in `messages.DataSet`."""
    sampling: Sampling
    prompts: Annotated[list[Answered], Meta(min_length=1)]
    """In the order of their rows."""

    def __post_init__(self) -> None:
        if any(list(one.answers) != list(self.prompts[0].answers) for one in self.prompts):
            raise ValueError("its prompts were read with different extractors")

    @classmethod
    def from_groups(
        cls, groups: Iterable[Group], *, step: int | None, snapshot: str, data: str, fingerprint: str, recipe: Recipe
    ) -> Self:
        """groups: at least one, each a row of its own."""
        drawn = recipe.eval
        return cls(
            step=step,
            snapshot=snapshot,
            data=data,
            fingerprint=fingerprint,
            sampling=Sampling(
                temperature=drawn.temperature,
                top_p=drawn.top_p,
                samples=drawn.samples,
                max_tokens=recipe.sampling.max_tokens,
            ),
            prompts=sorted((Answered.of(group, drawn.extractors) for group in groups), key=lambda one: one.row),
        )

    @property
    def accuracy(self) -> float:
        """The share of completions to which the first reward function gave more than 0."""
        return _mean(one.correct for one in self.prompts)

    def write(self, path: Path) -> None:
        """As JSON, atomically. Raises StorageError."""
        write_atomic(path, msgspec.json.encode(self))


def read(path: Path) -> Evaluation:
    """Raises UserError for a file that is not there, or is damaged."""
    try:
        return msgspec.json.decode(path.read_bytes(), type=Evaluation)
    except OSError as error:
        raise UserError(f"cannot read the evaluation {path}: {error.strerror}") from None
    except (msgspec.DecodeError, UnicodeDecodeError, RecursionError) as error:
        raise UserError(f"{path} is no evaluation, or damaged: {error}; evaluate again with --out") from None


def summary(evaluation: Evaluation) -> dict[str, float]:
    """Figures by name; shares are in [0, 1], `low` and `high` bound the 95 % interval of what stands before them.

    accuracy, low, high, n (prompts), accuracy/EXTRACTOR (and /low, /high), extraction_failures (right by `last`, but
    not by the first extractor), pass@k and maj@k for k = 1, 2, 4, ... up to the samples where
    there is more than one, reward,
    completions/clipped_ratio, completions/mean_length (tokens). What needs gold answers counts only prompts that
    have one, and is missing where none has.
    """
    prompts = evaluation.prompts
    with_gold = [one for one in prompts if one.gold is not None]
    low, high = _interval([one.correct for one in prompts])
    return {
        "accuracy": evaluation.accuracy,
        "low": low,
        "high": high,
        "n": len(prompts),
        **_by_extractor(with_gold),
        **_by_count(prompts, "pass", lambda one, k: pass_at(len(one.correct), sum(one.correct), k)),
        **_by_count([one for one in with_gold if one.answers], "maj", _majority),
        "reward": _mean(one.rewards for one in prompts),
        "completions/clipped_ratio": _mean(one.truncated for one in prompts),
        "completions/mean_length": _mean(one.tokens for one in prompts),
    }


def compare(before: Evaluation, after: Evaluation) -> dict[str, float]:
    """The change of accuracy on the same prompts: difference, low, high, wins, losses, p, n (prompts).

    low, high: 95 % interval by a seeded paired bootstrap over prompts (Efron 1979). A prompt is won if more of its
    completions are right after than before. p: exact two-sided sign test, with one sample a prompt the exact McNemar
    test (1947). Raises UserError where the prompts are not the same.
    """
    refuse_other_prompts(before, after.fingerprint, after.data, len(after.prompts))
    rows = [one.row for one in before.prompts], [one.row for one in after.prompts]
    if rows[0] != rows[1]:
        missing = len(set(rows[0]) ^ set(rows[1]))
        raise UserError(f"cannot compare: {missing} prompts have a result on one side only; evaluate again")
    old, new = (np.array([np.mean(one.correct) for one in side.prompts]) for side in (before, after))
    low, high = bootstrap(new - old)
    wins, losses = int((new > old).sum()), int((new < old).sum())
    figures = {"difference": float((new - old).mean()), "low": low, "high": high, "wins": wins, "losses": losses}
    return figures | {"p": sign_test(wins, losses), "n": len(old)}


def refuse_other_prompts(before: Evaluation, fingerprint: str, data: str, count: int) -> None:
    """Raises UserError where another evaluation answers other prompts, `count` of them, which `fingerprint` tells."""
    if before.fingerprint != fingerprint:
        raise UserError(
            f"cannot compare: {before.snapshot} answered {len(before.prompts)} prompts of {before.data}, not these "
            f"{count} of {data}; evaluate both with the same data, limit, prompt settings and tokenizer"
        )


def _by_extractor(prompts: Sequence[Answered]) -> dict[str, float]:
    """prompts: with a gold answer."""
    figures: dict[str, float] = {}
    hows = list(prompts[0].answers) if prompts else []
    for how in hows:
        right = [one.right(how) for one in prompts]
        low, high = _interval(right)
        figures |= {f"accuracy/{how}": _mean(right), f"accuracy/{how}/low": low, f"accuracy/{how}/high": high}
    if "last" in hows[1:]:
        pairs = [zip(one.right("last"), one.right(hows[0]), strict=True) for one in prompts]
        figures["extraction_failures"] = _mean([last and not first for last, first in pair] for pair in pairs)
    return figures


def _by_count(prompts: Sequence[Answered], name: str, figure: Callable[[Answered, int], float]) -> dict[str, float]:
    """name@k for k = 1, 2, 4, ...: the mean of a figure over the prompts. One sample has no choice: nothing."""
    samples = min((len(one.rewards) for one in prompts), default=0)
    counts = [2**power for power in range(samples.bit_length())] if samples > 1 else []
    return {f"{name}@{k}": math.fsum(figure(one, k) for one in prompts) / len(prompts) for k in counts}


def _majority(one: Answered, k: int) -> float:
    """Seeded by the prompt, so that two evaluations of the same completions give the same figures."""
    first = next(iter(one.answers.values()))
    return majority_at(first, one.gold or "", k, np.random.default_rng([one.row, k]))


def _mean(values: Iterable[Sequence[float]]) -> float:
    flat = [value for one in values for value in one]
    return math.fsum(flat) / len(flat)


def _interval(right: Sequence[Sequence[bool]]) -> tuple[float, float]:
    return clustered([sum(one) for one in right], [len(one) for one in right])
