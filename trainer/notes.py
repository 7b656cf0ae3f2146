"""Notes that the ranks leave for one another in torch's key-value store, before they have a group.

Rank 0 collects the notes of all and hands them out, or says whose did not come: so all ranks end with one sentence.
The store is served by rank 0, or under torchrun by the launcher on its node.
"""

import contextlib
import logging
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from datetime import timedelta
from typing import Self, TypeVar

import msgspec
import torch.distributed as dist
from torch.distributed.distributed_c10d import PrefixStore, Store

from protocol.errors import RunError, StorageError, UserError

log = logging.getLogger(__name__)

T = TypeVar("T")

ANSWER_S = 300.0
"""For ranks that are all there to answer."""
LATER_S = 30.0
"""By so much the others wait longer than rank 0, who says which are missing."""
FAREWELL_S = 10.0
"""For the others to read what rank 0 hands out, before it goes on and perhaps ends."""
NAMED = 8
"""Missing ranks in one sentence."""


class Absent(RunError):
    """Some ranks left no note in time."""

    def __init__(self, about: str, names: Sequence[str], seconds: float) -> None:
        more = f" and {len(names) - NAMED} more" if len(names) > NAMED else ""
        self.names = ", ".join(names[:NAMED]) + more
        super().__init__(
            f"no answer of {self.names} about {about} within {seconds:.0f} s: has it ended, or its node? "
            "Its own log says why"
        )


class Collected(msgspec.Struct, frozen=True):
    notes: list[bytes]
    """Of all ranks, in their order; none where some are missing."""
    missing: list[int]


class Outcome(msgspec.Struct, frozen=True):
    """How a rank fared with what all of them do."""

    problem: str = ""
    code: int = 0

    @classmethod
    def of(cls, error: Exception | None) -> Self:
        if error is None:
            return cls()
        if isinstance(error, RunError):
            return cls(str(error), error.exit_code)
        return cls(f"{type(error).__name__}: {' '.join(str(error).split())}", RunError.exit_code)


@dataclass(frozen=True, slots=True)
class Notes:
    store: Store
    rank: int
    names: Sequence[str]
    """Of all ranks, in their order."""

    @property
    def world(self) -> int:
        return len(self.names)

    def swap(self, about: str, own: T, kind: type[T], seconds: float = ANSWER_S) -> list[T]:
        """Called by all ranks, each with its own note -> the notes of all, in their order. `about` is used once.

        Raises Absent on all ranks that are there, RunError where the store is lost or holds what no rank has written.
        """
        store = PrefixStore(about, self.store)
        try:
            with self.connected():
                found = self._exchange(store, msgspec.msgpack.encode(own), seconds)
            notes = [msgspec.msgpack.decode(note, type=kind) for note in found.notes]
        except msgspec.DecodeError as error:
            raise RunError(
                f"what the ranks' store holds about {about} is of no rank ({error}): who else reaches MASTER_PORT? "
                "Set another one, and close it to others"
            ) from None
        if found.missing:
            raise Absent(about, [self.names[rank] for rank in found.missing], seconds)
        return notes

    def together(self, about: str, act: Callable[[], T], seconds: float = ANSWER_S) -> T:
        """Called by all ranks -> what `act` returns here, once all have done it.

        What it raises on one rank is raised on all, with the name of that rank: none waits for one that has failed.
        """
        done: list[T] = []
        failed: Exception | None = None
        try:
            done.append(act())
        except Exception as error:  # also what nobody expects: the others wait
            if self.world == 1:
                raise
            log.error("%s", error)
            failed = error
        outcomes = self.swap(about, Outcome.of(failed), Outcome, seconds)
        if failed and not isinstance(failed, RunError):
            raise failed
        bad = [(name, one) for name, one in zip(self.names, outcomes, strict=True) if one.code]
        if bad:
            name, first = bad[0]
            said = first.problem if first.problem.startswith(name) else f"{name}: {first.problem}"
            more = f" ({len(bad) - 1} more ranks fail)" if len(bad) > 1 else ""
            raise ERRORS.get(first.code, RunError)(said + more)
        return done[0]

    @contextlib.contextmanager
    def connected(self) -> Iterator[None]:
        """Inside, a store that is lost is a RunError with the name of the rank that is gone with it."""
        try:
            yield
        except dist.DistError as error:
            said = str(error).splitlines()[0]
            raise RunError(f"{self.names[0]}, where the ranks' store is, has ended or is cut off ({said})") from None

    def _exchange(self, store: Store, own: bytes, seconds: float) -> Collected:
        _set(store, str(self.rank), own)
        if self.rank == 0:
            _set(store, "all", msgspec.msgpack.encode(self._collect(store, seconds)))
        store.wait(["all"], timedelta(seconds=seconds + LATER_S))
        found = msgspec.msgpack.decode(store.get("all"), type=Collected)
        store.set(f"read/{self.rank}", "")
        if self.rank == 0:  # if it ended now, the others would lose the store
            readers = [f"read/{rank}" for rank in range(self.world) if rank not in found.missing]
            with contextlib.suppress(dist.DistError):
                store.wait(readers, timedelta(seconds=FAREWELL_S))
        return found

    def _collect(self, store: Store, seconds: float) -> Collected:
        keys = [str(rank) for rank in range(self.world)]
        with contextlib.suppress(dist.DistStoreError):  # not all in time
            store.wait(keys, timedelta(seconds=seconds))
        missing = [rank for rank, key in enumerate(keys) if not store.check([key])]
        return Collected(notes=[] if missing else [store.get(key) for key in keys], missing=missing)


def _set(store: Store, key: str, value: bytes) -> None:
    store.set(key, value)  # pyright: ignore[reportArgumentType]  # torch stores bytes, too; its stub knows text alone


ERRORS = {kind.exit_code: kind for kind in (UserError, StorageError)}
"""Failures that keep their exit code on all ranks, as it decides whether Slurm starts them again."""
