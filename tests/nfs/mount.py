"""Mounts of one server directory, for tests: `with mounted(server, place) as client:` is a machine's view of it."""

import contextlib
import ctypes.util
import importlib.util
import json
import os
import shutil
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

READY_S = 60.0
SYS_ADMIN = 21
"""The number of this capability."""


class Mount:
    """path: where this client sees the server."""

    def __init__(self, path: Path, process: subprocess.Popen) -> None:
        self.path, self._process = path, process

    def set(self, **habits: object) -> None:
        """Habits of tests/nfs/cache.py, from now on."""
        self._tell(habits)

    def lose(self, op: str, name: str = "*", error: str = "EIO", times: int = 1) -> None:
        """The server does the next such operations, only the replies are lost. error: RETRY: the client asks again."""
        self._tell({"faults": [{"op": op, "name": name, "error": error, "times": times}]})

    def refuse(self, op: str, name: str = "*", error: str = "EIO", times: int = 1) -> None:
        """The server does not do them."""
        self._tell({"faults": [{"op": op, "name": name, "error": error, "times": times, "done": False}]})

    def away(self, seconds: float) -> None:
        """The server does not answer: a hard mount waits."""
        self.set(away_until=time.monotonic() + seconds)

    def expire(self) -> None:
        """All that this client remembers is too old."""
        self._tell({"expire": True})

    def write_back(self, size: int = 1 << 30) -> None:
        """Of what was written to each open file and waits, the first `size` bytes go to the server."""
        self._tell({"write_back": size})

    def pending(self) -> list[dict]:
        """Faults that nobody has met; they are taken back."""
        return self._tell({"forgive": True})

    def _tell(self, words: dict) -> list[dict]:
        assert self._process.stdin and self._process.stdout
        self._process.stdin.write(json.dumps(words) + "\n")
        self._process.stdin.flush()
        return json.loads(self._process.stdout.readline())


def why_not() -> str | None:
    """Why nothing can be mounted here."""
    capabilities = int(Path("/proc/self/status").read_text().partition("CapEff:")[2].split()[0], 16)
    if not capabilities >> SYS_ADMIN & 1:
        return "mounting needs root, in a container CAP_SYS_ADMIN"
    if not os.path.exists("/dev/fuse") or not shutil.which("umount"):
        return "no /dev/fuse here"
    if not importlib.util.find_spec("mfusepy"):
        return "mfusepy is not installed: pip install '.[dev]'"
    if not (ctypes.util.find_library("fuse3") or ctypes.util.find_library("fuse")):
        return "no libfuse here: apt-get install fuse3"
    return None


@contextlib.contextmanager
def mounted(server: Path, path: Path, **habits: object) -> Iterator[Mount]:
    """Unmounted and gone at the end, whoever still uses it."""
    path.mkdir()
    command = [sys.executable, "-m", "tests.nfs.client", str(server), str(path)]
    with (path.parent / f"{path.name}.log").open("wb") as log:
        process = subprocess.Popen(
            command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=log, text=True, cwd=Path(__file__).parents[2]
        )
    try:
        _wait_until_mounted(path, process)
        mount = Mount(path, process)
        mount.set(**habits)
        yield mount
    finally:
        process.kill()  # what waits for the server has an error now, and ends
        process.communicate()
        subprocess.run(["umount", "-l", str(path)], check=False, capture_output=True)


def _wait_until_mounted(path: Path, process: subprocess.Popen) -> None:
    deadline = time.monotonic() + READY_S
    while not path.is_mount():
        if process.poll() is not None or time.monotonic() > deadline:
            raise RuntimeError(f"not mounted: {(path.parent / f'{path.name}.log').read_text()[-2000:]}")
        time.sleep(0.02)
