"""One seed's story: puts the parts together and lets virtual time run until the run is complete and all have ended."""

import contextlib
import dataclasses
import logging
import random
import sys
from collections import Counter
from collections.abc import Iterator

from protocol.messages import Up
from tests.simulation.answers import forget, recipe
from tests.simulation.audit import Violation
from tests.simulation.clock import Clock
from tests.simulation.disk import Disk
from tests.simulation.machine import Machine
from tests.simulation.nemesis import Nemesis
from tests.simulation.network import Network
from tests.simulation.plan import draw
from tests.simulation.trainer import Trainer

PATIENCE_S = 1500.0
"""Without a step; nothing that the nemesis does lasts so long."""
ENDING_S = 300.0
"""For the last sampler to hear, or to read, that the run is complete."""
MAX_TRAINER_KILLS = 6


class History:
    def __init__(self, seed: int, verbose: bool = False, **conditions: object) -> None:
        """conditions: fields of the plan that are not left to chance."""
        self.verbose = verbose
        self.dice = random.Random(seed)
        self.plan = dataclasses.replace(draw(self.dice), **conditions)
        self.recipe = recipe(self.plan)
        self.clock = Clock()
        self.network = Network(self.plan, self.dice, self.clock)
        self.disk = Disk()
        self.counts: Counter[str] = Counter()
        self.is_complete = False
        self.peers: dict[bytes, tuple[Machine, int]] = {}
        self.excused: set[int] = set()
        """Groups that may be set aside though nothing is wrong with them."""
        self._moved_at = 0.0
        self._kills = 0
        self._failing: dict[tuple[str, int], int] = {}
        self._all: list[Machine] = []
        self._coming = 0
        self.trainer: Trainer | None = Trainer(self)
        for _ in range(self.plan.samplers):
            self.join("healthy", after_s=self.dice.choice((0.0, self.dice.uniform(0.0, 60.0))))
        if self.plan.hostile:
            self.join("hostile", after_s=self.dice.uniform(0.0, 60.0))
        self.nemesis = Nemesis(self)

    def run(self) -> Counter[str]:
        """Raises Violation."""
        forget()
        clock = self.clock
        with quiet():
            while not self.is_complete or self.machines() or self._coming:
                clock.step()
                if clock.now - self._moved_at > (ENDING_S if self.is_complete else PATIENCE_S):
                    raise Violation("stall", f"nothing has moved for {clock.now - self._moved_at:.0f} s")
        network = self.network
        self.counts.update({"histories": 1, "events": clock.events, "virtual hours": clock.now / 3600})
        self.counts.update({"messages": network.sent, "messages dropped": network.dropped.total()})
        self.counts.update({"messages repeated": network.repeated, "messages reordered": network.reordered})
        self.counts.update({f"messages dropped: {kind}": count for kind, count in network.dropped.items()})
        return self.counts

    def say(self, text: str, *arguments: object) -> None:
        if self.verbose:
            sys.stdout.write(f"{self.clock.now:9.2f}  {text % arguments}\n")

    # -- samplers ------------------------------------------------------------------------------------------------

    def machines(self, kind: str | None = None) -> list[Machine]:
        """Those that live."""
        self._all = [machine for machine in self._all if machine.alive]
        return [machine for machine in self._all if kind in (None, machine.kind)]

    def join(self, kind: str, after_s: float = 0.0) -> None:
        self._coming += 1
        self.clock.at(self.clock.now + after_s, None, self._joined, kind)

    def _joined(self, kind: str) -> None:
        self._coming -= 1
        self.counts["samplers"] += 1
        machine = Machine(self, self.counts["samplers"], kind)
        self._all.append(machine)
        self.say("%s comes", machine.name)

    def new_peer(self, machine: Machine) -> bytes:
        peer = b"%d/%d" % (machine.number, machine.uplink)
        self.peers[peer] = (machine, machine.uplink)
        return peer

    def fails(self, split: str, group_id: int) -> bool:
        """Some groups fail at first: once or twice in the whole history, less often than sets one aside."""
        work = (split, group_id)
        if work not in self._failing:
            self._failing[work] = self.dice.randint(1, 2) if self.dice.random() < self.plan.fail else 0
        self._failing[work] -= 1
        failed = self._failing[work] >= 0
        self.counts["failures"] += failed
        return failed

    def was_rejected(self, machine: Machine, why: str) -> None:
        self.counts[f"{machine.kind} samplers rejected"] += 1
        if machine.kind == "healthy":
            raise Violation("rejected", f"{machine.name}: {why}")

    # -- trainer -------------------------------------------------------------------------------------------------

    def arrive(self, machine: Machine, peer: bytes, address: int, message: Up) -> None:
        trainer = self.trainer
        if trainer and trainer.address == address:
            if self.verbose:
                self.say("%s says %s", machine.name, type(message).__name__)
            trainer.hear(peer, message)

    def moved(self) -> None:
        self._moved_at = self.clock.now

    def may_kill_trainer(self) -> bool:
        return self.trainer is not None and self._kills < MAX_TRAINER_KILLS and not self.is_complete

    def kill_trainer(self) -> None:
        if self.may_kill_trainer():
            self._kills += 1
            self.counts["trainer kills"] += 1
            self.counts[f"trainer kills in {self.trainer.phase}"] += 1
            self.trainer_ended(self.trainer, "is killed")

    def trainer_ended(self, trainer: Trainer, why: str) -> None:
        self.say("trainer %d %s at step %d in %s", trainer.incarnation, why, trainer.steps, trainer.phase)
        trainer.alive, self.trainer = False, None
        if not self.is_complete:
            self.clock.at(self.clock.now + self.dice.uniform(1.0, 20.0), None, self._restarted)

    def _restarted(self) -> None:
        self.trainer = Trainer(self)
        self.moved()

    def completed(self, trainer: Trainer) -> None:
        """All steps are done and saved: the books are closed."""
        self.is_complete = True
        self.moved()
        self.say("complete")
        trainer.audit.close(trainer.desk.train, trainer.steps)


@contextlib.contextmanager
def quiet() -> Iterator[None]:
    """Without the log lines that desk and session would write."""
    previous = logging.root.manager.disable
    logging.disable(logging.CRITICAL)
    try:
        yield
    finally:
        logging.disable(previous)


def simulate(seed: int, verbose: bool = False, **conditions: object) -> Counter[str]:
    """What happened in one history. Raises Violation; any other exception of the real parts is one, too."""
    try:
        return History(seed, verbose, **conditions).run()
    except Violation:
        raise
    except Exception as error:
        raise Violation("crash", f"{type(error).__name__}: {error}") from error
