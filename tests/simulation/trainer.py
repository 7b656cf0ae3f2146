"""One trainer process: a real Desk, served as in trainer/inbox.py, and the steps of trainer/{loop,store}.py.

`phase` is where the training thread is: boot, take, step (until the weights have changed), store (until the ledger
knows it), save (until the checkpoint does), exam (waits for its end), end.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import TYPE_CHECKING

import msgspec

from protocol.messages import DataSet, Group, Pulse, Stop, Up
from protocol.snapshot import snapshot_id
from tests.simulation.answers import AGREED, QuickDesk
from tests.simulation.audit import Audit
from tests.simulation.clock import Process
from tests.simulation.disk import Endpoint, Saved
from trainer.desk import Letters
from trainer.exam import Plan

if TYPE_CHECKING:
    from tests.simulation.history import History

GOODBYE_S = 10.0
MAX_SKIPPED = 2
"""Steps in a row that are not finite; the real one stops at one more."""


class Trainer(Process):
    def __init__(self, history: History) -> None:
        super().__init__(history.clock, history.dice.uniform(0.0, 1e6))
        self.history, self.dice, self.plan, self.disk = history, history.dice, history.plan, history.disk
        self.incarnation = self.disk.claim()
        self.address = 0 if self.plan.fixed_port else self.incarnation
        self.desk = QuickDesk(recipe=history.recipe, agreement=AGREED, incarnation=self.incarnation)
        self.desk.verdicts = {}
        self.audit = Audit(self.plan, history)
        self.phase = "boot"
        self.stopping = False
        self.steps = self.exams = self.unpublished = self.skipped = 0
        self.saved_step: int | None = None
        self.asked: set[int] = set()
        self.after: Callable[[], None] = self._next
        self.later(self.dice.uniform(1.0, 8.0), self._booted)
        self.later(self.plan.tick_s, self._tick)

    # -- the hub thread ------------------------------------------------------------------------------------------

    def hear(self, peer: bytes, message: Up) -> None:
        """What arrives while the process is stopped waits in its socket."""
        if self.backlog is None:
            self._receive(peer, message)
        else:
            self.backlog.append((self._receive, (peer, message)))

    def _receive(self, peer: bytes, message: Up) -> None:
        holder = self.audit.asked(self.desk, message)
        letters = self.desk.on(peer, message, self.time())
        self._post(letters)
        if holder is not None:
            self.audit.answered(self.desk, message, holder, letters)
        self._think()

    def jump(self, seconds: float) -> None:
        """Its clock shows more all of a sudden."""
        self.offset += seconds

    def _tick(self) -> None:
        self._post(self.desk.tick(self.time()))
        self._look_at_doubted()
        self._think()
        self.later(self.plan.tick_s, self._tick)

    def _announce(self) -> None:
        self._post(self.desk.news() + self.desk.tick(self.time()))

    def _post(self, letters: Letters) -> None:
        peers = self.history.peers
        for peer, message in letters:
            machine, uplink = peers[peer]
            self.audit.posted(machine, message)
            machine.send_down(uplink, message)
        self.audit.check(self.desk)

    def _look_at_doubted(self) -> None:
        if self.desk.doubted and self.phase in ("take", "exam"):
            doubted, self.desk.doubted = self.desk.doubted, None
            self.stopping |= doubted.snapshot in self.disk.rotten

    # -- the training thread -------------------------------------------------------------------------------------

    def _booted(self) -> None:
        """Continues the newest checkpoint and publishes its weights under the new incarnation."""
        saved = self.disk.newest(self.dice, self.plan.stale_checkpoint)
        if saved:
            self._restore(saved)
        self._publish()
        self.disk.endpoint = Endpoint(self.address)
        self.history.say("trainer %d goes on at step %d", self.incarnation, self.steps)
        self._examine(self._next)

    def _restore(self, saved: Saved) -> None:
        state = msgspec.json.decode(saved.inbox)
        self.steps = self.saved_step = saved.step
        self.exams = state["exams"]
        self.audit.weights, self.audit.lineage = dict(saved.weights), list(saved.history)
        if state["ledger"]:
            self.desk.sets = msgspec.convert(state["sets"], dict[str, DataSet])
            self.desk.open_ledger(self.desk.sets["train"].rows).restore(state["ledger"])

    def _think(self) -> None:
        """Whenever the hub thread has heard something."""
        if self.phase == "take" and self.stopping:
            self._stop()
        elif self.phase == "take" and self.desk.train:
            groups = self.desk.train.take(self.plan.per_step)
            if groups:
                self._learn(groups)
        elif self.phase == "exam" and self.stopping:
            self._stop()
        elif self.phase == "exam":
            self.after()

    def _learn(self, groups: list[Group]) -> None:
        self.audit.taken(groups, self.steps)
        self.phase = "step"
        self._then(self.plan.step_s * self.dice.uniform(0.5, 1.5), self._stepped, groups)

    def _stepped(self, groups: list[Group]) -> None:
        if self.skipped < MAX_SKIPPED and self.dice.random() < self.plan.skip:
            self.skipped += 1
            self.history.counts["steps skipped"] += 1
            self.desk.train.set_aside(f"step {self.steps + 1} was not finite")
            self.audit.aside(groups)
            self._next()
        else:
            self.skipped = 0
            self.audit.train(groups)
            self.steps += 1
            self.phase = "store"
            self._then(self.dice.uniform(0.1, 2.0), self._stored)

    def _stored(self) -> None:
        """The snapshot is written, or the disk was full and samplers go on with the one before."""
        missing = self.unpublished < self.plan.max_staleness and self.steps < self.plan.steps
        self._publish(missing and self.dice.random() < self.plan.unpublished)
        self._announce()
        self._examine(self._checkpoint)

    def _checkpoint(self) -> None:
        if self.steps % self.plan.checkpoint_every == 0:
            self.phase = "save"
            self._then(self.dice.uniform(0.1, 3.0), self._saved, self._next)
        else:
            self._next()

    def _publish(self, missing: bool = False) -> None:
        self.unpublished = self.unpublished + 1 if missing else 0
        if not missing:
            name = snapshot_id(self.steps, self.incarnation)
            self.disk.snapshots.append(name)
            self.audit.lineage.append(name)
        pulse = Pulse(snapshot=self.audit.lineage[-1], manifest_sha256="h")
        self.commit(pulse)
        self.history.moved()

    def commit(self, pulse: Pulse) -> None:
        """As the inbox does it."""
        if self.desk.train:
            self.desk.train.commit(self.steps)
            self.desk.train.publish(pulse.snapshot)
        self.desk.pulse = pulse

    def _saved(self, after) -> None:
        """Weights and ledger, in one piece."""
        if self.saved_step != self.steps:
            self.saved_step = self.steps
            state = msgspec.json.encode(self.state())
            weights, lineage = dict(self.audit.weights), tuple(self.audit.lineage)
            self.disk.save(Saved(self.incarnation, self.steps, state, weights, lineage))
        after()

    def state(self) -> dict:
        """As the inbox does it."""
        ledger = self.desk.train.state() if self.desk.train else None
        return {"ledger": ledger, "sets": msgspec.to_builtins(self.desk.sets), "exams": self.exams}

    def _next(self) -> None:
        in_use = {sampler.snapshot for sampler in self.desk.samplers.values() if sampler.snapshot}
        in_use |= {exam.pulse.snapshot for exam in (self.desk.exam, self.desk.planned) if exam}
        self.disk.prune(self.plan.max_staleness + 2, in_use)
        if self.steps < self.plan.steps:
            self.phase = "take"
            self._think()
        else:
            self._examine(self._save_the_last, to_the_end=True)

    def _save_the_last(self) -> None:
        self.phase = "save"
        self._then(0.1, self._saved, self._finish)

    def _examine(self, after: Callable[[], None], to_the_end: bool = False) -> None:
        """As trainer/exams.py does it: takes answers, begins what is due, and waits where it must."""
        self.after = functools.partial(self._examine, after, to_the_end)
        groups, exam = None, self.desk.exam
        if exam:
            groups = self.desk.end_exam()
        if groups is not None:
            self.audit.examined(groups, self.exams - 1, exam.pulse.snapshot)
            self.history.counts["exams beside training"] += exam.alone
            self.history.moved()
            self._announce()
        is_open, is_due = bool(self.desk.exam or self.desk.planned), self._is_due()
        if is_open and (is_due or to_the_end):
            self.phase = "exam"
            return
        if is_due:
            self.asked.add(self.steps)
            self.exams, number = self.exams + 1, self.exams
            alone = 0 < self.steps < self.plan.steps
            self.desk.start_exam(Plan(number=number, pulse=self.desk.pulse, alone=alone))
            self._announce()
            self._examine(after, to_the_end)
            return
        after()

    def _is_due(self) -> bool:
        every = self.plan.exams
        beside = every > 0 and self.steps % every == 0
        return every >= 0 and (beside or self.steps in (0, self.plan.steps)) and self.steps not in self.asked

    def _stop(self) -> None:
        """Asked to: saves, says so, ends."""
        self.phase = "end"
        self._saved(lambda: self._farewell(final=False))
        self.history.trainer_ended(self, "stopped in order")

    def _finish(self) -> None:
        self.phase = "end"
        self.disk.endpoint = Endpoint(self.address, steps=self.steps)
        self._farewell(final=True)
        self.history.completed(self)
        self.later(GOODBYE_S, self.history.trainer_ended, self, "is done")

    def _farewell(self, final: bool) -> None:
        self.desk.stop = Stop(final=final)
        self._announce()

    def _then(self, seconds: float, action, *arguments: object) -> None:
        """The next act of a step, unless the trainer is killed just before it."""
        if self.dice.random() < self.plan.boundary and self.history.may_kill_trainer():
            seconds, action, arguments = seconds * self.dice.random(), self.history.kill_trainer, ()
        self.later(seconds, action, *arguments)
