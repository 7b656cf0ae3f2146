"""Virtual time: what is to happen, in the order of time and then of planning."""

import heapq
from collections.abc import Callable


class Clock:
    """`now` is true time in seconds; a process adds its own offset, so that no two clocks agree."""

    def __init__(self) -> None:
        self.now = 0.0
        self.events = 0
        self._heap: list[tuple[float, int, Process | None, Callable, tuple]] = []

    def at(self, time: float, process: "Process | None", action: Callable, *arguments: object) -> None:
        """Plans an action, of a process or of the world around them."""
        self.events += 1
        heapq.heappush(self._heap, (time, self.events, process, action, arguments))

    def step(self) -> None:
        """Lets the next thing happen: not to a process that is dead, and later to one that is stopped."""
        self.now, _, process, action, arguments = heapq.heappop(self._heap)
        if process is None or (process.alive and process.backlog is None):
            action(*arguments)
        elif process.alive:
            process.backlog.append((action, arguments))


class Process:
    """Something that can be killed and paused. While it is stopped, whatever would happen to it waits in line."""

    def __init__(self, clock: Clock, offset: float) -> None:
        self.clock, self.offset = clock, offset
        self.alive = True
        self.backlog: list[tuple[Callable, tuple]] | None = None
        """Not None while the process is stopped."""

    def time(self) -> float:
        """What its own monotonic clock shows."""
        return self.clock.now + self.offset

    def later(self, seconds: float, action: Callable, *arguments: object) -> None:
        self.clock.at(self.clock.now + seconds, self, action, *arguments)

    def pause(self, seconds: float) -> None:
        """SIGSTOP, and SIGCONT after a while."""
        if self.backlog is None:
            self.backlog = []
            self.clock.at(self.clock.now + seconds, None, self._resume)

    def _resume(self) -> None:
        waiting, self.backlog = self.backlog or [], None
        for action, arguments in waiting:
            if self.alive:
                action(*arguments)
