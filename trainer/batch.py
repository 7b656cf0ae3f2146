"""Groups -> one step's micro-batches: advantages, one denominator, an even split over ranks, packed rows.

The loss of a step is a sum over completion tokens divided by `denominator`, known before the first backward pass
and the same on every rank. So neither the number of ranks nor the packing changes the update.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np
import torch
from torch import Tensor

from policy.logprobs import Packed, pack
from protocol.codec import unpack
from protocol.messages import Group
from protocol.snapshot import step_of
from trainer.advantage import group_advantages


@dataclass(frozen=True, slots=True, kw_only=True)
class Sample:
    """A prompt with one of its completions. m prompt tokens, n completion tokens."""

    prompt: np.ndarray  # [m]
    tokens: np.ndarray  # [n]
    logprobs: np.ndarray  # [n] float32, the sampler's
    ref_logprobs: np.ndarray | None  # [n] float32
    advantage: float

    @property
    def length(self) -> int:
        return len(self.prompt) + len(self.tokens)


@dataclass(frozen=True, slots=True, kw_only=True)
class MicroBatch:
    """What one forward pass needs. n = completion tokens in it; all floats are float32."""

    packed: Packed
    sampler_logprobs: Tensor  # [n]
    ref_logprobs: Tensor | None  # [n]
    advantages: Tensor  # [n]
    mask: Tensor  # [n], 0 for the tokens of a filler
    denominator: float

    def to(self, device: torch.device | str) -> "MicroBatch":
        ref = None if self.ref_logprobs is None else self.ref_logprobs.to(device)
        return replace(
            self,
            packed=self.packed.to(device),
            sampler_logprobs=self.sampler_logprobs.to(device),
            ref_logprobs=ref,
            advantages=self.advantages.to(device),
            mask=self.mask.to(device),
        )

    def with_reference(self, ref_logprobs: Tensor) -> "MicroBatch":
        return replace(self, ref_logprobs=ref_logprobs)


@dataclass(frozen=True, slots=True, kw_only=True)
class Batch:
    """One step's work for one rank, and figures about the whole of it (all ranks)."""

    micro_batches: list[MicroBatch]
    group_ids: list[int]
    figures: dict[str, float]


def make_batch(
    groups: Sequence[Group],
    *,
    rank: int,
    world: int,
    tokens_per_micro_batch: int,
    advantage_std: bool,
    skip_zero: bool,
    step: int,
) -> Batch:
    """Every rank calls this with the same groups and gets its own share.

    skip_zero: leave out completions whose advantage is exactly 0. That is exact where the loss has no other term
    (kl_beta = 0), because the denominator still counts them.
    """
    samples = [sample for group in groups for sample in _samples(group, advantage_std)]
    denominator = float(sum(len(sample.tokens) for sample in samples))
    trained = [sample for sample in samples if sample.advantage or not skip_zero]
    shares = [pack_rows(share, tokens_per_micro_batch) for share in split_evenly(trained, world)]
    rows = shares[rank] + [[]] * (max(1, *map(len, shares)) - len(shares[rank]))  # ranks must step together
    micro_batches = [_micro_batch(row, denominator) for row in rows]
    figures = {**_figures(groups, step), "train/tokens": float(sum(sample.length for sample in trained))}
    return Batch(micro_batches=micro_batches, group_ids=[group.group_id for group in groups], figures=figures)


def split_evenly(samples: Sequence[Sample], world: int) -> list[list[Sample]]:
    """Longest first, each to the rank with the least cost so far (Graham's LPT rule)."""
    shares: list[list[Sample]] = [[] for _ in range(world)]
    costs = [0.0] * world
    for sample in sorted(samples, key=lambda sample: -sample.length):
        rank = costs.index(min(costs))
        shares[rank].append(sample)
        costs[rank] += sample.length
    return shares


def pack_rows(samples: Sequence[Sample], budget: int) -> list[list[Sample]]:
    """First fit, longest first: rows of at most `budget` tokens; a longer sample gets a row of its own."""
    rows: list[list[Sample]] = []
    room: list[int] = []
    for sample in sorted(samples, key=lambda sample: -sample.length):
        fitting = next((i for i, left in enumerate(room) if sample.length <= left), None)
        if fitting is None:
            rows.append([sample])
            room.append(budget - sample.length)
        else:
            rows[fitting].append(sample)
            room[fitting] -= sample.length
    return rows


FILLER = Sample(
    prompt=np.zeros(1, np.int32),
    tokens=np.zeros(1, np.int32),
    logprobs=np.zeros(1, np.float32),
    ref_logprobs=np.zeros(1, np.float32),
    advantage=0.0,
)
"""Stands in where a rank has fewer rows than others; its mask is 0."""


def _samples(group: Group, advantage_std: bool) -> list[Sample]:
    prompt = unpack(group.prompt)
    rewards = np.array([completion.reward for completion in group.completions])
    return [
        Sample(
            prompt=prompt,
            tokens=unpack(completion.tokens),
            logprobs=unpack(completion.logprobs),
            ref_logprobs=None if completion.ref_logprobs is None else unpack(completion.ref_logprobs),
            advantage=float(advantage),
        )
        for completion, advantage in zip(group.completions, group_advantages(rewards, advantage_std), strict=True)
    ]


def _micro_batch(row: list[Sample], denominator: float) -> MicroBatch:
    samples = row or [FILLER]
    lengths = [len(sample.tokens) for sample in samples]
    refs = [sample.ref_logprobs for sample in samples if sample.ref_logprobs is not None]
    return MicroBatch(
        packed=pack([(sample.prompt, sample.tokens) for sample in samples]),
        sampler_logprobs=_float32([sample.logprobs for sample in samples]),
        ref_logprobs=_float32(refs) if refs else None,
        advantages=_float32([np.repeat([sample.advantage], len(sample.tokens)) for sample in samples]),
        mask=torch.full((sum(lengths),), float(bool(row))),
        denominator=denominator,
    )


def _figures(groups: Sequence[Group], step: int) -> dict[str, float]:
    """What the step was fed with, under TRL's names where they mean the same."""
    completions = [completion for group in groups for completion in group.completions]
    rewards = np.array([[completion.reward for completion in group.completions] for group in groups])
    lengths = np.array([span.end - span.start for c in completions for span in c.spans], np.float64)
    ages = np.array([step - step_of(span.snapshot) for c in completions for span in c.spans], np.float64)
    totals = np.array([c.spans[-1].end for c in completions], np.float64)
    figures = {
        "reward": rewards.mean(),
        "reward_std": rewards.std(axis=1).mean(),
        "frac_reward_zero_std": (rewards == rewards[:, :1]).all(axis=1).mean(),
        "completions/mean_length": totals.mean(),
        "completions/max_length": totals.max(),
        "completions/clipped_ratio": np.mean([c.finish == "length" for c in completions]),
        "staleness/mean": (ages * lengths).sum() / lengths.sum(),
        "staleness/max": ages.max(),
        "completions/tokens": totals.sum(),
    }
    for name in completions[0].rewards:
        values = [c.rewards[name] for c in completions if c.rewards.get(name) is not None]
        figures[f"rewards/{name}/mean"] = np.mean(values) if values else float("nan")
    first = next(iter(completions[0].rewards))
    figures["accuracy"] = np.mean([(c.rewards.get(first) or 0.0) > 0 for c in completions])
    return {name: float(value) for name, value in figures.items()}


def _float32(parts: Sequence[np.ndarray]) -> Tensor:
    return torch.from_numpy(np.concatenate(parts).astype(np.float32))
