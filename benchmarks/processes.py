"""Children of a benchmark: forked after everything was imported, silent, ended with it."""

import ctypes
import os
import signal
import socket
import tempfile
import traceback
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import msgspec


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


def in_child(work: Callable[[], object]) -> Any:
    """What `work` returned in a process of its own, as JSON carries it. Exits where that failed."""
    with tempfile.TemporaryDirectory(prefix="benchmark-") as name:
        out, log = Path(name) / "out", Path(name) / "log"
        os.waitpid(forked(lambda: out.write_bytes(msgspec.json.encode(work())), log), 0)
        if not out.exists():
            raise SystemExit(log.read_text()[-2000:])
        return msgspec.json.decode(out.read_bytes())


def stop_all(children: Sequence[int]) -> None:
    for child in children:
        os.kill(child, signal.SIGKILL)
        os.waitpid(child, 0)


def thread_seconds() -> dict[int, float]:
    """CPU seconds of each thread of this process, by the kernel's id."""
    tasks = Path("/proc/self/task").iterdir()
    return {int(task.name): int((task / "schedstat").read_text().split()[0]) / 1e9 for task in tasks}


def spent_since(before: Mapping[int, float]) -> dict[str, float]:
    """CPU seconds of all threads, and of the busiest one."""
    spent = [seconds - before.get(thread, 0.0) for thread, seconds in thread_seconds().items()]
    return {"cpu": sum(spent), "busiest": max(spent)}


def memory_mb() -> float:
    """Resident, of this process."""
    return int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE") / 1e6


def free_port() -> int:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        return free.getsockname()[1]


if __name__ == "__main__":
    raise SystemExit("a part of another benchmark: python -m benchmarks.hub")
