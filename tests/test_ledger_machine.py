"""Any order of calls: each group is trained at most once in a lineage, and none is lost.

The moves and the audit are tests/fuzz/history.py's; hypothesis chooses them and shrinks what breaks.
"""

import pytest
from hypothesis import HealthCheck, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, rule, run_state_machine_as_test

from tests.fuzz.history import CAP, SESSIONS, History
from trainer.ledger import MAX_TRIES

SESSION = st.sampled_from(SESSIONS)
NEAR = st.integers(-1, CAP + 3)
"""Offset from the first group that is not done."""
AGE = st.integers(0, 3)
"""Of weights, in publications."""


class LedgerMachine(RuleBasedStateMachine):
    def __init__(self) -> None:
        super().__init__()
        self.history = History()

    def near(self, offset: int) -> int:
        return max(0, self.history.book.done_below + offset)

    def weights(self, age: int) -> str:
        return self.history.published[max(0, len(self.history.published) - 1 - age)]

    @rule(session=SESSION, age=AGE, want=st.integers(1, CAP + 1))
    def grant(self, session, age, want):
        self.history.grant(session, self.weights(age), want)

    @rule(session=SESSION)
    def grant_without_weights(self, session):
        before = len(self.history.book.leases)
        self.history.grant(session, None, CAP)
        assert len(self.history.book.leases) == before

    @rule(offset=NEAR, age=AGE, right_row=st.booleans() | st.just(True))
    def offer(self, offset, age, right_row):
        self.history.offer(self.near(offset), self.weights(age), right_row)

    @rule(offset=NEAR)
    def offer_from_weights_that_never_were(self, offset):
        assert self.history.offer(self.near(offset), "s00000099.i0099") != "accepted"

    @rule(age=AGE)
    def offer_every_lease(self, age):
        for group_id in list(self.history.book.leases):
            self.history.offer(group_id, self.weights(age))

    @rule(offset=NEAR, age=AGE)
    def duplicate(self, offset, age):
        first = self.history.offer(self.near(offset), self.weights(age))
        if first == "accepted":
            assert self.history.offer(self.near(offset), self.weights(age)) == "duplicate"

    @rule(session=SESSION, offset=NEAR)
    def fail(self, session, offset):
        self.history.fail(session, self.near(offset))

    @rule()
    def fail_until_set_aside(self):
        for _ in range(MAX_TRIES):
            self.history.grant("one", self.history.newest, 1)
            for group_id, lease in list(self.history.book.leases.items())[:1]:
                self.history.fail(lease.session, group_id)

    @rule(session=SESSION, held=st.sets(NEAR, max_size=4), moved=st.booleans())
    def beat(self, session, held, moved):
        self.history.beat(session, {self.near(offset) for offset in held}, moved)

    @rule(seconds=st.integers(0, 30))
    def expire(self, seconds):
        self.history.now += seconds
        self.history.expire()

    @rule(session=SESSION)
    def drop(self, session):
        self.history.drop(session)

    @rule()
    def take(self):
        self.history.take()

    @rule()
    def commit(self):
        self.history.commit()

    @rule()
    def set_aside(self):
        self.history.set_aside()

    @rule()
    def publish(self):
        self.history.publish()

    @rule()
    def checkpoint(self):
        self.history.checkpoint()

    @rule()
    def restore(self):
        self.history.restore()

    @invariant()
    def once_each_and_no_more_than_the_cap(self):
        self.history.check()

    def teardown(self):
        """Whatever happened: with honest samplers every group that was ever handed out gets trained."""
        self.history.drain()


EVERY_ORDER = settings(
    max_examples=100, stateful_step_count=40, deadline=None, suppress_health_check=[HealthCheck.too_slow]
)


@pytest.mark.fault("E1", "E4", "E6", "E7", "F1", "I7", "I9")
def test_in_any_order_of_events_each_group_is_trained_once_and_none_is_lost():
    run_state_machine_as_test(LedgerMachine, settings=EVERY_ORDER)


def test_the_machine_can_train_skip_and_crash():
    """What it would do if hypothesis asked: else its silence would mean nothing."""
    machine = LedgerMachine()
    for _ in range(3):
        machine.grant("one", 0, CAP)
        machine.offer_every_lease(0)
        machine.take()
        machine.commit()
    machine.checkpoint()
    machine.fail_until_set_aside()
    machine.restore()
    machine.teardown()
    assert len(machine.history.weights) >= 6
    assert not machine.history.book.quarantined, "what the crash undid is undone"
