"""Child processes that never outlive their parent, and a Ctrl-C that ends work instead of breaking it."""

import ctypes
import logging
import os
import signal
import subprocess
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import IO

log = logging.getLogger(__name__)

PR_SET_PDEATHSIG = 1
NVIDIA_SMI_S = 20.0
"""It hangs where a driver is broken."""
KILLED_S = 10.0
"""For the kernel to take back what killed processes had."""


def die_with_parent(number: int = signal.SIGTERM) -> None:
    """Asks the kernel to signal this process when the thread that started it ends. Linux only, else nothing."""
    try:
        ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, int(number))
    except (OSError, AttributeError):
        return


def start(
    command: Sequence[str],
    *,
    log: IO[bytes] | None = None,
    environment: Mapping[str, str] | None = None,
    directory: Path | None = None,
) -> subprocess.Popen:
    """Starts a command in a session of its own, so that `end` reaches all that it starts in turn."""
    return subprocess.Popen(
        command,
        stdin=subprocess.DEVNULL,
        stdout=log,
        stderr=subprocess.STDOUT if log else None,
        env={**os.environ, **(environment or {})},
        cwd=directory,
        start_new_session=True,
        preexec_fn=die_with_parent,
    )


def signal_group(process: subprocess.Popen, number: int) -> None:
    try:
        os.killpg(process.pid, number)
    except ProcessLookupError:
        return


def group_alive(process: subprocess.Popen) -> bool:
    """Whether any process of the session is left, its leader or not; one that nobody has reaped yet is not."""
    return process.poll() is None or bool(members(process.pid))


def members(group: int) -> list[int]:
    """Living processes of a process group."""
    found = []
    for path in Path("/proc").iterdir():
        if path.name.isdigit():
            fields = _stat(int(path.name))
            if fields and (fields[0] != "Z" or int(fields[17]) > 1) and int(fields[2]) == group:  # with a thread left
                found.append(int(path.name))
    return found


def end(process: subprocess.Popen, grace_s: float) -> int:
    """Asks the whole group to end, waits for all of it, kills what is left after `grace_s`. -> exit code.

    What a driver still holds after KILLED_S is said in the log.
    """
    signal_group(process, signal.SIGTERM)
    _wait(process, grace_s)
    signal_group(process, signal.SIGKILL)
    _wait(process, KILLED_S)
    if left := members(process.pid):
        log.warning("processes %s do not end: their memory, and a GPU's, is not free yet", ", ".join(map(str, left)))
    return -signal.SIGKILL if process.returncode is None else process.returncode


def _wait(process: subprocess.Popen, seconds: float) -> None:
    deadline = time.monotonic() + seconds
    while group_alive(process) and time.monotonic() < deadline:
        time.sleep(0.05)


STOP_SIGNALS = (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1)
ONE_STOP_S = 1.0
"""Launchers pass one stop on in several ways: signals that come together count once."""


def on_stop_signal(action: Callable[[], None]) -> None:
    """Calls `action` on the first SIGTERM, SIGINT or SIGUSR1 (Slurm's warning); a later one ends the process."""
    first: list[float] = []

    def handle(number: int, _: object) -> None:
        now = time.monotonic()
        if not first:
            first.append(now)
            action()
        elif now - first[0] > ONE_STOP_S:
            signal.signal(number, signal.SIG_DFL)
            os.kill(os.getpid(), number)

    for number in STOP_SIGNALS:
        signal.signal(number, handle)


TRAINER_PID = "VESPER_TRAINER_PID"
"""Environment: the process that started DeepSpeed's launcher, and whose death ends the ranks."""


def watch_ancestors(depth: int, orphaned: Callable[[], None]) -> None:
    """Calls `orphaned` when the parent (depth 1) or also its parent (depth 2, ...) is gone.

    A launcher that is killed does not end its children; a parent-death signal sees only the direct parent.
    """
    chain, starter = _ancestors(depth), int(os.environ.get(TRAINER_PID, 0))

    def watch() -> None:
        while _ancestors(depth) == chain and (not starter or _stat(starter)):  # it may be gone before we look
            time.sleep(1.0)
        orphaned()

    threading.Thread(target=watch, name="watch-ancestors", daemon=True).start()


def _ancestors(depth: int) -> list[int]:
    chain, pid = [], os.getpid()
    while len(chain) < depth and pid > 1 and (fields := _stat(pid)):
        pid = int(fields[1])
        chain.append(pid)
    return chain


def _stat(pid: int) -> list[str]:
    """State, parent, group, ... of a process; [] when it is gone."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    except OSError:
        return []


def visible_gpus() -> list[str]:
    """Ids of the NVIDIA GPUs that this process may use; empty on a machine without any."""
    listed = os.environ.get("CUDA_VISIBLE_DEVICES")
    if listed is not None:
        return [gpu for gpu in listed.split(",") if gpu and gpu != "-1"]
    try:
        listing = ["nvidia-smi", "-L"]
        found = subprocess.run(listing, capture_output=True, text=True, check=True, timeout=NVIDIA_SMI_S).stdout
    except (OSError, subprocess.SubprocessError):
        return []
    return [str(index) for index in range(found.count("GPU "))]
