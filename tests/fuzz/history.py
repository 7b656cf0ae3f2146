"""One lineage of a ledger with its audit: `weights` counts how often each group was trained, as the model would show.

The fuzzer and the hypothesis machine make its moves in any order; after each, `check` says what must hold.
"""

import functools

import msgspec

from protocol.messages import Group
from protocol.snapshot import snapshot_id, step_of
from tests.groups import make_group
from trainer.ledger import Ledger

PER_STEP, MAX_STALENESS, ROWS, LEASE_S, RESEND_S = 2, 1, 12, 20.0, 5.0
CAP = (MAX_STALENESS + 1) * PER_STEP
SESSIONS = ("one", "two", "three")


@functools.cache
def answer(group_id: int, row: int, snapshot: str) -> Group:
    return msgspec.structs.replace(template(snapshot), group_id=group_id, row=row)


@functools.cache
def template(snapshot: str) -> Group:
    return make_group(0, snapshot=snapshot, lengths=[1, 1])


def check_ledger(ledger: Ledger) -> None:
    """What must hold for any ledger after any call."""
    leased, ready, taken = set(ledger.leases), set(ledger.ready), set(ledger.taken)
    assert len(leased) + len(ready) <= (ledger.max_staleness + 1) * ledger.per_step, "more is out than the cap"
    assert not leased & ready and not leased & taken and not ready & taken, "a group is in two places"
    assert not any(ledger.is_done(group_id) for group_id in leased | ready | taken), "a done group is still open"
    assert all(ledger.is_done(group_id) for group_id in ledger.quarantined), "a quarantined group is still open"


class History:
    """A trainer's ledger, its last checkpoint, and the weights that both describe."""

    def __init__(self) -> None:
        self.incarnation, self.now = 1, 0.0
        self.weights: dict[int, int] = {}
        self.in_step: list[int] = []
        self.book = self._ledger()
        self.book.publish(self.newest)
        self.saved = (self.book.state(), {}, [self.newest])
        self.published = [self.newest]

    @property
    def newest(self) -> str:
        return snapshot_id(self.book.step, self.incarnation)

    def grant(self, session: str, snapshot: str | None, want: int) -> None:
        book = self.book
        held = {*self.weights, *book.quarantined, *book.leases, *book.ready, *self.in_step}
        granted = [group_id for group_id, _ in book.grant(session, snapshot, want, self.now)]
        assert len(granted) == len(set(granted)) <= want
        assert not held & set(granted), "leased what is trained, held, ready or being trained"

    def offer(self, group_id: int, snapshot: str, right_row: bool = True) -> str:
        before = self.book.is_done(group_id) or group_id in self.book.ready or group_id in self.in_step
        row = self.book.row(group_id) + (0 if right_row else 1)
        status = self.book.offer(answer(group_id, row, snapshot))
        assert (status == "duplicate") == before
        assert status != "accepted" or (right_row and snapshot in self.book.lineage and group_id in self.book.ready)
        return status

    def fail(self, session: str, group_id: int) -> None:
        self.book.fail(session, group_id, "why")

    def beat(self, session: str, held: set[int], moved: bool) -> None:
        self.book.beat(session, held, moved, self.now, RESEND_S)

    def expire(self) -> None:
        late = self.book.expire(self.now)
        assert not set(late) & set(self.book.leases)

    def drop(self, session: str) -> None:
        self.book.drop(session)
        assert all(lease.session != session for lease in self.book.leases.values())

    def take(self) -> None:
        """The trainer has one batch at a time."""
        groups = None if self.in_step else self.book.take(PER_STEP)
        for group in groups or []:
            assert group.group_id not in self.weights, "trained twice"
            oldest = min(step_of(span.snapshot) for one in group.completions for span in one.spans)
            assert self.book.step - oldest <= MAX_STALENESS, "trained too stale"
        self.in_step = [group.group_id for group in groups or []] or self.in_step

    def commit(self) -> None:
        if not self.in_step:
            return
        for group_id in self.in_step:
            self.weights[group_id] = self.weights.get(group_id, 0) + 1
        self.in_step = []
        self.book.commit(self.book.step + 1)
        self.publish()

    def set_aside(self) -> None:
        """The step was not finite: nothing is trained."""
        self.book.set_aside("not finite")
        self.in_step = []

    def publish(self) -> None:
        """Of the newest weights; again does no harm."""
        if self.newest not in self.published:
            self.published.append(self.newest)
        self.book.publish(self.newest)

    def checkpoint(self) -> None:
        """Taken between steps, as the trainer does."""
        if not self.in_step:
            state = msgspec.json.decode(msgspec.json.encode(self.book.state()))
            self.saved = (state, dict(self.weights), list(self.published))

    def restore(self) -> None:
        """Killed, and started again from the last checkpoint."""
        state, weights, published = self.saved
        self.incarnation += 1
        self.book, self.in_step = self._ledger(), []
        self.book.restore(state)
        self.weights, self.published = dict(weights), list(published)
        self.publish()

    def check(self) -> None:
        check_ledger(self.book)
        assert all(count == 1 for count in self.weights.values()), "trained twice"
        done = {group_id for group_id in range(self.book.done_below)} | self.book.done_above
        assert done == self.weights.keys() | self.book.quarantined.keys(), "the ledger and the weights differ"
        assert not self.weights.keys() & self.book.quarantined.keys()

    def drain(self, steps: int = 4) -> None:
        """Honest samplers to the end: nothing waits for ever, and nothing below the front was lost."""
        self.commit()
        for session in SESSIONS:
            self.book.drop(session)
        front = max([*self.weights, *self.book.ready, *self.book.quarantined, self.book._fresh - 1, -1])
        for _ in range(steps + front + 1):
            if self.book.done_below > front:
                break
            self.book.grant("one", self.newest, CAP, self.now)
            for group_id in list(self.book.leases):
                self.offer(group_id, self.newest)
            self.take()
            assert self.in_step, "a trainer with honest samplers waits for ever"
            self.commit()
            self.check()
        assert self.book.done_below > front, "a group was lost"

    def _ledger(self) -> Ledger:
        return Ledger(rows=ROWS, per_step=PER_STEP, max_staleness=MAX_STALENESS, lease_s=LEASE_S, seed=3)
