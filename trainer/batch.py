"""Groups -> one step's micro-batches: advantages, one denominator, an even split over ranks, packed rows.

The loss of a step is a sum over completion tokens divided by `denominator`, known before the first backward pass
and the same on every rank. So neither the number of ranks nor the packing changes the update.
"""

import itertools
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
    """One completion of a group. m prompt tokens, n completion tokens."""

    group: int
    prompt: np.ndarray  # [m]
    tokens: np.ndarray  # [n]
    logprobs: np.ndarray  # [n] float32, the sampler's
    ref_logprobs: np.ndarray | None  # [n] float32
    advantage: float


Piece = list[Sample]
"""Completions of one group; their prompt is computed once."""


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
    pieces = [_samples(group, advantage_std) for group in groups]
    denominator = float(sum(len(sample.tokens) for piece in pieces for sample in piece))
    trained = [[sample for sample in piece if sample.advantage or not skip_zero] for piece in pieces]
    shares = [pack_rows(share, tokens_per_micro_batch) for share in split_evenly(trained, world)]
    rows = shares[rank] + [[]] * (max(1, *map(len, shares)) - len(shares[rank]))  # ranks must step together
    return Batch(
        micro_batches=[_micro_batch(row, denominator) for row in rows],
        group_ids=[group.group_id for group in groups],
        figures={**_figures(groups, step), "train/tokens": float(sum(map(length, trained)))},
    )


def length(piece: Piece) -> int:
    """Tokens that a forward pass computes for it."""
    return len(piece[0].prompt) + sum(len(sample.tokens) for sample in piece) if piece else 0


def split_evenly(groups: Sequence[Piece], world: int) -> list[list[Piece]]:
    """Longest first, each to the rank with the least work so far (Graham's LPT rule).

    Groups are cut only where whole ones are too coarse for an even split: a cut costs its prompt once more.
    """
    limit = sum(map(length, groups)) / world / 4 if world > 1 else float("inf")
    pieces = [piece for group in groups if group for piece in _cut(group, limit)]
    shares: list[list[Piece]] = [[] for _ in range(world)]
    work = [0] * world
    for piece in sorted(pieces, key=length, reverse=True):
        rank = work.index(min(work))
        shares[rank].append(piece)
        work[rank] += length(piece)
    return [_rejoined(share) for share in shares]


def pack_rows(pieces: Sequence[Piece], budget: int) -> list[list[Piece]]:
    """First fit, longest first: rows of at most `budget` tokens; a single longer completion gets a row of its own."""
    rows: list[list[Piece]] = []
    room: list[int] = []
    fitting = [part for piece in pieces for part in _cut(piece, budget)]
    for piece in sorted(fitting, key=length, reverse=True):
        place = next((i for i, left in enumerate(room) if length(piece) <= left), None)
        if place is None:
            rows.append([piece])
            room.append(budget - length(piece))
        else:
            rows[place].append(piece)
            room[place] -= length(piece)
    return rows


def _cut(piece: Piece, limit: float) -> list[Piece]:
    """Halved until every part is within the limit or a single completion."""
    if len(piece) == 1 or length(piece) <= limit:
        return [piece]
    middle = len(piece) // 2
    return _cut(piece[:middle], limit) + _cut(piece[middle:], limit)


def _rejoined(pieces: Sequence[Piece]) -> list[Piece]:
    """Pieces of one group that met again on one rank become one."""
    samples = sorted(itertools.chain(*pieces), key=lambda sample: sample.group)
    return [list(piece) for _, piece in itertools.groupby(samples, key=lambda sample: sample.group)]


FILLER = Sample(
    group=-1,
    prompt=np.zeros(1, np.int32),
    tokens=np.zeros(1, np.int32),
    logprobs=np.zeros(1, np.float32),
    ref_logprobs=np.zeros(1, np.float32),
    advantage=0.0,
)
"""Stands in where a rank has fewer rows than others; its mask is 0."""


def _samples(group: Group, advantage_std: bool) -> Piece:
    prompt = unpack(group.prompt)
    rewards = np.array([completion.reward for completion in group.completions])
    return [
        Sample(
            group=group.group_id,
            prompt=prompt,
            tokens=unpack(completion.tokens),
            logprobs=unpack(completion.logprobs),
            ref_logprobs=None if completion.ref_logprobs is None else unpack(completion.ref_logprobs),
            advantage=float(advantage),
        )
        for completion, advantage in zip(group.completions, group_advantages(rewards, advantage_std), strict=True)
    ]


def _micro_batch(row: list[Piece], denominator: float) -> MicroBatch:
    pieces = row or [[FILLER]]
    samples = list(itertools.chain(*pieces))
    refs = [sample.ref_logprobs for sample in samples if sample.ref_logprobs is not None]
    advantages = [np.full(len(sample.tokens), sample.advantage) for sample in samples]
    return MicroBatch(
        packed=pack([(piece[0].prompt, [sample.tokens for sample in piece]) for piece in pieces]),
        sampler_logprobs=_float32([sample.logprobs for sample in samples]),
        ref_logprobs=_float32(refs) if refs else None,
        advantages=_float32(advantages),
        mask=torch.full((sum(map(len, advantages)),), float(bool(row))),
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
