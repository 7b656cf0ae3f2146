"""One against two real samplers: vLLM with the demo's model, and a consumer for a trainer.

Each has a GPU of its own; without GPUs (or with CUDA_VISIBLE_DEVICES=) one thread. Both run from the beginning; in
every other window the second one is stopped (SIGSTOP), so that a machine that slows down slows both alike. Nothing is
trained: one snapshot of the model itself, and steps that throw their groups away.
"""

import contextlib
import signal
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path

from benchmarks.measure import interleaved, spread
from benchmarks.processes import last_words
from benchmarks.rank_zero import rank_zero
from benchmarks.untrained import Untrained
from protocol.process import end, signal_group, start
from protocol.recipe import Recipe
from protocol.resolve import dump, load
from protocol.rundir import RunDir
from sampler.supervisor import REPLICA, environments
from trainer.inbox import Inbox

WINDOW_S, SETTLE_S, ROUNDS = 20.0, 4.0, 3
SETTINGS = [
    "data.limit=2000", "data.eval=", "eval.before=false", "eval.after=false", "sampler.threads=1",
    "trainer.steps=100000", "trainer.prompts_per_step=4", "trainer.max_staleness=100000",
    "network.beat_s=0.5", "network.dead_s=600", "network.lease_s=3600",
]  # fmt: skip


@contextlib.contextmanager
def samplers(rundir: RunDir, places: Sequence[Mapping[str, str]]) -> Iterator[list[subprocess.Popen]]:
    """places: the environment of each."""
    command = [sys.executable, "-m", "sampler", "--run", str(rundir.path)]
    found = []
    try:
        for index, place in enumerate(places):
            environment = {**place, REPLICA: "0"}  # no supervisor: a signal to the process stops all of it
            with log_of(rundir, index).open("wb") as log:
                found.append(start(command, log=log, environment=environment))
        yield found
    finally:
        for process in found:
            signal_group(process, signal.SIGCONT)
            end(process, 20.0)


def log_of(rundir: RunDir, index: int) -> Path:
    return rundir.logs / f"sampler-{index}.log"


def measure() -> list[dict[str, object]]:
    """Tokens a second with one and with two."""
    recipe = load(Path("recipes/demo.toml"), SETTINGS)
    with tempfile.TemporaryDirectory(prefix="real-samplers-") as name:
        rundir = RunDir(Path(name))
        rundir.make()
        rundir.recipe.write_text(dump(recipe))
        rates = measured(rundir, recipe)
    one = spread(rates["1"])["median"]
    return [
        {"samplers": int(name), **{key: round(value) for key, value in spread(values).items()},
         "of one": round(spread(values)["median"] / one, 2)}
        for name, values in rates.items()
    ]  # fmt: skip


def measured(rundir: RunDir, recipe: Recipe) -> dict[str, list[float]]:
    """-> tokens a second in each window, by the number of samplers"""
    places = environments(recipe, 2)  # before `rank_zero` hides the GPUs from this process
    with rank_zero(rundir, recipe) as trainer:
        inbox, stop = trainer.inbox, trainer.stop
        pulse = trainer.publisher.publish(Untrained(recipe, trainer.directory), True)
        inbox.serve()
        inbox.commit(pulse, 0)
        rundir.write_endpoint(trainer.endpoint)
        with samplers(rundir, places) as pair:
            consumer = threading.Thread(target=consume, args=(inbox, recipe, pulse), daemon=True)
            consumer.start()
            try:
                return windows(inbox, pair, rundir)
            finally:
                stop.set()
                consumer.join(30)


def consume(inbox: Inbox, recipe: Recipe, pulse) -> None:
    step = 0
    while inbox.take(recipe.trainer.prompts_per_step) is not None:
        step += 1
        inbox.commit(pulse, step)


def windows(inbox: Inbox, pair: Sequence[subprocess.Popen], rundir: RunDir) -> dict[str, list[float]]:
    """Tokens a second of both together, A-B-A-B."""
    while inbox.counts()["samplers"] < 2 or inbox.counts()["sampler/tokens"] < 2000:
        expect_both(pair, rundir)
        time.sleep(1)

    def rate(second: int) -> float:
        signal_group(pair[1], second)
        time.sleep(SETTLE_S)
        before, begun = inbox.counts()["sampler/tokens"], time.monotonic()
        time.sleep(WINDOW_S)
        expect_both(pair, rundir)
        return (inbox.counts()["sampler/tokens"] - before) / (time.monotonic() - begun)

    return interleaved({"1": lambda: rate(signal.SIGSTOP), "2": lambda: rate(signal.SIGCONT)}, ROUNDS)


def expect_both(pair: Sequence[subprocess.Popen], rundir: RunDir) -> None:
    for index, process in enumerate(pair):
        if process.poll() is not None:
            raise SystemExit(f"a sampler ended; its last words:\n{last_words(log_of(rundir, index))}")


if __name__ == "__main__":
    raise SystemExit("a part of another benchmark: python -m benchmarks.samplers --real")
