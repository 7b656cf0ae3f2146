"""The record: one JSON object a line, flushed at once, so that others can follow the file while it grows."""

import json
import logging
import math
import os
import time
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Self

from protocol.errors import StorageError

log = logging.getLogger(__name__)


class MetricsWriter:
    """Appends to one file. Each record gets `time_s`, seconds since the epoch. NaN and infinities become null.

    A full disk stops no run: the record is left out, counted in `lost`, and said once.
    """

    def __init__(self, path: Path) -> None:
        self._path = path
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            self._torn = ends_torn(path)
            self._file = path.open("ab", buffering=0)
        except OSError as error:
            raise StorageError(f"cannot write {path}: {error.strerror}; free space or mend permissions") from error
        self.lost = 0

    def write(self, record: Mapping[str, object]) -> None:
        finite = {key: _finite(value) for key, value in {"time_s": round(time.time(), 3), **record}.items()}
        line = b"\n" * self._torn + json.dumps(finite, ensure_ascii=False).encode(errors="replace") + b"\n"
        try:
            written = self._file.write(line)
            self._torn = written != len(line)
        except OSError as error:
            written, reason = 0, error.strerror
        else:
            reason = "only a part of it could be written"
        if written != len(line):
            self.lost += 1
            if self.lost == 1:
                log.error("a record is missing in %s: %s; the run goes on", self._path, reason)

    def close(self) -> None:
        """A network filesystem may say only now that the disk is full."""
        try:
            self._file.close()
        except OSError as error:
            self.lost += 1
            log.error("the last records may be missing in %s: %s", self._path, error.strerror)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


def ends_torn(path: Path) -> bool:
    """Whether a killed writer left the last line unfinished: the next record must not be glued to it."""
    if not path.exists() or not path.stat().st_size:
        return False
    with path.open("rb") as file:
        file.seek(-1, os.SEEK_END)
        return file.read(1) != b"\n"


def read_metrics(path: Path) -> list[dict]:
    """All complete records of a file; a line that a killed writer left unfinished is skipped."""
    if not path.exists():
        return []
    records = []
    for line in path.read_text(errors="replace").splitlines():
        try:
            records.append(json.loads(line))
        except json.JSONDecodeError:
            continue
    return records


class Tail:
    """Follows a file of records while it grows, or finds it complete."""

    def __init__(self, path: Path) -> None:
        self.path, self._offset = path, 0

    def lines(self) -> Iterator[tuple[int, bytes]]:
        """(offset, line) of each complete line since the last call; from the start again if the file was replaced."""
        try:
            with self.path.open("rb") as file:
                if file.seek(0, os.SEEK_END) < self._offset:
                    self._offset = 0
                file.seek(self._offset)
                for line in file:
                    if not line.endswith(b"\n"):
                        return
                    at, self._offset = self._offset, self._offset + len(line)
                    yield at, line
        except FileNotFoundError:
            return


def _finite(value: object) -> object:
    return None if isinstance(value, float) and not math.isfinite(value) else value
