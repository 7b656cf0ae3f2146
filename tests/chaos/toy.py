"""A policy and an engine without a network: one weight per prompt group, and random tokens."""

import asyncio
import random
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Self

import numpy as np
import torch
from safetensors.torch import load, load_file, save_file
from torch import Tensor

from protocol.messages import Group, Span, Split
from protocol.recipe import Recipe
from protocol.snapshot import Sealed
from sampler.engine import Sampled
from sampler.weights import Apply, Weights
from trainer.advantage import ADVANTAGES
from trainer.batch import Batch, MicroBatch, make_batch
from trainer.ranks import Ranks
from trainer.shards import Entry

GROUPS = 4096
TOKENS = 6


def canary(weights: Tensor, length: int) -> Tensor:
    """Log-probs [length] that any other set of trained groups would change."""
    mixed = (weights.double() * torch.arange(1, len(weights) + 1)).sum() % 9973
    return torch.full((length,), -1.0 - float(mixed) / 9973)


class ToyPolicy:
    """`trainer.engine.Policy` with a vector for a model; every rank holds all of it."""

    learning_rate = 1.0
    grad_norm = 0.0
    device_memory = (0, 0)
    spoilt: frozenset[int] = frozenset()
    """Groups that make a step not finite."""

    def __init__(self, recipe: Recipe, directory: Path, ranks: Ranks) -> None:
        self.recipe, self.directory, self._ranks = recipe, directory, ranks
        self.steps_done = self.skipped = 0
        self._weights = torch.zeros(GROUPS)
        self._groups: list[int] = []

    def batch(self, groups: list[Group]) -> Batch:
        self._groups = [group.group_id for group in groups]
        place = {"rank": self._ranks.rank, "world": self._ranks.world, "step": self.steps_done}
        return make_batch(groups, self.recipe, ADVANTAGES["mean"], **place)

    def accumulate(self, micro_batches: list[MicroBatch]) -> Iterator[MicroBatch]:
        yield from micro_batches

    def logprobs(self, micro: MicroBatch) -> tuple[Tensor, Tensor]:
        return micro.sampler_logprobs.clone(), torch.zeros_like(micro.sampler_logprobs)

    def backward(self, loss: Tensor) -> None:
        assert torch.isfinite(loss)

    def update(self) -> bool:
        done = not self._ranks.max([bool(self.spoilt & set(self._groups))])[0]
        if done:
            half = len(self._groups) // 2
            self._add(self._groups[:half])
            self._add(self._groups[half:])
        self.steps_done += done
        self.skipped = 0 if done else self.skipped + 1
        return done

    def _add(self, groups: list[int]) -> None:
        """In two parts, so that a process can be killed in the middle of an optimizer step."""
        self._weights[groups] += 1

    def score(self, packed, temperature: float) -> Tensor:
        return canary(self._weights, len(packed.targets))

    def weights(self) -> Iterator[tuple[str, Tensor]]:
        half = GROUPS // 2  # two tensors: each is a place to be killed at
        yield "first", self._weights[:half].clone()
        yield "second", self._weights[half:].clone()

    def layout(self) -> list[Entry]:
        return [Entry(name, torch.float32, (GROUPS // 2,)) for name in ("first", "second")]

    def save(self, directory: Path, tag: str) -> None:
        (directory / tag).mkdir(exist_ok=True)
        state = {"weights": self._weights, "step": torch.tensor(self.steps_done)}
        try:
            save_file(state, directory / tag / f"rank{self._ranks.rank}.safetensors")
        except Exception as error:  # safetensors' own, for a full disk
            raise OSError(28, str(error)) from error

    def load(self, directory: Path, tag: str) -> None:
        state = load_file(directory / tag / f"rank{self._ranks.rank}.safetensors")
        self._weights, self.steps_done = state["weights"], int(state["step"])


class ToyEngine:
    """`sampler.engine.Engine` without vLLM: reading, verifying and switching weights are the real ones."""

    dead = False
    busy_s = 0.0

    def __init__(self, recipe: Recipe, directory: Path, snapshots: Path, *, gpu: bool, seed: int) -> None:
        self._recipe = recipe
        self.weights = Weights(self, snapshots, recipe.model.dtype)
        self.tokens = self.running = 0
        self._vector = torch.zeros(GROUPS)
        self._applied = ""
        self._dice = random.Random()

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(self, *_: object) -> None:
        return

    async def generate(self, prompt: np.ndarray, split: Split) -> list[Sampled]:
        self.running += 1
        await self._think()
        self.running -= 1
        await self.weights.checked()
        count = self._recipe.sampling.group_size if split == "train" else self._recipe.eval.samples
        self.tokens += count * TOKENS
        return [self._one() for _ in range(count)]

    async def _think(self) -> None:
        await asyncio.sleep(self._dice.uniform(0.005, 0.03) * (10 if self._dice.random() < 0.02 else 1))

    def _one(self) -> Sampled:
        tokens = np.array([self._dice.randrange(97, 123) for _ in range(TOKENS)], np.int64)
        text = "".join(map(chr, tokens))
        spans = [Span(self._applied, 0, TOKENS)]
        return Sampled(tokens=tokens, logprobs=np.full(TOKENS, -3.0, np.float32), text=text, finish="stop", spans=spans)

    async def read(self, sealed: Sealed, sha256: str) -> Apply:
        tensors = load(await asyncio.to_thread(sealed.read, "model.safetensors"))

        async def apply() -> None:
            self._vector = torch.cat([tensors["first"], tensors["second"]])

        return apply

    async def switch(self, apply: Apply, snapshot: str) -> None:
        await apply()
        self._applied = snapshot

    async def score(self, tokens: Sequence[int]) -> list[float]:
        return canary(self._vector, len(tokens) - 1).tolist()
