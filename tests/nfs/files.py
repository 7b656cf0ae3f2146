"""What one client has open, and what it has not yet sent to the server."""

import errno
import os
import sys
import time
from dataclasses import dataclass, field

from tests.nfs.cache import Cache


@dataclass
class OpenFile:
    """descriptor: at the server. `writes` are in this client's memory alone until they are flushed."""

    descriptor: int
    path: str
    inode: int
    append: bool
    size: int
    """As this client knows it: where it appends."""
    writes: list[tuple[int, bytes]] = field(default_factory=list)
    since: float = 0.0
    silly: str | None = None
    """The server's name of a removed file that is still open here."""


class Files(dict[int, OpenFile]):
    """By descriptor."""

    def __init__(self, cache: Cache) -> None:
        super().__init__()
        self._cache = cache

    def add(self, path: str, descriptor: int, flags: int) -> int:
        status = os.fstat(descriptor)
        self[descriptor] = OpenFile(descriptor, path, status.st_ino, bool(flags & os.O_APPEND), status.st_size)
        self._cache.written(path)
        return descriptor

    def of(self, inode: int) -> list[OpenFile]:
        return [file for file in self.values() if file.inode == inode]

    def alive(self, fh: int) -> OpenFile:
        """Raises ESTALE where another client has removed the file."""
        if not os.fstat(fh).st_nlink:
            self[fh].writes.clear()
            raise OSError(errno.ESTALE, "removed")
        return self[fh]

    def write(self, fh: int, data: bytes, offset: int) -> int:
        file = self.alive(fh)
        offset = file.size if file.append else offset
        file.since = file.since if file.writes else time.monotonic()
        file.writes.append((offset, data))
        file.size = max(file.size, offset + len(data))
        return len(data)

    def read(self, fh: int, size: int, offset: int) -> bytes:
        for file in self.of(self[fh].inode):
            self.send(file)
        self.alive(fh)
        return os.pread(fh, size, offset)

    def truncate(self, fh: int, length: int) -> None:
        file = self.alive(fh)
        self.send(file)
        os.ftruncate(fh, length)
        file.size = length
        self._cache.written(file.path)

    def send(self, file: OpenFile, size: int = sys.maxsize) -> None:
        """To the server, of what waits the first `size` bytes."""
        if not file.writes:
            return
        waiting, file.writes = file.writes, []
        for offset, data in waiting:
            now, later = data[:size], data[size:]
            os.pwrite(file.descriptor, now, offset)
            size -= len(now)
            if later:
                file.writes.append((offset + len(now), later))
        self._cache.written(file.path)

    def close(self, fh: int) -> None:
        file = self.pop(fh)
        self.send(file)
        os.close(fh)
        others = self.of(file.inode)
        if file.silly and others:
            others[0].silly = file.silly
        elif file.silly:
            os.unlink(file.silly)

    def hide(self, path: str) -> bool:
        """A file that is open here is not removed but renamed until it is closed (silly rename). Whether it was."""
        try:
            inode = os.lstat(self._cache.place(path)).st_ino
        except FileNotFoundError:
            return False
        held = self.of(inode)
        if held:
            silly = self._cache.place(os.path.join(os.path.dirname(path), f".nfs{inode:016x}"))
            os.rename(self._cache.place(path), silly)
            held[0].silly = silly
        return bool(held)

    def moved(self, old: str, new: str) -> None:
        for file in self.values():
            if file.path == old or file.path.startswith(old + "/"):
                file.path = new + file.path.removeprefix(old)
