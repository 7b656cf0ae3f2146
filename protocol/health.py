"""Whether the worker on this machine or in this container is well: what Docker and Kubernetes ask again and again.

    python -m protocol.health trainer      exit code 0: well, 1: not, and one line that says why
    python -m protocol.health sampler

A trainer is well when its hub answers, a sampler when the record of each of its engines grows. Both do so while they
wait for the other side, so none is ended for that. A worker that still loads has no record yet and is well, too. What
belongs to this container is found in /proc; nothing is written, and no engine is imported.
"""

import argparse
import asyncio
import itertools
import logging
import os
import secrets
import time
from pathlib import Path

from protocol.channel import Uplink
from protocol.cli import exit_with, log_to_console
from protocol.errors import RunError
from protocol.keys import Keys, open_keys
from protocol.messages import Beat
from protocol.rundir import RunDir

log = logging.getLogger(__name__)

RECORDS = {"trainer": "metrics/trainer.jsonl", "sampler": "metrics/sampler-*.jsonl"}
ANSWER_S = 20.0
GROWTH_S = 40.0
"""An engine writes a record every 10 s, whatever it waits for (`sampler.replica.REPORT_S`)."""


class Unwell(RunError):
    """Exit code 1."""


def main() -> int:
    flags = argparse.ArgumentParser("protocol.health", description="Exit code 0: the worker here is well.")
    flags.add_argument("worker", choices=sorted(RECORDS))
    flags.add_argument("--run", type=Path, help="only this run directory, where workers of several runs are at work")
    options = flags.parse_args()
    log_to_console("health")
    records = open_records(options.worker, options.run)
    if not records:
        log.info("%s", still_loads(options.worker, options.run))
    elif options.worker == "trainer":
        log.info("%s", hub_answers(RunDir(next(iter(records.values())).parents[1])))
    else:
        log.info("%s", records_grow(records))
    return 0


def open_records(worker: str, run: Path | None = None) -> dict[Path, Path]:
    """Records that processes here hold open for writing: /proc/PID/fd/N -> the file. run: of this one alone."""
    found = {}
    for descriptor in Path("/proc").glob("[0-9]*/fd/*"):
        try:
            path, writes = descriptor.readlink(), descriptor.lstat().st_mode & 0o200
        except OSError:  # it has just been closed, or is another user's
            continue
        if writes and path.match(RECORDS[worker]) and (not run or path.parents[1] == run.resolve()):
            found[descriptor] = path
    return found


def still_loads(worker: str, run: Path | None) -> str:
    """A worker without a record. Raises Unwell where no process of it is left."""
    for process in Path("/proc").glob("[0-9]*"):
        try:
            words = (process / "cmdline").read_bytes().decode(errors="replace").split("\0")
            directory = (process / "cwd").readlink()
        except OSError:
            continue
        runs = {(directory / word.removeprefix("--run=")).resolve() for word in words} if run else set()
        if ("-m", worker) in itertools.pairwise(words) and (not run or run.resolve() in runs):
            return f"the {worker} loads, or ends"
    raise Unwell(f"no {worker} runs here")


def hub_answers(rundir: RunDir) -> str:
    """A beat of a sampler that nobody knows is answered with Who, and changes nothing. Raises Unwell."""
    endpoint = rundir.read_endpoint()
    if not endpoint or endpoint.steps:
        return "the run is complete"
    if not asyncio.run(answered(open_keys(rundir.keys), endpoint.address)):
        raise Unwell(f"the hub at {endpoint.address} gave no answer for {ANSWER_S:.0f} s")
    return f"the hub at {endpoint.address} answers"


async def answered(keys: Keys, address: str) -> bool:
    question = Beat(session=secrets.token_hex(8), snapshot=None, want=0, held=[], progress=0)
    uplink, deadline = Uplink(keys, address), time.monotonic() + ANSWER_S
    try:
        while time.monotonic() < deadline:
            await uplink.send(question)  # not before a connection stands
            if await uplink.receive(0.5):
                return True
        return False
    finally:
        uplink.close()


def records_grow(records: dict[Path, Path]) -> str:
    """Waits for the next line of each engine. Raises Unwell."""
    sizes, deadline = {one: size(one) for one in records}, time.monotonic() + GROWTH_S
    while sizes and time.monotonic() < deadline:
        time.sleep(0.5)
        sizes = {one: before for one, before in sizes.items() if size(one) == before}
    if sizes:
        names = ", ".join(sorted(records[one].name for one in sizes))
        raise Unwell(f"{len(sizes)} of {len(records)} engines wrote nothing for {GROWTH_S:.0f} s: {names}")
    return f"{len(records)} engines write"


def size(descriptor: Path) -> int | None:
    """Bytes; None when the file is not open any more."""
    try:
        return os.stat(descriptor).st_size
    except OSError:
        return None


if __name__ == "__main__":
    exit_with(main)
