"""Groups -> one step's micro-batches: advantages, and the share of each token in the loss.

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
from protocol.messages import Completion, Group
from protocol.recipe import Recipe
from trainer import figures
from trainer.advantage import Advantage
from trainer.packing import Piece, Sample, length, pack_rows, split_evenly


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
        return MicroBatch(
            packed=self.packed.to(device),
            sampler_logprobs=self.sampler_logprobs.to(device),
            ref_logprobs=None if self.ref_logprobs is None else self.ref_logprobs.to(device),
            advantages=self.advantages.to(device),
            mask=self.mask.to(device),
            shares=self.shares.to(device),
            completion=self.completion.to(device),
            lengths=self.lengths.to(device),
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
    groups: Sequence[Group], recipe: Recipe, advantages: Advantage, *, rank: int, world: int, step: int
) -> Batch:
    """Every rank calls this with the same groups and gets its own share of the work.

    Left out are completions without any effect on the loss: masked ones, and without a KL or entropy term those whose
    advantage is exactly 0; with `trainer.refill` also whole groups without signal. The shares still count them.
    """
    pieces = _samples(groups, recipe, advantages)
    trained = [_trained(piece, recipe) for piece in pieces]
    parts = [pack_rows(part, recipe.trainer.tokens_per_micro_batch) for part in split_evenly(trained, world)]
    rows = parts[rank] + [[]] * (max(1, *map(len, parts)) - len(parts[rank]))  # ranks must step together
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
    """lengths of all c completions of a step, masked: those that are not trained -> the share of each token; all of
    one shape.

    grpo and gspo: 1 / (c * length). dr_grpo: 1 / (c * max_tokens). Others: 1 / tokens that are trained.
    """
    match objective:
        case "grpo" | "gspo":
            shares = 1.0 / (lengths.size * lengths)
        case "dr_grpo":
            shares = 1.0 / (lengths.size * max_tokens)
        case _:
            shares = 1.0 / max(1, lengths[~masked].sum())
    return np.where(masked, 0.0, shares)


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
    lengths = np.array([[one.spans[-1].end for one in group.completions] for group in groups])
    cut_off = np.array([[one.finish == "length" for one in group.completions] for group in groups])
    rewards = np.array([[one.reward for one in group.completions] for group in groups], np.float64)
    shares = token_shares(lengths, cut_off & objective.mask_truncated, objective.name, recipe.sampling.max_tokens)
    better = np.ones_like(rewards) if objective.name == "sft" else advantages(rewards)
    return [
        [_sample(group, *one) for one in zip(group.completions, better[index], shares[index], strict=True)]
        for index, group in enumerate(groups)
    ]


def _sample(group: Group, completion: Completion, advantage: float, share: float) -> Sample:
    return Sample(
        group=group.group_id,
        prompt=unpack(group.prompt),
        tokens=unpack(completion.tokens),
        logprobs=unpack(completion.logprobs),
        ref_logprobs=None if completion.ref_logprobs is None else unpack(completion.ref_logprobs),
        advantage=float(advantage),
        share=float(share),
    )


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
