"""Files that another process reads: written aside, flushed, renamed. A name either is absent or is complete."""

import contextlib
import errno
import os
import secrets
import stat
from collections.abc import Iterable
from pathlib import Path

from protocol.errors import StorageError

NO_DIRECTORY_SYNC = {errno.EINVAL, errno.ENOTSUP}
"""What filesystems say that cannot flush a directory, as some network ones: there names are as durable as they get."""


def write_atomic(path: Path, data: bytes, mode: int = 0o644) -> None:
    """Replaces `path` by `data`; readers see the old or the new bytes, also after a power cut.

    Raises StorageError with the path and the reason (disk full, quota, permissions).
    """
    aside = path.with_name(f".tmp-{path.name}-{os.getpid()}-{secrets.token_hex(4)}")
    try:
        write_new(aside, [data], mode)
        try:
            os.replace(aside, path)
        except OSError:
            if not holds(path, data):  # else only the reply was lost
                raise
        sync_directory(path.parent)
    except OSError as error:
        with contextlib.suppress(OSError):  # the first reason is the one that counts
            aside.unlink()
        raise StorageError(f"cannot write {path}: {error.strerror}; free space or mend permissions") from error


def write_new(path: Path, chunks: Iterable[bytes | memoryview], mode: int = 0o644) -> None:
    """A new file, flushed to the disk. Close is checked too: network filesystems report a full disk there."""
    descriptor = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW, mode)
    with os.fdopen(descriptor, "wb") as file:
        for chunk in chunks:
            file.write(chunk)
            del chunk  # what it belongs to may be large
        file.flush()
        os.fsync(file.fileno())


def names_in(directory: Path) -> list[str]:
    """Raises StorageError where a directory that must be there is not, or cannot be read."""
    try:
        return os.listdir(directory)
    except OSError as error:
        raise StorageError(f"cannot list {directory}: {error.strerror}; was the run directory moved?") from error


def is_listed(path: Path) -> bool:
    """Whether the name is in a listing of its directory. A network filesystem may remember for a minute that a name was
    absent, but lists a directory afresh; what was listed is looked up afresh, too.

    Raises StorageError where the directory cannot be listed.
    """
    return path.name in names_in(path.parent)


def sync_directory(path: Path) -> None:
    """Makes the names in a directory durable, not only the files' contents."""
    descriptor = os.open(path, os.O_RDONLY | os.O_DIRECTORY)
    try:
        os.fsync(descriptor)
    except OSError as error:
        if error.errno not in NO_DIRECTORY_SYNC:
            raise
    finally:
        os.close(descriptor)


def read_file(path: Path) -> bytes:
    """The whole file. NONBLOCK: a pipe in its place would be waited for; it is refused like all that is no file."""
    descriptor = os.open(path, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK)
    if not stat.S_ISREG(os.fstat(descriptor).st_mode):
        os.close(descriptor)
        raise OSError(errno.EINVAL, "no regular file")
    with os.fdopen(descriptor, "rb") as file:
        return file.read()


def holds(path: Path, data: bytes) -> bool:
    """Whether the file has these bytes at the server: the listing makes a network filesystem forget what it knew."""
    try:
        os.listdir(path.parent)
        return read_file(path) == data
    except OSError:
        return False
