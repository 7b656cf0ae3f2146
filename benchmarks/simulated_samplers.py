"""Runs with simulated engines and a simulated trainer, for `benchmarks.samplers`: what is between them is real."""

import asyncio
import statistics
import tempfile
import time
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path

import numpy as np

from benchmarks.measure import emit
from benchmarks.processes import Children, free_port
from protocol.messages import Span, Split
from protocol.metrics import read_metrics
from protocol.recipe import Recipe
from protocol.resolve import dump, load
from protocol.rundir import RunDir
from sampler import replica
from sampler.engine import Sampled
from tests.chaos.toy import ToyEngine, ToyPolicy
from tests.tiny import make_model
from trainer import rank

TOKENS_PER_S = 512
GROUP, LENGTH = 4, 64
PER_STEP = 8
STEP_S = 1.0
WARM = 4
"""Steps that are not counted: samplers join one after the other."""
SETTINGS = (
    "data.train=word-problems", "data.eval=", "data.limit=400", "data.system=", "model.dtype=float32",
    f"sampling.group_size={GROUP}", f"sampling.max_tokens={LENGTH}", f"trainer.prompts_per_step={PER_STEP}",
    "objective.kl_beta=0.0", "eval.before=false", "eval.after=false", "sampler.reward_workers=1",
    "trainer.threads=1", "trainer.backend=gloo", "trainer.checkpoint_every=1000", "trainer.keep_stream=false",
)  # fmt: skip


class PacedEngine(ToyEngine):
    """Samples TOKENS_PER_S in all, however many requests it has."""

    _free_at = 0.0

    async def generate(self, prompt: np.ndarray, split: Split) -> list[Sampled]:
        self.running += 1
        begins = max(time.monotonic(), self._free_at)
        self._free_at = begins + GROUP * LENGTH / TOKENS_PER_S
        await asyncio.sleep(self._free_at - time.monotonic())
        self.running -= 1
        await self.weights.checked()
        self.tokens += GROUP * LENGTH
        return [self._one() for _ in range(GROUP)]

    def _one(self) -> Sampled:
        tokens = np.array([self._dice.randrange(97, 123) for _ in range(LENGTH)], np.int64)
        spans = [Span(self._applied, 0, LENGTH)]
        logprobs = np.full(LENGTH, -3.0, np.float32)
        return Sampled(
            tokens=tokens, logprobs=logprobs, text=bytes(tokens.tolist()).decode(), finish="length", spans=spans
        )


class PacedPolicy(ToyPolicy):
    """Takes STEP_S a step."""

    def update(self) -> bool:
        time.sleep(STEP_S)
        return super().update()


def simulated(samplers: int, model: Path, measured: int) -> dict[str, object]:
    """One run. Rates are those of the last `measured` steps."""
    reward = Path(__file__).parents[1] / "tests" / "rewards_for_tests.py"
    steps = f"trainer.steps={WARM + measured}"
    recipe = load(None, [*SETTINGS, steps, f"model.path={model}", f"reward=[{{function='{reward}:vowels'}}]"])
    place = {"RANK": 0, "LOCAL_RANK": 0, "WORLD_SIZE": 1, "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": free_port()}
    with tempfile.TemporaryDirectory(prefix="samplers-") as name, Children(Path(name) / "log") as children:
        rundir = RunDir(Path(name))
        rundir.make()
        rundir.recipe.write_text(dump(recipe))
        children.start(lambda: rank.run(rundir, recipe, PacedPolicy), **place)
        for index in range(samplers):
            children.start(lambda i=index: replica.run(rundir, recipe, i, PacedEngine))
        children.wait()
        return figures(read_metrics(rundir.metrics / "trainer.jsonl"), recipe, samplers)


def figures(records: Iterable[Mapping], recipe: Recipe, samplers: int) -> dict[str, object]:
    """records: the trainer's metrics."""
    steps = [record for record in records if record["kind"] == "step"]
    if len(steps) != recipe.trainer.steps:
        raise SystemExit(f"only {len(steps)} steps: the run was stopped")
    counted = steps[WARM:]
    per_s = PER_STEP / statistics.mean(record["step_time"] for record in counted)
    tokens = GROUP * LENGTH
    by_engines, by_trainer = samplers * TOKENS_PER_S / tokens, PER_STEP / STEP_S
    return {
        "samplers": samplers,
        "groups/s": round(per_s, 2),
        "bound": round(min(by_engines, by_trainer), 2),
        "of bound": round(per_s / min(by_engines, by_trainer), 3),
        "limit": "samplers" if by_engines < by_trainer else "trainer",
        "waited": round(statistics.mean(record["time/wait_s"] / record["step_time"] for record in counted), 2),
        "staleness": round(statistics.mean(record["staleness/mean"] for record in counted), 2),
        "joined": int(counted[-1]["samplers"]),
    }


def compared(counts: Sequence[int], steps: int) -> list[dict[str, object]]:
    """counts: of samplers, a run each; steps: that are counted."""
    with tempfile.TemporaryDirectory(prefix="samplers-") as name:
        model = make_model(Path(name) / "model")
        return [simulated(count, model, steps) for count in counts]


def measure(counts: Sequence[int], steps: int) -> None:
    """Prints the table and its JSON line."""
    emit(
        "samplers",
        compared(counts, steps),
        tokens_per_s=TOKENS_PER_S,
        group_tokens=GROUP * LENGTH,
        per_step=PER_STEP,
        step_s=STEP_S,
    )


if __name__ == "__main__":
    raise SystemExit("a part of another benchmark: python -m benchmarks.samplers")
