"""What the trainer answers, message by message."""

import msgspec
import pytest

from protocol.messages import (
    Ack,
    Agreement,
    Beat,
    Bye,
    DataSet,
    Failure,
    Hello,
    Lease,
    Pulse,
    Rejection,
    Stop,
    Unreadable,
    Welcome,
    Who,
)
from protocol.recipe import Recipe
from protocol.resolve import load
from protocol.snapshot import snapshot_id
from sampler.session import Load, Session
from tests.groups import make_group
from trainer.advantage import ADVANTAGES
from trainer.batch import make_batch
from trainer.desk import MAX_INVALID, MAX_QUARANTINED, BrokenGroups, Desk
from trainer.exam import Plan
from trainer.ledger import MAX_TRIES

AGREED = Agreement(protocol=1, run_id="r", model="m", tokenizer="t", vocabulary=320, group_size=2, recipe="c")
ROWS = DataSet(rows=50, fingerprint="f")
HELLO = Hello(session="one", agreement=AGREED, train=ROWS, eval=DataSet(rows=3, fingerprint="e"))
NEWEST = snapshot_id(0, 1)


@pytest.fixture
def desk():
    recipe = load(None, ["trainer.prompts_per_step=2", "sampling.group_size=2", "objective.kl_beta=0.0"])
    result = Desk(recipe=recipe, agreement=AGREED, incarnation=1)
    result.pulse = Pulse(snapshot=NEWEST, manifest_sha256="h")
    return result


def beat(session="one", snapshot=NEWEST, want=20, held=(), progress=0):
    return Beat(session=session, snapshot=snapshot, want=want, held=list(held), progress=progress)


def said(letters):
    return [message for _, message in letters]


def leased(letters):
    return [item[0] for message in said(letters) if isinstance(message, Lease) for item in message.items]


def test_a_sampler_that_agrees_is_welcomed_told_the_weights_and_leased_prompts(desk):
    assert said(desk.on(b"p", HELLO, 0.0)) == [Welcome(incarnation=1), desk.pulse]
    letters = desk.on(b"p", beat(), 1.0)
    assert said(letters)[0] == desk.pulse and leased(letters) == [0, 1, 2, 3]


@pytest.mark.fault("H1", "H6")
@pytest.mark.parametrize("name", ["protocol", "run_id", "model", "tokenizer", "vocabulary", "group_size", "recipe"])
def test_any_disagreement_is_refused_and_named(desk, name):
    other = 99 if isinstance(getattr(AGREED, name), int) else "other"
    hello = msgspec.structs.replace(HELLO, agreement=msgspec.structs.replace(AGREED, **{name: other}))
    [answer] = said(desk.on(b"p", hello, 0.0))
    assert isinstance(answer, Rejection) and name in answer.why and str(other) in answer.why
    assert said(desk.on(b"p", beat(), 1.0)) == [Who()]


@pytest.mark.fault("H8")
def test_other_data_than_the_first_samplers_are_refused(desk):
    desk.on(b"p", HELLO, 0.0)
    hello = msgspec.structs.replace(HELLO, session="two", train=DataSet(rows=51, fingerprint="g"))
    [answer] = said(desk.on(b"q", hello, 0.0))
    assert isinstance(answer, Rejection) and "51" in answer.why


def test_a_stranger_is_asked_who_it_is(desk):
    assert said(desk.on(b"p", beat(), 0.0)) == [Who()]
    assert said(desk.on(b"p", make_group(0), 0.0)) == [Who()]


def test_a_sampler_without_weights_gets_the_notice_and_no_lease(desk):
    desk.on(b"p", HELLO, 0.0)
    assert said(desk.on(b"p", beat(snapshot=None), 1.0)) == [desk.pulse]


def test_an_answer_is_acknowledged_and_the_place_filled_again(desk):
    desk.on(b"p", HELLO, 0.0)
    desk.on(b"p", beat(want=2), 1.0)
    letters = desk.on(b"p", make_group(0, row=desk.train.row(0), snapshot=NEWEST), 2.0)
    assert said(letters)[0] == Ack(split="train", group_id=0, status="accepted")
    assert leased(letters) == [1]


def three_samplers(desk, wants=(20, 20, 20)):
    """They have joined and said what they want, before there are weights."""
    for peer, name, want in zip(b"123", ("one", "two", "three"), wants, strict=True):
        desk.on(b"%d" % peer, msgspec.structs.replace(HELLO, session=name), 0.0)
        desk.on(b"%d" % peer, beat(name, snapshot=None, want=want), 0.0)


def test_the_first_to_load_new_weights_takes_its_part_only(desk):
    three_samplers(desk)
    assert len(leased(desk.on(b"1", beat("one"), 1.0))) == 2  # of 4, rounded up
    assert leased(desk.tick(2.0)) == []
    assert len(leased(desk.on(b"2", beat("two"), 3.0))) == 2


def test_parts_are_as_large_as_what_a_sampler_can_hold(desk):
    three_samplers(desk, wants=(0, 2, 6))
    assert len(leased(desk.on(b"3", beat("three", want=6), 1.0))) == 3
    assert len(leased(desk.on(b"2", beat("two", want=2), 1.0))) == 1


def test_what_a_sampler_answered_makes_room_for_more(desk):
    three_samplers(desk)
    [first, second] = leased(desk.on(b"1", beat("one"), 1.0))
    done = make_group(first, row=desk.train.row(first), snapshot=NEWEST, session="one")
    assert leased(desk.on(b"1", done, 2.0)) == []  # 3 are left, of which one is a part: the one that it holds
    done = make_group(second, row=desk.train.row(second), snapshot=NEWEST, session="one")
    assert len(leased(desk.on(b"1", done, 2.0))) == 1


def test_silent_samplers_have_no_part(desk):
    three_samplers(desk)
    assert len(leased(desk.on(b"1", beat("one"), 5.0))) == 2
    assert len(leased(desk.on(b"1", beat("one", held=[("train", 0), ("train", 1)]), 21.0))) == 2


@pytest.mark.fault("I1")
def test_an_unsound_answer_is_tried_again_and_its_sender_sent_away_in_the_end(desk):
    desk.on(b"p", HELLO, 0.0)
    leases = leased(desk.on(b"p", beat(want=2), 1.0))
    for number in range(MAX_INVALID):
        assert desk.samplers, number
        letters = desk.on(b"p", make_group(leases.pop(), rewards=[0.0, float("nan")], snapshot=NEWEST), 2.0)
        assert said(letters)[0].status == "invalid" and "reward" in said(letters)[0].why
        leases += leased(letters)
    assert said(desk.on(b"p", beat(), 3.0)) == [Who()]
    [answer] = said(desk.on(b"p", HELLO, 3.0))
    assert isinstance(answer, Rejection) and "unsound" in answer.why


def test_an_unsound_answer_that_is_sent_again_counts_once(desk):
    """Its acknowledgement may be lost again and again, and a healthy sampler would be sent away for one bad prompt."""
    desk.on(b"p", HELLO, 0.0)
    [group_id] = leased(desk.on(b"p", beat(want=2), 1.0))
    desk.on(b"q", msgspec.structs.replace(HELLO, session="two"), 1.0)
    wrong = make_group(group_id, rewards=[0.0, float("nan")], snapshot=NEWEST)
    desk.on(b"p", wrong, 2.0)
    desk.train.leases.clear()
    for _ in range(2 * MAX_INVALID):
        desk.samplers["one"].want = 0  # so that it is not leased to this one again
        desk.on(b"p", wrong, 3.0)
    assert "one" in desk.samplers and desk.unsound["one"] < MAX_INVALID


def test_silence_frees_the_leases_for_others(desk):
    desk.on(b"p", HELLO, 0.0)
    desk.on(b"p", beat(), 0.0)
    desk.on(b"q", msgspec.structs.replace(HELLO, session="two"), 20.0)
    assert leased(desk.on(b"q", beat(session="two"), 20.0)) == []
    assert leased(desk.tick(31.0)) == [0, 1, 2, 3]


def test_a_goodbye_frees_them_at_once(desk):
    desk.on(b"p", HELLO, 0.0)
    desk.on(b"p", beat(), 0.0)
    desk.on(b"p", Bye(session="one"), 1.0)
    assert not desk.samplers and not desk.train.leases


def plan(number=0, pulse=None, alone=False):
    return Plan(number=number, pulse=pulse or Pulse(snapshot=NEWEST, manifest_sha256="h"), alone=alone)


def leases(letters):
    return [message for message in said(letters) if isinstance(message, Lease)]


def test_an_exam_leases_each_held_out_row_once_beside_training(desk):
    desk.on(b"p", HELLO, 0.0)
    desk.start_exam(plan())
    assert leases(desk.on(b"p", beat(), 0.0)) == [
        Lease(split="eval", items=[(0, 0), (1, 1), (2, 2)]),
        Lease(split="train", items=[(number, desk.train.row(number)) for number in range(4)]),
    ]
    for row in range(3):
        assert desk.end_exam() is None
        one = make_group(row, rewards=[1.0], split="eval", snapshot=NEWEST)
        assert said(desk.on(b"p", one, 1.0))[0].status == "accepted"
    assert len(desk.end_exam()) == 3 and desk.exam is None
    desk.start_exam(plan(1))
    assert said(desk.on(b"p", one, 1.0))[0].status == "duplicate"  # a late answer to the first exam
    assert not desk.exam.ledger.ready


def test_an_exam_before_any_sampler_begins_with_the_first_one(desk):
    desk.start_exam(plan())
    assert desk.exam is None and desk.end_exam() is None
    desk.on(b"p", HELLO, 0.0)
    assert [lease.split for lease in leases(desk.on(b"p", beat(), 0.0))] == ["eval", "train"]


def test_who_takes_part_in_an_exam_keeps_its_weights_and_the_others_go_on(desk):
    """One alone, that has the weights; and all of its answers are by these weights."""
    newer = Pulse(snapshot=snapshot_id(1, 1), manifest_sha256="h")
    for name in ("one", "two"):
        desk.on(name.encode(), msgspec.structs.replace(HELLO, session=name), 0.0)
    desk.on(b"two", beat("two", want=0), 0.0)
    desk.start_exam(plan(alone=True))
    desk.train.commit(1)
    desk.train.publish(newer.snapshot)
    desk.pulse = newer
    assert dict(desk.news()) == {b"one": newer, b"two": plan().pulse}
    assert leases(desk.on(b"one", beat("one", want=2), 1.0))[0].split == "train"
    assert [lease.split for lease in leases(desk.on(b"two", beat("two", want=3), 1.0))] == ["eval"]
    mixed = make_group(0, rewards=[1.0], split="eval", snapshot=newer.snapshot, session="two")
    assert said(desk.on(b"two", mixed, 1.0))[0].status == "stale"
    for row in range(3):
        desk.on(b"two", make_group(row, rewards=[1.0], split="eval", snapshot=NEWEST, session="two"), 2.0)
    assert said(desk.on(b"two", beat("two"), 3.0))[0] == newer  # at once, before anybody has looked at the answers


@pytest.mark.parametrize("how", ["goes", "stands still", "cannot read the weights"])
def test_an_exam_goes_to_another_sampler_if_its_own_goes_or_stands_still(desk, how):
    for name in ("one", "two"):
        desk.on(name.encode(), msgspec.structs.replace(HELLO, session=name), 0.0)
    desk.on(b"one", beat("one", want=0), 0.0)
    desk.start_exam(plan(alone=True))
    assert leases(desk.on(b"one", beat("one", want=3), 0.0))[0].split == "eval"
    if how == "goes":
        desk.on(b"one", Bye(session="one"), 1.0)
    elif how == "cannot read the weights":  # it was started again and has none yet
        desk.on(b"one", msgspec.structs.replace(HELLO, session="one"), 1.0)
        desk.on(b"one", beat("one", snapshot=None), 20.0)
        desk.on(b"one", Unreadable(session="one", snapshot=NEWEST, why="torn"), 20.0)
    else:
        for now in range(1, 1000, 20):  # it says that it is alive, and makes no progress
            desk.on(b"one", beat("one", held=[("eval", row) for row in range(3)]), float(now))
            desk.on(b"two", beat("two", want=0), float(now))
            desk.tick(float(now))
    found = leases(desk.on(b"two", beat("two", want=3), 1000.0))
    assert found[0] == Lease(split="eval", items=[(0, 0), (1, 1), (2, 2)])


def test_a_run_without_held_out_prompts_has_no_exam(desk):
    desk.on(b"p", msgspec.structs.replace(HELLO, eval=DataSet(rows=0, fingerprint="")), 0.0)
    desk.start_exam(plan())
    assert [lease.split for lease in leases(desk.on(b"p", beat(), 0.0))] == ["train"]
    assert desk.end_exam() == []


def test_no_prompt_is_leased_that_no_step_would_train(desk):
    desk.recipe = load(None, ["trainer.prompts_per_step=2", "sampling.group_size=2", "trainer.steps=1"])
    desk.on(b"p", HELLO, 0.0)
    assert leased(desk.on(b"p", beat(), 0.0)) == [0, 1]


def test_groups_without_signal_are_replaced_up_to_a_cap_and_never_trained(desk):
    options = ["prompts_per_step=2", "refill=1.0"]
    desk.recipe = load(None, [*(f"trainer.{option}" for option in options), "sampling.group_size=2"])
    desk.on(b"p", HELLO, 0.0)
    statuses = []
    for group_id in leased(desk.on(b"p", beat(), 0.0)):
        group = make_group(group_id, rewards=[1.0, 1.0], row=desk.train.row(group_id), snapshot=NEWEST)
        statuses += [message.status for message in said(desk.on(b"p", group, 1.0)) if isinstance(message, Ack)]
    assert statuses == ["no_signal", "no_signal", "accepted", "accepted"]  # a cap of 1.0 * 2
    assert [group.group_id for group in desk.train.take(2)] == [2, 3]
    assert desk.train.is_done(0) and desk.train.is_done(1) and not desk.train.is_done(2)
    assert sorted(desk.train.leases) == [4, 5]  # in the place of the first two
    desk.train.commit(1)
    assert desk.train.spare == 2


def test_after_the_end_every_word_is_stop(desk):
    desk.on(b"p", HELLO, 0.0)
    desk.stop = Stop(final=True)
    assert said(desk.on(b"p", beat(), 1.0)) == [desk.stop]
    assert said(desk.news()) == [desk.stop]


def test_a_reward_that_fails_everywhere_stops_the_run_instead_of_hiding(desk):
    desk.on(b"p", HELLO, 0.0)
    with pytest.raises(BrokenGroups, match="division by zero"):
        for _ in range(1000):
            for group_id in leased(desk.on(b"p", beat(), 0.0)):
                desk.on(b"p", Failure(session="one", split="train", group_id=group_id, why="division by zero"), 0.0)
    assert len(desk.train.quarantined) == MAX_QUARANTINED


# -- several samplers, some of them bad --------------------------------------------------------------------------


def run_until(desk, steps, answer, sessions=("one", "two", "three")):
    """Samplers that beat in turn, and a trainer that takes whatever is ready; `answer` makes each group.

    Returns the trained ids. A sampler that was sent away stays away.
    """
    trained, now = [], 0.0
    for session in sessions:
        desk.on(session.encode(), msgspec.structs.replace(HELLO, session=session), now)
    while desk.train.step < steps:
        now += 1.0
        assert now < 50 * steps, "the run does not move"
        for session in sessions:
            newest = desk.pulse.snapshot
            for group_id in leased(desk.on(session.encode(), beat(session, newest, want=2, progress=int(now)), now)):
                desk.on(session.encode(), answer(desk, session, group_id), now)
        groups = desk.train.take(2)
        if groups:
            trained += [group.group_id for group in groups]
            desk.train.commit(desk.train.step + 1)
            desk.pulse = Pulse(snapshot=snapshot_id(desk.train.step, 1), manifest_sha256="h")
            desk.train.publish(desk.pulse.snapshot)
    return trained


def sound(desk, session, group_id):
    return make_group(group_id, row=desk.train.row(group_id), snapshot=desk.pulse.snapshot, session=session)


def unsound(desk, session, group_id):
    completions = sound(desk, session, group_id).completions
    wrong = msgspec.structs.replace(completions[0], reward=float("nan"))
    return msgspec.structs.replace(sound(desk, session, group_id), completions=[wrong, completions[1]])


@pytest.mark.fault("I7")
def test_a_group_that_poisons_every_sampler_is_set_aside_and_no_other_one(desk):
    poisoned = {1, 6, 17}
    trained = run_until(desk, 16, lambda *lease: (unsound if lease[2] in poisoned else sound)(*lease))
    assert set(desk.train.quarantined) == poisoned
    assert set(desk.train.state()["quarantined"].values()) == {"reward is not finite"}  # a checkpoint keeps them
    assert desk.counts["train/invalid"] >= MAX_TRIES * len(poisoned)  # more: some said nothing about the group
    assert len(trained) == len(set(trained)) == 32 and not set(trained) & poisoned
    assert set(desk.samplers) == {"one", "two", "three"}


@pytest.mark.fault("I8")
def test_a_sampler_that_poisons_every_group_is_sent_away_and_the_others_go_on(desk):
    trained = run_until(desk, 20, lambda desk, *lease: (unsound if lease[0] == "two" else sound)(desk, *lease))
    assert desk.banned == {"two"} and set(desk.samplers) == {"one", "three"}
    assert desk.counts["train/invalid"] == MAX_INVALID
    assert len(trained) == len(set(trained)) == 40
    assert not desk.train.quarantined  # it never sent a sound group, so none of its groups is to blame


@pytest.mark.fault("I5")
def test_an_answer_about_another_row_than_the_leased_one_is_unknown_and_the_lease_stays(desk):
    desk.on(b"p", HELLO, 0.0)
    desk.on(b"p", beat(want=2), 1.0)
    other = make_group(0, row=desk.train.row(1), snapshot=NEWEST)
    assert said(desk.on(b"p", other, 2.0))[0].status == "unknown"
    assert set(desk.train.leases) >= {0} and not desk.train.ready


@pytest.mark.fault("E6")
def test_an_unsound_answer_to_somebody_elses_lease_takes_nothing_away(desk):
    desk.on(b"p", HELLO, 0.0)
    desk.on(b"p", beat(want=2), 1.0)
    desk.on(b"q", msgspec.structs.replace(HELLO, session="two"), 1.0)
    for _ in range(MAX_TRIES):
        assert said(desk.on(b"q", unsound(desk, "two", 0), 2.0))[0].status == "invalid"
    assert desk.train.leases[0].session == "one" and not desk.train.quarantined


@pytest.mark.fault("I6")
def test_equal_rewards_are_accepted_counted_and_teach_nothing(desk):
    desk.on(b"p", HELLO, 0.0)
    desk.on(b"p", beat(), 1.0)
    for group_id, rewards in ((0, [0.5, 0.5]), (1, [0.0, 1.0])):
        group = make_group(group_id, rewards=rewards, row=desk.train.row(group_id), snapshot=NEWEST)
        assert said(desk.on(b"p", group, 2.0))[0].status == "accepted"
    batch = make_batch(desk.train.take(2), Recipe(), ADVANTAGES["group"], rank=0, world=1, step=0)
    [micro] = batch.micro_batches
    equal = sum(completion.spans[-1].end for completion in make_group(0, rewards=[0.5, 0.5]).completions)
    assert int((micro.advantages == 0).sum()) == equal < len(micro.advantages)
    assert batch.figures["frac_reward_zero_std"] == 0.5


@pytest.mark.fault("M2")
def test_a_clock_that_jumps_ten_minutes_costs_leases_and_no_group(desk):
    """A virtual machine that was paused: every sampler seems dead, says who it is, and goes on."""
    before = run_until(desk, 2, sound, sessions=("one",))
    open_leases = leased(desk.on(b"p", beat(snapshot=desk.pulse.snapshot, want=4), 10.0))
    assert open_leases and leased(desk.tick(610.0)) == [] and not desk.samplers
    assert said(desk.on(b"p", sound(desk, "one", open_leases[0]), 610.0)) == [Who()]
    desk.on(b"p", HELLO, 610.0)
    assert said(desk.on(b"p", sound(desk, "one", open_leases[0]), 611.0))[0].status == "accepted"
    after = run_until(desk, 6, sound, sessions=("one",))
    assert sorted(before + after) == list(range(12))


@pytest.mark.fault("E4")
def test_an_answer_whose_acknowledgement_was_lost_is_sent_again_and_counts_once(desk):
    """The real session and the real desk; the network between them loses the first acknowledgement."""
    sets = {"train": ROWS, "eval": HELLO.eval}
    session = Session("one", desk.recipe.network, AGREED, sets, lambda held: Load(NEWEST, 0 if held else 2, 1), {})

    def exchange(now, loses=False):
        """All that is due, and what comes of it: the statuses of acknowledgements, those lost included."""
        letters = [letter for message in session.due(now) for letter in desk.on(b"p", message, now)]
        for answer in said(letters):
            if not (loses and isinstance(answer, Ack)):
                session.on(answer)
        return [answer.status for answer in said(letters) if isinstance(answer, Ack)]

    exchange(0.0)
    exchange(1.0)
    [group_id] = desk.train.leases
    session.answer(make_group(group_id, row=desk.train.row(group_id), snapshot=NEWEST, session=session.name))
    resent = 2.0 + desk.recipe.network.resend_s
    assert exchange(2.0, loses=True) == ["accepted"]
    assert exchange(resent - 1.0) == []
    assert exchange(resent) == ["duplicate"]
    assert exchange(99.0) == [] and list(desk.train.ready) == [group_id]


# -- who is to blame, and for what: found by tests/simulation ----------------------------------------------------


@pytest.mark.fault("I8")
def test_a_sampler_alone_that_never_sent_a_sound_group_sets_none_aside(desk):
    desk.on(b"p", HELLO, 0.0)
    desk.on(b"p", beat(want=2), 1.0)
    for _ in range(MAX_INVALID):
        desk.on(b"p", unsound(desk, "one", next(iter(desk.train.leases))), 1.0)
    assert desk.counts["train/invalid"] == MAX_INVALID and not desk.train.quarantined
    trained = run_until(desk, 15, sound, sessions=("two",))
    assert set(range(MAX_INVALID)) < set(trained) and len(set(trained)) == 30  # what it spoiled, and more


@pytest.mark.fault("I8")
def test_saying_hello_again_does_not_make_unsound_groups_forgotten(desk):
    for number in range(MAX_INVALID):
        assert not desk.banned, number
        desk.on(b"p", HELLO, 0.0)
        desk.on(b"p", beat(want=2), 1.0)
        desk.on(b"p", unsound(desk, "one", next(iter(desk.train.leases))), 1.0)
    assert desk.banned == {"one"}


@pytest.mark.fault("K3")
def test_a_failure_that_is_sent_again_and_again_is_one_try(desk):
    """Its sampler hears no ack, while the trainer leases the group to it again."""
    desk.on(b"p", HELLO, 0.0)
    desk.on(b"p", beat(want=2), 0.0)
    failure = Failure(session="one", split="train", group_id=0, why="timeout", number=1)
    for now in range(1, 100, 10):
        assert said(desk.on(b"p", failure, now))[0].status == "failed"
        desk.on(b"p", beat(want=2, held=[("train", 0)]), now)
    assert not desk.train.quarantined and desk.train.leases[0].session == "one"


@pytest.mark.fault("J1")
def test_steps_that_were_not_finite_do_not_count_as_groups_that_nobody_can_answer(desk):
    run_until(desk, 1, sound, sessions=("one",))
    for _ in range(MAX_QUARANTINED):
        desk.on(b"p", beat(snapshot=desk.pulse.snapshot), 5.0)
        for group_id in list(desk.train.leases):
            desk.on(b"p", sound(desk, "one", group_id), 5.0)
        assert desk.train.take(2)
        desk.train.set_aside("step 2 was not finite")
    assert len(desk.train.quarantined) >= MAX_QUARANTINED
    desk.on(b"p", beat(snapshot=desk.pulse.snapshot), 6.0)
    group_id = next(iter(desk.train.leases))
    desk.on(b"p", Failure(session="one", split="train", group_id=group_id, why="timeout", number=1), 6.0)  # no raise


@pytest.mark.fault("C5")
def test_what_is_taken_from_an_engine_that_stands_still_is_given_to_another(desk):
    """And not to the same one, although it is asked first and wants more."""
    desk.on(b"p", HELLO, 0.0)
    desk.on(b"p", beat(), 0.0)
    desk.on(b"q", msgspec.structs.replace(HELLO, session="two"), 0.0)
    given, now = [], 0.0
    while not given:
        now += 5.0
        assert now < 2 * desk.recipe.network.lease_s
        held = [("train", group_id) for group_id in range(4)]
        letters = desk.on(b"p", beat(held=held), now) + desk.on(b"q", beat("two"), now) + desk.tick(now)
        given = [peer for peer, message in letters if isinstance(message, Lease)]
    assert set(given) == {b"q"} and {lease.session for lease in desk.train.leases.values()} == {"two"}


def test_a_session_numbers_its_failures_and_keeps_the_number_when_it_sends_one_again(desk):
    session = Session(
        "one", desk.recipe.network, AGREED, {"train": ROWS, "eval": HELLO.eval}, lambda _: Load(None, 0, 0), {}
    )
    session.on(Welcome(incarnation=1))
    for group_id in (4, 2):
        session.answer(Failure(session=session.name, split="train", group_id=group_id, why="timeout"))
    for now in (0.0, desk.recipe.network.resend_s):
        sent = [message for message in session.due(now) if isinstance(message, Failure)]
        assert [(message.group_id, message.number) for message in sent] == [(4, 1), (2, 2)]
