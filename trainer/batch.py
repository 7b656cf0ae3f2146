"""Groups -> one step's micro-batches: advantages, shares, an even split over ranks, packed rows.

The loss of a step is a sum over completion tokens, each times its `share`. The shares are known before the first
backward pass and the same on every rank. So neither the number of ranks nor the packing changes the update.
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
from protocol.recipe import Recipe
from trainer import figures
from trainer.advantage import Advantage


@dataclass(frozen=True, slots=True, kw_only=True)
class Sample:
    """One completion of a group. m prompt tokens, n completion tokens."""

    group: int
    prompt: np.ndarray  # [m]
    tokens: np.ndarray  # [n]
    logprobs: np.ndarray  # [n] float32, the sampler's
    ref_logprobs: np.ndarray | None  # [n] float32
    advantage: float
    share: float
    """Of each of its tokens in the step's loss."""


Piece = list[Sample]
"""Completions of one group; their prompt is computed once."""


@dataclass(frozen=True, slots=True, kw_only=True)
class MicroBatch:
    """What one forward pass needs. n = completion tokens in it, c = completions; all floats are float32."""

    packed: Packed
    sampler_logprobs: Tensor  # [n]
    ref_logprobs: Tensor | None  # [n]
    advantages: Tensor  # [n]
    mask: Tensor  # [n], 0 for the tokens of a filler
    shares: Tensor  # [n], of each token in the step's loss; 0 where masked
    completion: Tensor  # [n] int64, which of the c completions a token belongs to
    lengths: Tensor  # [c], tokens

    def to(self, device: torch.device | str) -> "MicroBatch":
        parts = {name: getattr(self, name) for name in self.__dataclass_fields__}
        return MicroBatch(**{name: part if part is None else part.to(device) for name, part in parts.items()})

    def with_reference(self, ref_logprobs: Tensor) -> "MicroBatch":
        return replace(self, ref_logprobs=ref_logprobs)


@dataclass(frozen=True, slots=True, kw_only=True)
class Batch:
    """One step's work for one rank, and figures about the whole of it (all ranks)."""

    micro_batches: list[MicroBatch]
    group_ids: list[int]
    figures: dict[str, float]


def make_batch(
    groups: Sequence[Group], recipe: Recipe, advantages: Advantage, *, rank: int, world: int, step: int
) -> Batch:
    """Every rank calls this with the same groups and gets its own share of the work.

    Left out are completions without any effect on the loss: masked ones, and without a KL or entropy term those whose
    advantage is exactly 0; with `trainer.refill` also whole groups without signal. The shares still count them.
    """
    pieces = _samples(groups, recipe, advantages)
    trained = [_trained(piece, recipe) for piece in pieces]
    shares = [pack_rows(share, recipe.trainer.tokens_per_micro_batch) for share in split_evenly(trained, world)]
    rows = shares[rank] + [[]] * (max(1, *map(len, shares)) - len(shares[rank]))  # ranks must step together
    return Batch(
        micro_batches=[_micro_batch(row) for row in rows],
        group_ids=[group.group_id for group in groups],
        figures={**figures.of_groups(groups, step), "train/tokens": float(sum(map(length, trained)))},
    )


def _trained(piece: Piece, recipe: Recipe) -> Piece:
    all_count = bool(recipe.objective.kl_beta or recipe.objective.entropy_bonus)
    if recipe.trainer.refill:
        all_count = all_count and any(sample.advantage for sample in piece)
    return [sample for sample in piece if sample.share and (sample.advantage or all_count)]


def token_shares(lengths: np.ndarray, masked: np.ndarray, objective: str, max_tokens: int) -> np.ndarray:
    """lengths [c] of all completions of a step, masked [c] those that are not trained -> [c] the share of each token.

    grpo and gspo: 1 / (c * length). dr_grpo: 1 / (c * max_tokens). Others: 1 / tokens that are trained.
    """
    match objective:
        case "grpo" | "gspo":
            shares = 1.0 / (len(lengths) * lengths)
        case "dr_grpo":
            shares = np.full(len(lengths), 1.0 / (len(lengths) * max_tokens))
        case _:
            shares = np.full(len(lengths), 1.0 / max(1, lengths[~masked].sum()))
    return np.where(masked, 0.0, shares)


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
    share=0.0,
)
"""Stands in where a rank has fewer rows than others; its mask is 0."""


def _samples(groups: Sequence[Group], recipe: Recipe, advantages: Advantage) -> list[Piece]:
    objective = recipe.objective
    completions = [completion for group in groups for completion in group.completions]
    tokens = [unpack(completion.tokens) for completion in completions]
    masked = np.array([objective.mask_truncated and completion.finish == "length" for completion in completions])
    shares = token_shares(np.array([*map(len, tokens)]), masked, objective.name, recipe.sampling.max_tokens)
    rewards = np.array([[completion.reward for completion in group.completions] for group in groups], np.float64)
    better = np.ones_like(rewards) if objective.name == "sft" else advantages(rewards)
    samples = [
        Sample(
            group=group.group_id,
            prompt=prompt,
            tokens=ids,
            logprobs=unpack(completion.logprobs),
            ref_logprobs=None if completion.ref_logprobs is None else unpack(completion.ref_logprobs),
            advantage=float(advantage),
            share=float(share),
        )
        for (group, prompt, completion), ids, advantage, share in zip(
            [(group, unpack(group.prompt), one) for group in groups for one in group.completions],
            tokens,
            better.flat,
            shares,
            strict=True,
        )
    ]
    ends = itertools.accumulate(len(group.completions) for group in groups)
    return [samples[end - len(group.completions) : end] for group, end in zip(groups, ends, strict=True)]


def _micro_batch(row: list[Piece]) -> MicroBatch:
    pieces = row or [[FILLER]]
    samples = list(itertools.chain(*pieces))
    lengths = np.array([len(sample.tokens) for sample in samples])
    refs = [sample.ref_logprobs for sample in samples if sample.ref_logprobs is not None]

    def spread(values: list[float]) -> Tensor:
        return torch.from_numpy(np.repeat(np.array(values, np.float32), lengths))

    return MicroBatch(
        packed=pack([(piece[0].prompt, [sample.tokens for sample in piece]) for piece in pieces]),
        sampler_logprobs=_float32([sample.logprobs for sample in samples]),
        ref_logprobs=_float32(refs) if refs else None,
        advantages=spread([sample.advantage for sample in samples]),
        mask=torch.full((int(lengths.sum()),), float(bool(row))),
        shares=spread([sample.share for sample in samples]),
        completion=torch.from_numpy(np.repeat(np.arange(len(samples)), lengths)),
        lengths=torch.from_numpy(lengths.astype(np.float32)),
    )


def _float32(parts: Sequence[np.ndarray]) -> Tensor:
    return torch.from_numpy(np.concatenate(parts).astype(np.float32))
