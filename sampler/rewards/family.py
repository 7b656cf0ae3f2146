"""All the processes that came out of a reward worker: how many they are, and their end.

The worker is their subreaper: who loses its parent becomes its child, so below it nobody gets lost
as long as it lives. Linux alone (/proc/PID/task/TID/children).
"""

import asyncio
import contextlib
import itertools
import os
import signal
from collections.abc import Callable, Collection, Iterator
from glob import iglob
from pathlib import Path


def crowded(worker: int, limit: int) -> bool:
    """Whether more than `limit` processes are below the worker, also ended ones that nobody waited for.

    Counted from outside, for RLIMIT_NPROC is no limit here: root is exempt from it, and for others it
    counts all threads of the user, in every container, so that an engine which starts its own threads
    after the worker would make sound functions fail.
    """
    return next(itertools.islice(below(worker), limit, None), None) is not None


async def end_descendants(worker: int) -> None:
    """Kills all below the worker and leaves it stopped. May go on for ever: set a time limit.

    Stopped, it starts nobody and buries nobody: an ended child of it stays one, under that number. The
    stop of its whole group spares a race with forks in there; others are looked for until they end.
    """
    with contextlib.suppress(ProcessLookupError):
        os.killpg(worker, signal.SIGSTOP)
    await _end(lambda ended: below(worker, ended))


async def end_strays(home: str) -> None:
    """Kills those who outlived a worker that ended by itself: by the HOME that they got from it."""
    await _end(lambda ended: _at_home(home))


def below(worker: int, without: Collection[int] = ()) -> Iterator[int]:
    """All processes below the worker, also in other sessions; `without` leaves out ended ones."""
    ahead = [worker]
    while ahead:
        for children in iglob(f"/proc/{ahead.pop()}/task/*/children"):
            with contextlib.suppress(OSError):
                found = [int(pid) for pid in Path(children).read_text().split()]
                found = [pid for pid in found if pid not in without]
                yield from found
                ahead += found


async def _end(find: Callable[[Collection[int]], Iterator[int]]) -> None:
    """Kills whom `find` finds until it finds nobody but those who had ended before it looked.

    Who forks and exits all the time is another process at every look: no pause between two looks.
    """
    ended: set[int] = set()
    while living := list(find(ended)):
        for pid in living:
            with contextlib.suppress(ProcessLookupError, PermissionError):  # has ended; runs as root
                os.kill(pid, signal.SIGKILL)
        ended |= {pid for pid in living if _has_ended(pid)}
        await asyncio.sleep(0)


def _has_ended(pid: int) -> bool:
    """A zombie, or none at all. The name in "pid (name) state ..." may hold spaces and parentheses."""
    try:
        return Path(f"/proc/{pid}/stat").read_text(errors="replace").rpartition(")")[2].split()[0] in "ZX"
    except OSError:
        return True


def _at_home(home: str) -> Iterator[int]:
    mark = f"HOME={home}".encode()
    for path in iglob("/proc/[0-9]*/environ"):
        with contextlib.suppress(OSError):  # it has ended, or is another user's
            if mark in Path(path).read_bytes().split(b"\0"):
                yield int(path.split("/")[2])
