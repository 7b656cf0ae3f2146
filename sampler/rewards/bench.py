"""One reward function on texts that nobody sampled, in the same killable processes as in training.

async with Bench(reward, recipe) as bench:
    values = await bench.values(prompt, {"gold/heading": "#### 4", "empty/nothing": ""})
"""

import itertools
import time
import zlib
from dataclasses import dataclass
from typing import Self

from protocol.recipe import Recipe, Reward
from sampler.prompts import Prompt, read_prompts
from sampler.rewards.pool import RewardFailed, RewardPool

BESIDE = Reward(function="tag_count")
"""A function that applies to every text, so that "not applicable" of the other is a value, no failure."""
BYTES_PER_TOKEN = 4
ENOUGH = 5
"""Texts that failed, after which no more are tried."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Broken:
    """A text for which there is no value, and why."""

    name: str
    text: str
    why: str


class Bench:
    """`seconds`: of each call, with the number of its completions. `broken`: what failed."""

    def __init__(self, reward: Reward, recipe: Recipe) -> None:
        """Raises UserError for a function that cannot be there."""
        memory = int(recipe.sampler.reward_memory_gb * 2**30)
        self._pool = RewardPool([reward, BESIDE], workers=1, memory_bytes=memory)
        self._size, self._max_tokens = max(2, recipe.sampling.group_size), recipe.sampling.max_tokens
        self.seconds: list[tuple[float, int]] = []
        self.broken: list[Broken] = []

    async def __aenter__(self) -> Self:
        """Raises UserError if the import fails."""
        await self._pool.__aenter__()
        return self

    async def __aexit__(self, *error: object) -> None:
        await self._pool.__aexit__(*error)

    @property
    def needs(self) -> list[str]:
        """The columns that the function cannot do without."""
        return self._pool.required[self._pool.keys[0]]

    def check_columns(self, columns: dict) -> None:
        """Raises UserError if the data set lacks one of them."""
        self._pool.check_columns(columns)

    async def values(self, prompt: Prompt, texts: dict[str, str], backwards: bool = False) -> dict[str, float | None]:
        """By name, in groups of the recipe's size; `backwards` only turns the order round.

        A group that fails is tried again text by text, to name the one that did it; a text without a value is left
        out and noted in `broken`.
        """
        names = list(texts)
        groups = [names[start : start + self._size] for start in range(0, len(names), self._size)]
        found: dict[str, float | None] = {}
        for group in [names[::-1] for names in groups[::-1]] if backwards else groups:
            if len(self.broken) >= ENOUGH:
                break
            try:
                found |= await self._call(prompt, {name: texts[name] for name in group})
            except RewardFailed as failure:
                found |= await self._apart(prompt, {name: texts[name] for name in group}, failure)
        return found

    async def alone(self, prompt: Prompt, name: str, text: str) -> float | None:
        """The value of one text. Raises RewardFailed."""
        return (await self._call(prompt, {name: text}))[name]

    async def _apart(self, prompt: Prompt, texts: dict[str, str], failure: RewardFailed) -> dict[str, float | None]:
        found, before = {}, len(self.broken)
        for name, text in texts.items():
            try:
                found[name] = await self.alone(prompt, name, text)
            except RewardFailed as own:
                self.broken.append(Broken(name=name, text=text, why=f"{own.kind}: {own.why}"))
                if own.kind == "timeout":  # the others would take as long
                    break
        if len(self.broken) == before:
            why = f"{failure.kind}: {failure.why}, but each of its {len(texts)} texts alone works"
            self.broken.append(Broken(name="a group", text="\n".join(texts.values()), why=why))
        return found

    async def _call(self, prompt: Prompt, texts: dict[str, str]) -> dict[str, float | None]:
        said = list(texts.values())
        ids = [stand_ins(text, min(self._max_tokens, tokens_of(text))) for text in said]
        began = time.perf_counter()
        try:
            score = await self._pool.score(
                prompt.messages,
                said,
                prompt.columns,
                completion_ids=ids,
                finish_reasons=["length" if len(one) == self._max_tokens else "stop" for one in ids],
                max_tokens=self._max_tokens,
            )
        finally:
            self.seconds.append((time.perf_counter() - began, len(said)))
        values = score.by_function[self._pool.keys[0]]
        return dict(zip(texts, (None if value is None else value + 0.0 for value in values), strict=True))


def stand_ins(text: str, count: int) -> list[int]:
    """`count` token ids for functions that count them or look for repetition: equal for equal bytes. No tokenizer is
    loaded."""
    data = text.encode(errors="replace")
    cuts = [len(data) * part // count for part in range(count + 1)] if count else [0]
    return [zlib.crc32(data[start:stop]) for start, stop in itertools.pairwise(cuts)]


def tokens_of(text: str) -> int:
    """A guess."""
    return -(-len(text.encode(errors="replace")) // BYTES_PER_TOKEN)


def prompts_of(source: str, limit: int, recipe: Recipe) -> list[Prompt]:
    """The first rows (0: all) as training asks them, without token ids. Raises UserError as training would."""
    return read_prompts(source, limit, recipe.data)
