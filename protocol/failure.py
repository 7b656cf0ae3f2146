"""FAILED.md: which process of a run failed first, its last lines and what to do. Every later one points to it.

A dying trainer takes its other ranks and, in the end, its samplers with it: of many error messages only the first
says why. The file is made exclusively, so the first one stays at its top and later ones are added below; a new start
of the same worker puts it aside.
"""

import collections
import contextlib
import logging
import os
import re
import signal
import socket
import time
import traceback
from collections.abc import Iterator, Sequence
from pathlib import Path

from protocol.cli import CONTROL
from protocol.disk import write_atomic
from protocol.errors import PortBusy, RunError, StorageError, Superseded

log = logging.getLogger(__name__)

NAME = "FAILED.md"
LINES = 30
ENTRY = re.compile(r"^(?=##? .* failed (?:first|later)$)", re.MULTILINE)
"""Where one process's words begin; quoted lines are indented."""
LOST_PEER = re.compile(r"[Cc]onnection (was )?(closed|reset)|Broken pipe|Socket closed|Connection refused")
"""What gloo and NCCL say when another rank has died."""
AGAIN = "Start the same command again: the run goes on from its last checkpoint."
ADVICE = {
    2: "Mend what the message names and start again.",
    3: "This sampler does not belong to this run: start it with the run's own directory and recipe.",
    66: "Start the trainer, then the samplers.",
    72: "Do not trust this engine's weights: check the versions of vLLM and transformers.",
    73: f"Free space, or mend the disk or its permissions. {AGAIN}",
    74: "Restore a checkpoint from a backup, or start over in a new run directory.",
    76: "Lower optimizer.learning_rate, look at quarantine/ and metrics/trainer.jsonl, start again.",
    77: f"Change a setting that the message names with --set. {AGAIN}",
}


class Tail(logging.Handler):
    """Remembers the last lines that this process logged."""

    def __init__(self) -> None:
        super().__init__()
        self.lines: collections.deque[str] = collections.deque(maxlen=LINES)
        self.setFormatter(logging.Formatter("%(asctime)s %(levelname).1s %(message)s", "%H:%M:%S"))

    def emit(self, record: logging.LogRecord) -> None:
        self.lines.append(self.format(record))


@contextlib.contextmanager
def explained(run: Path, process: str) -> Iterator[None]:
    """A failure inside is described in FAILED.md; where another process has failed before, the log points there."""
    tail = Tail()
    logging.getLogger().addHandler(tail)
    try:
        yield
    except (KeyboardInterrupt, SystemExit, Superseded, PortBusy):  # nothing failed: another trainer goes on
        raise
    except BaseException as error:
        lines = list(tail.lines)
        if isinstance(error, RunError):
            code, what = error.exit_code, str(error)
        else:
            code, what = 1, f"{type(error).__name__}: {error}"
            lines += traceback.format_exc().splitlines()
            if isinstance(error, RuntimeError) and process.startswith("trainer") and LOST_PEER.search(what):
                what = f"another rank is gone (killed, or out of memory?): {what.splitlines()[0]}"
        write_failure(run, process, code, what, lines)
        raise
    finally:
        logging.getLogger().removeHandler(tail)


def write_failure(run: Path, process: str, code: int, what: str, lines: Sequence[str] = ()) -> None:
    """Writes FAILED.md, or adds to it what has failed later."""
    text = (
        f"# {process} failed first\n\n"
        f"exit code {code}, process {os.getpid()} on {socket.gethostname()}, {time.strftime('%Y-%m-%d %H:%M:%S')}\n\n"
        f"{what}\n\n**What to do:** {ADVICE.get(code, AGAIN)}\n\nIts last lines:\n\n"
        + "".join(f"    {line}\n" for entry in list(lines)[-2 * LINES :] for line in entry.splitlines())
    ).translate(CONTROL)
    path = run / NAME
    try:
        try:
            with path.open("x") as file:
                file.write(text)
        except FileExistsError:
            log.error("another process failed first, see %s", path)
            with path.open("a") as file:
                file.write("\n" + text.replace("# ", "## ", 1).replace(" failed first", " failed later", 1))
    except OSError as error:
        log.error("cannot write %s: %s", path, error.strerror)
        with contextlib.suppress(OSError):
            if not path.stat().st_size:
                path.unlink()  # an empty one would hide the next failure


def died(code: int) -> str:
    """A child's end in words, for those that could not say anything themselves."""
    if code < 0:
        return f"was killed by {signal.Signals(-code).name}" + " (out of memory?)" * (code == -signal.SIGKILL)
    return f"ended with exit code {code}"


def failure(run: Path, process: str) -> tuple[int, str] | None:
    """Exit code and message of the first failure in FAILED.md of a process whose name starts so."""
    try:
        text = (run / NAME).read_text(errors="replace")
    except OSError:
        return None
    header = rf"^##? {re.escape(process)}.* failed (?:first|later)\n\nexit code (\d+),.*\n\n(.*)\n"
    found = re.search(header, text, re.MULTILINE)
    return (int(found[1]), found[2]) if found else None


def put_aside(run: Path, process: str) -> None:
    """A new start of this worker: what its last one said moves to logs/; if that came first, with all that followed.

    process: its whole name; `trainer` is the trainer and any rank of it.
    """
    try:
        text = (run / NAME).read_text(errors="replace")
    except OSError:
        return
    own = re.compile(rf"##? {re.escape(process)}( rank \d+)? failed (first|later)\n")
    entries = list(filter(None, ENTRY.split(text)))
    if not any(map(own.match, entries)):
        return
    aside = run / "logs" / f"failed-{time.time_ns()}.md"
    try:
        aside.parent.mkdir(exist_ok=True)
        if own.match(entries[0]):
            os.replace(run / NAME, aside)
        else:
            aside.write_text("".join(filter(own.match, entries)))
            write_atomic(run / NAME, "".join(entry for entry in entries if not own.match(entry)).encode())
    except (OSError, StorageError) as error:
        log.error("cannot put aside %s: %s", run / NAME, error)
