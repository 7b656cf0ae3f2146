"""A reward worker seen from the sampler: start it, ask it, kill it with all that it started.

It has its own session, an empty directory of its own that is also its HOME and TMPDIR, and an
environment of a few allowed names: no token of the sampler's is handed to user code. A thread or a
signal could not end a C loop; a killed process always ends.

Code that looks for secrets still finds them: it runs as the same user, who can read the run's keys/
and the sampler's own environment in /proc. The network stays open: rewards may ask a judge there.
"""

import asyncio
import contextlib
import json
import logging
import os
import shutil
import signal
import site
import sys
import tempfile
from collections.abc import Coroutine
from pathlib import Path

import msgspec

from protocol.errors import UserError
from sampler.rewards.family import crowded, end_descendants, end_strays

log = logging.getLogger(__name__)
ROOT = Path(__file__).resolve().parents[2]
ALLOWED = ("PATH", "LANG", "LC_ALL", "TZ", "LD_LIBRARY_PATH", "VIRTUAL_ENV", "SSL_CERT_FILE")
START_S = 120.0
"""For the imports of the user's module."""
MAX_REPLY_BYTES = 1 << 24
MAX_PROCESSES = 512
"""Below one worker; the memory limit holds for each of them."""
LOOK_S = 0.1
"""How often they are counted: what a storm of forks gets done meanwhile, the machine must bear."""
KILL_S = 5.0


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

        Raises TimeoutError, or ConnectionError if the process ended, talks nonsense or has too many others.
        """
        assert self._process and self._process.stdin and self._process.stdout
        self.busy = True
        async with asyncio.timeout(timeout_s):
            self._process.stdin.write(json.dumps(request).encode() + b"\n")
            await self._process.stdin.drain()
            try:
                line = await self._line(self._process.stdout)
                reply = msgspec.json.decode(line, type=Reply) if line else None
            except ValueError as error:  # too long for asyncio's limit, or no such JSON
                raise ConnectionError(f"the worker sent no valid reply: {error}") from None
            if reply is None:
                raise ConnectionError(f"the process ended ({describe(await self._process.wait())})")
        self.busy = False
        return reply

    async def _line(self, replies: asyncio.StreamReader) -> bytes:
        assert self._process
        line = asyncio.ensure_future(replies.readline())
        try:
            while not line.done():
                await asyncio.wait({line}, timeout=LOOK_S)
                if crowded(self._process.pid, MAX_PROCESSES):
                    raise ConnectionError(f"more than {MAX_PROCESSES} processes that nobody has waited for")
            return line.result()
        finally:
            line.cancel()

    async def kill(self) -> None:
        """Ends the process and all that it started, or warns that it could not; removes its directory."""
        try:
            if self._process:
                await _in_time(self._end_family(self._process))
                await _in_time(self._end_strays(self._process))
        finally:
            shutil.rmtree(self._home, ignore_errors=True)

    async def _end_family(self, process: asyncio.subprocess.Process) -> None:
        """The descendants first, as the orphans among them come to the worker; then it and its group."""
        try:
            if process.returncode is None:
                await end_descendants(process.pid)
        finally:
            if process.returncode is None or not Path(f"/proc/{process.pid}").exists():  # not yet another's number
                with contextlib.suppress(ProcessLookupError):
                    os.killpg(process.pid, signal.SIGKILL)

    async def _end_strays(self, process: asyncio.subprocess.Process) -> None:
        await end_strays(self._home)
        await process.wait()  # also for a pipe that somebody holds open


async def _in_time(step: Coroutine[None, None, None]) -> None:
    try:
        async with asyncio.timeout(KILL_S):
            await step
    except TimeoutError:
        log.warning("a reward function's processes do not end within %.0f s; some may go on", KILL_S)


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


def describe(code: int) -> str:
    return f"killed by {signal.Signals(-code).name}" if code < 0 else f"exit code {code}"
