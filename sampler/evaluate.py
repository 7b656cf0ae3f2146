"""Evaluates one model on held-out prompts, by itself: no trainer, no run, no network.

Prompts, sampling, rewards and answers are those of training, by the same code; snapshots pass the same checks.
"""

import asyncio
import logging
import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

from policy.model import load_tokenizer
from protocol.codec import unpack
from protocol.errors import UserError
from protocol.evaluation import Evaluation, refuse_other_prompts
from protocol.messages import Group
from sampler.alone import alone, found
from sampler.answer import Answerer
from sampler.candidate import Candidate
from sampler.engine import Engine
from sampler.prompts import Prompt, fingerprint, load_prompts
from sampler.replica import first_cause

log = logging.getLogger(__name__)

REPORT_S = 5.0
TRIES = 5
"""Of a prompt whose reward fails, as in training."""


@dataclass(slots=True)
class Progress:
    """What came so far. `failed`: by row, why it has no result."""

    total: int
    groups: list[Group] = field(default_factory=list)
    failed: dict[int, str] = field(default_factory=dict)
    tokens: int = 0
    began: float = field(default_factory=time.monotonic)
    seconds: float = 0.0
    """From the first prompt on; loading the engine does not count."""

    def add(self, group: Group) -> None:
        self.groups.append(group)
        self.tokens += sum(len(unpack(completion.tokens)) for completion in group.completions)
        self.seconds = time.monotonic() - self.began

    def line(self, tokens: int) -> str:
        """Example: 120/400 prompts  reward 0.410  812 tokens/s"""
        rewards = [completion.reward for group in self.groups for completion in group.completions]
        mean = f"{sum(rewards) / len(rewards):.3f}" if rewards else "-"
        speed = tokens / max(1e-9, time.monotonic() - self.began)
        return f"{len(self.groups)}/{self.total} prompts  reward {mean}  {speed:.0f} tokens/s"


def run(
    candidate: Candidate, source: str, limit: int, out: Path | None, against: Evaluation | None
) -> tuple[Evaluation, Progress] | None:
    """None when it was stopped. Raises UserError before the engine loads for what the user can mend."""
    if not source:
        raise UserError("no held-out data: name it with --data, or set data.eval in the recipe")
    directory = found(candidate)
    prompts = load_prompts(source, limit, candidate.recipe.data, load_tokenizer(directory))
    if against:
        refuse_other_prompts(against, fingerprint(prompts), source, len(prompts))
    try:
        progress = asyncio.run(answered(candidate, directory, prompts, out))
    except BaseExceptionGroup as group:
        raise first_cause(group) from group
    except asyncio.CancelledError:
        return None
    if not progress.groups:
        raise UserError(f"no prompt has a result: {next(iter(progress.failed.values()))}")
    evaluation = Evaluation.from_groups(
        progress.groups,
        step=candidate.step,
        snapshot=candidate.name,
        data=source,
        fingerprint=fingerprint(prompts),
        recipe=candidate.recipe,
    )
    return evaluation, progress


async def answered(candidate: Candidate, directory: Path, prompts: list[Prompt], out: Path | None) -> Progress:
    """All prompts, as many at a time as keep the engine full."""
    recipe, this = candidate.recipe, asyncio.current_task()
    assert this is not None
    async with alone(candidate, directory, "eval", prompts, out, this.cancel) as it:
        progress, rows = Progress(len(prompts)), iter(range(len(prompts)))
        reporting = asyncio.create_task(report(progress, it.engine))
        try:
            async with asyncio.TaskGroup() as group:
                for _ in range(max(1, 2 * recipe.sampler.max_running // recipe.eval.samples)):
                    group.create_task(work(it.answerer, rows, progress))
        finally:
            reporting.cancel()
        return progress


async def work(answerer: Answerer, rows: Iterator[int], progress: Progress) -> None:
    """One prompt after the other."""
    for row in rows:
        for _ in range(TRIES):
            result = await answerer.answer("eval", row, row)
            if isinstance(result, Group):
                progress.add(result)
                progress.failed.pop(row, None)
                break
            progress.failed[row] = result.why
        else:
            log.error("row %d has no result after %d tries: %s", row, TRIES, progress.failed[row])


async def report(progress: Progress, engine: Engine) -> None:
    before = engine.tokens
    while True:
        await asyncio.sleep(REPORT_S)
        log.info("%s", progress.line(engine.tokens - before))
