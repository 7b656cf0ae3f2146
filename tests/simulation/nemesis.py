"""Strikes again and again while there is something to strike; then rests, so that the run can show that it recovers."""

from __future__ import annotations

from typing import TYPE_CHECKING

from tests.simulation.network import DOWN, UP

if TYPE_CHECKING:
    from tests.simulation.history import History
    from tests.simulation.machine import Machine

STRIKES = 20
UNTIL_S = 900.0
JUMP_S = 600.0
MAX_MACHINES = 6


class Nemesis:
    def __init__(self, history: History) -> None:
        self._history, self._dice, self._plan = history, history.dice, history.plan
        self._strikes = 0
        if self._plan.faults:
            self._again()

    def _again(self) -> None:
        history = self._history
        history.clock.at(history.clock.now + self._dice.expovariate(1.0 / self._plan.fault_s), None, self._strike)

    def _strike(self) -> None:
        history = self._history
        if history.is_complete or self._strikes >= STRIKES or history.clock.now > UNTIL_S:
            return
        self._strikes += 1
        getattr(self, self._dice.choice(self._plan.faults))()
        self._again()

    # -- samplers ------------------------------------------------------------------------------------------------

    def kill_sampler(self) -> None:
        if machine := self._victim():
            self._history.counts["sampler kills"] += 1
            machine.end("is killed")
            self._replace(machine)

    def leave(self) -> None:
        if machine := self._victim():
            self._history.counts["goodbyes"] += 1
            machine.end("leaves", goodbye=True)
            if not self._history.machines("healthy") or self._dice.random() < 0.5:
                self._replace(machine)

    def join(self) -> None:
        if len(self._history.machines()) < MAX_MACHINES:
            self._history.join("healthy")

    def foreign(self) -> None:
        self._history.join("foreign")

    def pause_sampler(self) -> None:
        if machine := self._victim():
            self._history.counts["pauses"] += 1
            seconds = self._pause_s()
            self._history.say("%s is paused for %.0f s", machine.name, seconds)
            machine.pause(seconds)

    def hang(self) -> None:
        """For a while, or for good where another sampler can do the work."""
        if machine := self._victim():
            self._history.counts["hangs"] += 1
            seconds = self._dice.uniform(10.0, 250.0)
            if machine.kind == "healthy" and len(self._history.machines("healthy")) > 1 and self._dice.random() < 0.3:
                machine.kind, seconds = "hung", 1e5
            self._history.say("%s hangs for %.0f s", machine.name, seconds)
            machine.hang(seconds)

    def partition(self) -> None:
        """One way or both, of one sampler or all."""
        ways = self._dice.choice(((UP,), (DOWN,), (UP, DOWN)))
        machines = self._history.machines()
        if machines and self._dice.random() < 0.7:
            machines = [self._dice.choice(machines)]
        seconds = self._pause_s()
        self._history.counts["partitions"] += 1
        for machine in machines:
            self._history.say("%s is cut off (%s) for %.0f s", machine.name, ways, seconds)
            for way in ways:
                self._history.network.cut(way, machine.number, seconds)

    def jump_sampler(self) -> None:
        if machine := self._victim():
            self._history.counts["clock jumps"] += 1
            self._history.say("%s: its clock jumps", machine.name)
            machine.jump(JUMP_S)

    # -- trainer -------------------------------------------------------------------------------------------------

    def kill_trainer(self) -> None:
        if self._history.may_kill_trainer():
            self._history.kill_trainer()

    def stop_trainer(self) -> None:
        if (trainer := self._history.trainer) and trainer.phase not in ("boot", "end"):
            self._history.counts["trainer stops"] += 1
            trainer.stopping = True

    def pause_trainer(self) -> None:
        if trainer := self._history.trainer:
            self._history.counts["pauses"] += 1
            seconds = self._pause_s()
            self._history.say("trainer %d is paused for %.0f s", trainer.incarnation, seconds)
            trainer.pause(seconds)

    def jump_trainer(self) -> None:
        if trainer := self._history.trainer:
            self._history.counts["clock jumps"] += 1
            self._history.say("trainer %d: its clock jumps", trainer.incarnation)
            trainer.jump(JUMP_S)

    def rot(self) -> None:
        """The newest snapshot's bytes change on the disk."""
        if self._history.disk.snapshots:
            self._history.counts["snapshots rotten"] += 1
            self._history.disk.rotten.add(self._history.disk.snapshots[-1])

    # -- inside --------------------------------------------------------------------------------------------------

    def _victim(self) -> Machine | None:
        machines = self._history.machines()
        return self._dice.choice(machines) if machines else None

    def _replace(self, machine: Machine) -> None:
        if machine.kind in ("healthy", "hung"):
            self._history.join("healthy", after_s=self._dice.uniform(1.0, 40.0))

    def _pause_s(self) -> float:
        """Often shorter than a peer may be silent, often longer."""
        return self._dice.choice((self._dice.uniform(1.0, 25.0), self._dice.uniform(25.0, 75.0)))
