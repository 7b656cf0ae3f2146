"""The sampler of `benchmarks.weights`: the real one, which notes when each part of a switch was done."""

import asyncio
import sys
import time
from pathlib import Path

from benchmarks.weights_notes import NOTES
from protocol.messages import Pulse
from protocol.metrics import MetricsWriter
from protocol.resolve import load
from protocol.rundir import RunDir
from protocol.snapshot import Sealed
from sampler import replica
from sampler.engine import Engine
from sampler.weights import Apply, Weights


class TimedWeights(Weights):
    """Notes when a notice came, and when its weights had passed their check."""

    timed: "TimedEngine"

    async def load(self, pulse: Pulse) -> None:
        begun = time.monotonic()
        await super().load(pulse)
        checked = time.monotonic()
        if self.timed.times.get("snapshot") == pulse.snapshot:
            while self.timed.tokens and "first" not in self.timed.times:  # before the first weights nothing is sampled
                await asyncio.sleep(0.001)
            self.timed.note(announced=begun, checked=checked)


class TimedEngine(Engine):
    def __init__(self, recipe, directory: Path, snapshots: Path, *, gpu: bool, seed: int) -> None:
        self.times: dict = {}
        self._sampled_at: list[float] = []
        super().__init__(recipe, directory, snapshots, gpu=gpu, seed=seed)
        self.weights = TimedWeights(self, snapshots, recipe.model.dtype)
        self.weights.timed = self
        self._notes = MetricsWriter(snapshots.parent / NOTES)

    @property
    def tokens(self) -> int:
        return self._tokens

    @tokens.setter
    def tokens(self, count: int) -> None:
        """Called whenever an engine step's tokens are here."""
        if self.times and "first" not in self.times and "resumed" in self.times:
            self.times["first"] = time.monotonic()
        self._tokens = count
        self._sampled_at = [*self._sampled_at[-2000:], time.monotonic()]

    async def read(self, sealed: Sealed, sha256: str) -> Apply:
        self.times = {"snapshot": sealed.manifest.id}
        apply = await super().read(sealed, sha256)
        self.times["read"] = time.monotonic()

        async def timed_apply() -> None:
            self.times["paused"] = time.monotonic()
            await apply()
            self.times["loaded"] = self.times["resumed"] = time.monotonic()

        return timed_apply

    def note(self, announced: float, checked: float) -> None:
        self._notes.write(self.times | {"announced": announced, "checked": checked, "sampled_at": self._sampled_at})
        self.times = {}


def main() -> None:
    rundir = RunDir(Path(sys.argv[1]))
    sys.exit(replica.run(rundir, load(rundir.recipe, []), 0, TimedEngine))


if __name__ == "__main__":
    if len(sys.argv) != 2:
        raise SystemExit("a part of another benchmark: python -m benchmarks.weights")
    main()
