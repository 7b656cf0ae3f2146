"""A run directory -> what rules read of it: recipe, metrics and rollouts, without this machine's paths."""

import io
import json
import math
import tarfile
from pathlib import Path

FILES = ("recipe.toml", "metrics/trainer.jsonl", "metrics/sampler-*.jsonl", "rollouts/*.jsonl")
HELD_OUT = 50
"""Completions of each evaluation that are kept; its numbers are in metrics/trainer.jsonl."""
DIGITS = 4


def compact(run: Path, target: Path, names: dict[str, str]) -> int:
    """Writes `target`, a .tar.xz; `names` maps texts of this machine to others. Returns its bytes."""
    with tarfile.open(target, "w:xz", preset=9) as archive:
        for path in sorted(path for pattern in FILES for path in run.glob(pattern)):
            text = path.read_text()
            for here, elsewhere in names.items():
                text = text.replace(here, elsewhere)
            if path.suffix == ".jsonl":
                text = "".join(json.dumps(record) + "\n" for record in thinned(text))
            member = tarfile.TarInfo(str(path.relative_to(run)))
            member.size = len(text.encode())
            archive.addfile(member, io.BytesIO(text.encode()))
    return target.stat().st_size


def thinned(text: str) -> list[dict]:
    """The records of a file with DIGITS significant digits, and of each evaluation the first HELD_OUT rollouts."""
    records, seen = [], {}
    for line in text.splitlines():
        record = json.loads(line)
        if record.get("split") == "eval":
            snapshot = record["snapshots"][-1]
            seen[snapshot] = seen.get(snapshot, 0) + 1
            if seen[snapshot] > HELD_OUT:
                continue
        records.append({name: rounded(name, value) for name, value in record.items()})
    return records


def rounded(name: str, value: object) -> object:
    if isinstance(value, dict):
        return {key: rounded(key, inner) for key, inner in value.items()}
    if name == "time_s":
        return round(value, 1)
    if not isinstance(value, float) or not math.isfinite(value) or value == int(value):
        return value
    return float(f"{value:.{DIGITS}g}")
