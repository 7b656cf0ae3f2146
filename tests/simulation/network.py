"""Frames between samplers and trainer: lost, repeated, delayed and so reordered; whole directions cut for a while.

Worse than TCP, which does neither repeat nor reorder within a connection: sessions and reconnections do both.
"""

import random
from collections import Counter
from collections.abc import Callable

from protocol.codec import decode_down, decode_up, encode
from protocol.messages import Down, Up
from tests.simulation.clock import Clock, Process
from tests.simulation.plan import Plan

UP, DOWN = 0, 1
FLIGHT_S = 0.005


class Network:
    def __init__(self, plan: Plan, dice: random.Random, clock: Clock) -> None:
        self._plan, self._roll, self._clock = plan, dice.random, clock
        self._latest: dict[tuple[int, int], float] = {}
        self._cut: dict[tuple[int, int], float] = {}
        self.sent = self.repeated = self.reordered = 0
        self.dropped: Counter[str] = Counter()

    def cut(self, way: int, machine: int, seconds: float) -> None:
        """Nothing that is sent this way from now on arrives."""
        self._cut[way, machine] = self._clock.now + seconds

    def carry(
        self, way: int, machine: int, message: Up | Down, process: Process | None, arrive: Callable, *address: object
    ) -> None:
        """Lets `arrive(*address, message)` happen to the process once, twice or never."""
        self.sent += 1
        roll, plan = self._roll(), self._plan
        if roll < plan.drop[way] or (self._cut and self._cut.get((way, machine), 0.0) > self._clock.now):
            self.dropped[type(message).__name__] += 1
            return
        if plan.encoded:
            message = (decode_down if way else decode_up)(encode(message))
        self._deliver((way, machine), process, arrive, *address, message)
        if roll > 1.0 - plan.repeat[way]:
            self.repeated += 1
            self._deliver((way, machine), process, arrive, *address, message)

    def _deliver(self, line: tuple[int, int], process: Process | None, arrive: Callable, *arguments: object) -> None:
        time = self._clock.now + FLIGHT_S + self._roll() * self._plan.delay_s
        if time < self._latest.get(line, 0.0):
            self.reordered += 1
        else:
            self._latest[line] = time
        self._clock.at(time, process, arrive, *arguments)
