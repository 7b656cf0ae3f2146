"""What one NFS client believes of the server's names and attributes (nfs(5): ac*, lookupcache, cto).

A name stands for a handle, that is for a file, until the client has seen that the name's directory was changed by
somebody else. It looks when the directory's attributes have expired, or when a file or directory is opened (cto):
nfs_lookup_verify_inode and nfs_neg_need_reval in Linux's fs/nfs/dir.c.
"""

import errno
import os
import stat
import time
from dataclasses import dataclass


@dataclass
class Habits:
    """Of one client; all can be changed while it is mounted. Seconds; Linux: 3, 60, 30, 60."""

    acregmin: float = 0.3
    acregmax: float = 3.0
    acdirmin: float = 1.5
    acdirmax: float = 3.0
    lookupcache: str = "all"
    """all; positive: the absence of a name is not remembered."""
    cto: bool = True
    """False (`nocto`): opening does not ask the server for news."""
    writeback: float = 1.0
    """Written data that nobody has flushed goes to the server after this. Linux: 30."""
    slow: float = 0.0
    """Each operation takes so much longer."""
    away_until: float = 0.0
    """On time.monotonic(): until then a hard mount waits."""
    squash: bool = False
    """The server does not tell root from nobody."""


@dataclass
class Known:
    """A name as this client knows it. handle: O_PATH descriptor of a file, whatever it is called now; None: absent."""

    handle: int | None
    verifier: tuple[int, int]
    """The directory and its generation when the name was looked up."""
    status: os.stat_result | None
    fetched: float
    lifetime: float
    generation: int = 0
    """Of a directory: how often this client has seen changes by others."""
    names: list[str] | None = None
    """Of a directory: the listing of this generation."""

    def close(self) -> None:
        if self.handle is not None:
            os.close(self.handle)


class Cache:
    """Raises OSError as the server would."""

    def __init__(self, server: str, habits: Habits) -> None:
        self._habits = habits
        root = os.open(server, os.O_PATH | os.O_DIRECTORY)
        self._known = {"/": Known(root, (0, 0), os.fstat(root), time.monotonic(), habits.acdirmin)}

    def get(self, path: str, fresh: bool = False) -> Known:
        """fresh: the path is opened, so its attributes are asked for (cto). Raises ENOENT."""
        known = self._valid(path)
        if fresh and self._habits.cto and known.handle is not None and not self._revalidate(known):
            known = self._look_up(path)
        if known.handle is None:
            raise OSError(errno.ENOENT, path)
        if time.monotonic() > known.fetched + known.lifetime and not self._revalidate(known):
            known = self._look_up(path)
            if known.handle is None:
                raise OSError(errno.ENOENT, path)
        return known

    def place(self, path: str) -> str:
        """The server's own path of a name: that in the directory which this client means."""
        directory, name = os.path.split(path)
        return f"/proc/self/fd/{self.get(directory).handle}/{name}" if name else f"/proc/self/fd/{self.get('/').handle}"

    def names(self, path: str) -> list[str]:
        directory = self.get(path)
        if directory.names is None:
            directory.names = os.listdir(f"/proc/self/fd/{directory.handle}")
        return directory.names

    def before(self, path: str) -> bool:
        """Asked before an own change of the directory that `path` is in: whether nobody else has changed it."""
        directory = self.get(os.path.dirname(path))
        return os.fstat(directory.handle).st_mtime_ns == directory.status.st_mtime_ns

    def changed(self, path: str, alone: bool) -> None:
        """After an own change of this name. alone: what `before` said."""
        directory = self.get(os.path.dirname(path))
        directory.status, directory.names = os.fstat(directory.handle), None
        directory.generation += not alone
        self._look_up(path)

    def forget(self, path: str) -> None:
        """The name will be looked up at the server."""
        if known := self._known.get(path):
            known.verifier = (-1, -1)

    def expire(self) -> None:
        """All attributes are too old now."""
        for known in self._known.values():
            known.fetched = 0.0

    def written(self, path: str) -> None:
        """After own data reached the server: its reply holds the attributes."""
        known = self._known.get(path)
        if known and known.handle is not None:
            known.status, known.fetched = os.fstat(known.handle), time.monotonic()

    def _valid(self, path: str) -> Known:
        """From memory, while nothing is known against it."""
        if path == "/":
            return self._known["/"]
        known, directory = self._known.get(path), self.get(os.path.dirname(path))
        remembered = known and known.verifier == (directory.handle, directory.generation)
        if remembered and (known.handle is not None or self._habits.lookupcache == "all"):
            return known
        return self._look_up(path)

    def _look_up(self, path: str) -> Known:
        """Asks the server for the name."""
        directory, known = self.get(os.path.dirname(path)), self._known.get(path)
        verifier = (directory.handle, directory.generation)
        try:
            handle = os.open(self.place(path), os.O_PATH | os.O_NOFOLLOW)
        except FileNotFoundError:
            handle = None
        if known and None not in (handle, known.handle) and os.path.samestat(os.fstat(handle), os.fstat(known.handle)):
            os.close(handle)
            known.verifier = verifier
            return known
        if known:
            known.close()
        status = None if handle is None else os.fstat(handle)
        self._known[path] = Known(handle, verifier, status, time.monotonic(), self._limits(status)[0])
        return self._known[path]

    def _revalidate(self, known: Known) -> bool:
        """Asks for a handle's attributes. False: the file is no more (ESTALE), its name must be looked up again."""
        status = os.fstat(known.handle)
        if not status.st_nlink:
            return False
        least, most = self._limits(status)
        same = status.st_mtime_ns == known.status.st_mtime_ns and status.st_size == known.status.st_size
        if not same:
            known.generation, known.names = known.generation + 1, None
        known.lifetime = min(2 * known.lifetime, most) if same else least
        known.status, known.fetched = status, time.monotonic()
        return True

    def _limits(self, status: os.stat_result | None) -> tuple[float, float]:
        habits = self._habits
        if status and stat.S_ISDIR(status.st_mode):
            return habits.acdirmin, habits.acdirmax
        return habits.acregmin, habits.acregmax
