"""How often a process may be started again: a crash heals, a crash loop is for a person."""

import time
from dataclasses import dataclass, field

MAX_RESTARTS, WINDOW_S = 5, 600.0
"""Of one process, so many within so many seconds."""


@dataclass(slots=True)
class Restarts:
    """The crashes of one process within the last WINDOW_S; `len` counts them."""

    times: list[float] = field(default_factory=list)

    def __len__(self) -> int:
        return len(self.times)

    def add(self) -> None:
        """It has crashed now."""
        now = time.monotonic()
        self.times = [then for then in self.times if now - then < WINDOW_S] + [now]

    @property
    def too_many(self) -> bool:
        return len(self.times) > MAX_RESTARTS
