"""The recorded stream: the groups of every step, one file a step, for `python -m trainer --replay`.

`stream/s00000012.i0001.msgpack` holds the groups that incarnation 1 trained as its step 12, the step whose weights
are snapshot s00000012.i0001: 32 bytes of sha256, then the groups as `codec.encode_groups` writes them.
"""

import hashlib
import logging
import re
from collections.abc import Iterator
from pathlib import Path

import msgspec

from protocol.codec import decode_groups, encode_groups
from protocol.disk import names_in, write_atomic
from protocol.errors import StorageError, UserError
from protocol.messages import Group
from protocol.metrics import read_metrics
from protocol.recipe import Recipe
from protocol.resolve import load
from protocol.rundir import RunDir, resolve_recipe
from protocol.snapshot import snapshot_id

log = logging.getLogger(__name__)

NAME = re.compile(r"s(\d{8,20})\.i(\d{4,20})\.msgpack")
DIGEST = 32
"""Bytes of a sha256: of a damaged file many bits are numbers that decode."""


class StreamWriter:
    """Used by rank 0 alone. on: `trainer.keep_stream`.

    A full disk stops no run: the step is left out, counted in `lost`, and said once.
    """

    def __init__(self, directory: Path, incarnation: int, *, on: bool) -> None:
        self._directory, self._incarnation, self._on = directory, incarnation, on
        self.lost = 0

    def keep(self, step: int, groups: list[Group]) -> None:
        """Called when step `step` is done, before its checkpoint: behind a checkpoint no step may be missing."""
        if not self._on:
            return
        data = encode_groups(groups)
        try:
            path = self._directory / f"{snapshot_id(step, self._incarnation)}.msgpack"
            write_atomic(path, hashlib.sha256(data).digest() + data)
        except StorageError as error:
            self.lost += 1
            if self.lost == 1:
                log.error("step %d is missing in the recorded stream: %s; the run goes on", step, error)

    def abandon(self, step: int) -> None:
        """Called at the start of a trainer whose history ends with `step`, which is 0 without a checkpoint.

        Files of later steps belong to a history that goes on no more. They are moved to `abandoned/`, not removed: what
        a trainer learned from before it died is what somebody may want to look at.
        """
        later = [path for number, _, path in _files(self._directory) if number > step]
        try:
            for path in later:
                path.parent.joinpath("abandoned").mkdir(exist_ok=True)
                path.rename(path.parent / "abandoned" / path.name)
        except OSError as error:
            log.error("cannot move %s: %s; recorded steps after %d are another history", path, error.strerror, step)


def read_stream(path: Path) -> Iterator[tuple[int, list[Group]]]:
    """(step, its groups) in order. path: a run directory or its `stream/`.

    Raises UserError for a path without recorded steps and, when the reading comes there, for a missing step and for a
    damaged file.
    """
    files = recorded(path)
    for step in range(min(files), max(files) + 1):
        if step not in files:
            raise UserError(
                f"step {step} is missing in {stream_of(path)}, steps after it are there (was the disk full?): what is "
                f"before it can be replayed, with --set trainer.steps={step - 1}"
            )
        yield step, _read(files[step])


def recorded(path: Path) -> dict[int, Path]:
    """The file of each recorded step. Raises UserError where there is none."""
    directory = stream_of(path)
    newest = {step: (incarnation, file) for step, incarnation, file in sorted(_files(directory))}
    if not newest:
        raise UserError(f"no recorded steps in {directory}; a run writes them with trainer.keep_stream = true")
    files, latest = {}, 0
    for step, (incarnation, file) in newest.items():
        latest = max(latest, incarnation)
        if incarnation == latest:  # else of a history that this later incarnation left before that step
            files[step] = file
    return files


def stream_of(path: Path) -> Path:
    """The `stream/` of a run directory, or `path` itself. Raises UserError for what is no directory."""
    directory = path / "stream" if (path / "stream").is_dir() else path
    if not directory.is_dir():
        raise UserError(f"{path} is no directory; expected a run directory, or the stream/ in one")
    return directory


def resolve_replay(stream: Path, run: Path | None, recipe: Path | None, overrides: list[str]) -> tuple[RunDir, Recipe]:
    """What `--replay stream --run run` means: the recipe kept beside the stream, unless another is given.

    Raises UserError for a run directory that has trained before, and for a stream that begins in the middle of a run,
    where the model to begin with is the one that the run began with.
    """
    first, kept = min(recorded(stream)), stream_of(stream).parent / "recipe.toml"
    if not run or (run / "metrics" / "trainer.jsonl").exists():
        raise UserError(
            f"--replay needs a new directory for what comes of it; {run or 'none'} was given: name one by --run"
        )
    known = recipe or (run / "recipe.toml").exists()
    if not known and not kept.exists():
        raise UserError(f"there is no {kept} to replay {stream} with; give one by --recipe")
    rundir, resolved = resolve_recipe(run, recipe if known else kept, overrides)
    began = load(kept).model if kept.exists() else None
    if first > 1 and began and (began.path, began.revision) == (resolved.model.path, resolved.model.revision):
        raise UserError(
            f"{stream} begins with step {first}, the model of its recipe with step 1: name weights of step {first - 1} "
            f"by --set model.path=SNAPSHOT; the optimizer begins anew all the same"
        )
    return rundir, resolved


def replayed(run: Path) -> bool:
    """Whether a replay into this directory came to its end."""
    records = read_metrics(run / "replay.jsonl")
    return bool(records) and records[-1]["kind"] == "end"


def _files(directory: Path) -> list[tuple[int, int, Path]]:
    """(step, incarnation, file)."""
    matches = [NAME.fullmatch(name) for name in names_in(directory)]
    return [(int(match[1]), int(match[2]), directory / match[0]) for match in matches if match]


def _read(file: Path) -> list[Group]:
    try:
        data = file.read_bytes()
    except OSError as error:
        raise UserError(f"cannot read {file}: {error.strerror}") from None
    if hashlib.sha256(data[DIGEST:]).digest() != data[:DIGEST]:
        raise UserError(f"{file} is damaged: its {len(data)} bytes are not those that were written; use another copy")
    try:
        groups = decode_groups(data[DIGEST:])
    except (msgspec.DecodeError, UnicodeDecodeError, RecursionError) as error:
        raise UserError(f"{file} is no list of groups of this version of the protocol: {error}") from None
    if not groups:
        raise UserError(f"{file} holds no groups; use another copy")
    return groups
