"""Sealed directories: weights for samplers (snapshots) and, with a signature, the trainer's checkpoints.

A directory is written aside, every file flushed and hashed, described by `manifest.json`, renamed into place and
never changed again. Its id is never used twice. A reader knows the manifest's hash from the (encrypted) channel
and verifies each file over the very bytes that it then parses; nothing is memory-mapped, so a file that shrinks
under the reader is an error and no crash. This module moves bytes; it knows no tensors.
"""

import contextlib
import errno
import hashlib
import hmac
import logging
import os
import re
import secrets
import shutil
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Literal, Self

import msgspec
from msgspec import Struct

from protocol.disk import holds, is_listed, names_in, read_file, sync_directory, write_new
from protocol.errors import StorageError

log = logging.getLogger(__name__)

NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,63}")
TRANSIENT = {errno.ENOENT, errno.ESTALE, errno.EIO, errno.EAGAIN}
"""What a network filesystem may answer for a file that is there; tried again until `patience_s` is over."""
REREADS = 3
"""Of a file whose bytes are wrong: a stale view heals, a flipped bit does not."""


class Corrupt(StorageError):
    """The bytes on the disk are not the bytes that were sealed."""


class File(Struct, frozen=True):
    size: int
    sha256: str


class Canary(Struct, frozen=True):
    """Log-probs of fixed tokens under these weights: a sampler that computes others has not loaded them.

    tokens: [sequences][n]; logprobs: [sequences][n - 1], of tokens[1:] at temperature 1.
    """

    tokens: list[list[int]]
    logprobs: list[list[float]]


class Manifest(Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    format: Literal[1] = 1
    kind: Literal["full", "adapter", "checkpoint"]
    run_id: str
    id: str
    parent: str | None
    step: int
    incarnation: int
    model: str
    """Fingerprint of the model's configuration."""
    canary: Canary | None = None
    files: dict[str, File] = {}


def snapshot_id(step: int, incarnation: int) -> str:
    """Example: s00000042.i0001. The incarnation keeps step 42 of a dead history apart from step 42 of this one."""
    return f"s{step:08d}.i{incarnation:04d}"


def checkpoint_id(step: int, incarnation: int) -> str:
    return f"c{step:08d}.i{incarnation:04d}"


def step_of(identifier: str) -> int:
    """The step in a snapshot's or checkpoint's id. Raises ValueError for any other text."""
    match = re.fullmatch(r"[sc](\d{8,})\.i\d{4,}", identifier)
    if not match:
        raise ValueError(f"{identifier!r} is no snapshot id")
    return int(match[1])


def make_staging(parent: Path, name: str) -> Path:
    aside = parent / f".tmp-{name}-{os.getpid()}-{secrets.token_hex(4)}"
    try:
        aside.mkdir()  # a run directory that was moved must not be made anew
    except OSError:
        if not aside.is_dir():  # else only the reply was lost
            raise
    return aside


@contextlib.contextmanager
def staging(parent: Path, name: str) -> Iterator[Path]:
    """A directory beside its final place; removed if the writer fails."""
    aside = None
    try:
        aside = make_staging(parent, name)
        yield aside
    except OSError as error:
        raise StorageError(f"cannot write {parent / name}: {error.strerror}; free space or mend permissions") from error
    finally:
        if aside:
            shutil.rmtree(aside, ignore_errors=True)


def write_hashed(path: Path, data: bytes) -> File:
    """Writes a new file and hashes the bytes in memory, not what the disk made of them."""
    write_new(path, [data])
    return File(len(data), hashlib.sha256(data).hexdigest())


def hash_file(path: Path) -> File:
    """Of a file that a library wrote; it is flushed to the disk first."""
    with path.open("rb") as file:
        os.fsync(file.fileno())
        return File(path.stat().st_size, hashlib.file_digest(file, "sha256").hexdigest())


def seal(aside: Path, final: Path, manifest: Manifest, key: bytes | None = None) -> str:
    """Describes, signs (with a key) and renames a staged directory. Returns the sha256 of its manifest.

    A rename whose reply was lost has succeeded: the manifest in place is ours then. The listing makes a network
    filesystem forget the old name; by that, whoever removes what was staged would reach what is sealed.
    """
    data = msgspec.json.format(msgspec.json.encode(manifest), indent=1)
    write_new(aside / "manifest.json", [data])
    if key:
        write_new(aside / "manifest.hmac", [hmac.new(key, data, "sha256").hexdigest().encode()])
    for directory in {aside, *(aside / name for name in manifest.files)}:
        sync_directory(directory if directory.is_dir() else directory.parent)
    try:
        os.rename(aside, final)
    except OSError:
        names_in(final.parent)
        if not holds(final / "manifest.json", data):
            raise
    sync_directory(final.parent)
    return hashlib.sha256(data).hexdigest()


@dataclass(frozen=True, slots=True)
class Sealed:
    """A directory whose manifest was verified; `read` verifies each file."""

    path: Path
    manifest: Manifest
    patience_s: float
    wanted: Callable[[], bool]

    def read(self, name: str) -> bytes:
        """The file's bytes, equal to the sealed ones. Raises Corrupt."""
        expected = self.manifest.files[name]
        return _patiently(self.path / name, lambda data: _is(data, expected), self.patience_s, self.wanted)

    def verified(self) -> Self:
        """Itself, after every file was read once. Raises Corrupt."""
        for name in self.manifest.files:
            self.read(name)
        return self

    def alone(self) -> Self:
        """Itself, where nothing lies beside the sealed files. Raises Corrupt."""
        known = {*self.manifest.files, "manifest.json", "manifest.hmac"}
        for path in self.path.rglob("*"):
            if str(path.relative_to(self.path)) not in known and (path.is_symlink() or not path.is_dir()):
                raise Corrupt(f"{path} was not sealed")
        return self


def open_sealed(
    path: Path,
    sha256: str | None = None,
    key: bytes | None = None,
    patience_s: float = 0.0,
    wanted: Callable[[], bool] = lambda: True,
) -> Sealed:
    """Opens a sealed directory whose manifest has this hash, or this signature. Raises Corrupt.

    A file that is not there is looked for again for `patience_s`, one with other bytes is read REREADS times more;
    both only as long as it is `wanted`.
    """
    if not NAME.fullmatch(path.name):
        raise Corrupt(f"{path.name!r} is no name of a sealed directory")
    data = _patiently(
        path / "manifest.json",
        lambda data: sha256 in (None, hashlib.sha256(data).hexdigest()),
        patience_s,
        wanted,
    )
    if key:
        signature = _patiently(path / "manifest.hmac", lambda _: True, patience_s, wanted)
        if not hmac.compare_digest(signature, hmac.new(key, data, "sha256").hexdigest().encode()):
            raise Corrupt(f"{path}/manifest.json was not signed by this run")
    try:
        manifest = msgspec.json.decode(data, type=Manifest)
    except (msgspec.DecodeError, UnicodeDecodeError, RecursionError) as error:
        raise Corrupt(f"{path}/manifest.json: {error}") from None
    for name in manifest.files:
        if not all(NAME.fullmatch(part) for part in name.split("/")):
            raise Corrupt(f"{path}/manifest.json names {name!r}, which may lead out of the directory")
    if manifest.id != path.name:
        raise Corrupt(f"{path}/manifest.json is that of {manifest.id!r}")
    return Sealed(path, manifest, patience_s, wanted)


def listed(parent: Path) -> list[Path]:
    """Sealed directories, oldest first: by incarnation, then step, because a restarted trainer goes back in steps.

    Anything without a manifest is not one.
    """
    found = [parent / name for name in names_in(parent) if re.fullmatch(r"[sc]\d{8,}\.i\d{4,}", name)]
    sealed = [path for path in found if (path / "manifest.json").exists()]
    return sorted(sealed, key=lambda path: tuple(map(int, reversed(path.name[1:].split(".i")))))


def remove(path: Path) -> None:
    """Renamed first, so that a half-deleted directory is never listed. One that cannot be removed stays."""
    grave = path.with_name(f".del-{path.name}-{secrets.token_hex(4)}")
    try:
        os.rename(path, grave)
    except OSError as error:
        if not is_listed(grave):  # else only the reply was lost
            log.warning("cannot remove %s: %s", path, error.strerror)
    shutil.rmtree(grave, ignore_errors=True)


def sweep(parent: Path, incarnation: int) -> None:
    """Removes what killed writers of earlier incarnations left behind; a living one has lost the run anyway."""
    for path in parent.iterdir():
        half_written = re.match(r"\.tmp-[sc]\d+\.i(\d+)-", path.name)
        if path.name.startswith(".del-") or (half_written and int(half_written[1]) < incarnation):
            shutil.rmtree(path, ignore_errors=True)


def _is(data: bytes, expected: File) -> bool:
    return len(data) == expected.size and hashlib.sha256(data).hexdigest() == expected.sha256


def _patiently(
    path: Path, good: Callable[[bytes], bool], patience_s: float = 0.0, wanted: Callable[[], bool] = lambda: True
) -> bytes:
    """Reads a whole file until `good(bytes)`; a delayed or stale view of a network filesystem heals."""
    deadline, pause, read = time.monotonic() + patience_s, 0.1, 0
    while True:
        try:
            data = read_file(path)
            if good(data):
                return data
            reason, read = "its bytes are not the sealed ones", read + 1
        except OSError as error:
            if error.errno not in TRANSIENT:
                raise Corrupt(f"{path}: {error.strerror}") from None
            reason = error.strerror or str(error)
        if read > REREADS or time.monotonic() + pause > deadline or not wanted():
            raise Corrupt(f"{path}: {reason}")
        time.sleep(pause)
        pause = min(2 * pause, 5.0)
