"""The inside of a reward worker: a process that runs user code and may be killed at any moment.

`python -m sampler.rewards.worker PARENT_PID`, started by sampler/rewards/process.py. One JSON
object a line, on stdin and stdout:

    -> {"paths": [directories for imports], "memory": bytes,
        "rewards": [{"reference": ..., "options": {...}}]}
    <- {"required": [[column, ...] per reward]}   or  {"refused": why}
    -> {"reward": index, "prompts": [...], "completions": [...], "completion_ids": [[...], ...],
        "finish_reasons": [...], "max_tokens": number, "columns": {name: [...]}}
    <- {"values": [number or null, ...]}          or  {"error": "Type: text (file.py:12)"}

User code sees neither pipe: its stdin is empty, its prints go to stderr. This limits damage; it is
no sandbox. Memory and the size of a file have limits of the kernel; the number of processes is
counted from outside (sampler/rewards/family.py says why).
"""

import asyncio
import contextlib
import ctypes
import inspect
import json
import math
import numbers
import os
import resource
import signal
import sys
from collections.abc import Awaitable, Callable
from dataclasses import dataclass
from typing import IO

from protocol.errors import UserError
from sampler.rewards.loader import NAMED, accepted, file_of, load, required, where
from sampler.rewards.signature import GIVEN

PR_SET_PDEATHSIG, PR_SET_CHILD_SUBREAPER = 1, 36
MAX_FILE_BYTES = 16 << 30
"""A write beyond is an OSError: no file gets endless. Large, as stderr may be the log of a long run."""


def main() -> None:
    die_with(int(sys.argv[1]))
    requests, replies = private_pipes()
    start = json.loads(requests.readline())
    limit(resource.RLIMIT_DATA, start["memory"])
    limit(resource.RLIMIT_FSIZE, MAX_FILE_BYTES)
    limit(resource.RLIMIT_CORE, 0)
    sys.path.extend(start["paths"])
    try:
        calls = [Call(**item, run=load(**item)) for item in start["rewards"]]
    except UserError as error:
        return send(replies, {"refused": str(error)})
    send(replies, {"required": [required(call.run, call.options) for call in calls]})
    with asyncio.Runner() as runner:  # one for all calls: a client kept between them stays usable
        for line in requests:
            request = json.loads(line)
            send(replies, answer(calls[request["reward"]], request, runner))


@dataclass(frozen=True, kw_only=True, slots=True)
class Call:
    """A reward as the recipe names it, and the function behind it."""

    reference: str
    options: dict
    run: Callable


def answer(call: Call, request: dict, runner: asyncio.Runner) -> dict:
    """Calls the function for one group; whatever it does wrong becomes the text of an error."""
    given, named = ({name: request[name] for name in names if name in request} for names in (GIVEN, NAMED))
    try:
        values = call.run(**accepted(call.run, request["columns"] | call.options | given, named))
        if inspect.isawaitable(values):
            values = runner.run(_wait(values))
        return {"values": checked(values, len(request["completions"]))}
    except (Exception, SystemExit) as error:  # a bad reward is data: counted and reported
        return {"error": where(error, file_of(call.reference))}


def checked(values: object, count: int) -> list[float | None]:
    """The function's values as floats. Raises TypeError or ValueError that names the wrong one."""
    if not isinstance(values, list | tuple):
        raise TypeError(f"the function returned {type(values).__name__}, expected a list of float or None")
    if len(values) != count:
        raise ValueError(f"the function returned {len(values)} values for {count} completions")
    for index, value in enumerate(values):
        if value is not None and not isinstance(value, numbers.Real):
            kind = type(value).__name__
            raise TypeError(f"value {index} is {value!r:.80} ({kind}), expected float, int or None")
        if value is not None and not math.isfinite(value):
            raise ValueError(f"value {index} is {value}, expected a finite number or None")
    return [None if value is None else float(value) for value in values]


def die_with(parent: int) -> None:
    """The kernel kills this process when the sampler ends; orphans of its children come to it."""
    libc = ctypes.CDLL(None, use_errno=True)
    libc.prctl(PR_SET_PDEATHSIG, signal.SIGKILL)
    libc.prctl(PR_SET_CHILD_SUBREAPER, 1)
    if os.getppid() != parent:
        sys.exit("the sampler ended before its reward worker began")
    with contextlib.suppress(OSError), open("/proc/self/oom_score_adj", "w") as file:
        file.write("1000")  # out of memory: the kernel takes this process, not the engine


def limit(what: int, most: int) -> None:
    """At most `most`, or what was set before if that is less."""
    soft, _ = resource.getrlimit(what)
    most = most if soft == resource.RLIM_INFINITY else min(most, soft)
    resource.setrlimit(what, (most, most))


def private_pipes() -> tuple[IO[str], IO[str]]:
    """Moves both pipes to descriptors that no child inherits; 0 becomes empty, 1 the same as 2."""
    requests, replies = (
        os.fdopen(os.dup(0), encoding="ascii"),
        os.fdopen(os.dup(1), "w", encoding="ascii"),
    )
    empty = os.open(os.devnull, os.O_RDONLY)
    os.dup2(empty, 0)
    os.close(empty)
    os.dup2(2, 1)
    return requests, replies


def send(replies: IO[str], message: dict) -> None:
    replies.write(json.dumps(message) + "\n")
    replies.flush()


async def _wait(values: Awaitable) -> object:
    return await values


if __name__ == "__main__":
    main()
