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
    Welcome,
    Who,
)
from protocol.resolve import load
from protocol.snapshot import snapshot_id
from tests.groups import make_group
from trainer.desk import MAX_INVALID, MAX_QUARANTINED, BrokenGroups, Desk

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


@pytest.mark.parametrize("name", ["protocol", "run_id", "model", "tokenizer", "vocabulary", "group_size", "recipe"])
def test_any_disagreement_is_refused_and_named(desk, name):
    other = 99 if isinstance(getattr(AGREED, name), int) else "other"
    hello = msgspec.structs.replace(HELLO, agreement=msgspec.structs.replace(AGREED, **{name: other}))
    [answer] = said(desk.on(b"p", hello, 0.0))
    assert isinstance(answer, Rejection) and name in answer.why and str(other) in answer.why
    assert said(desk.on(b"p", beat(), 1.0)) == [Who()]


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


def test_an_unsound_answer_is_tried_again_and_its_sender_sent_away_in_the_end(desk):
    desk.on(b"p", HELLO, 0.0)
    for number in range(MAX_INVALID):
        letters = desk.on(b"p", beat(want=2), 1.0)
        wrong = make_group((leased(letters) or [0])[0], rewards=[0.0, float("nan")], snapshot=NEWEST)
        [ack, *_] = said(desk.on(b"p", wrong, 2.0))
        assert ack.status == "invalid" and "reward" in ack.why, number
    assert said(desk.on(b"p", beat(), 3.0)) == [Who()]
    [answer] = said(desk.on(b"p", HELLO, 3.0))
    assert isinstance(answer, Rejection) and "unsound" in answer.why


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


def test_an_exam_leases_each_held_out_row_once_and_no_training_prompt(desk):
    desk.on(b"p", HELLO, 0.0)
    desk.start_exam(0)
    letters = desk.on(b"p", beat(), 0.0)
    assert [message for message in said(letters) if isinstance(message, Lease)] == [
        Lease(split="eval", items=[(0, 0), (1, 1), (2, 2)])
    ]
    for row in range(3):
        one = make_group(row, rewards=[1.0], split="eval", snapshot=NEWEST)
        assert said(desk.on(b"p", one, 1.0))[0].status == "accepted"
    assert desk.exam.finished()
    desk.start_exam(1)
    assert said(desk.on(b"p", one, 1.0))[0].status == "duplicate"  # a late answer to the first exam
    assert not desk.exam.ready


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
