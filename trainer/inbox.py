"""Where a step's groups come from: rank 0's hub thread serves the samplers, every rank gets the same groups.

The thread owns the socket; the desk (all protocol state) is shared under one lock. The training thread only calls
`take`, `commit`, `start_exam`, `end_exam` and the like. While rank 0 waits for samplers, all ranks meet in a small
all-reduce every two seconds; that is also how a stop signal or a failure on one of them reaches all.
"""

import logging
import threading
import time
from collections.abc import Callable
from typing import Self

import msgspec

from protocol import codec
from protocol.channel import Hub
from protocol.errors import RunError, StorageError, Superseded
from protocol.messages import DataSet, Group, Pulse, Split, Stop
from protocol.rundir import RunDir
from protocol.snapshot import Corrupt, open_sealed
from trainer.desk import Desk, Letters
from trainer.exam import Plan
from trainer.ranks import Ranks

log = logging.getLogger(__name__)

SAY_S = 30.0
"""Between two lines that say what is waited for."""
TURN_S = 2.0
"""Between two meetings of the ranks while they wait."""


class Inbox:
    """All ranks construct one; only rank 0's has a desk and a hub. Once `stop` is set on any, all `take` None.

    `broken` is why this rank asked for the end itself, if it did.
    """

    def __init__(self, ranks: Ranks, desk: Desk | None, hub: Hub | None, stop: threading.Event, rundir: RunDir) -> None:
        self._ranks, self._desk, self._hub, self._stopping = ranks, desk, hub, stop
        self._rundir = rundir
        self.broken: StorageError | None = None
        self._sound: Pulse | None = None
        self._changed = threading.Condition()
        self._closing = threading.Event()
        self._wanted: Callable[[Desk], list[Group] | None] | None = None
        """What the training thread waits for; it is woken when that is there, and not by every message."""
        self._found: list[Group] | None = None
        self._failure: BaseException | None = None
        self._thread = threading.Thread(target=self._serve, name="hub", daemon=True)
        self._news = False
        self.waited_s = 0.0
        self._said = 0.0
        self.exams = 0

    # -- the training thread, on every rank ----------------------------------------------------------------------

    def take(self, count: int) -> list[Group] | None:
        """The next `count` groups, the same on every rank; None when any rank was asked to stop.

        Waits for samplers, without a limit: the hub thread ends the wait when enough groups are ready.
        """
        return self._wait(lambda desk: desk.train.take(count) if desk.train else None)

    def commit(self, pulse: Pulse, step: int) -> None:
        """The taken groups are trained, and these are the weights that came of it."""
        if self._desk is None:
            return
        with self._changed:
            if self._desk.train:
                self._desk.train.commit(step)
                self._desk.train.publish(pulse.snapshot)
            self._desk.pulse = pulse
        self._announce()

    def set_aside(self, why: str) -> None:
        """The taken groups broke a step and are not tried again."""
        if self._desk and self._desk.train:
            with self._changed:
                self._desk.train.set_aside(why)

    def start_exam(self, alone: bool) -> None:
        """Has the announced weights answer every held-out prompt while training goes on; `exam.py` says by whom."""
        number, self.exams = self.exams, self.exams + 1
        if self._desk and self._desk.pulse:
            with self._changed:
                self._desk.start_exam(Plan(number=number, pulse=self._desk.pulse, alone=alone))
            self._announce()

    def end_exam(self, wait: bool) -> list[Group] | None:
        """Its answers, on rank 0 alone; None where some are missing, or when asked to stop while waiting.

        While training waits all samplers take part.
        """
        if wait and self._desk and self._desk.exam:
            with self._changed:
                self._desk.exam.alone = False
            self._announce()
        if wait and self._wait(lambda desk: [] if desk.exam and desk.exam.ledger.finished() else None) is None:
            return None
        if self._desk is None:
            return None
        with self._changed:
            groups = self._desk.end_exam()
        if groups is not None:
            self._announce()
        return groups

    def data(self, split: Split) -> DataSet:
        """What samplers said of a split, once one has."""
        assert self._desk is not None
        with self._changed:
            return self._desk.sets[split]

    def pinned(self) -> set[str]:
        """Snapshots that an exam needs."""
        assert self._desk is not None
        with self._changed:
            return {exam.pulse.snapshot for exam in (self._desk.exam, self._desk.planned) if exam}

    def serve(self) -> None:
        """From now on samplers are heard, on rank 0."""
        if self._desk:
            self._thread.start()

    # -- rank 0 --------------------------------------------------------------------------------------------------

    def state(self) -> dict:
        """What a checkpoint must keep: trained ids, lineage, data sets, exams."""
        assert self._desk is not None
        with self._changed:
            return {
                "ledger": self._desk.train.state() if self._desk.train else None,
                "sets": msgspec.to_builtins(self._desk.sets),
                "exams": self.exams,
                "solved": self._desk.solved.state(),
            }

    def solved(self) -> dict[str, list[int]]:
        """Rows of the training data: always, never and sometimes solved."""
        assert self._desk is not None
        with self._changed:
            return self._desk.solved.report()

    def counts(self) -> dict[str, float]:
        """Figures for the record: groups by status, samplers, their progress in tokens."""
        assert self._desk is not None
        with self._changed:
            samplers = self._desk.samplers.values()
            figures = {f"groups/{name}": float(count) for name, count in self._desk.counts.items() if count}
            figures["samplers"] = float(len(samplers))
            figures["sampler/tokens"] = float(sum(sampler.progress for sampler in samplers))
            figures["malformed"] = float(self._hub.malformed) if self._hub else 0.0
            figures["unsent"] = float(self._hub.unsent) if self._hub else 0.0
            figures["quarantined"] = float(len(self._desk.train.quarantined)) if self._desk.train else 0.0
            return figures

    def loaded(self) -> set[str]:
        """Snapshots that samplers said they use."""
        assert self._desk is not None
        with self._changed:
            return {sampler.snapshot for sampler in self._desk.samplers.values() if sampler.snapshot}

    def finish(self, final: bool, patience_s: float = 10.0) -> None:
        """Tells all samplers that the run is over (final) or pauses, and waits a little for their goodbyes."""
        if self._desk is None:
            return
        with self._changed:
            self._desk.stop = Stop(final=final)
        self._announce()
        deadline = time.monotonic() + patience_s
        with self._changed:
            while self._desk.samplers and final and (left := deadline - time.monotonic()) > 0:
                self._changed.wait(left)

    # -- inside --------------------------------------------------------------------------------------------------

    def _wait(self, ready: Callable[[Desk], list[Group] | None]) -> list[Group] | None:
        """What rank 0 found ready, on every rank; None when any was asked to stop."""
        start = time.monotonic()
        try:
            while True:
                groups = self._poll(ready)
                data = codec.encode_groups(groups) if groups and self._ranks.world > 1 else b""
                news = [self._stopping.is_set(), self._exit_code(), groups is not None, len(data)]
                stopping, failed, found, size = self._ranks.max(news)
                if failed:
                    self._raise_failure(failed)
                if stopping:  # asked for on one rank, it holds on all, after the groups that are here already
                    self._stopping.set()
                if found:
                    sent = self._ranks.broadcast(data, size) if size else b""
                    return codec.decode_groups(sent) if sent and not self._ranks.first else groups or []
                if stopping:
                    return None
                self._say_what_is_missing(start)
        finally:
            self.waited_s += time.monotonic() - start

    def _poll(self, ready: Callable[[Desk], list[Group] | None]) -> list[Group] | None:
        """Rank 0: up to TURN_S for groups. Other ranks come to the meeting at once and wait there."""
        if self._desk is None:
            return None
        self._look_around()
        deadline = time.monotonic() + TURN_S
        with self._changed:
            self._found, self._wanted = None, ready
            self._try()
            while self._found is None and not self._stopping.is_set() and self._failure is None:
                left = deadline - time.monotonic()
                if left <= 0 or not self._changed.wait(left):
                    break
            self._wanted = None
            return self._found

    def _try(self) -> None:
        """Either thread, for what the training thread waits for."""
        going_on = not self._stopping.is_set() and self._failure is None
        if self._desk and self._wanted and self._found is None and going_on:
            self._found = self._wanted(self._desk)

    def _look_around(self) -> None:
        """What only the disk tells: a newer trainer, whose samplers will not come back to this one; a spoiled snapshot.

        A sampler doubted the announced one. If we cannot read it either, a new start must publish the weights again.
        """
        assert self._desk is not None
        with self._changed:
            doubted, self._desk.doubted = self._desk.doubted, None
        if doubted == self._sound:  # read and verified before: the fault is on the sampler's side
            doubted = None
        try:
            self._rundir.refuse_if_superseded(self._desk.incarnation)
            if doubted:
                path = self._rundir.snapshots / doubted.snapshot
                open_sealed(path, doubted.manifest_sha256, patience_s=TURN_S).verified()
                self._sound = doubted
        except Superseded as error:
            self._failure = error
        except Corrupt as error:
            self.broken = StorageError(f"{error}; checkpoint saved: start the trainer again, it publishes anew")
            self._stopping.set()

    def _say_what_is_missing(self, since: float) -> None:
        if self._desk and time.monotonic() - max(since, self._said) > SAY_S:
            self._said = time.monotonic()
            log.info("waiting for answers of %d samplers: python -m sampler --run ...", len(self._desk.samplers))

    def _exit_code(self) -> int:
        """Of this rank's failure; 0 without one."""
        return 0 if self._failure is None else getattr(self._failure, "exit_code", 1)

    def _raise_failure(self, code: int) -> None:
        if isinstance(self._failure, RunError):
            raise self._failure
        if self._failure is None:
            raise SystemExit(code)  # the first rank says why
        raise RuntimeError("the hub thread failed") from self._failure

    def _announce(self) -> None:
        self._news = True
        if self._hub:
            self._hub.wake()

    def _serve(self) -> None:
        """The hub thread: one message in, the desk's answers out, until `close`."""
        assert self._desk is not None and self._hub is not None
        try:
            next_tick = 0.0
            while not self._closing.is_set():
                received = self._hub.receive(timeout_s=1.0)
                letters: Letters = []
                with self._changed:
                    now = time.monotonic()
                    if self._news:
                        self._news = False
                        letters += self._desk.news() + self._desk.tick(now)
                    if received:
                        letters += self._desk.on(*received, now)
                    if now >= next_tick:
                        letters += self._desk.tick(now)
                        next_tick = now + 1.0
                    self._try()
                    if self._found is not None or self._desk.stop or self._stopping.is_set():
                        self._changed.notify_all()
                for peer, message in letters:
                    self._hub.send(peer, message)
        except BaseException as error:  # told to the training thread, which ends the run
            with self._changed:
                self._failure = error
                self._changed.notify_all()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self._closing.set()
        if self._hub:
            self._hub.wake()
            if self._thread.is_alive():
                self._thread.join(timeout=10.0)
            self._hub.close()
