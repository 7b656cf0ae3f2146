"""The protocol with one piece removed: the simulator must notice, or it proves nothing about that piece."""

from collections.abc import Callable
from dataclasses import dataclass, field

import pytest

from protocol.messages import Welcome, Who
from sampler.session import NEVER, Session
from tests.simulation.audit import Violation
from tests.simulation.history import simulate
from tests.simulation.trainer import Trainer
from trainer import desk
from trainer.desk import Desk
from trainer.exam import Exam, open_exam
from trainer.ledger import MAX_TRIES, Ledger

Replace = Callable[[object, str, object], None]
"""`monkeypatch.setattr`."""


@dataclass(frozen=True, slots=True)
class Mutant:
    """kinds: of the violations that it must lead to within SEEDS histories; none: it only costs time, or rarely more.

    where: conditions under which the piece matters, where that is seldom the case.
    """

    piece: str
    remove: Callable[[Replace], None]
    kinds: tuple[str, ...] = ()
    where: dict[str, object] = field(default_factory=dict)


SEEDS = 60


# -- exactly once ------------------------------------------------------------------------------------------------


def dedupe(replace: Replace) -> None:
    offer = Ledger.offer

    def again(ledger: Ledger, group) -> str:
        known = ledger.is_done(group.group_id) or group.group_id in ledger.ready or group.group_id in ledger.taken
        if not known:
            return offer(ledger, group)
        ledger.ready[group.group_id] = group
        return "accepted"

    replace(Ledger, "offer", again)


def done_set_as_cursor(replace: Replace) -> None:
    state = Ledger.state

    def cursor(ledger: Ledger) -> dict:
        return state(ledger) | {"done_below": max([ledger.done_below - 1, *ledger.done_above]) + 1, "done_above": []}

    replace(Ledger, "state", cursor)


def done_set_as_low_water_mark(replace: Replace) -> None:
    state = Ledger.state
    replace(Ledger, "state", lambda ledger: state(ledger) | {"done_above": []})


def restored_done_set(replace: Replace) -> None:
    restore = Ledger.restore
    replace(Ledger, "restore", lambda ledger, state: restore(ledger, state | {"done_above": []}))


def ledger_of_another_moment(replace: Replace) -> None:
    """The checkpoint keeps the weights of this step and the ledger of the one before."""
    commit, state = Trainer.commit, Trainer.state

    def remember(trainer: Trainer, pulse) -> None:
        trainer.before = trainer.desk.train.state() if trainer.desk.train else None
        commit(trainer, pulse)

    def earlier(trainer: Trainer) -> dict:
        now = state(trainer)
        return now | {"ledger": trainer.before and trainer.before | {"step": trainer.steps}}

    replace(Trainer, "commit", remember)
    replace(Trainer, "state", earlier)


def requeue(replace: Replace) -> None:
    replace(Ledger, "_requeue", lambda ledger, group_id: None)


# -- which weights, how many groups ------------------------------------------------------------------------------


def lineage_fence(replace: Replace) -> None:
    replace(Ledger, "_staleness", lambda ledger, group: 0)


def outstanding_cap(replace: Replace) -> None:
    replace(Ledger, "_slot_step", lambda ledger: ledger.step)


def cap_on_answers_without_a_lease(replace: Replace) -> None:
    offer = Ledger.offer

    def roomy(ledger: Ledger, group) -> str:
        status = offer(ledger, group)
        if status == "full" and ledger._staleness(group) <= ledger.max_staleness:
            ledger.ready[group.group_id], status = group, "accepted"
        return status

    replace(Ledger, "offer", roomy)


def spare(replace: Replace) -> None:
    """A group without signal is forgotten, but not marked as done."""
    offer, done = Ledger.offer, Ledger._mark_done

    def forgetful(ledger: Ledger, group) -> str:
        replace(Ledger, "_mark_done", lambda *_: None)
        status = offer(ledger, group)
        replace(Ledger, "_mark_done", done)
        return status

    replace(Ledger, "offer", forgetful)


# -- exams -------------------------------------------------------------------------------------------------------


def one_version(replace: Replace) -> None:
    """An exam takes answers by any weights that a step may still be trained with."""
    opened = open_exam

    def open_to_all(plan, rows: int, lease_s: float):
        exam = opened(plan, rows, lease_s)
        exam.ledger._staleness = lambda group: 0
        return exam

    replace(desk, "open_exam", open_to_all)


def pinned(replace: Replace) -> None:
    """Who takes part in an exam is told of newer weights all the same."""
    replace(Desk, "_news", lambda desk, session: desk.stop or desk.pulse)


def hand_over(replace: Replace) -> None:
    replace(Exam, "hand_over", lambda *_: None)


# -- who is to blame ---------------------------------------------------------------------------------------------


def soundness(replace: Replace) -> None:
    replace(Desk, "_problem", lambda desk, group: None)


def many_tries(replace: Replace) -> None:
    """A healthy group that fails once is set aside."""
    fail = Ledger.fail

    def hasty(ledger: Ledger, session: str, group_id: int, why: str, **rest) -> None:
        ledger._tries[group_id] = MAX_TRIES - 1
        return fail(ledger, session, group_id, why, **rest)

    replace(Ledger, "fail", hasty)


def trust(replace: Replace) -> None:
    """A sampler that never sent a sound group speaks for its groups, too."""
    fail = Ledger.fail
    replace(Ledger, "fail", lambda ledger, *lease, number=0, trusted=True: fail(ledger, *lease, number=number))


def numbers_of_failures(replace: Replace) -> None:
    fail = Ledger.fail
    replace(Ledger, "fail", lambda ledger, *lease, number=0, trusted=True: fail(ledger, *lease, trusted=trusted))


def session_in_a_failure(replace: Replace) -> None:
    fail = Ledger.fail

    def anybodys(ledger: Ledger, session: str, group_id: int, why: str, **rest) -> None:
        lease = ledger.leases.get(group_id)
        return fail(ledger, lease.session if lease else session, group_id, why, **rest)

    replace(Ledger, "fail", anybodys)


def memory_of_unsound_groups(replace: Replace) -> None:
    """A hello makes good."""
    hello = Desk._hello

    def forgiving(desk: Desk, peer: bytes, message, now: float):
        desk.unsound.pop(message.session, None)
        return hello(desk, peer, message, now)

    replace(Desk, "_hello", forgiving)


# -- liveness ----------------------------------------------------------------------------------------------------


def no_lease_for_an_engine_that_stands_still(replace: Replace) -> None:
    grant = Desk._grant

    def generous(desk: Desk, session: str, now: float):
        if session in desk.samplers:
            desk.samplers[session].moved = now
        return grant(desk, session, now)

    replace(Desk, "_grant", generous)


def lease_expiry(replace: Replace) -> None:
    replace(Ledger, "expire", lambda ledger, now: expire(ledger, now) if now == float("inf") else [])


expire = Ledger.expire  # the auditor's own call must go on working


def lost_sampler(replace: Replace) -> None:
    """A sampler that is silent keeps its leases."""
    replace(Ledger, "drop", lambda ledger, session: 0)


def lost_lease(replace: Replace) -> None:
    beat = Ledger.beat

    def trusting(ledger: Ledger, session: str, held, moved: bool, now: float, resend_s: float) -> None:
        beat(ledger, session, set(ledger.leases), moved, now, resend_s)

    replace(Ledger, "beat", trusting)


def resend(replace: Replace) -> None:
    due = Session.due

    def once(session: Session, now: float) -> list:
        for work, sent in session._sent.items():
            session._sent[work] = now if sent > NEVER else sent
        return due(session, now)

    replace(Session, "due", once)


def outbox(replace: Replace) -> None:
    due = Session.due

    def forgetful(session: Session, now: float) -> list:
        messages = due(session, now)
        for work in [*session._outbox] if session._welcomed else []:
            session._forget(work)
        return messages

    replace(Session, "due", forgetful)


def hello_retry(replace: Replace) -> None:
    greeting = Session._greeting

    def shy(session: Session, now: float) -> list:
        messages = greeting(session, now)
        if messages:
            session._next_hello = float("inf")
        return messages

    replace(Session, "_greeting", shy)


def resend_after_a_welcome(replace: Replace) -> None:
    on = Session.on

    def polite(session: Session, message):
        sent = dict(session._sent)
        news = on(session, message)
        if isinstance(message, Welcome):
            session._sent |= sent
        return news

    replace(Session, "on", polite)


def who(replace: Replace) -> None:
    on = Session.on
    replace(Session, "on", lambda session, message: [] if isinstance(message, Who) else on(session, message))


def repeated_pulse(replace: Replace) -> None:
    """Weights are announced once, when they are new."""
    beat = Desk._beat

    def silent(desk: Desk, message, sampler, now: float):
        return [letter for letter in beat(desk, message, sampler, now) if letter[1] is not desk.pulse]

    replace(Desk, "_beat", silent)


TRAINER_DIES = {"faults": ("kill_trainer",), "fault_s": 15.0, "checkpoint_every": 3}
SAMPLERS_PAUSE = {"faults": ("pause_sampler", "partition"), "fault_s": 15.0, "samplers": 3}
ENGINES_HANG = {"faults": ("hang",), "fault_s": 15.0, "samplers": 3}
ALL_FAIL_ONCE = {"fail": 1.0, "hostile": False, "poisoned": frozenset()}
LINKS_BREAK = {"faults": ("partition", "pause_trainer"), "fault_s": 15.0, "repeat": (0.2, 0.2), "delay_s": 3.0}
FLAT = {"flat": 0.5, "refill": 4}
EXAMS = {"exams": 2, "samplers": 3, "steps": 15}
ONE_IS_HOSTILE = {"hostile": True, "faults": ("partition", "jump_sampler"), "fault_s": 10.0, "exams": -1}

MUTANTS = [
    Mutant("dedupe by group id", dedupe, ("overlap", "trained twice", "cap", "lineage")),
    Mutant("lineage fence", lineage_fence, ("lineage", "stale")),
    Mutant("outstanding cap", outstanding_cap, ("cap",)),
    Mutant("cap on answers without a lease", cap_on_answers_without_a_lease),
    Mutant("done set (a cursor instead)", done_set_as_cursor, ("lost",)),
    Mutant("done set (a low-water mark instead)", done_set_as_low_water_mark, ("trained twice",)),
    Mutant("done set in restore", restored_done_set, ("trained twice",)),
    Mutant("ledger and weights of one moment", ledger_of_another_moment, ("trained twice",)),
    Mutant("requeue", requeue, ("lost", "stall")),
    Mutant("groups without signal are done", spare, ("trained twice", "lost"), FLAT),
    Mutant("one version in an exam", one_version, ("exam",), EXAMS),
    Mutant("weights pinned for an exam", pinned, ("stall",), EXAMS),
    Mutant("exam handed over by a sampler that stands still", hand_over, ("stall",), EXAMS | ENGINES_HANG),
    Mutant("soundness check", soundness, ("unsound",)),
    Mutant("several tries before quarantine", many_tries, ("quarantined", "exam")),
    Mutant("trust before a sampler's word counts", trust, ("quarantined",), ONE_IS_HOSTILE),
    Mutant("numbers of failures", numbers_of_failures, ("quarantined", "exam"), ALL_FAIL_ONCE | LINKS_BREAK),
    Mutant("session in a failure", session_in_a_failure, ("taken away",), ALL_FAIL_ONCE | SAMPLERS_PAUSE),
    Mutant("unsound groups outlive a hello", memory_of_unsound_groups, ("not banned",), ONE_IS_HOSTILE),
    Mutant(
        "no lease for an engine that stands still", no_lease_for_an_engine_that_stands_still, ("stall",), ENGINES_HANG
    ),
    Mutant("lease expiry", lease_expiry, ("stall",), ENGINES_HANG),
    Mutant("resend of unacknowledged answers", resend, ("stall",)),
    Mutant("Who is answered", who, ("stall",), TRAINER_DIES | {"fixed_port": True}),
    Mutant("pulse in every beat's answer", repeated_pulse),
    Mutant("leases of a silent sampler go back", lost_sampler, where=SAMPLERS_PAUSE),
    Mutant("hello retry", hello_retry, where=LINKS_BREAK),
    Mutant("resend after a welcome", resend_after_a_welcome, where=TRAINER_DIES),
    Mutant("outbox (forget after sending)", outbox, where=LINKS_BREAK),
    Mutant("lost leases seen in a beat", lost_lease, where=LINKS_BREAK),
]


def caught(mutant: Mutant, seeds: int = SEEDS, patience: int | None = None, **conditions: object) -> list[Violation]:
    """The violations in histories 0 .. seeds - 1 without the piece; ends at the `patience`th one."""
    found: list[Violation] = []
    with pytest.MonkeyPatch.context() as patch:
        mutant.remove(patch.setattr)
        for seed in range(seeds):
            try:
                simulate(seed, **conditions)
            except Violation as violation:
                found.append(violation)
                if len(found) == patience:
                    break
    return found


def table(seeds: int) -> str:
    """What each piece is good for: in any histories, and in those where it matters."""
    lines = [f"| removed piece | caught in x/{seeds} seeds | where it matters | consequence |", "|---|---|---|---|"]
    for mutant in MUTANTS:
        anywhere = caught(mutant, seeds)
        there = caught(mutant, seeds, **mutant.where) if mutant.where else anywhere
        kinds = (
            ", ".join(sorted({violation.kind for violation in [*anywhere, *there]}))
            or "none found: costs time, or matters seldom"
        )
        lines.append(f"| {mutant.piece} | {len(anywhere)} | {len(there)} | {kinds} |")
    return "\n".join(lines)
