"""The reward of one group: every function of the recipe, under its own deadline, in a process
that can be killed.

    async with RewardPool(recipe.reward, workers=2) as pool:
        score = await pool.score(prompt.messages, ["<answer>4</answer>", ...], prompt.columns)

A function gives each completion a value or "not applicable" (None), or the group has no reward at
all and `RewardFailed` says why. Nothing turns a failure into 0: that would teach the model what
breaks the grader.
"""

import asyncio
import contextlib
import itertools
import math
from collections.abc import AsyncIterator
from dataclasses import dataclass

from protocol.errors import UserError
from protocol.recipe import Reward
from sampler.rewards.loader import find, name_of
from sampler.rewards.process import RewardProcess

MEMORY_BYTES = 8 << 30
"""Private memory of one worker; more is a MemoryError in the function, not an end of the engine."""
KINDS = ("values", "not_applicable", "errors", "timeouts")


@dataclass(frozen=True, kw_only=True, slots=True)
class Score:
    """`Score(rewards=[2.25, -2.0], by_function={"gsm8k": [1.0, -1.0], "format": [1.25, -1.0]})`."""

    rewards: list[float]  # [group] weighted sums over the functions that apply
    by_function: dict[str, list[float | None]]  # key -> [group]; None: not applicable


class RewardFailed(Exception):
    """A group without a reward. `kind` is `error`, `timeout` or `not_applicable`."""

    def __init__(self, function: str, kind: str, why: str) -> None:
        super().__init__(f"reward {function}: {kind}: {why}")
        self.function, self.kind, self.why = function, kind, why


class RewardPool:
    """Scores `workers` groups at a time; one that did not answer is killed, replaced on demand."""

    def __init__(self, rewards: list[Reward], workers: int, memory_bytes: int = MEMORY_BYTES) -> None:
        """Raises UserError for a function that cannot be there (nothing is imported here)."""
        self.keys = distinct([name_of(reward.function) for reward in rewards])
        self._rewards = dict(zip(self.keys, rewards, strict=True))
        self._workers, self._memory_bytes = workers, memory_bytes
        self._sources = [{"reference": find(reward.function), "options": reward.options} for reward in rewards]
        self._counts = {f"{key}/{kind}": 0 for key in self.keys for kind in KINDS}
        self._running: set[RewardProcess] = set()
        for key, reward in self._rewards.items():
            if not math.isfinite(reward.weight):
                raise UserError(f"reward {key}: weight = {reward.weight}, expected a finite number")

    async def __aenter__(self) -> "RewardPool":
        """Imports the functions in one worker; the others start on demand.

        Raises UserError if the import fails.
        """
        self._idle: asyncio.LifoQueue[RewardProcess | None] = asyncio.LifoQueue()
        for _ in range(self._workers - 1):
            self._idle.put_nowait(None)
        first = await self._start()
        self.required = dict(zip(self.keys, first.required, strict=True))
        self._idle.put_nowait(first)
        return self

    async def __aexit__(self, *error: object) -> None:
        await asyncio.gather(*(self._kill(process) for process in list(self._running)))

    def check_columns(self, columns: dict) -> None:
        """Raises UserError if a function needs a column that the data set lacks."""
        for key, needed in self.required.items():
            if missing := [name for name in needed if name not in columns]:
                raise UserError(
                    f"reward {key} needs the column {missing[0]!r}, or an option of that name; "
                    f"the data set has: {', '.join(columns)}"
                )

    async def score(
        self, prompt: list[dict[str, str]] | str, completions: list[str], columns: dict, **sampled: object
    ) -> Score:
        """Scores the completions of one prompt, whose row is `columns`; waits for a free worker.

        sampled: `completion_ids` (token ids of each completion) and `max_tokens`, for functions that want them.
        Raises RewardFailed, which costs this group alone, and UserError if a worker that starts
        only now cannot import.
        """
        request = batch(prompt, completions, columns) | sampled
        async with self._borrowed() as process:
            by_function = {key: await self._call(process, key, request) for key in self.keys}
        return Score(rewards=self._sum(by_function), by_function=by_function)

    def counters(self) -> dict[str, int]:
        """`{"gsm8k/values": 64, "gsm8k/not_applicable": 0, "gsm8k/errors": 1, ...}`.

        `values` and `not_applicable` count completions, `errors` and `timeouts` groups.
        """
        return dict(self._counts)

    @contextlib.asynccontextmanager
    async def _borrowed(self) -> AsyncIterator[RewardProcess]:
        process = await self._idle.get()
        try:
            process = process or await self._start()
            yield process
        finally:  # also when this call was cancelled: what still computes can serve nobody
            useless = process if process and process.busy else None
            self._idle.put_nowait(None if useless else process)
            if useless:
                await self._kill(useless)

    async def _call(self, process: RewardProcess, key: str, request: dict) -> list[float | None]:
        timeout_s = self._rewards[key].timeout_s
        try:
            reply = await process.ask({"reward": self.keys.index(key), **request}, timeout_s)
        except TimeoutError:
            raise self._failed(key, "timeout", f"no values within {timeout_s:g} s") from None
        except ConnectionError as error:
            raise self._failed(key, "error", str(error)) from None
        if reply.error is not None:
            raise self._failed(key, "error", reply.error)
        if len(reply.values) != len(request["completions"]):
            raise self._failed(key, "error", "the worker's reply has the wrong length")
        applies = sum(value is not None for value in reply.values)
        self._counts[f"{key}/values"] += applies
        self._counts[f"{key}/not_applicable"] += len(reply.values) - applies
        return reply.values

    def _failed(self, key: str, kind: str, why: str) -> RewardFailed:
        self._counts[f"{key}/{kind}s"] += 1
        return RewardFailed(key, kind, why)

    def _sum(self, by_function: dict[str, list[float | None]]) -> list[float]:
        weights = [reward.weight for reward in self._rewards.values()]
        rewards = []
        for index, values in enumerate(zip(*by_function.values(), strict=True)):
            pairs = zip(weights, values, strict=True)
            terms = [weight * value for weight, value in pairs if value is not None]
            if not terms:
                why = f"no function applies to completion {index}"
                raise RewardFailed(" + ".join(self.keys), "not_applicable", why)
            rewards.append(sum(terms))
        return rewards

    async def _start(self) -> RewardProcess:
        process = RewardProcess()
        self._running.add(process)
        try:
            await process.start(self._sources, self._memory_bytes)
        except BaseException:
            await self._kill(process)
            raise
        return process

    async def _kill(self, process: RewardProcess) -> None:
        self._running.discard(process)
        await process.kill()


def batch(prompt: list[dict[str, str]] | str, completions: list[str], columns: dict) -> dict:
    """The group as TRL's functions take it: lists of equal length, messages behind messages."""
    said = [text if isinstance(prompt, str) else [{"role": "assistant", "content": text}] for text in completions]
    count = len(completions)
    repeated = {name: [value] * count for name, value in columns.items()}
    return {"prompts": [prompt] * count, "completions": said, "columns": repeated}


def distinct(names: list[str]) -> list[str]:
    """`["f", "g", "f"]` -> `["f", "g", "f_2"]`: one key per function in metrics and errors."""
    keys: list[str] = []
    for name in names:
        others = (name if n == 1 else f"{name}_{n}" for n in itertools.count(1))
        keys.append(next(key for key in others if key not in keys))
    return keys
