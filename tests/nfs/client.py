"""One client: python -m tests.nfs.client SERVER MOUNTPOINT, obeys JSON lines on stdin and unmounts when stdin ends."""

import errno
import fnmatch
import functools
import json
import os
import resource
import subprocess
import sys
import threading
import time
from collections.abc import Callable

import mfusepy

from tests.nfs.cache import Cache, Habits
from tests.nfs.files import Files

KEPT = os.O_ACCMODE | os.O_TRUNC | os.O_APPEND
OPERATIONS = (
    "getattr", "open", "create", "read", "write", "flush", "fsync", "release", "opendir", "readdir", "fsyncdir",
    "mkdir", "unlink", "rmdir", "rename", "symlink", "readlink", "truncate", "chmod", "utimens", "statfs",
)  # fmt: skip


class Client(mfusepy.Operations):
    use_ns = True
    flag_nopath = flag_nullpath_ok = True

    def __init__(self, server: str) -> None:
        self.habits = Habits()
        self.faults: list[dict] = []
        """{op, name, error, done, times}: done: the server did it, and only its reply is lost."""
        self._cache = Cache(server, self.habits)
        self._files = Files(self._cache)
        self._deaf = False
        """The reply to the operation that is done now will be lost."""
        self._listed: list[str] = []
        """Paths of the directories that were opened."""
        self._lock = threading.RLock()
        for name in OPERATIONS:
            setattr(self, name, self._served(name, getattr(self, name)))

    def _served(self, name: str, operation: Callable) -> Callable:
        @functools.wraps(operation)
        def call(*arguments):
            time.sleep(self.habits.slow)
            while time.monotonic() < self.habits.away_until:
                time.sleep(0.02)
            with self._lock:
                fault = self._fault(name, arguments)
                if not fault:
                    return operation(*arguments)
                if fault["done"]:
                    self._deaf = True
                    operation(*arguments)
                    self._deaf = False
                if fault["error"] == "RETRY":  # the client asks again, and the server has forgotten
                    return operation(*arguments)
                raise OSError(getattr(errno, fault["error"]), name)

        return call

    def _fault(self, name: str, arguments: tuple) -> dict | None:
        paths = [one for one in arguments[:2] if isinstance(one, str)]
        if name in ("flush", "fsync", "read", "write"):
            paths = [self._files[arguments[-1]].path]
        elif name == "fsyncdir":
            paths = [self._listed[arguments[-1]]]
        for fault in self.faults:
            if name in ("flush", "fsync") and not self._files[arguments[-1]].writes:
                continue  # nothing can go wrong
            if fault["op"] == name and any(fnmatch.fnmatch(path, f"*/{fault['name']}") for path in paths):
                fault["times"] -= 1
                if not fault["times"]:
                    self.faults.remove(fault)
                return fault
        return None

    # -- names -------------------------------------------------------------------------------------------------------

    def getattr(self, path: str | None, fh: int | None = None) -> dict:
        status = self._cache.get(path).status if path else os.fstat(self._files[fh].descriptor)
        unwritten = [file.size for file in self._files.of(status.st_ino) if file.writes]
        names = ("st_mode", "st_nlink", "st_uid", "st_gid", "st_ino")
        attributes = {name: getattr(status, name) for name in names}
        attributes |= {f"st_{name}": getattr(status, f"st_{name}_ns") for name in ("atime", "mtime", "ctime")}
        nobody = {"st_uid": 65534, "st_gid": 65534} if self.habits.squash else {}
        return attributes | {"st_size": max([status.st_size, *unwritten])} | nobody

    def opendir(self, path: str) -> int:
        self._cache.get(path, fresh=True)
        self._listed.append(path)
        return len(self._listed) - 1

    def readdir(self, path: str | None, fh: int) -> list[str]:
        return [".", "..", *self._cache.names(self._listed[fh])]

    def readlink(self, path: str) -> str:
        return os.readlink(self._cache.place(path))

    def mkdir(self, path: str, mode: int) -> None:
        self._change(lambda: os.mkdir(self._cache.place(path), mode), path)

    def rmdir(self, path: str) -> None:
        self._change(lambda: os.rmdir(self._cache.place(path)), path)

    def symlink(self, target: str, source: str) -> None:
        self._change(lambda: os.symlink(source, self._cache.place(target)), target)

    def unlink(self, path: str) -> None:
        self._change(lambda: self._files.hide(path) or os.unlink(self._cache.place(path)), path)

    def rename(self, old: str, new: str) -> None:
        def renamed() -> None:
            self._files.hide(new)
            os.rename(self._cache.place(old), self._cache.place(new))

        self._change(renamed, old, new)
        self._files.moved(old, new)

    def _change(self, change: Callable[[], object], *paths: str) -> None:
        """A rename that fails teaches the client nothing (NFSv4): it goes on to take either name for what it was."""
        alone = {path: self._cache.before(path) for path in paths}
        try:
            change()
        except OSError:
            if len(paths) == 1:
                self._cache.forget(paths[0])
            raise
        if not self._deaf:
            for path in paths:
                self._cache.changed(path, alone[path])
        elif len(paths) == 1:
            self._cache.forget(paths[0])

    def chmod(self, path: str, mode: int) -> None:
        os.chmod(self._cache.place(path), mode)
        self._cache.written(path)

    def utimens(self, path: str, times: tuple[int, int]) -> None:
        os.utime(self._cache.place(path), ns=times)
        self._cache.written(path)

    def statfs(self, path: str) -> dict:
        status = os.statvfs(self._cache.place("/"))
        return {name: getattr(status, name) for name in dir(status) if name.startswith("f_")}

    def fsyncdir(self, path: str | None, datasync: int, fh: int) -> None:
        pass

    # -- contents ----------------------------------------------------------------------------------------------------

    def open(self, path: str, flags: int) -> int:
        known = self._cache.get(path, fresh=True)
        return self._files.add(path, os.open(f"/proc/self/fd/{known.handle}", flags & KEPT), flags)

    def create(self, path: str, mode: int, flags: int) -> int:
        found: list[int] = []
        place = self._cache.place(path)
        self._change(lambda: found.append(os.open(place, flags & (KEPT | os.O_EXCL) | os.O_CREAT, mode)), path)
        if self._deaf:  # it will never be closed
            os.close(found[0])
            return 0
        return self._files.add(path, found[0], flags)

    def read(self, path: str | None, size: int, offset: int, fh: int) -> bytes:
        return self._files.read(fh, size, offset)

    def write(self, path: str | None, data: bytes, offset: int, fh: int) -> int:
        return self._files.write(fh, data, offset)

    def truncate(self, path: str | None, length: int, fh: int | None = None) -> None:
        if fh is None:
            os.truncate(f"/proc/self/fd/{self._cache.get(path, fresh=True).handle}", length)
            self._cache.written(path)
        else:
            self._files.truncate(fh, length)

    def flush(self, path: str | None, fh: int) -> None:
        if self._files[fh].writes:
            self._files.send(self._files.alive(fh))

    def fsync(self, path: str | None, datasync: int, fh: int) -> None:
        self.flush(path, fh)

    def release(self, path: str | None, fh: int) -> None:
        self._files.close(fh)

    # -- control -----------------------------------------------------------------------------------------------------

    def tick(self) -> None:
        """Data that was written long ago goes to the server, flushed or not."""
        with self._lock:
            for file in self._files.values():
                if file.writes and time.monotonic() > file.since + self.habits.writeback:
                    self._files.send(file)

    def obey(self, line: str) -> list[dict]:
        """-> the faults that nobody has met yet."""
        words = json.loads(line)
        with self._lock:
            self.faults += [{"name": "*", "done": True, "times": 1} | fault for fault in words.pop("faults", [])]
            if words.pop("expire", False):
                self._cache.expire()
            if size := words.pop("write_back", 0):
                for file in self._files.values():
                    self._files.send(file, size)
            waiting = list(self.faults)
            if words.pop("forgive", False):
                self.faults.clear()
            for name, value in words.items():
                setattr(self.habits, name, value)
            return waiting


class Fuse(mfusepy.FUSE):
    truncate_fuse_3 = mfusepy.FUSE.ftruncate
    """mfusepy's own leaves out which open file libfuse 3 means, and files that are open have no other name here."""


def control(client: Client, mountpoint: str) -> None:
    for line in sys.stdin:
        sys.stdout.write(json.dumps(client.obey(line)) + "\n")
        sys.stdout.flush()
    client.habits.away_until = 0.0
    subprocess.run(["umount", "-l", mountpoint], check=False)
    time.sleep(1.0)
    os._exit(0)


def main() -> None:
    server, mountpoint = sys.argv[1:]
    os.umask(0)
    most = resource.getrlimit(resource.RLIMIT_NOFILE)[1]
    resource.setrlimit(resource.RLIMIT_NOFILE, (most, most))
    client = Client(server)

    def ticking() -> None:
        while True:
            time.sleep(client.habits.writeback / 4)
            client.tick()

    threading.Thread(target=control, args=(client, mountpoint), daemon=True).start()
    threading.Thread(target=ticking, daemon=True).start()
    options = {"entry_timeout": 0, "attr_timeout": 0, "negative_timeout": 0, "hard_remove": True, "direct_io": True}
    Fuse(client, mountpoint, foreground=True, nothreads=True, default_permissions=True, **options)


if __name__ == "__main__":
    main()
