"""Which prompt groups are leased, ready, trained: exactly-once bookkeeping without clocks, sockets or files.

A group id `g` is row `order(epoch)[g % rows]` of the data set in epoch `g // rows`. The trained ids are saved in the
same atomic checkpoint as the weights, so each group is trained once in the history of any checkpoint. A group without
signal counts as trained while `spare` lasts: the next id takes its place in the step. All else
(leases, ready groups, sessions) may be lost at any time and is made again.

Staleness bounds what is handed out: the group in slot q of the queue is trained `q // per_step` steps after the next
one, so it is leased only to a sampler whose weights will then be at most `max_staleness` steps old. With the newest
weights that admits (max_staleness + 1) * per_step groups, which also bounds the trainer's memory.
"""

import heapq
import math
import random
from collections import Counter
from dataclasses import dataclass

from protocol.messages import Group, Status, without_signal
from protocol.snapshot import step_of

MAX_TRIES = 5
"""Failures (not lost samplers) after which a group is set aside with its reason."""


@dataclass(slots=True)
class Lease:
    session: str
    version: int
    granted: float
    deadline: float


class Ledger:
    """One split's groups. `now` is any monotonic clock in seconds.

    rows: of the data set. per_step: groups that one step trains. first, last: the ids handed out are
    first <= id < last (last None: without end). seed None: rows in their order. refill: groups without signal that
    others may replace in a step. steps: after which no group is trained any more (None: without end).
    """

    def __init__(
        self,
        *,
        rows: int,
        per_step: int,
        max_staleness: int,
        lease_s: float,
        seed: int | None,
        first: int = 0,
        last: int | None = None,
        step: int = 0,
        refill: int = 0,
        steps: int | None = None,
    ) -> None:
        self.rows, self.per_step, self.max_staleness = rows, per_step, max_staleness
        self.lease_s, self.seed, self.first, self.last = lease_s, seed, first, last
        self.step, self.steps = step, steps
        self.refill = self.spare = refill
        self.lineage: dict[str, int] = {}
        self.leases: dict[int, Lease] = {}
        self._held: Counter[str] = Counter()
        self.ready: dict[int, Group] = {}
        self.taken: set[int] = set()
        self.done_below = first
        self.done_above: set[int] = set()
        self.quarantined: dict[int, str] = {}
        self._tries: dict[int, int] = {}
        self._retry: list[int] = []
        self._doubted: list[int] = []
        self._heard: set[tuple[str, int]] = set()
        self._fresh = first
        self._orders: dict[int, list[int]] = {}

    # -- what samplers do ----------------------------------------------------------------------------------------

    def grant(
        self, session: str, snapshot: str | None, want: int, now: float, part: float = 1.0
    ) -> list[tuple[int, int]]:
        """Up to `want` leases, (group id, row), oldest ids first, for a sampler that has loaded `snapshot`.

        part: of all groups that may be leased to samplers with these weights, those that this one may hold.
        """
        granted: list[tuple[int, int]] = []
        version = self.lineage.get(snapshot or "")
        if version is None:
            return granted
        want = min(want, math.ceil(part * self._leasable(version)) - self._held[session])
        while len(granted) < want and self._has_slot(version):
            group_id = self._next()
            if group_id is None:
                break
            self.leases[group_id] = Lease(session, version, now, now + self.lease_s)
            self._held[session] += 1
            granted.append((group_id, self.row(group_id)))
        return granted

    def can_grant(self, snapshot: str | None) -> bool:
        """Whether anything is left to lease for a sampler that has loaded `snapshot`."""
        version = self.lineage.get(snapshot or "")
        return version is not None and self._has_slot(version)

    def held(self, session: str) -> int:
        """Leases of a session."""
        return self._held[session]

    def offer(self, group: Group) -> Status:
        """Decides over an answered lease that `accept.problem` found sound; returns the status to acknowledge."""
        group_id = group.group_id
        if self.is_done(group_id) or group_id in self.ready or group_id in self.taken:
            return "duplicate"
        outstanding = len(self.leases) + len(self.ready)
        cap = (self.max_staleness + 1) * self.per_step
        if group_id < self.first or group_id >= self._fresh + cap or group.row != self.row(group_id):
            return "unknown"
        if group_id not in self.leases and outstanding >= cap:
            return "full"
        leased = self._end_lease(group_id)
        if self._staleness(group) > self.max_staleness:
            if leased:  # else its turn comes, or is in the queue already
                self._requeue(group_id)
            return "stale"
        while self._doubted:
            self._requeue(self._doubted.pop())
        if self.spare and without_signal([completion.reward for completion in group.completions]):
            self.spare -= 1
            self._mark_done(group_id)
            return "no_signal"
        self.ready[group_id] = group
        return "accepted"

    def fail(self, session: str, group_id: int, why: str, *, number: int = 0, trusted: bool = True) -> bool:
        """A lease that its sampler could not answer; tried again, and set aside after MAX_TRIES. False: no such lease.

        number: of the failure in its session; heard again, it is no other try (0: each counts). Not trusted: the
        sampler itself may be the reason. Then this is no try, and other groups come first, so that a sound answer
        to one of them can tell.
        """
        lease = self.leases.get(group_id)
        if lease is None or lease.session != session or (session, number) in self._heard:
            return False
        if number:
            self._heard.add((session, number))
        self._end_lease(group_id)
        if not trusted:
            self._doubted.append(group_id)
            return True
        self._tries[group_id] = self._tries.get(group_id, 0) + 1
        if self._tries[group_id] >= MAX_TRIES:
            self.quarantined[group_id] = why
            self._mark_done(group_id)
        else:
            self._requeue(group_id)
        return True

    def beat(self, session: str, held: set[int], moved: bool, now: float, resend_s: float) -> None:
        """A sampler names the leases it holds: one it never received goes back; progress extends the others."""
        for group_id, lease in list(self.leases.items()):
            if lease.session != session:
                continue
            if group_id not in held and now - lease.granted > resend_s:
                self._release(group_id)
            elif moved:
                lease.deadline = now + self.lease_s

    def expire(self, now: float) -> list[int]:
        """Takes back leases that saw no progress for `lease_s`."""
        late = [group_id for group_id, lease in self.leases.items() if lease.deadline <= now]
        for group_id in late:
            self._release(group_id)
        return late

    def drop(self, session: str) -> int:
        """A sampler is gone: its leases go back. Returns how many."""
        held = [group_id for group_id, lease in self.leases.items() if lease.session == session]
        for group_id in held:
            self._release(group_id)
        return len(held)

    # -- what the trainer does -----------------------------------------------------------------------------------

    def take(self, count: int) -> list[Group] | None:
        """The oldest `count` ready groups, none of them too stale; None until there are so many.

        Waits also for leases that a step begun now would make too stale: to drop what is slow and sample it anew
        would waste it and, worse, prefer prompts with short answers.
        """
        if len(self.ready) < count:
            return None
        if any(self.step + 1 - lease.version > self.max_staleness for lease in self.leases.values()):
            return None
        groups = [self.ready.pop(group_id) for group_id in sorted(self.ready)[:count]]
        self.taken = {group.group_id for group in groups}
        return groups

    def commit(self, step: int) -> None:
        """The taken groups are trained; `step` optimizer steps have been done."""
        for group_id in self.taken:
            self._mark_done(group_id)
        self.taken = set()
        self.step = step
        self.spare = self.refill
        for group_id, group in list(self.ready.items()):
            if self._staleness(group) > self.max_staleness:
                del self.ready[group_id]
                self._requeue(group_id)

    def set_aside(self, why: str) -> None:
        """The taken groups broke a step: they count as done, and the checkpoint keeps the reason."""
        for group_id in self.taken:
            self.quarantined[group_id] = why
            self._mark_done(group_id)
        self.taken = set()
        self.spare = self.refill

    def publish(self, snapshot: str) -> None:
        """From now on `snapshot` counts; those too old for any further step do not."""
        self.lineage[snapshot] = step_of(snapshot)
        oldest = self.step - self.max_staleness
        self.lineage = {name: step for name, step in self.lineage.items() if step >= oldest}

    def finished(self) -> bool:
        """Every id up to `last` is ready, trained or set aside."""
        return self.last is not None and self.last - self.first == len(self.ready) + self.done_count()

    # -- state that a checkpoint keeps ---------------------------------------------------------------------------

    def state(self) -> dict:
        return {
            "step": self.step,
            "lineage": dict(self.lineage),
            "done_below": self.done_below,
            "done_above": sorted(self.done_above),
            "quarantined": {str(group_id): why for group_id, why in self.quarantined.items()},
        }

    def restore(self, state: dict) -> None:
        """Continues a saved history; leases and ready groups start empty."""
        self.step = state["step"]
        self.lineage = dict(state["lineage"])
        self.done_below = state["done_below"]
        self.done_above = set(state["done_above"])
        self.quarantined = {int(group_id): why for group_id, why in state["quarantined"].items()}
        self._fresh = self.done_below

    def row(self, group_id: int) -> int:
        """The data set's row behind an id: every epoch visits all rows, in an order of its own."""
        epoch, position = divmod(group_id, self.rows)
        if self.seed is None:
            return position
        if epoch not in self._orders:
            order = list(range(self.rows))
            random.Random(f"{self.seed}/{epoch}").shuffle(order)
            self._orders = {kept: self._orders[kept] for kept in self._orders if kept >= epoch - 1} | {epoch: order}
        return self._orders[epoch][position]

    def is_done(self, group_id: int) -> bool:
        return group_id < self.done_below or group_id in self.done_above

    def done_count(self) -> int:
        return self.done_below - self.first + len(self.done_above)

    def given_up(self) -> int:
        """Groups that failed MAX_TRIES times since this trainer began."""
        return sum(tries >= MAX_TRIES for tries in self._tries.values())

    # -- inside --------------------------------------------------------------------------------------------------

    def _has_slot(self, version: int) -> bool:
        """Whether a step to come would train a group leased now, and not too late for these weights."""
        step = self._slot_step()
        return step - version <= self.max_staleness and (self.steps is None or step < self.steps)

    def _leasable(self, version: int) -> int:
        """Groups that may be leased at the same time, all samplers together, to those with these weights."""
        steps = version + self.max_staleness + 1 - self._next_step()
        return max(0, steps * self.per_step - len(self.ready))

    def _next_step(self) -> int:
        """The step that trains the oldest group that is out."""
        return self.step + (1 if self.taken else 0)

    def _slot_step(self) -> int:
        """The step that would train a group leased now."""
        return self._next_step() + (len(self.leases) + len(self.ready)) // self.per_step

    def _staleness(self, group: Group) -> float:
        """Of the group's oldest token when the next step trains it; infinite for weights outside the lineage."""
        names = {span.snapshot for completion in group.completions for span in completion.spans}
        versions = [self.lineage.get(name, float("-inf")) for name in names]
        return self._next_step() - min(versions)

    def _next(self) -> int | None:
        while self._retry:
            group_id = heapq.heappop(self._retry)
            if self._open(group_id):
                return group_id
        while self.last is None or self._fresh < self.last:
            self._fresh += 1
            if self._open(self._fresh - 1):
                return self._fresh - 1
        while self._doubted:
            group_id = self._doubted.pop(0)
            if self._open(group_id):
                return group_id
        return None

    def _open(self, group_id: int) -> bool:
        return not (
            self.is_done(group_id) or group_id in self.leases or group_id in self.ready or group_id in self.taken
        )

    def _release(self, group_id: int) -> None:
        self._end_lease(group_id)
        self._requeue(group_id)

    def _end_lease(self, group_id: int) -> Lease | None:
        lease = self.leases.pop(group_id, None)
        if lease:
            self._held[lease.session] -= 1
            if not self._held[lease.session]:
                del self._held[lease.session]
        return lease

    def _requeue(self, group_id: int) -> None:
        heapq.heappush(self._retry, group_id)

    def _mark_done(self, group_id: int) -> None:
        self.done_above.add(group_id)
        while self.done_below in self.done_above:
            self.done_above.remove(self.done_below)
            self.done_below += 1
