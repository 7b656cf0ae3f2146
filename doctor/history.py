"""A run as its files tell it, read again and again while they grow: beside the run, after it, on another machine.

What comes back is the history that led to the newest step: steps that a killed trainer had done after its last
checkpoint, and did again, count once.
"""

from dataclasses import dataclass, field
from pathlib import Path
from typing import Self

import msgspec

from doctor.text import repetition, tail_after_answer
from protocol.metrics import Tail
from protocol.recipe import Recipe
from protocol.resolve import load
from protocol.rollout import Rollout
from protocol.rundir import RunDir
from protocol.snapshot import step_of


@dataclass(frozen=True, slots=True, kw_only=True)
class Seen:
    """A completion without its text, which `History.rollout` reads again."""

    split: str
    group: int
    row: int
    version: int
    """Optimizer steps of the newest weights that sampled it."""
    reward: float
    rewards: dict[str, float | None]
    tokens: int
    truncated: bool
    specials: int
    gold: str | None
    answers: dict[str, str | None]
    repetition: float
    """Share of its 5-grams of words that came before, in [0, 1]."""
    after: int
    """Characters behind its final answer mark; 0 without a mark."""
    file: Path
    offset: int

    @property
    def right(self) -> bool:
        """The first reward function gave more than 0."""
        return (next(iter(self.rewards.values())) or 0.0) > 0


@dataclass(slots=True)
class History:
    """All lists are in the order of their steps."""

    rundir: RunDir
    recipe: Recipe
    steps: list[dict] = field(default_factory=list)
    """Records of kind `step` in metrics/trainer.jsonl."""
    exams: list[dict] = field(default_factory=list)
    """Of kind `exam`."""
    skipped: list[dict] = field(default_factory=list)
    """Of kind `skipped`: steps that were not finite."""
    train: list[Seen] = field(default_factory=list)
    """Training completions, by `version`."""
    held_out: list[Seen] = field(default_factory=list)
    samplers: dict[str, list[dict]] = field(default_factory=dict)
    """By session, the records of metrics/sampler-*.jsonl, counted since that sampler's start."""
    unreadable: int = 0
    """Lines that are no records."""
    _tails: dict[Path, Tail] = field(default_factory=dict)

    @classmethod
    def open(cls, run: Path) -> Self:
        """Raises UserError where no run is."""
        rundir = RunDir(run)
        history = cls(rundir, load(rundir.recipe))
        history.refresh()
        return history

    def refresh(self) -> None:
        """Takes in what was written since the last time."""
        for record in self._new(self.rundir.metrics / "trainer.jsonl"):
            self._trainer(record)
        for path in sorted(self.rundir.metrics.glob("sampler-*.jsonl")):
            session = path.stem.removeprefix("sampler-")
            self.samplers.setdefault(session, []).extend(self._new(path))
        count = len(self.train)
        for path in sorted(self.rundir.rollouts.glob("*.jsonl")):
            self._rollouts(path)
        if len(self.train) > count:
            self.train.sort(key=lambda seen: seen.version)

    def rollout(self, seen: Seen) -> Rollout:
        """The whole of it, from disk."""
        with seen.file.open("rb") as file:
            file.seek(seen.offset)
            return msgspec.json.decode(file.readline(), type=Rollout)

    def _trainer(self, record: dict) -> None:
        kind, step = record.get("kind"), record.get("step")
        if not isinstance(step, int):
            self.unreadable += 1
        elif kind == "step":
            for records in (self.steps, self.exams, self.skipped):  # done again after a restart
                while records and records[-1]["step"] >= step + (records is not self.steps):
                    records.pop()
            self.steps.append(record)
        elif kind == "exam":
            self.exams = [exam for exam in self.exams if exam["step"] < step] + [record]
        elif kind == "skipped":
            self.skipped.append(record)

    def _new(self, path: Path) -> list[dict]:
        records = []
        for _, line in self._tails.setdefault(path, Tail(path)).lines():
            try:
                records.append(msgspec.json.decode(line, type=dict))
            except msgspec.DecodeError:
                self.unreadable += 1
        return records

    def _rollouts(self, path: Path) -> None:
        for offset, line in self._tails.setdefault(path, Tail(path)).lines():
            try:
                rollout = msgspec.json.decode(line, type=Rollout)
                version = step_of(rollout.snapshots[-1])
            except (msgspec.DecodeError, UnicodeDecodeError, IndexError, ValueError):
                self.unreadable += 1
                continue
            seen = Seen(
                split=rollout.split,
                group=rollout.group,
                row=rollout.row,
                version=version,
                reward=rollout.reward,
                rewards=rollout.rewards,
                tokens=rollout.tokens,
                truncated=rollout.finish == "length",
                specials=rollout.specials,
                gold=rollout.gold,
                answers=rollout.answers,
                repetition=repetition(rollout.completion),
                after=tail_after_answer(rollout.completion),
                file=path,
                offset=offset,
            )
            (self.train if rollout.split == "train" else self.held_out).append(seen)
