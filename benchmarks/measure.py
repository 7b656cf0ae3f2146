"""What every benchmark shares: interleaved repetitions, medians with their spread, a table, and one line of JSON."""

import contextlib
import importlib.metadata
import json
import os
import platform
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

from protocol.versions import libraries


def interleaved(variants: Mapping[str, Callable[[], float]], rounds: int) -> dict[str, list[float]]:
    """Each variant once a round, A-B-A-B, so that a machine that slows down slows all alike. -> figures by variant."""
    found: dict[str, list[float]] = {name: [] for name in variants}
    for _ in range(rounds):
        for name, measure in variants.items():
            found[name].append(measure())
    return found


def timed(work: Callable[[], object]) -> float:
    """Seconds that it took."""
    start = time.perf_counter()
    work()
    return time.perf_counter() - start


def spread(values: Sequence[float]) -> dict[str, float]:
    """Median, smallest and largest of repeated measurements."""
    return {"median": statistics.median(values), "min": min(values), "max": max(values)}


def machine() -> dict[str, object]:
    """What a figure depends on: processor, cores, the commit that was measured, versions of what is installed."""
    model = next((line.partition(":")[2].strip() for line in _lines("/proc/cpuinfo") if line[:10] == "model name"), "")
    return {
        "cpu": model or platform.processor(), "cores": os.cpu_count(), "commit": _commit(), "versions": _versions(),
    }  # fmt: skip


def emit(name: str, rows: Sequence[Mapping[str, object]], **facts: object) -> None:
    """Prints the rows as a table, and everything as one line of JSON that begins with the benchmark's name."""
    columns = list(dict.fromkeys(column for row in rows for column in row))
    cells = [columns, *([_cell(row.get(column, "")) for column in columns] for row in rows)]
    widths = [max(len(line[index]) for line in cells) for index in range(len(columns))]
    for line in cells:
        print("  ".join(cell.rjust(width) for cell, width in zip(line, widths, strict=True)))
    print(json.dumps({"benchmark": name, **machine(), **facts, "rows": list(rows)}), flush=True)


def _cell(value: object) -> str:
    if value is None:
        return ""
    return f"{value:.4g}" if isinstance(value, float) else str(value)


def _lines(path: str) -> list[str]:
    return Path(path).read_text().splitlines() if Path(path).exists() else []


def _versions() -> dict[str, str]:
    """Of Python, the engines and TRL, which is only measured against; nothing is imported for it."""
    found = libraries()
    with contextlib.suppress(importlib.metadata.PackageNotFoundError):
        found["trl"] = importlib.metadata.version("trl")
    return found


def _commit() -> str:
    """Short hash; a `+` behind it where files differ from it."""
    described = subprocess.run(
        ["git", "describe", "--always", "--dirty=+"],
        cwd=Path(__file__).parent,
        capture_output=True,
        text=True,
        check=False,
    )
    return described.stdout.strip() or "unknown"


if __name__ == "__main__":
    sys.exit("measure has no figures of its own; try: python -m benchmarks.hub")
