"""The wire for the fuzzer: a desk that has granted leases, hostile messages for it, and what must hold after each."""

import contextlib
import functools

import msgspec
import numpy as np

from protocol import codec
from protocol.messages import (
    Ack,
    Agreement,
    Beat,
    Bye,
    Completion,
    DataSet,
    Down,
    Failure,
    Group,
    Hello,
    Lease,
    Pulse,
    Rejection,
    Span,
    Stop,
    Unreadable,
    Up,
    Welcome,
    Who,
)
from protocol.recipe import Recipe
from protocol.resolve import load
from protocol.snapshot import snapshot_id
from tests.fuzz.choices import Choices
from tests.fuzz.history import check_ledger
from tests.groups import make_group
from trainer.accept import problem
from trainer.desk import BrokenGroups, Desk, Letters
from trainer.exam import Plan

AGREED = Agreement(protocol=1, run_id="r", model="m", tokenizer="t", vocabulary=320, group_size=2, recipe="c")
ROWS, EXAM = DataSet(rows=12, fingerprint="f"), DataSet(rows=3, fingerprint="e")
NOW, NEVER = snapshot_id(0, 1), snapshot_id(7, 9)
HUGE = (1 << 64) - 1
HELLO = {name: Hello(session=name, agreement=AGREED, train=ROWS, eval=EXAM) for name in ("one", "two")}
BEAT = {name: Beat(session=name, snapshot=NOW, want=4, held=[], progress=0) for name in ("one", "two")}
PULSE = Pulse(snapshot=NOW, manifest_sha256="0" * 64)


def _floats(*values: float) -> bytes:
    return codec.pack(np.array(values, np.float32))


def _ints(*values: int) -> bytes:
    return codec.pack(np.array(values, np.int32))


TOKENS = (
    _ints(1, 2, 3),
    _ints(1, 2),
    _ints(1, 2, 320),
    _ints(1, -1, 2),
    _ints(),
    b"",
    b"x",
    _floats(1, 2, 3),
    b"\0\0i",
)
LOGPROBS = (
    *(
        _floats(-1, -2, -3),
        _floats(-1, -2),
        _floats(-1, float("nan"), -1),
        _floats(0.5, -1, -1),
        _floats(),
        b"",
        b"abcf",
    ),
    *(_floats(-1, float("-inf"), -1), _floats(-1e30, -1, -1), _ints(1, 2, 3)),
)
SPANS = (
    *(
        [Span(NOW, 0, 3)],
        [Span(NOW, 0, 2), Span(NEVER, 2, 3)],
        [Span(NEVER, 0, 3)],
        [Span(NOW, 0, 4)],
        [Span(NOW, 1, 3)],
    ),
    *([], [Span(NOW, 0, 0), Span(NOW, 0, 3)], [Span(NOW, 0, HUGE)], [Span("../x", 0, 3)], [Span("s", 0, 3)]),
)
REWARDS = (0.0, 1.0, -1.0, float("nan"), float("inf"), 1e308, 5e-324)
NAMED = ({"gsm8k": 1.0}, {"gsm8k": None}, {}, {"other": 0.0}, {"gsm8k": float("nan")})
WHY = ("", "why", "\x1b[2J\n", "w" * 4096, "w" * 4097)


class Session:
    """A desk with two samplers and leases, or an exam going on; or one that nobody has greeted."""

    def __init__(self, exam: bool = False, greeted: bool = True) -> None:
        self.desk = Desk(recipe=recipe(), agreement=AGREED, incarnation=1, pulse=PULSE)
        self.now, self.step = 0.0, 0
        if not greeted:
            return
        for name in HELLO:
            self.desk.on(name.encode(), HELLO[name], self.now)
        if exam:
            self.desk.start_exam(Plan(number=0, pulse=self.desk.pulse, alone=False))
        for name in HELLO:
            self.desk.on(name.encode(), BEAT[name], self.now)

    def hear(self, frame: bytes) -> None:
        """One frame from a sampler that holds a key."""
        try:
            message = codec.decode_up(frame)
        except codec.Malformed:
            return
        with contextlib.suppress(BrokenGroups):  # the run ends there, on purpose
            letters = self.desk.on(b"one", message, self.now)
            if isinstance(message, Group | Failure) and message.session in HELLO:
                assert sum(isinstance(letter, Ack | Who) for _, letter in letters) == 1, "not one answer to one group"
            self.check(letters)

    def train(self) -> None:
        """What the training thread does when it can."""
        ledger = self.desk.train
        groups = ledger.take(ledger.per_step) if ledger else None
        if ledger and groups:
            assert codec.decode_groups(codec.encode_groups(groups)) == groups
            self.step += 1
            ledger.commit(self.step)
            self.desk.pulse = Pulse(snapshot=snapshot_id(self.step, 1), manifest_sha256="0" * 64)
            ledger.publish(self.desk.pulse.snapshot)
            self.check(self.desk.news())

    def check(self, letters: Letters) -> None:
        for _, letter in letters:
            assert codec.decode_down(codec.encode(letter)) == letter, "a sampler could not read this"
        for ledger in self.desk._ledgers().values():
            if ledger:
                check_ledger(ledger)
                for group in ledger.ready.values():
                    count = 2 if group.split == "train" else 1
                    unsound = problem(group, completions=count, max_tokens=512, vocabulary=320, reference=False)
                    assert unsound is None, unsound


@functools.cache
def recipe() -> Recipe:
    changes = [
        "trainer.prompts_per_step=2",
        "sampling.group_size=2",
        "objective.kl_beta=0.0",
        "eval.samples=1",
    ]  # as `check` expects
    return load(None, changes)


def told(frame: bytes) -> None:
    """The sampler's side: what the trainer says, or what stands in its place."""
    with contextlib.suppress(codec.Malformed):
        message = codec.decode_down(frame)
        assert codec.decode_down(codec.encode(message)) == message


def play(choices: Choices) -> None:
    """Up to 16 moves of samplers, clock and trainer; some messages are damaged on the way."""
    session = Session(exam=choices.seldom(), greeted=not choices.seldom())
    for _ in range(16):
        if not choices.left:
            return
        move = choices.below(16)
        if move == 0:
            session.now += choices.below(40)
            session.check(session.desk.tick(session.now))
        elif move == 1:
            session.train()
        else:
            frame = codec.encode(up(move, choices, session.desk))
            session.hear(choices.damage(frame) if choices.seldom() else frame)


def up(move: int, choices: Choices, desk: Desk) -> Up:
    """A message that has the right form, and seldom wrong values."""
    name = choices.pick(("two", "nobody", "", "s" * 257)) if choices.seldom() else "one"
    group_id = choices.pick((HUGE, 1000, -1)) if choices.seldom() else choices.below(8)
    split = "eval" if desk.exam else "train"
    if choices.seldom():
        split = choices.pick(("train", "eval", "test"))
    match move:
        case 2:
            rows = DataSet(rows=choices.pick((12, 13, 0, HUGE)), fingerprint="f")
            return Hello(session=name, agreement=AGREED, train=rows, eval=EXAM, versions={"a": choices.pick(WHY)[:256]})
        case 3 | 4:
            held = [(split, choices.below(6)) for _ in range(choices.below(4))]
            want, snapshot = choices.pick((4, 0, 1, HUGE)), choices.pick((NOW, None, NEVER, "../x"))
            return Beat(session=name, snapshot=snapshot, want=want, held=held, progress=choices.below(3))
        case 5:
            return Failure(session=name, split=split, group_id=group_id, why=choices.pick(WHY))
        case 6:
            return Bye(session=name) if choices.seldom() else BEAT["two"]
        case 7:
            return Unreadable(session=name, snapshot=choices.pick((NOW, NEVER, "../x")), why=choices.pick(WHY))
    return group(choices, desk, name, split, group_id)


def group(choices: Choices, desk: Desk, session: str, split: str, group_id: int) -> Group:
    ledger = desk._ledgers().get(split)
    known = ledger is not None and 0 <= group_id < 100
    row = ledger.row(group_id) if known and ledger and not choices.seldom() else choices.below(20)
    count = choices.below(4) if choices.seldom() else 1 if split == "eval" else 2
    completions = [completion(choices) for _ in range(count)]
    prompt = choices.pick(TOKENS) if choices.seldom() else TOKENS[0]
    return Group(
        session=session, split=split, group_id=group_id, row=row, prompt=prompt, completions=completions, seconds=1.0
    )


def completion(choices: Choices) -> Completion:
    spoiled = choices.below(12) if choices.seldom() else -1  # which field is hostile
    return Completion(
        tokens=choices.pick(TOKENS) if spoiled == 0 else TOKENS[0],
        logprobs=choices.pick(LOGPROBS) if spoiled in (1, 2) else LOGPROBS[0],
        ref_logprobs=choices.pick(LOGPROBS) if spoiled == 3 else None,
        finish="stop",
        spans=choices.pick(SPANS) if spoiled in (4, 5, 6) else SPANS[0],
        reward=choices.pick(REWARDS) if spoiled in (7, 8) else 1.0,
        rewards=choices.pick(NAMED) if spoiled in (9, 10) else NAMED[0],
    )


def down(choices: Choices) -> bytes:
    return choices.pick(DOWN)


UP = [
    codec.encode(message)
    for message in (
        *(HELLO["one"], BEAT["one"], make_group(0, lengths=[3, 2], snapshot=NOW), Bye(session="one")),
        *(Failure(session="one", split="train", group_id=0, why="w"), Unreadable(session="one", snapshot=NOW, why="w")),
        msgspec.structs.replace(BEAT["one"], held=[("train", 0), ("eval", 1)]),
        make_group(1, rewards=[1.0], lengths=[2], split="eval", reference=True),
    )
]
"""One of each; test_fuzz proves that none is missing."""

_DOWN: tuple[Down, ...] = (
    *(Welcome(incarnation=1), Rejection(why="w"), PULSE, Lease(split="eval", items=[(1, 2), (3, HUGE)]), Who()),
    *(Ack(split="train", group_id=0, status="stale", why="w"), Stop(final=True)),
)
DOWN = [codec.encode(message) for message in _DOWN]
