"""Leases, staleness, exactly once: the ledger alone, and driven through a network that loses and repeats."""

import random

import msgspec
import pytest
from hypothesis import given
from hypothesis import strategies as st

from protocol.snapshot import snapshot_id, step_of
from tests.groups import make_group
from trainer.ledger import MAX_TRIES, Ledger


def ledger(**options) -> Ledger:
    settings = {"rows": 10, "per_step": 2, "max_staleness": 1, "lease_s": 100.0, "seed": 7}
    result = Ledger(**settings | options)
    result.publish(snapshot_id(0, 1))
    return result


def answer(book: Ledger, group_id: int, step: int = 0):
    return make_group(group_id, row=book.row(group_id), snapshot=snapshot_id(step, 1))


@pytest.mark.fault("F1")
def test_it_leases_no_more_than_staleness_allows():
    book = ledger()
    leased = book.grant("a", snapshot_id(0, 1), 100, 0.0)
    assert [group_id for group_id, _ in leased] == [0, 1, 2, 3]  # (1 + 1) steps of 2
    assert book.grant("b", snapshot_id(0, 1), 100, 0.0) == []


def test_on_policy_means_that_nothing_is_leased_while_a_step_trains():
    book = ledger(max_staleness=0)
    first = [group_id for group_id, _ in book.grant("a", snapshot_id(0, 1), 100, 0.0)]
    assert first == [0, 1]
    for group_id in first:
        assert book.offer(answer(book, group_id)) == "accepted"
    assert book.take(2) is not None
    assert book.grant("a", snapshot_id(0, 1), 100, 0.0) == []
    book.commit(1)
    book.publish(snapshot_id(1, 1))
    assert book.grant("a", snapshot_id(0, 1), 100, 0.0) == []  # not with the old weights
    assert [group_id for group_id, _ in book.grant("a", snapshot_id(1, 1), 100, 0.0)] == [2, 3]


def test_a_lease_is_given_only_to_weights_that_will_not_be_too_old_when_trained():
    """Else the group would be sampled, dropped at the door and sampled again."""
    book = ledger()
    for group_id, _ in book.grant("a", snapshot_id(0, 1), 2, 0.0):
        book.offer(answer(book, group_id))
    book.take(2)
    book.commit(1)
    book.publish(snapshot_id(1, 1))
    assert len(book.grant("old", snapshot_id(0, 1), 100, 0.0)) == 2
    assert len(book.grant("new", snapshot_id(1, 1), 100, 0.0)) == 2


@pytest.mark.fault("I9")
def test_unknown_weights_get_no_lease_and_their_groups_are_stale():
    book = ledger()
    assert book.grant("a", None, 5, 0.0) == []
    assert book.grant("a", "s00000000.i0009", 5, 0.0) == []
    book.grant("a", snapshot_id(0, 1), 1, 0.0)
    assert book.offer(make_group(0, row=book.row(0), snapshot="s00000000.i0009")) == "stale"
    assert [group_id for group_id, _ in book.grant("a", snapshot_id(0, 1), 1, 0.0)] == [0]  # leased again


@pytest.mark.fault("I9")
def test_the_oldest_token_of_a_group_decides():
    book = ledger(max_staleness=0)
    book.grant("a", snapshot_id(0, 1), 1, 0.0)
    book.step = 1
    book.publish(snapshot_id(1, 1))
    assert book.offer(answer(book, 0, step=0)) == "stale"


@pytest.mark.fault("F3")
def test_a_step_waits_for_slow_answers_that_it_would_make_too_old():
    """Else slow groups would be dropped and sampled again for ever, and only short answers trained."""
    book = ledger()
    book.grant("a", snapshot_id(0, 1), 4, 0.0)
    for group_id in (2, 3):
        book.offer(answer(book, group_id))
    taken = book.take(2)
    assert [group.group_id for group in taken] == [2, 3]  # 0 and 1 may still be trained by the next step
    book.commit(1)
    book.publish(snapshot_id(1, 1))
    assert len(book.grant("a", snapshot_id(1, 1), 4, 0.0)) == 2
    for group_id in (4, 5):
        book.offer(answer(book, group_id, step=1))
    assert book.take(2) is None  # 0 and 1, sampled with step 0, would be too old after this step
    assert [book.offer(answer(book, group_id)) for group_id in (0, 1)] == ["accepted", "accepted"]
    assert [group.group_id for group in book.take(2)] == [0, 1]


@pytest.mark.fault("E1")
def test_a_group_counts_once_however_often_it_comes():
    book = ledger()
    book.grant("a", snapshot_id(0, 1), 4, 0.0)
    assert [book.offer(answer(book, 0)) for _ in range(3)] == ["accepted", "duplicate", "duplicate"]
    book.offer(answer(book, 1))
    assert [group.group_id for group in book.take(2)] == [0, 1]
    assert book.offer(answer(book, 0)) == "duplicate"
    book.commit(1)
    assert book.offer(answer(book, 1)) == "duplicate"
    assert book.done_below == 2


def test_a_dead_samplers_leases_go_to_another_oldest_first():
    book = ledger()
    book.grant("a", snapshot_id(0, 1), 4, 0.0)
    assert book.drop("a") == 4
    assert [group_id for group_id, _ in book.grant("b", snapshot_id(0, 1), 4, 1.0)] == [0, 1, 2, 3]


@pytest.mark.fault("E3")
def test_a_lease_that_the_sampler_never_got_goes_back():
    book = ledger()
    book.grant("a", snapshot_id(0, 1), 2, now=0.0)
    book.beat("a", held={0}, moved=True, now=11.0, resend_s=10.0)
    assert set(book.leases) == {0}


@pytest.mark.fault("F3")
def test_a_lease_without_progress_expires_and_one_with_progress_does_not():
    book = ledger()
    book.grant("a", snapshot_id(0, 1), 1, now=0.0)
    book.beat("a", held={0}, moved=True, now=60.0, resend_s=10.0)
    assert book.expire(now=120.0) == []
    book.beat("a", held={0}, moved=False, now=150.0, resend_s=10.0)
    assert book.expire(now=161.0) == [0]


@pytest.mark.fault("I7")
def test_a_group_that_always_fails_is_set_aside_with_its_reason():
    book = ledger()
    for attempt in range(MAX_TRIES):
        assert book.grant("a", snapshot_id(0, 1), 1, 0.0)[0][0] == 0, attempt
        book.fail("a", 0, "the reward crashed")
    assert book.quarantined == {0: "the reward crashed"}
    assert book.grant("a", snapshot_id(0, 1), 1, 0.0)[0][0] == 1


def test_every_epoch_visits_every_row_once_in_another_order():
    book = ledger()
    epochs = [[book.row(epoch * 10 + index) for index in range(10)] for epoch in range(3)]
    assert all(sorted(order) == list(range(10)) for order in epochs)
    assert epochs[0] != epochs[1]
    assert epochs == [[ledger().row(epoch * 10 + index) for index in range(10)] for epoch in range(3)]


def test_a_restored_ledger_goes_on_where_the_checkpoint_was():
    book = ledger()
    for group_id, _ in book.grant("a", snapshot_id(0, 1), 4, 0.0):
        if group_id != 1:
            book.offer(answer(book, group_id))
    assert [group.group_id for group in book.take(2)] == [0, 2]
    book.commit(1)
    book.publish(snapshot_id(1, 1))
    again = ledger()
    again.restore(book.state())
    again.publish(snapshot_id(1, 2))
    assert [group_id for group_id, _ in again.grant("b", snapshot_id(1, 2), 100, 0.0)] == [1, 3, 4, 5]
    assert again.offer(answer(again, 0)) == "duplicate"


@pytest.mark.fault("E1", "E2", "E3", "F1")
@pytest.mark.parametrize("seed", range(60))
def test_nothing_is_lost_or_trained_twice_over_a_bad_network(seed):
    """Drops, repeats, delays, dead samplers, trainer restarts from checkpoints: the weights are the audit."""
    dice = random.Random(seed)
    book, weights = ledger(rows=1000), {}
    saved = (book.state(), dict(weights))
    flying: list[int] = []
    incarnation = 1
    for now in range(4000):
        newest = snapshot_id(book.step, incarnation)
        event = dice.random()
        if event < 0.3:
            granted = book.grant(dice.choice("abc"), newest, dice.randint(1, 3), now)
            flying += [group_id for group_id, _ in granted if dice.random() > 0.2]  # a lost lease
        elif event < 0.7 and flying:
            group_id = dice.choice(flying)
            group = make_group(group_id, row=book.row(group_id), snapshot=newest, lengths=[1, 1])
            book.offer(group)
            if dice.random() > 0.3:  # else it comes again
                flying.remove(group_id)
        elif event < 0.75:
            book.drop(dice.choice("abc"))
        elif event < 0.8:
            book.expire(now)
        elif event < 0.98:
            taken = book.take(2)
            if taken is not None and dice.random() > 0.1:
                for group in taken:
                    weights[group.group_id] = weights.get(group.group_id, 0) + 1
                book.commit(book.step + 1)
                book.publish(snapshot_id(book.step, incarnation))
                if dice.random() < 0.3:
                    saved = (book.state(), dict(weights))
            elif taken is not None:  # killed between take and commit
                event = 1.0
        if event >= 0.98:
            incarnation += 1
            book = ledger(rows=1000)
            book.restore(saved[0])
            weights = dict(saved[1])
            book.publish(snapshot_id(book.step, incarnation))
        assert len(book.leases) + len(book.ready) <= 4
    assert book.step > 10
    done = [group_id for group_id in range(max(weights) + 1) if book.is_done(group_id)]
    assert {group_id: weights.get(group_id) for group_id in done} == dict.fromkeys(done, 1)
    assert all(count == 1 for count in weights.values())
    assert set(weights) == set(done)


@pytest.mark.fault("E5")
@given(st.lists(st.sampled_from(["first", "second"]), min_size=1, max_size=8), st.booleans())
def test_of_two_samplers_that_answer_one_lease_the_first_counts(order, trained):
    """The lease moved on while its sampler was silent; then both answer, again and again, in any order."""
    book = ledger(per_step=1)
    for session in ("first", "second"):
        [(group_id, row)] = book.grant(session, snapshot_id(0, 1), 1, 0.0)
        if session == "first":
            assert book.drop("first") == 1
    answers = [make_group(group_id, row=row, snapshot=snapshot_id(0, 1), session=session) for session in order]
    statuses = [book.offer(answers[0])]
    if trained:
        [taken] = book.take(1)
        assert taken is answers[0]
        book.commit(1)
    else:
        assert book.ready == {0: answers[0]}
    statuses += [book.offer(group) for group in answers[1:]]
    assert statuses == ["accepted"] + ["duplicate"] * (len(order) - 1)
    assert group_id not in book.leases


@pytest.mark.fault("E6")
@given(st.lists(st.tuples(st.integers(0, 20), st.booleans()), max_size=30), st.integers(0, 4))
def test_an_answer_nobody_asked_for_is_unknown_or_as_good_as_any_and_never_beyond_the_cap(answers, leased):
    """Whoever sends it: what counts is that the group is open, near, about its row, and that there is room."""
    book, cap = ledger(rows=40), 4
    book.grant("one", snapshot_id(0, 1), leased, 0.0)
    for group_id, right_row in answers:
        group = answer(book, group_id)
        if not right_row:
            group = msgspec.structs.replace(group, row=group.row + 1)
        leases, ready = set(book.leases), set(book.ready)
        status = book.offer(group)
        if group_id in ready:
            assert status == "duplicate"
        elif not right_row or group_id >= leased + cap:
            assert status == "unknown"
        else:
            assert status == ("accepted" if group_id in leases or len(leases | ready) < cap else "full")
        assert (group_id in book.ready) == (group_id in ready or status == "accepted")
        assert len(book.leases) + len(book.ready) <= cap
    asked_again = {group_id for group_id, _ in book.grant("two", snapshot_id(0, 1), 100, 0.0)}
    assert not asked_again & set(book.ready)


@pytest.mark.fault("E7")
@pytest.mark.parametrize(
    ("group_id", "snapshot", "status"),
    [
        (0, snapshot_id(0, 1), "duplicate"),  # trained before the checkpoint
        (1, snapshot_id(0, 1), "accepted"),  # open, and its weights led to the checkpoint
        (1, snapshot_id(1, 1), "accepted"),
        (1, snapshot_id(2, 1), "stale"),  # from weights that were rolled back with the crash
        (1, snapshot_id(1, 7), "stale"),  # from a history that never was
        (3, snapshot_id(1, 1), "accepted"),  # trained after the checkpoint: rolled back, so open again
        (9, snapshot_id(1, 1), "unknown"),  # not within reach of this trainer
    ],
)
def test_what_was_in_flight_when_the_trainer_died_counts_where_its_weights_and_its_group_do(group_id, snapshot, status):
    book, saved = ledger(), []
    for step, pair in enumerate([(0, 2), (1, 3)]):
        book.grant("a", snapshot_id(step, 1), 4, 0.0)
        for one in pair:
            book.offer(answer(book, one, step))
        assert [group.group_id for group in book.take(2)] == list(pair)
        book.commit(step + 1)
        book.publish(snapshot_id(step + 1, 1))
        saved.append(book.state())
    again = ledger()
    again.restore(saved[0])  # and what the second step did is lost
    again.publish(snapshot_id(1, 2))
    group = make_group(group_id, row=again.row(group_id), snapshot=snapshot)
    assert again.offer(group) == status
    open_ids = {one for one, _ in again.grant("b", snapshot_id(1, 2), 4, 0.0)}
    assert (1 in open_ids) == (1 not in again.ready)  # whatever was refused is leased again


@pytest.mark.fault("I9")
@given(st.integers(0, 3), st.randoms(use_true_random=False))
def test_no_step_is_fed_with_weights_older_than_the_bound_and_what_was_too_old_is_leased_again(bound, dice):
    """Answers come under any weights that ever were, and under some that never were."""
    book = ledger(max_staleness=bound, rows=200)
    published, trained = [snapshot_id(0, 1)], []
    for now in range(120):
        book.grant("a", published[-1], dice.randint(0, 3), now)
        for group_id in list(book.leases):
            if dice.random() < 0.5:
                old = dice.choice([*published[-bound - 2 :], "s00000099.i0009"])
                book.offer(make_group(group_id, row=book.row(group_id), snapshot=old, lengths=[1, 1]))
        if dice.random() < 0.1:
            book.drop("a")
        for group in book.take(2) or []:
            [version] = {step_of(span.snapshot) for one in group.completions for span in one.spans}
            assert 0 <= book.step - version <= bound
            trained.append(group.group_id)
        if book.taken:
            book.commit(book.step + 1)
            published.append(snapshot_id(book.step, 1))
            book.publish(published[-1])
    assert len(trained) == len(set(trained)) == book.done_count()
    lost = set(range(book._fresh)) - set(trained) - set(book.ready) - set(book.leases) - set(book._retry)
    assert not lost
