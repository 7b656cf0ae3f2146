"""Children of a benchmark: forked after everything was imported, silent, ended with it."""

import ctypes
import logging
import os
import signal
import socket
from collections.abc import Callable, Sequence
from pathlib import Path


def forked(work: Callable[[], object], log: Path, **environment: object) -> int:
    """Runs `work` in a child whose output goes to `log`. -> its process id."""
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
        logging.exception("ended with")
    finally:
        os._exit(0)


def stop_all(children: Sequence[int]) -> None:
    for child in children:
        os.kill(child, signal.SIGKILL)
        os.waitpid(child, 0)


def free_port() -> int:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        return free.getsockname()[1]


if __name__ == "__main__":
    raise SystemExit("a part of another benchmark: python -m benchmarks.hub")
