"""A reward worker seen from the sampler: start it, ask it, kill it with all that it started.

It has its own session, an empty directory of its own that is also its HOME and TMPDIR, and an
environment of a few allowed names: no token of the sampler's reaches user code. A thread or a
signal could not end a C loop; a killed process always ends.
"""

import asyncio
import contextlib
import json
import os
import shutil
import signal
import site
import sys
import tempfile
from pathlib import Path

import msgspec

from protocol.errors import UserError

ROOT = Path(__file__).resolve().parents[2]
ALLOWED = ("PATH", "LANG", "LC_ALL", "TZ", "LD_LIBRARY_PATH", "VIRTUAL_ENV", "SSL_CERT_FILE")
START_S = 120.0
"""For the imports of the user's module."""
MAX_REPLY_BYTES = 1 << 24


class Reply(msgspec.Struct, forbid_unknown_fields=True):
    """What a worker answers; user code could write to the pipe, so it is checked like any input."""

    refused: str | None = None
    required: list[list[str]] = []
    error: str | None = None
    values: list[float | None] = []


class RewardProcess:
    """One worker. `start` it first; if it is still `busy` after `ask`, only `kill` is left."""

    def __init__(self) -> None:
        self.required: list[list[str]] = []  # [rewards] the columns that each cannot do without
        self.busy = False  # from a request to its reply; for ever if that did not come
        self._process: asyncio.subprocess.Process | None = None
        self._home = tempfile.mkdtemp(prefix="reward-")

    async def start(self, rewards: list[dict], memory_bytes: int) -> None:
        """Imports the functions. Raises UserError with the worker's words, or if none come."""
        self._process = await asyncio.create_subprocess_exec(
            *(sys.executable, "-P", "-m", "sampler.rewards.worker", str(os.getpid())),
            stdin=asyncio.subprocess.PIPE,
            stdout=asyncio.subprocess.PIPE,
            cwd=self._home,
            env=environment(self._home),
            start_new_session=True,
            limit=MAX_REPLY_BYTES,
        )
        paths = [os.getcwd(), *filter(None, sys.path)]
        start = {"paths": paths, "memory": memory_bytes, "rewards": rewards}
        try:
            reply = await self.ask(start, START_S)
        except TimeoutError:
            raise UserError(f"rewards: the import took more than {START_S:.0f} s; is it a loop?") from None
        except ConnectionError as error:
            raise UserError(f"rewards: the worker ended during the import: {error}") from None
        if reply.refused:
            raise UserError(reply.refused)
        self.required = reply.required

    async def ask(self, request: dict, timeout_s: float) -> Reply:
        """One request, one reply.

        Raises TimeoutError, or ConnectionError if the process ended or talks nonsense.
        """
        assert self._process and self._process.stdin and self._process.stdout
        self.busy = True
        async with asyncio.timeout(timeout_s):
            self._process.stdin.write(json.dumps(request).encode() + b"\n")
            await self._process.stdin.drain()
            try:
                line = await self._process.stdout.readline()
                reply = msgspec.json.decode(line, type=Reply) if line else None
            except ValueError as error:  # too long for asyncio's limit, or no such JSON
                raise ConnectionError(f"the worker sent no valid reply: {error}") from None
            if reply is None:
                raise ConnectionError(f"the process ended ({describe(await self._process.wait())})")
        self.busy = False
        return reply

    async def kill(self) -> None:
        """Ends the process, its group, its descendants in other sessions; removes its directory."""
        if self._process:
            for pid in descendants(self._process.pid):
                with contextlib.suppress(ProcessLookupError):
                    os.kill(pid, signal.SIGKILL)
            with contextlib.suppress(ProcessLookupError):
                os.killpg(self._process.pid, signal.SIGKILL)
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(5):  # a pipe that an escaped process holds open
                    await self._process.wait()
        shutil.rmtree(self._home, ignore_errors=True)


def environment(home: str) -> dict[str, str]:
    """What user code may see. No GPU and one thread: memory and cores belong to the engine."""
    paths = [str(ROOT), *filter(None, [os.environ.get("PYTHONPATH")])]
    kept = {name: os.environ[name] for name in ALLOWED if name in os.environ}
    return kept | {
        "HOME": home,
        "TMPDIR": home,
        "PYTHONPATH": os.pathsep.join(paths),
        "PYTHONUSERBASE": site.getuserbase(),  # `pip install --user` went to the real HOME
        "PYTHONUNBUFFERED": "1",
        "OMP_NUM_THREADS": "1",
        "CUDA_VISIBLE_DEVICES": "",
    }


def descendants(pid: int) -> list[int]:
    """All processes below `pid`, also those that left its session (they would survive `killpg`)."""
    children: dict[int, list[int]] = {}
    for stat in Path("/proc").glob("[0-9]*/stat"):
        with contextlib.suppress(OSError):
            # "pid (name) state parent ...": the name may hold spaces and parentheses.
            parent = int(stat.read_text(errors="replace").rpartition(")")[2].split()[1])
            children.setdefault(parent, []).append(int(stat.parent.name))
    found, ahead = [], [pid]
    while ahead:
        below = children.get(ahead.pop(), [])
        found += below
        ahead += below
    return found


def describe(code: int) -> str:
    return f"killed by {signal.Signals(-code).name}" if code < 0 else f"exit code {code}"
