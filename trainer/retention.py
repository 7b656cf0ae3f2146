"""What a run forgets: checkpoints and snapshots beyond the numbers and bytes that its recipe keeps."""

import shutil
from dataclasses import dataclass
from pathlib import Path

from protocol.errors import StorageError
from protocol.recipe import TrainerTable
from protocol.rundir import RunDir
from protocol.snapshot import listed, remove

SPARE = 2
"""Snapshots beyond `max_staleness` that are kept: the one that samplers load now, and the one before."""


@dataclass(frozen=True, slots=True)
class Stored:
    """A sealed directory."""

    name: str
    size: int
    """Bytes."""


def surplus(
    checkpoints: list[Stored],
    snapshots: list[Stored],
    *,
    keep_checkpoints: int,
    keep_snapshots: int,
    needed: set[str],
    limit: int,
) -> list[str]:
    """Names to remove, in this order. Both lists have the oldest first; what is `needed` stays in any case.

    First those beyond the numbers. Then, while all of them take more than `limit` bytes (0: no limit), the oldest
    checkpoints but not the newest; snapshots within their number are those that samplers may ask for.
    """
    removable = [one for one in checkpoints[:-1] if one.name not in needed]
    gone = [one for one in removable if one in checkpoints[:-keep_checkpoints]]
    gone += [one for one in snapshots[:-keep_snapshots] if one.name not in needed]
    total = sum(one.size for one in checkpoints + snapshots) - sum(one.size for one in gone)
    for one in removable:
        if limit and total > limit and one not in gone:
            gone.append(one)
            total -= one.size
    return [one.name for one in gone]


def tidy(rundir: RunDir, settings: TrainerTable, needed: set[str]) -> int:
    """Removes what is surplus. Returns the bytes by which the rest exceeds `trainer.keep_gb`."""
    limit = int(settings.keep_gb * 2**30)
    paths = {path.name: path for parent in (rundir.checkpoints, rundir.snapshots) for path in listed(parent)}
    stored = [Stored(name, size(path) if limit else 0) for name, path in paths.items()]
    gone = surplus(
        [one for one in stored if one.name.startswith("c")],
        [one for one in stored if one.name.startswith("s")],
        keep_checkpoints=settings.keep_checkpoints,
        keep_snapshots=settings.max_staleness + SPARE,
        needed=needed | best(rundir),
        limit=limit,
    )
    for name in gone:
        remove(paths[name])
    left = sum(one.size for one in stored if one.name not in gone)
    return max(0, left - limit) if limit else 0


def best(rundir: RunDir) -> set[str]:
    """The snapshot with the best held-out accuracy, if there is one yet."""
    return {rundir.best.readlink().name} if rundir.best.is_symlink() else set()


def size(path: Path) -> int:
    """Bytes of a directory's files."""
    return sum(file.stat().st_size for file in path.rglob("*") if file.is_file())


def size_of_newest(parent: Path) -> int:
    """Bytes of the newest sealed directory; 0 where there is none."""
    return sum(size(path) for path in listed(parent)[-1:])


def check_room(directory: Path, what: str, needed: int) -> None:
    """Raises StorageError where the disk of `directory` has not `needed` bytes left."""
    free = shutil.disk_usage(directory).free
    if free < needed:
        raise StorageError(
            f"no room for {what}: {needed / 2**20:.1f} MiB needed, {free / 2**20:.1f} free in {directory}; free space"
        )
