"""A policy for a publisher that nobody trains; its weights may change a little between two publishes."""

import time
from collections.abc import Iterator
from pathlib import Path

import torch

from policy.logprobs import TokenLogprobs
from policy.model import add_adapter, load_model
from protocol.recipe import Recipe
from trainer.shards import Entry

CHANGE = 1 / 64
"""Of each weight, as a share of itself, up and down in turns: less than 1 / 256 would be rounded away in bfloat16."""
NOISE = 1e-3
"""Added to adapters, which begin with zeros."""


class Untrained:
    """What the publisher asks of a policy; `times` are those of its last publish."""

    def __init__(self, recipe: Recipe, directory: Path) -> None:
        self.recipe, self.directory, self.steps_done = recipe, directory, 0
        self.model = load_model(directory, recipe.model.dtype).eval()
        if recipe.lora.rank:
            add_adapter(self.model, recipe.lora)
        self._published = [
            (name, one.detach())
            for name, one in self.model.named_parameters()
            if one.requires_grad or not recipe.lora.rank
        ]
        self.times = {"canary": 0.0}

    @torch.no_grad()
    def change(self) -> None:
        """A step without an optimizer."""
        self.steps_done += 1
        for _, weight in self._published:
            weight.mul_(1 + CHANGE * (1 if self.steps_done % 2 else -1))
            if self.recipe.lora.rank:
                weight.add_(torch.randn_like(weight), alpha=NOISE)
        self.times = {"canary": 0.0}

    @torch.no_grad()
    def score(self, packed, temperature: float) -> torch.Tensor:
        begun = time.monotonic()
        found = TokenLogprobs(self.model, temperature, self.recipe.trainer.logits_chunk)(packed)[0]
        self.times["canary"] += time.monotonic() - begun
        return found

    def layout(self) -> list[Entry]:
        return [Entry(name, weight.dtype, tuple(weight.shape)) for name, weight in self._published]

    def weights(self) -> Iterator[tuple[str, torch.Tensor]]:
        """As one rank without ZeRO 3 has them: nothing is gathered."""
        yield from self._published


if __name__ == "__main__":
    raise SystemExit("a part of other benchmarks: python -m benchmarks.weights, python -m benchmarks.end_to_end")
