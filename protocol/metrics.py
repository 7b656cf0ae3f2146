"""The record: one JSON object a line, flushed at once, so that others can follow the file while it grows."""

import json
import math
import time
from pathlib import Path
from typing import Self


class MetricsWriter:
    """Appends to one file. Each record gets `time_s`, seconds since the epoch. NaN and infinities become null."""

    def __init__(self, path: Path) -> None:
        path.parent.mkdir(parents=True, exist_ok=True)
        self._file = path.open("a", buffering=1)

    def write(self, record: dict[str, object]) -> None:
        finite = {key: _finite(value) for key, value in {"time_s": round(time.time(), 3), **record}.items()}
        self._file.write(json.dumps(finite, ensure_ascii=False) + "\n")

    def close(self) -> None:
        self._file.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


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


def _finite(value: object) -> object:
    return None if isinstance(value, float) and not math.isfinite(value) else value
