"""What the trainer answers to its samplers: the protocol as a state machine, without sockets, clocks or threads.

`on` takes one message and the time, `tick` only the time; both return the messages to send.
"""

import logging
import math
from dataclasses import dataclass, field

from protocol.errors import UserError
from protocol.messages import (
    MAX_LEASES,
    Ack,
    Agreement,
    Beat,
    Bye,
    DataSet,
    Down,
    Failure,
    Group,
    Hello,
    Lease,
    Pulse,
    Rejection,
    Split,
    Status,
    Stop,
    Unreadable,
    Up,
    Welcome,
    Who,
)
from protocol.recipe import Recipe
from trainer.accept import has_reference, problem
from trainer.exam import Exam, Plan, open_exam
from trainer.ledger import Ledger
from trainer.solved import Solved

log = logging.getLogger(__name__)

MAX_INVALID = 20
"""Unsound groups in a row after which a sampler is sent away."""

MAX_QUARANTINED = 10
"""Groups that nobody could answer after which the run stops, unless ten times as many went well."""

Letters = list[tuple[bytes, Down]]


class BrokenGroups(UserError):
    """Groups fail again and again: a reward function or the data is broken, and training on the rest would hide it."""


@dataclass(slots=True)
class Sampler:
    peer: bytes
    seen: float
    snapshot: str | None = None
    want: int = 0
    progress: int = 0
    unsound: set[int] = field(default_factory=set)
    """Groups that it answered without sense."""
    moved: float = 0.0
    """When it last made progress, or held nothing to make progress with."""


@dataclass(slots=True)
class Desk:
    recipe: Recipe
    agreement: Agreement
    incarnation: int
    train: Ledger | None = None
    """None until a sampler or a checkpoint says how many rows there are."""
    exam: Exam | None = None
    planned: Plan | None = None
    """An exam that begins when the first sampler says how many held-out rows there are."""
    sets: dict[Split, DataSet] = field(default_factory=dict)
    samplers: dict[str, Sampler] = field(default_factory=dict)
    pulse: Pulse | None = None
    stop: Stop | None = None
    doubted: Pulse | None = None
    """A snapshot that a sampler could not read."""
    banned: set[str] = field(default_factory=set)
    """Sessions that were sent away."""
    unsound: dict[str, int] = field(default_factory=dict)
    """By session, however often it says hello: unsound groups since its last sound one; none before the first."""
    solved: Solved = field(default_factory=Solved)
    counts: dict[str, int] = field(default_factory=dict)
    """Groups by the status they were acknowledged with, and other things worth a number."""

    def on(self, peer: bytes, message: Up, now: float) -> Letters:
        if isinstance(message, Hello):
            return self._hello(peer, message, now)
        sampler = self.samplers.get(message.session)
        if sampler is None:
            return [(peer, Who())]
        sampler.peer, sampler.seen = peer, now
        match message:
            case Beat():
                return self._beat(message, sampler, now)
            case Group():
                return [(peer, self._group(message, sampler)), *self._grant(message.session, now)]
            case Failure():
                return [(peer, self._failure(message))]
            case Unreadable():
                log.error("sampler %s cannot read %s: %s", message.session, message.snapshot, message.why)
                self._count("snapshots_unreadable")
                announced = [pulse for pulse in (self.pulse, self.exam and self.exam.pulse) if pulse]
                self.doubted = next((p for p in announced if p.snapshot == message.snapshot), self.doubted)
                if self.exam and self.exam.pulse.snapshot == message.snapshot:
                    self.exam.hand_over(message.session, self.samplers)
            case Bye():
                self._lose(message.session, "said goodbye")
        return []

    def tick(self, now: float) -> Letters:
        """Gives up on silent samplers and stuck leases, and offers what that frees to the others."""
        for session, sampler in list(self.samplers.items()):
            if now - sampler.seen > self.recipe.network.dead_s:
                self._count("samplers_lost")
                self._lose(session, f"was silent for {self.recipe.network.dead_s:.0f} s")
            elif self.exam and now - sampler.moved >= self.recipe.network.lease_s:
                self.exam.hand_over(session, self.samplers)
        for ledger in self._ledgers().values():
            self._count("leases_expired", len(ledger.expire(now)))
        return [letter for session in list(self.samplers) for letter in self._grant(session, now)]

    def news(self) -> Letters:
        """After new weights or the end: what every sampler should hear without waiting for its next beat."""
        letters = [(sampler.peer, self._news(session)) for session, sampler in self.samplers.items()]
        return [(peer, message) for peer, message in letters if message]

    def start_exam(self, plan: Plan) -> None:
        """Leases every held-out row once, beside training, to samplers that keep the plan's weights until the end."""
        if not self.sets:
            self.planned = plan
        else:
            self.exam, self.planned = open_exam(plan, self.sets["eval"].rows, self.recipe.network.lease_s), None

    def end_exam(self) -> list[Group] | None:
        """Its answers, once there is one to every row; None before."""
        if self.exam is None or not self.exam.ledger.finished():
            return None
        groups, self.exam = list(self.exam.ledger.ready.values()), None
        return groups

    def open_ledger(self, rows: int) -> Ledger:
        trainer, network = self.recipe.trainer, self.recipe.network
        self.train = Ledger(
            rows=rows,
            per_step=trainer.prompts_per_step,
            max_staleness=trainer.max_staleness,
            lease_s=network.lease_s,
            seed=self.recipe.seed,
            refill=math.ceil(trainer.refill * trainer.prompts_per_step),
            steps=trainer.steps,
        )
        if self.pulse:
            self.train.publish(self.pulse.snapshot)
        return self.train

    # -- inside --------------------------------------------------------------------------------------------------

    def _hello(self, peer: bytes, hello: Hello, now: float) -> Letters:
        why = self._disagreement(hello)
        if why:
            self._count("samplers_rejected")
            log.warning("rejected sampler %s: %s", hello.session, why)
            return [(peer, Rejection(why=why))]
        if not self.sets:
            self.sets = {"train": hello.train, "eval": hello.eval}
        if self.train is None:
            self.open_ledger(hello.train.rows)
        if self.planned:
            self.start_exam(self.planned)
        if hello.session not in self.samplers:
            log.info("sampler %s joined (%s)", hello.session, hello.versions)
        self.samplers[hello.session] = Sampler(peer=peer, seen=now, moved=now)
        letters: Letters = [(peer, Welcome(incarnation=self.incarnation))]
        return letters + [(peer, message) for message in (self._news(hello.session),) if message]

    def _disagreement(self, hello: Hello) -> str | None:
        if hello.session in self.banned:
            return f"it sent {MAX_INVALID} unsound groups; see the trainer's log"
        for name in self.agreement.__struct_fields__:
            ours, theirs = getattr(self.agreement, name), getattr(hello.agreement, name)
            if ours != theirs:
                return f"{name} differs: the trainer has {ours}, this sampler {theirs}"
        if not hello.train.rows:
            return "its training data have no rows"
        told: dict[Split, DataSet] = {"train": hello.train, "eval": hello.eval}
        for split, theirs in told.items():
            ours = self.sets.get(split, theirs)
            if ours != theirs:
                return f"{split} data differ: this run has {ours.rows} rows ({ours.fingerprint}), this sampler {theirs}"
        return None

    def _beat(self, beat: Beat, sampler: Sampler, now: float) -> Letters:
        moved = beat.progress != sampler.progress
        if moved or not beat.held:
            sampler.moved = now
        sampler.snapshot, sampler.want, sampler.progress = beat.snapshot, beat.want, beat.progress
        for split, ledger in self._ledgers().items():
            held = {group_id for kind, group_id in beat.held if kind == split}
            ledger.beat(beat.session, held, moved, now, self.recipe.network.resend_s)
        answer = self._news(beat.session)
        letters: Letters = [(sampler.peer, answer)] if answer else []
        return letters + self._grant(beat.session, now)

    def _news(self, session: str) -> Stop | Pulse | None:
        """Who takes part in an exam keeps its weights until it is over."""
        exam = self._exam_of(session)
        return self.stop or (exam.pulse if exam else self.pulse)

    def _exam_of(self, session: str) -> Exam | None:
        """The one that a sampler takes part in."""
        return self.exam if self.exam and self.exam.has(session, self.samplers) else None

    def _grant(self, session: str, now: float) -> Letters:
        """What a sampler asked for, within its part of all."""
        sampler = self.samplers.get(session)
        if sampler is None or self.stop or self._stands_still(sampler, now):
            return []
        letters: Letters = []
        for split, ledger in self._ledgers().items():
            if split == "eval" and not self._exam_of(session):
                continue
            want = min(MAX_LEASES, sampler.want // self._size(split))
            if not want or not ledger.can_grant(sampler.snapshot):
                continue
            items = ledger.grant(session, sampler.snapshot, want, now, self._part(session, split, now))
            sampler.want -= len(items) * self._size(split)
            letters += [(sampler.peer, Lease(split=split, items=items))] if items else []
        return letters

    def _part(self, session: str, split: Split, now: float) -> float:
        """Of the completions that all samplers at work can hold, the share that this one can.

        Without it the first one to load new weights would take every lease, and the others had nothing to do.
        """
        ledgers = self._ledgers()
        room = {
            name: sampler.want + sum(ledger.held(name) * self._size(kind) for kind, ledger in ledgers.items())
            for name, sampler in self.samplers.items()
            if name == session or self._at_work(name, split, now)
        }
        return room[session] / max(1, sum(room.values()))

    def _at_work(self, session: str, split: Split, now: float) -> bool:
        """Whether leases of this split may go to a sampler, now or as soon as it has loaded the weights."""
        sampler = self.samplers[session]
        answers = now - sampler.seen <= 2 * self.recipe.network.beat_s and not self._stands_still(sampler, now)
        return answers and (split == "train" or self._exam_of(session) is not None)

    def _stands_still(self, sampler: Sampler, now: float) -> bool:
        """What was taken from its engine is for others."""
        return now - sampler.moved >= self.recipe.network.lease_s

    def _group(self, group: Group, sampler: Sampler) -> Ack:
        ledger = self._ledgers().get(group.split)
        why = self._problem(group)
        status: Status
        if ledger is None:
            status = "unknown"
        elif why:
            status, before = "invalid", self.unsound.get(group.session)
            held = ledger.fail(group.session, group.group_id, why, trusted=before == 0)
            if held or group.group_id not in sampler.unsound:  # else sent again, because our answer was lost
                self.unsound[group.session] = (before or 0) + 1
            sampler.unsound.add(group.group_id)
        else:
            status = ledger.offer(group)
            self.unsound[group.session] = 0
            if group.split == "train" and status in ("accepted", "no_signal"):
                self.solved.add(group)
        sampler.want += self._size(group.split)
        self._count(f"{group.split}/{status}")
        if status not in ("accepted", "duplicate", "no_signal"):
            log.warning("%s group %d from %s: %s %s", group.split, group.group_id, group.session, status, why or "")
        if self.unsound.get(group.session, 0) >= MAX_INVALID:
            self.banned.add(group.session)
            self._lose(group.session, f"sent {MAX_INVALID} unsound groups, the last one: {why}")
        return Ack(split=group.split, group_id=group.group_id, status=status, why=why or "")

    def _problem(self, group: Group) -> str | None:
        recipe, training = self.recipe, group.split == "train"
        return problem(
            group,
            completions=self._size(group.split),
            max_tokens=recipe.sampling.max_tokens,
            vocabulary=self.agreement.vocabulary,
            reference=training and has_reference(group, recipe),
        )

    def _size(self, split: Split) -> int:
        """Completions of one of its groups."""
        return self.recipe.sampling.group_size if split == "train" else self.recipe.eval.samples

    def _failure(self, failure: Failure) -> Ack:
        log.warning("%s group %d failed: %s", failure.split, failure.group_id, failure.why)
        ledger = self._ledgers().get(failure.split)
        if ledger:
            ledger.fail(failure.session, failure.group_id, failure.why, number=failure.number)
            bad, done = ledger.given_up(), ledger.done_count() + len(ledger.ready)
            if bad >= MAX_QUARANTINED and done < 10 * bad:
                raise BrokenGroups(f"{bad} of {done} groups could not be answered, the last one: {failure.why}")
        self._count(f"{failure.split}/failed")
        self.samplers[failure.session].want += self._size(failure.split)
        return Ack(split=failure.split, group_id=failure.group_id, status="failed", why=failure.why)

    def _lose(self, session: str, why: str) -> None:
        del self.samplers[session]
        freed = sum(ledger.drop(session) for ledger in self._ledgers().values())
        log.info("sampler %s %s; %d leases go to others", session, why, freed)

    def _ledgers(self) -> dict[Split, Ledger]:
        """An exam's first: it is short, and newer weights wait for it."""
        found: dict[Split, Ledger] = {"eval": self.exam.ledger} if self.exam else {}
        if self.train:
            found["train"] = self.train
        return found

    def _count(self, name: str, by: int = 1) -> None:
        self.counts[name] = self.counts.get(name, 0) + by
