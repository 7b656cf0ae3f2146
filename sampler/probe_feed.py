"""Which training prompts a probe gives to the engine, and when no more."""

import random
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Self

from protocol.messages import Failure, Group

if TYPE_CHECKING:
    from sampler.engine import Engine

ENOUGH = 400
"""Prompts after which a share of them is known to within five points (95 %, the worst case): nothing more is begun."""


def order(seed: int, rows: int) -> list[int]:
    """Rows in the order in which the first epoch of a run leases them (`trainer/ledger.py`)."""
    result = list(range(rows))
    random.Random(f"{seed}/0").shuffle(result)
    return result


@dataclass(slots=True)
class Feed:
    """Rows to be answered, until enough are or the time is nearly over.

    What was begun is ended: to leave out what takes longest would make completions look shorter than they are. So
    nothing is begun that would probably end too late.
    """

    rows: Sequence[int]
    """In the order in which they are begun."""
    seconds: float
    engine: "Engine"
    began: float = field(default_factory=time.monotonic)
    begun: int = 0
    answered: int = 0
    longest: float = 0.0
    """Seconds from the lease to the rewards of the slowest group."""
    failed: dict[int, str] = field(default_factory=dict)
    full: tuple[float, int] | None = None
    """Seconds and tokens until the first time that nothing more was begun."""

    def __iter__(self) -> Self:
        return self

    def __next__(self) -> tuple[int, int]:
        """(group id, row)"""
        passed = time.monotonic() - self.began
        if self.begun == min(len(self.rows), ENOUGH) or passed + self.longest >= self.seconds:
            self.full = self.full or (passed, self.engine.tokens)
            raise StopIteration
        self.begun += 1
        return self.begun - 1, self.rows[self.begun - 1]

    def add(self, row: int, result: Group | Failure) -> None:
        if isinstance(result, Failure):
            self.failed[row] = result.why
            return
        self.answered += 1
        self.longest = max(self.longest, result.seconds)

    def speed(self, tokens: int) -> float:
        """Tokens per second while the engine was kept full; of the whole probe where that was the smaller part."""
        passed = time.monotonic() - self.began
        if self.full and self.full[0] > passed / 2:
            passed, tokens = self.full
        return tokens / max(passed, 1e-9)
