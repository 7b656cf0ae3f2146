"""Mirrors the record into a tracker: one process each, which reads metrics/trainer.jsonl while it grows.

The file is the queue, so no step waits for a tracker that is slow or hangs, none breaks the trainer, and after a
restart each goes on where it was. trackers/NAME.json in the run directory says how far it came. For an ended run:

    python -m protocol.mirror RUN tensorboard
"""

import argparse
import contextlib
import logging
import os
import secrets
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import msgspec
from msgspec import Struct

from protocol.cli import exit_with, log_to_console
from protocol.disk import write_atomic
from protocol.errors import RunError, StorageError, UserError
from protocol.metrics import Tail
from protocol.process import end
from protocol.recipe import Recipe, Tracking
from protocol.resolve import load
from protocol.rundir import RunDir
from protocol.trackers import Tracker, make, refuse_missing, scalars

log = logging.getLogger(__name__)

POLL_S = 2.0
END_S = 20.0
"""For what is left to be sent after the run; then the process is killed."""


class State(Struct, kw_only=True, forbid_unknown_fields=True):
    """trackers/NAME.json"""

    tracked_as: str
    """The id of the tracker's run, chosen at the first start."""
    offset: int = 0
    """Bytes of the record that are mirrored."""
    mirrored: int = 0
    """Records that the tracker took."""
    lost: int = 0
    """Records that it refused."""
    error: str = ""
    """The first refusal's since the start."""


@contextlib.contextmanager
def mirrored(rundir: RunDir, settings: Tracking, *, first: bool) -> Iterator[None]:
    """Inside, a process for each of `settings.mirrors` follows the record. first: whether this is the first rank."""
    processes = {name: process for name in settings.mirrors if first and (process := _start(rundir, name))}
    try:
        yield
    finally:
        for process in processes.values():
            assert process.stdin is not None
            process.stdin.close()
        deadline = time.monotonic() + END_S
        for name, process in processes.items():
            _end(name, process, deadline)


def _start(rundir: RunDir, name: str) -> subprocess.Popen | None:
    command = [sys.executable, "-m", "protocol.mirror", str(rundir.path), name, "--follow"]
    try:  # in a session of its own: a Ctrl-C is for the trainer, whose last records are mirrored too
        return subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.DEVNULL, start_new_session=True)
    except OSError as error:
        log.error("no mirror for %s: %s; the run goes on without", name, error.strerror)
        return None


def _end(name: str, process: subprocess.Popen, deadline: float) -> None:
    try:
        process.wait(max(0.0, deadline - time.monotonic()))
    except subprocess.TimeoutExpired:
        end(process, 0.0)
        log.error("%s had not taken all records %.0f s after the run; %s", name, END_S, again(name))


def again(name: str) -> str:
    return f"what is missing comes with the next start, or with: python -m protocol.mirror RUN {name}"


def main() -> int:
    flags = argparse.ArgumentParser("protocol.mirror", description="Mirrors the record of a run into a tracker.")
    flags.add_argument("run", type=Path, help="run directory")
    flags.add_argument("tracker", choices=["tensorboard", "wandb", "trackio"])
    flags.add_argument("--follow", action="store_true", help="go on until stdin ends: for the trainer, not for you")
    options = flags.parse_args()
    log_to_console(f"mirror.{options.tracker}")
    rundir, ended = RunDir(options.run), threading.Event()
    refuse_missing(Tracking(mirrors=[options.tracker]))
    if not options.follow:
        ended.set()
        return 1 if follow(rundir, load(rundir.recipe), options.tracker, ended).error else 0
    threading.Thread(target=_watch, args=(ended,), daemon=True).start()
    try:
        follow(rundir, load(rundir.recipe), options.tracker, ended)
    except RunError as error:  # a line that begins with `error: ` would count as the trainer's own last word
        log.error("%s; the run goes on; %s", error, again(options.tracker))
    return 0


def _watch(ended: threading.Event) -> None:
    """Stdin ends with the trainer, however that ends. A tracker that hangs must not outlive it."""
    sys.stdin.buffer.read()
    ended.set()
    time.sleep(END_S)
    os._exit(1)


def follow(rundir: RunDir, recipe: Recipe, name: str, ended: threading.Event) -> State:
    """Mirrors all records that are not yet, and new ones until `ended`; -> how far it came.

    A record may come twice after a crash. None is left out but those that the tracker refuses; these are counted.
    Raises RunError when the tracker cannot start, UserError for a damaged state.
    """
    path = rundir.path / "trackers" / f"{name}.json"
    state = msgspec.structs.replace(_state(path), error="")
    _keep(path, state)
    try:
        tracker = make(name, path.with_suffix(""), recipe, state.tracked_as)
    except Exception as error:  # whatever a library does
        raise RunError(f"{name} cannot start: {brief(error)}") from None
    tail, over = Tail(rundir.metrics / "trainer.jsonl"), False
    while not over:
        over = ended.is_set()  # before the last look, not after it
        for at, line in tail.lines():
            if at >= state.offset:
                _take(tracker, line, state)
                state.offset = at + len(line)
        with _counted(state):
            tracker.flush()
        _keep(path, state)
        ended.wait(POLL_S)
    with _counted(state):
        tracker.close()
    _keep(path, state)
    return state


def _take(tracker: Tracker, line: bytes, state: State) -> None:
    with _counted(state):
        record = msgspec.json.decode(line, type=dict)
        values = scalars(record)
        if values:
            tracker.log(record, values)
            state.mirrored += 1


@contextlib.contextmanager
def _counted(state: State) -> Iterator[None]:
    """An error inside is said once, and counted."""
    try:
        yield
    except Exception as error:  # whatever a library does
        state.lost += 1
        if not state.error:
            state.error = brief(error)
            log.error("a record was refused: %s; the run goes on, and further ones are counted", state.error)


def brief(error: Exception) -> str:
    return f"{type(error).__name__}: {error}"[:300]


def _state(path: Path) -> State:
    if not path.exists():
        return State(tracked_as=secrets.token_hex(8))
    try:
        return msgspec.json.decode(path.read_bytes(), type=State)
    except (OSError, msgspec.DecodeError, UnicodeDecodeError) as error:
        raise UserError(f"cannot read {path}: {error}; remove it to mirror the whole record anew") from None


def mirrors(rundir: RunDir) -> dict[str, State]:
    """By tracker, how far it came; one whose file cannot be read is left out."""
    found = {}
    for path in sorted((rundir.path / "trackers").glob("*.json")):
        with contextlib.suppress(UserError):
            found[path.stem] = _state(path)
    return found


def _keep(path: Path, state: State) -> None:
    try:
        path.parent.mkdir(exist_ok=True)
        write_atomic(path, msgspec.json.encode(state))
    except (OSError, StorageError) as error:
        log.error("%s", error)


if __name__ == "__main__":
    exit_with(main)
