"""What must be true, whatever happens. The model is the audit: training group g adds 1 to weight g.

One Audit goes with one trainer process; weights and lineage come from its checkpoint, like the real ones.
"""

from __future__ import annotations

from collections import Counter
from typing import TYPE_CHECKING

from protocol.messages import Ack, Beat, Down, Failure, Group, Hello, Lease, Up
from protocol.snapshot import snapshot_id, step_of
from tests.simulation.answers import EXAM_ROWS, SIZE, is_sound, make
from tests.simulation.plan import Plan
from trainer.desk import MAX_INVALID, Desk, Letters
from trainer.ledger import Ledger

if TYPE_CHECKING:
    from tests.simulation.history import History
    from tests.simulation.machine import Machine


class Violation(Exception):
    """kind: in one or two words. The message tells more."""

    def __init__(self, kind: str, text: str) -> None:
        super().__init__(f"{kind}: {text}")
        self.kind = kind


class Audit:
    def __init__(self, plan: Plan, history: History) -> None:
        self._plan, self._history = plan, history
        self.cap = (plan.max_staleness + 1) * plan.per_step
        self.weights: dict[int, int] = {}
        """0: done without being trained, because the group had no signal."""
        self.lineage: list[str] = []
        """Snapshots that were published on the way to these weights, oldest first."""
        self._credit: dict[str, int] = {}
        """Completions that each session has asked for and was not leased."""
        self._unsound: Counter[str] = Counter()

    # -- after every event ---------------------------------------------------------------------------------------

    def check(self, desk: Desk) -> None:
        if desk.train is not None:
            self._bounded(desk.train, self.cap)
        if desk.exam is not None:
            self._bounded(desk.exam.ledger, EXAM_ROWS)

    def _bounded(self, ledger: Ledger, cap: int) -> None:
        leases, ready = ledger.leases.keys(), ledger.ready.keys()
        count, held = len(leases) + len(ready), leases | ready
        if count > cap:
            raise Violation("cap", f"{len(leases)} groups leased and {len(ready)} ready, at most {cap} may be")
        if count == cap:
            self._history.counts["events at the cap"] += 1
        if len(held) < count or not held.isdisjoint(ledger.taken):
            raise Violation("overlap", f"leased {set(leases)}, ready {set(ready)}, taken {ledger.taken}")
        if held and (min(held) < ledger.done_below or not held.isdisjoint(ledger.done_above)):
            raise Violation("overlap", f"leased {set(leases)} or ready {set(ready)}, but done")

    def asked(self, desk: Desk, message: Up) -> str | None:
        """What a sampler asks for; it gets no more. Returns whose lease a group is about: "" is nobody's."""
        match message:
            case Beat():
                self._credit[message.session] = message.want
            case Hello():
                self._credit[message.session] = 0
            case Group() | Failure():
                self._credit[message.session] = self._credit.get(message.session, 0) + SIZE[message.split]
                return self._holder(desk, message)
        return None

    def _holder(self, desk: Desk, answer: Group | Failure) -> str:
        ledger = desk.train if answer.split == "train" else desk.exam and desk.exam.ledger
        lease = ledger.leases.get(answer.group_id) if ledger else None
        return lease.session if lease else ""

    def posted(self, machine: Machine, message: Down) -> None:
        if isinstance(message, Lease):
            session = machine.session.name
            self._credit[session] = self._credit.get(session, 0) - len(message.items) * SIZE[message.split]
            if self._credit[session] < 0:
                raise Violation("credit", f"{machine.name} got {-self._credit[session]} completions unasked")

    def answered(self, desk: Desk, answer: Group | Failure, holder: str, letters: Letters) -> None:
        """holder: of the lease before the answer came."""
        status = next((letter.status for _, letter in letters if isinstance(letter, Ack)), "from a stranger")
        self._history.counts[f"groups {status}"] += 1
        others = status in ("failed", "invalid") and holder not in ("", answer.session)
        if others and self._holder(desk, answer) != holder:
            raise Violation("taken away", f"group {answer.group_id} from a sampler that works on it")
        if isinstance(answer, Group):
            self._judged(desk, answer, holder, status)

    def _judged(self, desk: Desk, group: Group, holder: str, status: str) -> None:
        if status == "no_signal":
            self.train([group], by=0)
        if is_sound(group):
            self._unsound[group.session] = 0
            self._history.counts["groups accepted without a lease"] += status == "accepted" and not holder
        elif status in ("accepted", "no_signal"):
            raise Violation("unsound", f"{group.split} group {group.group_id} was accepted")
        elif status == "invalid":
            self._unsound[group.session] += holder == group.session  # one that is sent again counts once
            if self._unsound[group.session] >= MAX_INVALID and group.session in desk.samplers:
                raise Violation("not banned", f"{self._unsound[group.session]} unsound groups in a row")

    # -- at every step -------------------------------------------------------------------------------------------

    def taken(self, groups: list[Group], step: int) -> None:
        """step: how many were done before."""
        for group in groups:
            self._sampled_well(group, step, self._plan.max_staleness)
            if not is_sound(group):
                raise Violation("unsound", f"group {group.group_id} is to be trained")

    def _sampled_well(self, group: Group, step: int, max_staleness: int) -> None:
        for name in {span.snapshot for item in group.completions for span in item.spans}:
            if name not in self.lineage:
                raise Violation("lineage", f"{group.split} group {group.group_id} at step {step} was sampled by {name}")
            if step - step_of(name) > max_staleness:
                raise Violation("stale", f"{group.split} group {group.group_id} at step {step} was sampled by {name}")

    def train(self, groups: list[Group], by: int = 1) -> None:
        self._history.counts["groups trained"] += len(groups) * by
        for group in groups:
            if group.group_id in self.weights:
                raise Violation("trained twice", f"group {group.group_id}")
            self.weights[group.group_id] = by

    def aside(self, groups: list[Group]) -> None:
        """Their step was not finite: they may end in quarantine."""
        self._history.excused |= {group.group_id for group in groups}

    def examined(self, groups: list[Group], number: int, snapshot: str) -> None:
        self._history.counts["exams"] += 1
        ids = sorted(group.group_id for group in groups)
        if ids != list(range(number * EXAM_ROWS, (number + 1) * EXAM_ROWS)):
            raise Violation("exam", f"exam {number} has the answers {ids}")
        if sorted(group.row for group in groups) != list(range(EXAM_ROWS)):
            raise Violation("exam", f"exam {number} has the rows {sorted(group.row for group in groups)}")
        names = {span.snapshot for group in groups for item in group.completions for span in item.spans}
        if names != {snapshot}:
            raise Violation("exam", f"exam {number} of {snapshot} was sampled by {names}")

    # -- in the end ----------------------------------------------------------------------------------------------

    def close(self, ledger: Ledger, step: int) -> None:
        """The weights and the ledger tell the same, and every group that was not trained still can be."""
        wrong = set(ledger.quarantined) - self._plan.poisoned - self._history.excused
        if wrong:
            group_id = min(wrong)
            raise Violation("quarantined", f"healthy group {group_id}: {ledger.quarantined[group_id]}")
        self._history.counts["groups set aside"] += len(ledger.quarantined)
        self._history.counts["poisoned groups set aside"] += len(self._plan.poisoned & set(ledger.quarantined))
        frontier = max([*self.weights, *ledger.leases, *ledger.ready, ledger.done_below - 1, *ledger.done_above]) + 1
        for group_id in range(frontier):
            weight, done = self.weights.get(group_id), ledger.is_done(group_id)
            if (weight is not None) != (done and group_id not in ledger.quarantined):
                kind = "lost" if weight is None else "trained twice"
                raise Violation(kind, f"group {group_id} weighs {weight}, the ledger says that it is done: {done}")
        self._still_open(ledger, step, frontier)

    def _still_open(self, ledger: Ledger, step: int, frontier: int) -> None:
        """Goes on with one perfect sampler until all groups that were begun are done."""
        ledger.expire(float("inf"))
        ledger.steps = None
        for now in range(3 * self.cap + frontier):
            if ledger.done_below >= frontier:
                return
            name = snapshot_id(step + now, 9999)
            ledger.publish(name)
            for group_id, row in ledger.grant("auditor", name, self.cap, 0.0):
                ledger.offer(make("auditor", "train", group_id, row, (name,), True))
            if ledger.take(self._plan.per_step):
                ledger.commit(step + now + 1)
            else:
                break
        missing = [group_id for group_id in range(frontier) if not ledger.is_done(group_id)]
        if missing:
            raise Violation("lost", f"groups {missing} are neither done nor leased to anybody who asks")
