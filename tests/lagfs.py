"""The bad days of a network filesystem, for code that reaches files through its module's `os` and `time`.

    lag = LagFS()
    with lag.mounted(snapshot, disk):
        lag.opens["manifest.json"] = [Refused(errno.ESTALE), Broken(errno.EIO, after=10), Stale(b"what was there")]

Everything reaches the real files; a fault is spent by one opening of the file that it is meant for. Time is made up,
so two minutes of waiting take none. What no fsync has asked for is lost by `crash`.
"""

import contextlib
import errno
import io
import os
import stat
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from types import ModuleType


@dataclass(frozen=True, slots=True)
class Refused:
    """The file cannot be opened."""

    number: int


@dataclass(frozen=True, slots=True)
class Broken:
    """Reading ends with an error after so many bytes, or after the last one."""

    number: int
    after: int


@dataclass(frozen=True, slots=True)
class Stale:
    """The client's cache answers, and with other bytes than the server has."""

    data: bytes


Fault = Refused | Broken | Stale


@dataclass(slots=True)
class Clock:
    """Stands in for the module `time`."""

    now: float = 0.0

    def monotonic(self) -> float:
        return self.now

    def sleep(self, seconds: float) -> None:
        self.now += seconds


@dataclass
class LagFS:
    """Stands in for the module `os`."""

    clock: Clock = field(default_factory=Clock)
    opens: dict[str, list[Fault]] = field(default_factory=dict)
    """Faults by file name, the next one first."""
    visible_at: float = 0.0
    """Before this, every file that is opened for reading is absent."""
    chunk: int = 1 << 20
    """Bytes that one read gives at most."""
    lost_replies: list[int] = field(default_factory=list)
    """Errors of renames that succeeded all the same."""
    syncs: bool = True
    """False: fsync says that it succeeded, and does nothing."""
    opened: list[str] = field(default_factory=list)
    _faults: dict[int, Fault] = field(default_factory=dict)
    _names: dict[int, dict[str, int]] = field(default_factory=dict)
    _data: dict[int, bytes] = field(default_factory=dict)

    def __getattr__(self, name: str) -> object:
        return getattr(os, name)

    @contextlib.contextmanager
    def mounted(self, *modules: ModuleType) -> Iterator[None]:
        """Those modules see this filesystem and its clock."""
        real = [
            (module, name, vars(module)[name]) for module in modules for name in ("os", "time") if name in vars(module)
        ]
        for module, name, _ in real:
            setattr(module, name, self if name == "os" else self.clock)
        try:
            yield
        finally:
            for module, name, thing in real:
                setattr(module, name, thing)

    def open(self, path: Path, flags: int, mode: int = 0o777) -> int:
        if flags & (os.O_CREAT | os.O_DIRECTORY):
            return os.open(path, flags, mode)
        self.opened.append(Path(path).name)
        if self.clock.now < self.visible_at:
            raise OSError(errno.ENOENT, os.strerror(errno.ENOENT))
        waiting = self.opens.get(Path(path).name)
        fault = waiting.pop(0) if waiting else None
        if isinstance(fault, Refused):
            raise OSError(fault.number, os.strerror(fault.number))
        descriptor = os.open(path, flags, mode)
        if fault:
            self._faults[descriptor] = fault
        return descriptor

    def fdopen(self, descriptor: int, mode: str) -> io.IOBase:
        if mode != "rb":
            return os.fdopen(descriptor, mode)
        return io.BufferedReader(_Reads(descriptor, self._faults.pop(descriptor, None), self.chunk))

    def rename(self, source: Path, target: Path) -> None:
        os.rename(source, target)
        if self.lost_replies:
            number = self.lost_replies.pop(0)
            raise OSError(number, os.strerror(number))

    def fsync(self, descriptor: int) -> None:
        """From now on a crash keeps what the file, or the list of a directory's names, holds at this moment."""
        status = os.fstat(descriptor)
        if not self.syncs:
            return
        if stat.S_ISDIR(status.st_mode):
            self._names[status.st_ino] = {entry.name: entry.inode() for entry in os.scandir(descriptor)}
        else:
            self._data[status.st_ino] = Path(f"/proc/self/fd/{descriptor}").read_bytes()

    def crash(self, root: Path, survivors: Path) -> None:
        """Writes below `survivors` what is left of `root`, itself durable, after the server lost its memory.

        A name whose directory was synced is there; the contents of a file that was not are gone.
        """
        survivors.mkdir()
        self._restore(root.stat().st_ino, survivors)

    def _restore(self, inode: int, directory: Path) -> None:
        for name, child in self._names.get(inode, {}).items():
            if child in self._names:
                (directory / name).mkdir()
                self._restore(child, directory / name)
            else:
                (directory / name).write_bytes(self._data.get(child, b""))


class _Reads(io.RawIOBase):
    """An open file that gives few bytes at a time, others, or an error."""

    def __init__(self, descriptor: int, fault: Fault | None, chunk: int) -> None:
        self._file, self._fault, self._chunk, self._given = io.FileIO(descriptor), fault, chunk, 0
        if isinstance(fault, Stale):
            self._stale = io.BytesIO(fault.data)

    def readable(self) -> bool:
        return True

    def readinto(self, buffer) -> int:
        size = min(self._chunk, len(buffer))
        source = self._stale if isinstance(self._fault, Stale) else self._file
        if isinstance(self._fault, Broken):
            size = min(size, self._fault.after - self._given)
        data = source.read(size)
        if not data and isinstance(self._fault, Broken):
            raise OSError(self._fault.number, os.strerror(self._fault.number))
        buffer[: len(data)] = data
        self._given += len(data)
        return len(data)

    def close(self) -> None:
        self._file.close()
        super().close()
