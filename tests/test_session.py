"""A sampler's session and a trainer's inbox over real sockets and files; only the engine's tokens are made up."""

import asyncio
import contextlib
import socket
import threading
import time

import pytest

from protocol.channel import Hub
from protocol.errors import Rejected, TrainerGone
from protocol.keys import open_keys
from protocol.messages import Ack, Agreement, DataSet, Lease, Pulse, Welcome
from protocol.resolve import load
from protocol.rundir import Endpoint, RunDir
from protocol.snapshot import snapshot_id
from sampler.link import Link
from sampler.session import Load, Session, Work
from tests.groups import make_group
from trainer.desk import Desk
from trainer.inbox import Inbox
from trainer.ranks import Ranks

RECIPE = load(
    None,
    [
        "trainer.prompts_per_step=2",
        "sampling.group_size=2",
        "objective.kl_beta=0.0",
        "network.beat_s=0.2",
        "network.resend_s=0.4",
        "network.dead_s=1.5",
        "network.grace_s=5.0",
    ],
)


def agreed(run_id: str, **other) -> Agreement:
    fields = {"protocol": 1, "model": "m", "tokenizer": "t", "vocabulary": 320, "group_size": 2, "recipe": "c"}
    return Agreement(run_id=run_id, **fields | other)


@pytest.fixture
def rundir(tmp_path):
    result = RunDir(tmp_path / "run")
    result.make()
    return result


@pytest.fixture
def ranks(monkeypatch):
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    settings = {"RANK": 0, "WORLD_SIZE": 1, "LOCAL_RANK": 0, "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
    for name, value in settings.items():
        monkeypatch.setenv(name, str(value))
    with Ranks("gloo", threads=1) as result:
        yield result


@contextlib.contextmanager
def trainer(rundir: RunDir, ranks: Ranks, incarnation: int = 1, state: dict | None = None, stop=None):
    keys = open_keys(rundir.keys)
    hub = Hub(keys, "127.0.0.1", 0)
    desk = Desk(recipe=RECIPE, agreement=agreed(keys.run_id), incarnation=incarnation)
    with Inbox(ranks, desk, hub, stop or threading.Event(), rundir) as inbox:
        if state:
            desk.open_ledger(50).restore(state["ledger"])
        inbox.serve()
        inbox.commit(Pulse(snapshot=snapshot_id(inbox_step(desk), incarnation), manifest_sha256="h"), inbox_step(desk))
        rundir.write_endpoint(Endpoint(address=hub.address, incarnation=incarnation, host="here"))
        yield inbox


def inbox_step(desk: Desk) -> int:
    return desk.train.step if desk.train else 0


class FakeEngine(threading.Thread):
    """A sampler process without vLLM: answers each lease after a moment, under the weights it was told to use."""

    def __init__(self, rundir: RunDir, *, silent: bool = False, **disagreement) -> None:
        super().__init__(daemon=True)
        self._rundir, self._silent, self._disagreement = rundir, silent, disagreement
        self.error: Exception | None = None
        self.answered: list[int] = []
        self.snapshot: str | None = None

    def run(self) -> None:
        try:
            asyncio.run(self._serve())
        except Exception as error:
            self.error = error

    async def _serve(self) -> None:
        keys = open_keys(self._rundir.keys)
        sets = {"train": DataSet(rows=50, fingerprint="f"), "eval": DataSet(rows=3, fingerprint="e")}
        agreement = agreed(keys.run_id, **self._disagreement)
        session = Session("one", RECIPE.network, agreement, sets, self._load, {})
        self.link = link = Link(self._rundir, keys, RECIPE, session)
        async for message in link.messages():
            if isinstance(message, Pulse):
                self.snapshot = message.snapshot
                link.loaded()
            elif isinstance(message, Lease) and not self._silent:
                for group_id, row in message.items:
                    rewards = [0.0, 1.0] if message.split == "train" else [1.0]
                    group = make_group(
                        group_id,
                        row=row,
                        snapshot=self.snapshot,
                        session=session.name,
                        split=message.split,
                        rewards=rewards,
                    )
                    self.answered.append(group_id)
                    link.answer(group)

    def _load(self, held: set[Work]) -> Load:
        return Load(self.snapshot, max(0, 16 - 2 * len(held)), len(self.answered))


def train(inbox: Inbox, steps: int, incarnation: int = 1) -> list[int]:
    """Ids trained, step by step, as the loop does it."""
    trained = []
    for step in range(1, steps + 1):
        groups = inbox.take(2)
        assert groups is not None
        trained += [group.group_id for group in groups]
        number = inbox.state()["ledger"]["step"] + 1
        inbox.commit(Pulse(snapshot=snapshot_id(number, incarnation), manifest_sha256="h"), number)
        assert step
    return trained


def test_groups_flow_exams_are_answered_and_the_end_reaches_the_sampler(rundir, ranks):
    with trainer(rundir, ranks) as inbox:
        sampler = FakeEngine(rundir)
        sampler.start()
        for alone in (False, True):
            inbox.start_exam(alone)
            assert len(inbox.end_exam(wait=True)) == 3
            assert inbox.end_exam(wait=False) is None
        assert sorted(train(inbox, 6)) == list(range(12))
        inbox.start_exam(alone=True)  # and training goes on
        assert sorted(train(inbox, 6)) == list(range(12, 24))
        answers = inbox.end_exam(wait=True)
        spans = [span for group in answers for one in group.completions for span in one.spans]
        assert {span.snapshot for span in spans} == {"s00000006.i0001"}
        inbox.finish(final=True)
        sampler.join(60)
    assert not sampler.is_alive() and sampler.error is None


def test_many_answers_are_followed_by_few_beats_and_acknowledgements_by_none_at_once():
    sets = {split: DataSet(rows=50, fingerprint=split) for split in ("train", "eval")}
    session = Session("one", load(None, []).network, agreed("r"), sets, lambda held: Load(None, 0, 0), {})
    session.on(Welcome(incarnation=1))
    session.on(Lease(split="train", items=[(number, number) for number in range(9)]))
    kinds = []
    for number in range(9):
        session.answer(make_group(number, session="one"))
        kinds += [type(message).__name__ for message in session.due(10.0 + number / 10)]
        session.on(Ack(split="train", group_id=number, status="accepted", why=""))
        assert not session.due(10.0 + number / 10)
    assert kinds == ["Group", "Beat", *["Group"] * 5, "Beat", *["Group"] * 3]
    assert session.wake_at() == pytest.approx(11.0)
    [beat] = session.due(11.0)
    assert beat.held == [] and session.wake_at() == 16.0


def test_the_room_of_an_acknowledged_answer_is_told_soon():
    """The beat beside an answer still counts it as held."""
    sets = {split: DataSet(rows=50, fingerprint=split) for split in ("train", "eval")}
    session = Session("one", load(None, []).network, agreed("r"), sets, lambda held: Load(None, 1 - len(held), 0), {})
    session.on(Welcome(incarnation=1))
    session.on(Lease(split="train", items=[(0, 0)]))
    session.answer(make_group(0, session="one"))
    assert [getattr(message, "want", None) for message in session.due(10.0)] == [None, 0]
    session.on(Ack(split="train", group_id=0, status="accepted", why=""))
    assert session.wake_at() == 10.5 and [beat.want for beat in session.due(10.5)] == [1]


def test_a_sampler_may_come_first(rundir, ranks):
    sampler = FakeEngine(rundir)
    sampler.start()
    time.sleep(0.5)
    with trainer(rundir, ranks) as inbox:
        assert train(inbox, 1) == [0, 1]


def test_a_sampler_that_never_answers_loses_its_leases_when_it_goes(rundir, ranks):
    with trainer(rundir, ranks) as inbox:
        lazy = FakeEngine(rundir, silent=True)
        lazy.start()
        time.sleep(1.0)
        FakeEngine(rundir).start()
        lazy.link.stop()
        assert train(inbox, 2) == [0, 1, 2, 3]


@pytest.mark.fault("D6")
def test_a_trainer_that_restarts_elsewhere_is_found_and_nothing_is_lost_or_doubled(rundir, ranks):
    sampler = FakeEngine(rundir)
    sampler.start()
    with trainer(rundir, ranks) as inbox:
        first = train(inbox, 3)
        checkpoint = inbox.state()
        train(inbox, 2)  # lost with the crash: not in the checkpoint
    with trainer(rundir, ranks, incarnation=2, state=checkpoint) as inbox:
        again = train(inbox, 5, incarnation=2)
        book = inbox.state()["ledger"]
    # Answers from before the crash may come first; what counts is that each id is trained once and known as done.
    assert len(set(first + again)) == 16
    assert {*range(book["done_below"]), *book["done_above"]} == set(first + again)


@pytest.mark.fault("H6")
def test_a_sampler_of_another_model_is_refused_with_the_reason(rundir, ranks):
    with trainer(rundir, ranks):
        sampler = FakeEngine(rundir, model="another")
        sampler.start()
        sampler.join(60)
    assert isinstance(sampler.error, Rejected) and "model differs" in str(sampler.error)


@pytest.mark.fault("N5")
def test_a_sampler_without_a_trainer_gives_up_after_its_grace(rundir):
    sampler = FakeEngine(rundir)
    sampler.start()
    sampler.join(60)
    assert isinstance(sampler.error, TrainerGone) and "start one" in str(sampler.error)


def test_a_stop_signal_ends_the_wait_for_groups(rundir, ranks):
    stop = threading.Event()
    with trainer(rundir, ranks, stop=stop) as inbox:
        threading.Timer(0.5, stop.set).start()
        assert inbox.take(2) is None


def test_a_broken_reward_reaches_the_training_thread(rundir, ranks):
    with trainer(rundir, ranks) as inbox:
        inbox._failure = RuntimeError("boom")
        with pytest.raises(RuntimeError, match="hub thread failed"):
            inbox.take(2)
