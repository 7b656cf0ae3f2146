"""The trainer of `benchmarks.weights`: publishes weights that changed a little, throws groups away, adds up times."""

import argparse
import contextlib
import functools
import os
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path

from benchmarks.child import tidy_when_stopped
from benchmarks.measure import emit
from benchmarks.rank_zero import rank_zero
from benchmarks.untrained import CHANGE, Untrained
from benchmarks.weights_notes import COLUMNS, NOTES, parts, summary
from protocol.messages import Pulse
from protocol.metrics import read_metrics
from protocol.process import end, start
from protocol.recipe import Recipe
from protocol.resolve import dump, load
from protocol.rundir import RunDir
from protocol.snapshot import remove
from sampler.supervisor import environments
from trainer import publish, shards
from trainer.inbox import Inbox
from trainer.publish import Publisher
from trainer.shards import Entry

SETTINGS = [
    "data.eval=", "eval.before=false", "eval.after=false", "objective.kl_beta=0.0", "trainer.steps=100000",
    "trainer.prompts_per_step=1", "trainer.max_staleness=100000", "network.beat_s=0.5", "network.lease_s=3600",
]  # fmt: skip
SETTLE_S = 3.0
"""Between two switches the engine decodes undisturbed."""


def measure(options: argparse.Namespace) -> None:
    """Prints the table and its JSON line."""
    tidy_when_stopped()
    rows = [row for variant in options.variants for row in measured(variant, options)]
    emit("weights", rows, publishes=options.publishes, change=CHANGE)


def measured(variant: str, options: argparse.Namespace) -> list[dict[str, object]]:
    """Median and largest of one variant; p95 only of so many switches that it is not the largest."""
    rank = f"lora.rank={options.rank if variant == 'adapter' else 0}"
    recipe = load(options.recipe, [*options.overrides, *SETTINGS, rank])
    limit_shards(int(options.shard_mb * 1e6) if variant == "sharded" else shards.SHARD_BYTES)
    with tempfile.TemporaryDirectory(prefix="weights-") as name:
        rundir = RunDir(Path(name))
        rundir.make()
        rundir.recipe.write_text(dump(recipe))
        switches = run(rundir, recipe, options.publishes)
    return summary(switches, {"variant": variant, "MB": round(switches[0]["bytes"] / 1e6)})


def limit_shards(limit: int) -> None:
    """The publisher's own limit is for models of many gigabytes."""

    def limited(directory: Path, entries: Sequence[Entry], tensors) -> dict:
        return shards.write_shards(directory, entries, tensors, limit)

    publish.write_shards = limited


def run(rundir: RunDir, recipe: Recipe, publishes: int) -> list[dict]:
    """One sampler, and as many switches of its weights after a first one that does not count."""
    environment = environments(recipe, 1)[0]  # within rank_zero there are no GPUs
    with rank_zero(rundir, recipe) as trainer:
        policy, publisher = Untrained(recipe, trainer.directory), trainer.publisher
        policy.change()
        steps = Steps(trainer.inbox, trainer.stop, publisher.publish(policy, True))
        steps.begin()
        rundir.write_endpoint(trainer.endpoint)
        with sampler(rundir, environment) as process:
            try:
                wait(process, lambda: len(notes(rundir)) > 0, 300.0)
                work = functools.partial(switch, rundir, policy, publisher, steps, process)
                return list(counted(publishes, work, rundir))
            finally:
                steps.end()


def counted(count: int, work: Callable[[], dict], rundir: RunDir) -> Iterator[dict]:
    """One switch that does not count, then `count`, each with the floor of the same minute; said as they are done."""
    work()
    for number in range(1, count + 1):
        found = work()
        found |= floor(found, rundir)
        said = ", ".join(f"{name} {found[name]:.2f}" for name in COLUMNS)
        print(f"{number}/{count}: {said}", file=sys.stderr, flush=True)
        yield found


class Steps:
    """Takes groups and throws them away, so that leases never end; announces weights."""

    def __init__(self, inbox: Inbox, stop: threading.Event, pulse: Pulse) -> None:
        self._inbox, self._stop = inbox, stop
        self._announced = pulse, 1
        self._lock = threading.Lock()
        """Around reading what is announced and committing it: no old notice may follow a new one."""
        inbox.commit(*self._announced)
        self._thread = threading.Thread(target=self._take, daemon=True)

    def begin(self) -> None:
        self._inbox.serve()
        self._thread.start()

    def announce(self, pulse: Pulse, step: int) -> None:
        with self._lock:
            self._announced = pulse, step
            self._inbox.commit(pulse, step)

    def _take(self) -> None:
        while self._inbox.take(1) is not None:
            with self._lock:
                self._inbox.commit(*self._announced)

    def end(self) -> None:
        self._stop.set()
        self._thread.join(30)


@contextlib.contextmanager
def sampler(rundir: RunDir, environment: Mapping[str, str]):
    command = [sys.executable, "-m", "benchmarks.weights_sampler", str(rundir.path)]
    with (Path(tempfile.gettempdir()) / "benchmark-weights.log").open("wb") as log:
        process = start(command, log=log, environment=environment)
    try:
        yield process
    finally:
        end(process, 20.0)


def switch(rundir: RunDir, policy: Untrained, publisher: Publisher, steps: Steps, process) -> dict:
    """Changes and publishes once; waits until the sampler uses it. -> seconds by part."""
    time.sleep(SETTLE_S)
    policy.change()
    before, done = len(notes(rundir)), time.monotonic()
    pulse = publisher.publish(policy, True)
    published = time.monotonic()
    steps.announce(pulse, policy.steps_done)
    wait(process, lambda: len(notes(rundir)) > before, 120.0)
    note = notes(rundir)[-1]
    size = sum(path.stat().st_size for path in (rundir.snapshots / pulse.snapshot).iterdir())
    return {"bytes": size, "path": rundir.snapshots / pulse.snapshot} | parts(done, published, policy.times, note)


def floor(switch: dict, rundir: RunDir) -> dict[str, float]:
    """What the operating system takes for the same bytes at once; the snapshot is removed."""
    data = bytes(sum(path.stat().st_size for path in switch["path"].iterdir()))
    remove(switch["path"])
    begun = time.monotonic()
    with (rundir.path / "plain").open("wb") as file:
        file.write(data)
        file.flush()
        os.fsync(file.fileno())
    bytearray((rundir.path / "plain").read_bytes())
    seconds = time.monotonic() - begun + switch["load"]
    return {"floor": seconds, "of floor": switch["switch"] / seconds}


def notes(rundir: RunDir) -> list[dict]:
    path = rundir.path / NOTES
    return list(read_metrics(path)) if path.exists() else []


def wait(process, ready, seconds: float) -> None:
    deadline = time.monotonic() + seconds
    while not ready():
        if process.poll() is not None or time.monotonic() > deadline:
            raise SystemExit("the sampler ended or did not switch: see benchmark-weights.log among temporary files")
        time.sleep(0.05)


if __name__ == "__main__":
    raise SystemExit("a part of another benchmark: python -m benchmarks.weights")
