"""One against two real samplers on the CPU: vLLM with the demo's model, each one thread, and a consumer for a trainer.

Both run from the beginning; in every other window the second one is stopped (SIGSTOP), so that a machine that slows
down slows both alike. Nothing is trained: one snapshot of the model itself, and steps that throw their groups away.
"""

import contextlib
import signal
import sys
import tempfile
import threading
import time
from pathlib import Path

from benchmarks.measure import interleaved, spread
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
def samplers(rundir: RunDir, recipe: Recipe, count: int):
    command = [sys.executable, "-m", "sampler", "--run", str(rundir.path)]
    environment = environments(recipe, 2)[0] | {REPLICA: "0"}  # no supervisor: a signal to the process stops all of it
    found = []
    try:
        for index in range(count):
            with (rundir.logs / f"sampler-{index}.log").open("wb") as log:
                found.append(start(command, log=log, environment=environment))
        yield found
    finally:
        for process in found:
            signal_group(process, signal.SIGCONT)
            end(process, 20.0)


def measure() -> list[dict[str, object]]:
    """Tokens a second with one and with two."""
    rundir = RunDir(Path(tempfile.mkdtemp(prefix="real-samplers-")))
    recipe = load(Path("recipes/demo.toml"), SETTINGS)
    rundir.make()
    rundir.recipe.write_text(dump(recipe))
    with rank_zero(rundir, recipe) as trainer:
        inbox, stop = trainer.inbox, trainer.stop
        pulse = trainer.publisher.publish(Untrained(recipe, trainer.directory), True)
        inbox.serve()
        inbox.commit(pulse, 0)
        rundir.write_endpoint(trainer.endpoint)
        with samplers(rundir, recipe, 2) as pair:
            consumer = threading.Thread(target=consume, args=(inbox, recipe, pulse), daemon=True)
            consumer.start()
            try:
                rates = windows(inbox, pair, rundir)
            finally:
                stop.set()
                consumer.join(30)
    one = spread(rates["1"])["median"]
    return [
        {"samplers": int(name), **{key: round(value) for key, value in spread(values).items()},
         "of one": round(spread(values)["median"] / one, 2)}
        for name, values in rates.items()
    ]  # fmt: skip


def consume(inbox: Inbox, recipe: Recipe, pulse) -> None:
    step = 0
    while inbox.take(recipe.trainer.prompts_per_step) is not None:
        step += 1
        inbox.commit(pulse, step)


def windows(inbox: Inbox, pair: list, rundir: RunDir) -> dict[str, list[float]]:
    """Tokens a second of both together, A-B-A-B."""
    while inbox.counts()["samplers"] < 2 or inbox.counts()["sampler/tokens"] < 2000:
        if any(process.poll() is not None for process in pair):
            raise SystemExit(f"a sampler ended: see {rundir.logs}")
        time.sleep(1)

    def rate(second: int) -> float:
        signal_group(pair[1], second)
        time.sleep(SETTLE_S)
        before, begun = inbox.counts()["sampler/tokens"], time.monotonic()
        time.sleep(WINDOW_S)
        return (inbox.counts()["sampler/tokens"] - before) / (time.monotonic() - begun)

    return interleaved({"1": lambda: rate(signal.SIGSTOP), "2": lambda: rate(signal.SIGCONT)}, ROUNDS)


if __name__ == "__main__":
    raise SystemExit("a part of another benchmark: python -m benchmarks.samplers --real")
