"""Children of a benchmark: forked after everything was imported, silent, ended with it; and what processes cost."""

import contextlib
import ctypes
import os
import signal
import socket
import subprocess
import tempfile
import time
import traceback
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, Self

import msgspec
import psutil


class Children:
    """Use with `with`: none of them is left behind it, however it ends. What they print goes to `log`."""

    def __init__(self, log: Path) -> None:
        self._log = log
        self._running: list[int] = []

    def start(self, work: Callable[[], object], **environment: object) -> int:
        """Runs `work` in a child, which fails where that raises. -> its process id"""
        self._running.append(forked(work, self._log, **environment))
        return self._running[-1]

    def wait(self, *awaited: int) -> None:
        """For these, or for all. Exits with the last words of the log as soon as any child fails."""
        left = set(awaited or self._running)
        while left & set(self._running):
            for child in list(self._running):
                ended, status = os.waitpid(child, os.WNOHANG)
                if ended:
                    self._running.remove(child)
                if status:
                    raise SystemExit(last_words(self._log))
            time.sleep(0.005)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        for child in self._running:
            os.kill(child, signal.SIGKILL)
            os.waitpid(child, 0)


def forked(work: Callable[[], object], log: Path, **environment: object) -> int:
    """Runs `work` in a child whose output goes to `log`. -> its process id; it exits with 1 where `work` raised."""
    pid = os.fork()
    if pid:
        return pid
    try:
        os.setsid()
        ctypes.CDLL(None).prctl(1, signal.SIGKILL)  # PR_SET_PDEATHSIG
        descriptor = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o600)
        os.dup2(descriptor, 1)
        os.dup2(descriptor, 2)
        os.environ.update({name: str(value) for name, value in environment.items()})
        work()
    except BaseException:
        os.write(2, traceback.format_exc().encode())  # past whatever captures logging and sys.stderr
        os._exit(1)
    os._exit(0)


def last_words(log: Path) -> str:
    return log.read_text(errors="replace")[-2000:] if log.exists() else "a child ended before it could say why"


def in_child(work: Callable[[Path], object]) -> Any:
    """What `work` returned in a process of its own, as JSON carries it. Exits where that failed.

    It gets an empty directory, which this process removes: a child that is killed could not.
    """
    with tempfile.TemporaryDirectory(prefix="benchmark-") as name:
        out, own = Path(name) / "out", Path(name) / "own"
        own.mkdir()
        with Children(Path(name) / "log") as children:
            children.start(lambda: out.write_bytes(msgspec.json.encode(work(own))))
            children.wait()
        return msgspec.json.decode(out.read_bytes())


def thread_seconds() -> dict[int, float]:
    """CPU seconds of each thread of this process, by the kernel's id."""
    tasks = Path("/proc/self/task").iterdir()
    return {int(task.name): int((task / "schedstat").read_text().split()[0]) / 1e9 for task in tasks}


def spent_since(before: Mapping[int, float]) -> dict[str, float]:
    """CPU seconds of all threads, and of the busiest one."""
    spent = [seconds - before.get(thread, 0.0) for thread, seconds in thread_seconds().items()]
    return {"cpu": sum(spent), "busiest": max(spent)}


def tree(root: int) -> list[psutil.Process]:
    """The process and its descendants; none where it is gone."""
    try:
        return [found := psutil.Process(root), *found.children(recursive=True)]
    except psutil.NoSuchProcess:
        return []


def processor_s(root: int) -> float:
    """CPU seconds of a process and all that it started, those that have ended included."""
    total = 0.0
    for process in tree(root):
        with contextlib.suppress(psutil.NoSuchProcess):
            times = process.cpu_times()
            total += times.user + times.system + times.children_user + times.children_system
    return total


def kill(child: subprocess.Popen) -> None:
    """With all that it started: a signal to the leaders would have them save, and orphans go on."""
    if child.poll() is not None:  # its number may be another's by now
        return
    for number in (signal.SIGSTOP, signal.SIGKILL):
        for process in tree(child.pid):
            with contextlib.suppress(psutil.NoSuchProcess):
                process.send_signal(number)
    child.wait()


def memory_mb() -> float:
    """Resident, of this process."""
    return int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE") / 1e6


def free_port() -> int:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        return free.getsockname()[1]


if __name__ == "__main__":
    raise SystemExit("a part of another benchmark: python -m benchmarks.hub")
