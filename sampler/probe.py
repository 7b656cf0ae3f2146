"""The sampler alone for a short time, on training prompts in the order of the run: what will come of a recipe?

Prompts, sampling and rewards are those of training, by the same code.
"""

import asyncio
import json
import time
from collections import defaultdict
from pathlib import Path
from typing import Any

import numpy as np
import torch

from policy.model import load_tokenizer
from sampler.alone import Alone, alone, found
from sampler.answer import Answerer
from sampler.candidate import Candidate
from sampler.probe_feed import Feed, order
from sampler.probed import Calls, Probed
from sampler.prompts import Prompt, load_prompts
from sampler.replica import first_cause
from sampler.rewards.pool import RewardPool
from sampler.sampling import closing_token, end_tokens

OVERTIME = 2
"""Begun prompts have so many times the asked seconds to end, counted from the start."""


class TimedPool(RewardPool):
    """Also keeps how long each call of a function took; waiting for a free process does not count."""

    def __init__(self, *arguments) -> None:
        super().__init__(*arguments)
        self.seconds: defaultdict[str, list[float]] = defaultdict(list)

    async def _call(self, process, key: str, request: dict) -> list[float | None]:
        began = time.monotonic()
        try:
            return await super()._call(process, key, request)
        finally:
            self.seconds[key].append(round(time.monotonic() - began, 6))


def run(candidate: Candidate, seconds: float, out: Path) -> Probed:
    """Writes every completion beside `out` as it comes. Raises UserError before the engine loads for what the user
    can mend."""
    recipe, directory = candidate.recipe, found(candidate)
    tokenizer = load_tokenizer(directory)
    prompts = load_prompts(recipe.data.train, recipe.data.limit, recipe.data, tokenizer)
    ends, closing = end_tokens(recipe, directory, tokenizer), closing_token(tokenizer)
    try:
        measured = asyncio.run(measure(candidate, directory, prompts, seconds, out))
    except BaseExceptionGroup as group:
        raise first_cause(group) from group
    rows = order(recipe.seed, len(prompts))
    middle, long, longest = np.percentile([len(prompt.ids) for prompt in prompts], (50, 95, 100))
    return Probed(
        model=candidate.name,
        device=torch.cuda.get_device_name() if torch.cuda.is_available() else "CPU",
        data=recipe.data.train,
        rows=len(prompts),
        context=json.loads((directory / "config.json").read_text()).get("max_position_embeddings"),
        prompt=str(tokenizer.decode(prompts[rows[0]].ids.tolist())),
        prompt_lengths=(int(middle), int(long), int(longest)),
        ends={token: str(tokenizer.decode([token])) for token in ends},
        closing=None if closing is None or closing in ends else str(tokenizer.decode([closing])),
        **measured,
    )


async def measure(
    candidate: Candidate, directory: Path, prompts: list[Prompt], seconds: float, out: Path
) -> dict[str, Any]:
    """As many prompts at a time as in training. -> the measured fields of `Probed`."""
    recipe, stopped = candidate.recipe, asyncio.Event()
    async with alone(candidate, directory, "train", prompts, out, stopped.set, TimedPool) as it:
        feed = Feed(order(recipe.seed, len(prompts)), seconds, it.engine)
        abreast = max(1, 2 * recipe.sampler.max_running // recipe.sampling.group_size)
        working = asyncio.gather(*(work(it.answerer, feed) for _ in range(abreast)))
        stopping = asyncio.create_task(stopped.wait())
        await asyncio.wait({working, stopping}, timeout=OVERTIME * seconds, return_when=asyncio.FIRST_COMPLETED)
        result = figures(it, feed, stopped.is_set())
        stopping.cancel()
        if working.done():
            working.result()  # raises what ended the engine
        else:
            working.cancel()
            await asyncio.wait({working})
        return result


async def work(answerer: Answerer, feed: Feed) -> None:
    """One prompt after the other. A reward that fails is counted and not tried again: that is what a probe is for."""
    for group_id, row in feed:
        feed.add(row, await answerer.answer("train", group_id, row))


def figures(it: Alone, feed: Feed, stopped: bool) -> dict[str, Any]:
    counts = it.rewards.counters()
    assert isinstance(it.rewards, TimedPool)
    kinds = ("values", "not_applicable", "errors", "timeouts")
    return {
        "begun": feed.begun,
        "answered": feed.answered,
        "failed": feed.failed,
        "seconds": time.monotonic() - feed.began,
        "tokens_per_s": feed.speed(it.engine.tokens),
        "rewards": {
            key: Calls(seconds=it.rewards.seconds[key], **{kind: counts[f"{key}/{kind}"] for kind in kinds})
            for key in it.rewards.keys
        },
        "stopped": stopped,
    }
