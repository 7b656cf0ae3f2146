"""A run as its files tell it, read again and again while they grow: beside the run, after it, on another machine.

What comes back is the history that led to the newest step: steps that a killed trainer had done after its last
checkpoint, and did again, count once.
"""

from dataclasses import dataclass, field
from pathlib import Path
from typing import Self

import msgspec

from doctor.text import repetition, tail_after_answer
from protocol.errors import UserError
from protocol.metrics import Tail
from protocol.recipe import Recipe
from protocol.resolve import load
from protocol.rollout import Rollout
from protocol.rundir import RunDir
from protocol.snapshot import step_of

DAMAGED = (msgspec.DecodeError, UnicodeDecodeError, RecursionError)
"""What a line that is no record of ours raises."""
NEEDED: dict[str, tuple[str, ...]] = {
    "step": (
        "reward",
        "accuracy",
        "train/tokens",
        "step_time",
        "time/wait_s",
        "time/publish_s",
        "sampler/tokens_per_s",
    ),
    "exam": ("accuracy", "low", "high"),
}
"""Numbers without which a record of this kind counts as unreadable, so that who reads it may rely on them: what was
not finite is null in the file."""


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
    """Characters behind its answer mark, the first of those that agree with the last (text.py); 0 without one."""
    file: Path
    offset: int

    @property
    def first(self) -> float:
        """What the first reward function gave; 0 where it does not apply."""
        return next(iter(self.rewards.values())) or 0.0

    @property
    def right(self) -> bool:
        """The first reward function gave more than 0."""
        return self.first > 0


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
    """Answers of exams, by `version`."""
    starts: list[tuple[str, dict[str, str]]] = field(default_factory=list)
    """Of kind `start`: `trainer` or `sampler`, and the versions of what it ran on."""
    samplers: dict[str, list[dict]] = field(default_factory=dict)
    """By session, the other records of metrics/sampler-*.jsonl, counted since that sampler's start."""
    unreadable: int = 0
    """Lines that are no records."""
    scores: dict[int, tuple[float, float]] = field(default_factory=dict)
    """By `version`, the least and the most that the first reward function gave in training, of all completions ever."""
    _oldest: int = 0
    _tails: dict[Path, Tail] = field(default_factory=dict)

    @classmethod
    def open(cls, run: Path) -> Self:
        """Raises UserError where no run is."""
        rundir = RunDir(run)
        if not rundir.recipe.is_file():
            raise UserError(f"no run in {run}: it has no recipe.toml; start one there, or name another directory")
        history = cls(rundir, load(rundir.recipe))
        history.refresh()
        return history

    def refresh(self) -> None:
        """Takes in what was written since the last time."""
        for record in self._new(self.rundir.metrics / "trainer.jsonl"):
            if not self._start("trainer", record):
                self._trainer(record)
        for path in sorted(self.rundir.metrics.glob("sampler-*.jsonl")):
            session = path.stem.removeprefix("sampler-")
            records = self.samplers.setdefault(session, [])
            records += [record for record in self._new(path) if not self._start("sampler", record)]
        for path in sorted(self.rundir.rollouts.glob("*.jsonl")):
            self._rollouts(path)
        for completions in (self.train, self.held_out):
            completions.sort(key=lambda seen: seen.version)

    def forget(self, before: int) -> None:
        """Drops completions by weights older than `before` and takes in no more of them, for who looks beside a run and
        never looks back."""
        self._oldest = before
        examined = self.exams[-1]["step"] if self.exams else 0
        self.train[:] = [seen for seen in self.train if seen.version >= before]
        self.held_out[:] = [seen for seen in self.held_out if seen.version >= examined]

    def rollout(self, seen: Seen) -> Rollout:
        """The whole of it, from disk."""
        with seen.file.open("rb") as file:
            file.seek(seen.offset)
            return msgspec.json.decode(file.readline(), type=Rollout)

    def _start(self, worker: str, record: dict) -> bool:
        """Whether it is such a record."""
        if record.get("kind") == "start" and isinstance(versions := record.get("versions"), dict):
            self.starts.append((worker, {str(name): str(version) for name, version in versions.items()}))
        return record.get("kind") == "start"

    def _trainer(self, record: dict) -> None:
        kind, step = record.get("kind"), record.get("step")
        if not isinstance(step, int) or not all(is_number(record.get(name)) for name in NEEDED.get(str(kind), ())):
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
            except DAMAGED:
                self.unreadable += 1
        return records

    def _rollouts(self, path: Path) -> None:
        for offset, line in self._tails.setdefault(path, Tail(path)).lines():
            try:
                rollout = msgspec.json.decode(line, type=Rollout)
                version, first = step_of(rollout.snapshots[-1]), next(iter(rollout.rewards.values())) or 0.0
            except (*DAMAGED, IndexError, StopIteration, ValueError):
                self.unreadable += 1
                continue
            if rollout.split == "train":
                low, high = self.scores.get(version, (first, first))
                self.scores[version] = min(low, first), max(high, first)
            if version < self._oldest:
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


def is_number(value: object) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool)


def version_of(record: dict) -> int:
    """Of the weights that a sampler had when it wrote this record; -1 before its first."""
    try:
        return step_of(record.get("snapshot") or "")
    except (ValueError, TypeError):
        return -1
