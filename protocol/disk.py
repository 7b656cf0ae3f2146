"""Files that another process reads: written aside, flushed, renamed. A name either is absent or is complete."""

import contextlib
import os
import secrets
from pathlib import Path

from protocol.errors import StorageError


def write_atomic(path: Path, data: bytes, mode: int = 0o644) -> None:
    """Replaces `path` by `data`; readers see the old or the new bytes, also after a power cut.

    Raises StorageError with the path and the reason (disk full, quota, permissions).
    """
    aside = path.with_name(f".tmp-{path.name}-{os.getpid()}-{secrets.token_hex(4)}")
    try:
        write_new(aside, [data], mode)
        os.replace(aside, path)
        sync_directory(path.parent)
    except OSError as error:
        with contextlib.suppress(OSError):  # the first reason is the one that counts
            aside.unlink()
        raise StorageError(f"cannot write {path}: {error.strerror}; free space or mend permissions") from error


def write_new(path: Path, chunks: list[bytes], mode: int = 0o644) -> None:
    """A new file, flushed to the disk. Close is checked too: network filesystems report a full disk there."""
    descriptor = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW, mode)
    with os.fdopen(descriptor, "wb") as file:
        for chunk in chunks:
            file.write(chunk)
        file.flush()
        os.fsync(file.fileno())


def names_in(directory: Path) -> list[str]:
    """Raises StorageError where a directory that must be there is not, or cannot be read."""
    try:
        return os.listdir(directory)
    except OSError as error:
        raise StorageError(f"cannot list {directory}: {error.strerror}; was the run directory moved?") from error


def sync_directory(path: Path) -> None:
    """Makes the names in a directory durable, not only the files' contents."""
    descriptor = os.open(path, os.O_RDONLY | os.O_DIRECTORY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
