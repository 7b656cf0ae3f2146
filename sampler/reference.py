"""The reference policy: the model before the first step, scored with the trainer's own code.

So the KL estimate is 0 before the first step up to the order of float additions. With adapters the trainer scores
the base model itself, and with kl_beta = 0 nobody does: then nothing is loaded here.
"""

import asyncio
import logging
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch

from policy.kernels import equip
from policy.logprobs import TokenLogprobs, pack
from policy.model import load_model
from protocol.recipe import Recipe

log = logging.getLogger(__name__)


class Reference:
    """Scores one group after the other in a thread, so that the event loop goes on."""

    def __init__(self, recipe: Recipe, directory: Path, device: str) -> None:
        model = load_model(directory, recipe.model.dtype)
        model.to(device)  # pyright: ignore[reportArgumentType]  # transformers' decorator hides that it is a method
        model.eval()
        attention, kernels = equip(model, recipe.trainer, device)
        log.info("reference: %s", kernels)
        self._scorer = TokenLogprobs(model, recipe.sampling.temperature, recipe.trainer.logits_chunk, attention)
        self._budget, self._device = recipe.trainer.tokens_per_micro_batch, device
        self._turn = asyncio.Lock()

    async def logprobs(self, prompt: np.ndarray, completions: Sequence[np.ndarray]) -> list[np.ndarray]:
        """prompt [m], completions [n_i] token ids -> [n_i] float32 at the sampling temperature."""
        async with self._turn:
            return await asyncio.to_thread(self._score, prompt, completions)

    @torch.no_grad()
    def _score(self, prompt: np.ndarray, completions: Sequence[np.ndarray]) -> list[np.ndarray]:
        scored: list[np.ndarray] = []
        for row in _rows(len(prompt), completions, self._budget):
            logprobs, _ = self._scorer(pack([(prompt, row)]).to(self._device))
            scored += [part.cpu().numpy() for part in logprobs.split([len(tokens) for tokens in row])]
        return scored


def _rows(prompt: int, completions: Sequence[np.ndarray], budget: int) -> list[list[np.ndarray]]:
    """In their order, as many to a row as the budget of tokens holds, at least one."""
    rows: list[list[np.ndarray]] = []
    room = 0
    for tokens in completions:
        if not rows or len(tokens) > room:
            rows.append([])
            room = budget - prompt
        rows[-1].append(tokens)
        room -= len(tokens)
    return rows
