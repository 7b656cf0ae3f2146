"""Nodes with a host name and an address of their own on one machine: Linux network namespaces on one bridge.

Needs root and `ip`. A process on a node reaches the other nodes at 10.83.7.N alone; its loopback is its own.
"""

import contextlib
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import psutil

PREFIX = f"vesper{os.getpid() % 10_000}"
INTERFACE = "fabric0"


@dataclass(slots=True)
class Node:
    """Where commands of a test run."""

    name: str
    address: str
    enter: list[str] = field(default_factory=list)
    environment: dict[str, str] = field(default_factory=dict)

    def start(self, command: Sequence[str], log: Path, **environment: str) -> subprocess.Popen:
        """In a session of its own; `command` begins with a module's name: python -m is put before it."""
        settings = os.environ | {"OMP_NUM_THREADS": "1", "DS_ACCELERATOR": "cpu", "CUDA_VISIBLE_DEVICES": ""}
        with log.open("ab") as file:
            return subprocess.Popen(
                [*self.enter, sys.executable, "-m", *command],
                env=settings | self.environment | environment,
                stdin=subprocess.DEVNULL,
                stdout=file,
                stderr=file,
                start_new_session=True,
            )


@contextlib.contextmanager
def network(count: int) -> Iterator[list[Node]]:
    """`count` nodes that really are apart. Raises OSError where that is not allowed."""
    names = [f"{PREFIX}n{number}" for number in range(1, count + 1)]
    switch = f"{PREFIX}s"
    try:
        _ip("netns", "add", switch)
        _ip("-n", switch, "link", "add", "bridge0", "type", "bridge")
        _ip("-n", switch, "link", "set", "bridge0", "up")
        yield [_node(number, name, switch) for number, name in enumerate(names, 1)]
    finally:
        for name in [*names, switch]:
            subprocess.run(["ip", "netns", "del", name], capture_output=True, check=False)


def _node(number: int, name: str, switch: str) -> Node:
    address = f"10.83.7.{number}"
    _ip("netns", "add", name)
    _ip("-n", name, "link", "add", INTERFACE, "type", "veth", "peer", "name", name, "netns", switch)
    _ip("-n", switch, "link", "set", name, "master", "bridge0", "up")
    _ip("-n", name, "addr", "add", f"{address}/24", "dev", INTERFACE)
    for interface in (INTERFACE, "lo"):
        _ip("-n", name, "link", "set", interface, "up")
    named = ["unshare", "--uts", "sh", "-c", f'hostname node{number} && exec "$@"', "sh"]
    return Node(f"node{number}", address, ["ip", "netns", "exec", name, *named], {"GLOO_SOCKET_IFNAME": INTERFACE})


def _ip(*arguments: str) -> None:
    try:
        subprocess.run(["ip", *arguments], capture_output=True, text=True, check=True)
    except subprocess.CalledProcessError as error:
        raise OSError(f"ip {' '.join(arguments)}: {error.stderr.strip()}") from None


def wait_for(what: Callable[[], object], seconds: float, *logs: Path) -> object:
    """The first true value of `what()`; the logs' ends are shown where there is none in time."""
    deadline = time.monotonic() + seconds
    while time.monotonic() < deadline:
        if found := what():
            return found
        time.sleep(0.1)
    raise AssertionError("\n".join(log.read_text(errors="replace")[-3000:] for log in logs if log.exists()))


def living(mark: str) -> list[psutil.Process]:
    """Processes with `mark` in their command line."""
    found = []
    for one in psutil.process_iter():
        with contextlib.suppress(psutil.Error):
            if mark in " ".join(one.cmdline()) and one.status() != psutil.STATUS_ZOMBIE and one.pid != os.getpid():
                found.append(one)
    return found


def end_all(processes: Sequence[subprocess.Popen], mark: str) -> None:
    """Kills the sessions, and what has left them."""
    for process in processes:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
        process.wait()
    for one in living(mark):
        with contextlib.suppress(psutil.Error):
            one.kill()
