"""The run directory: checkpoints (weights and ledger together), snapshots, the endpoint."""

import random
from dataclasses import dataclass, field

KEEP = 2
"""Checkpoints."""


@dataclass(frozen=True, slots=True)
class Saved:
    """One checkpoint, as it was sealed."""

    incarnation: int
    step: int
    inbox: bytes
    """JSON, as in the real one."""
    weights: dict[int, int]
    history: tuple[str, ...]
    """Snapshots published on the way to these weights."""


@dataclass(slots=True)
class Endpoint:
    address: int
    steps: int = 0


@dataclass(slots=True)
class Disk:
    endpoint: Endpoint | None = None
    incarnations: int = 0
    checkpoints: list[Saved] = field(default_factory=list)
    """By incarnation, then step."""
    snapshots: list[str] = field(default_factory=list)
    rotten: set[str] = field(default_factory=set)

    def claim(self) -> int:
        self.incarnations += 1
        return self.incarnations

    def save(self, saved: Saved) -> None:
        self.checkpoints = [*self.checkpoints, saved][-KEEP:]

    def newest(self, dice: random.Random, stale: float) -> Saved | None:
        """Sometimes the newest one turns out to be corrupt, and an older one must do."""
        if len(self.checkpoints) > 1 and dice.random() < stale:
            self.checkpoints.pop()
        return self.checkpoints[-1] if self.checkpoints else None

    def prune(self, keep: int, in_use: set[str]) -> None:
        old = self.snapshots[:-keep]
        self.snapshots = [name for name in old if name in in_use] + self.snapshots[-keep:]

    def readable(self, snapshot: str) -> bool:
        return snapshot in self.snapshots and snapshot not in self.rotten
