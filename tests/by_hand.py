"""The objectives as their papers write them: one completion and one token after the other, in float64.

Knows nothing of `trainer/loss.py` and of a batch's shares: means are taken over the completions' own lengths.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from statistics import fmean, stdev

import torch
from torch import Tensor

from protocol.codec import unpack
from protocol.messages import Group
from protocol.recipe import Objective
from trainer.batch import MicroBatch

CLIP = {"grpo": (0.2, 0.2), "dr_grpo": (0.2, 0.2), "dapo": (0.2, 0.28), "gspo": (3e-4, 4e-4), "cispo": (1.0, 4.0)}
"""Of the papers: a ratio may move within [1 - first, 1 + second]; of cispo's only 1 + second = 5 bounds anything."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Answer:
    """One completion of n tokens."""

    place: slice | None
    """Of its tokens in the micro-batch; None where it was left out of it."""
    sampler: list[float]  # [n] log-probs
    reference: list[float] | None  # [n] log-probs
    advantage: float
    cut: bool


def answers(groups: Sequence[Group], micro: MicroBatch, objective: Objective) -> list[Answer]:
    """All completions of a step, found in its only micro-batch by the sampler's log-probs, which are all different."""
    packed = micro.sampler_logprobs.tolist()
    found = []
    for group in groups:
        for one, advantage in zip(group.completions, advantages(group, objective), strict=True):
            sampler = unpack(one.logprobs).astype(float).tolist()
            starts = [start for start in range(len(packed)) if packed[start : start + len(sampler)] == sampler]
            assert len(starts) <= 1
            found.append(
                Answer(
                    place=slice(starts[0], starts[0] + len(sampler)) if starts else None,
                    sampler=sampler,
                    reference=unpack(one.ref_logprobs).astype(float).tolist() if one.ref_logprobs else None,
                    advantage=advantage,
                    cut=one.finish == "length",
                )
            )
    return found


def advantages(group: Group, objective: Objective) -> list[float]:
    """Dr. GRPO does not divide by the standard deviation; a demonstration is as good as any other."""
    rewards = [one.reward for one in group.completions]
    if objective.name == "sft":
        return [1.0] * len(rewards)
    spread = 1.0 if objective.name == "dr_grpo" else stdev(rewards) + 1e-4
    return [(reward - fmean(rewards)) / spread for reward in rewards]


def loss(logprobs: Tensor, entropies: Tensor, everyone: list[Answer], objective: Objective, max_tokens: int) -> Tensor:
    """logprobs, entropies [n] float64 in the micro-batch's order -> the step's loss."""
    trained = [one for one in everyone if not (objective.mask_truncated and one.cut)]
    total = torch.zeros((), dtype=torch.float64)
    for one in trained:
        if one.place is None:
            assert not (one.advantage or objective.kl_beta or objective.entropy_bonus)  # it would have added 0
            continue
        cost = sum(_costs(logprobs[one.place], entropies[one.place], one, objective))
        match objective.name:
            case "grpo" | "gspo":  # mean over its tokens, then over all completions
                total = total + cost / len(one.sampler) / len(everyone)
            case "dr_grpo":
                total = total + cost / (len(everyone) * max_tokens)
            case _:  # mean over all tokens
                total = total + cost / sum(len(other.sampler) for other in trained)
    return total


def _costs(logprobs: Tensor, entropies: Tensor, one: Answer, objective: Objective) -> list[Tensor]:
    """What each token costs."""
    old = logprobs.tolist() if objective.recompute_old_logprobs else one.sampler
    ratios = [torch.exp(new - before) for new, before in zip(logprobs, old, strict=True)]
    if objective.name == "gspo":
        ratios = [math.prod(ratios) ** (1 / len(ratios))] * len(ratios)
    rho = [math.exp(new - mu) for new, mu in zip(logprobs.tolist(), one.sampler, strict=True)]
    held = [1.0] * len(rho) if objective.recompute_old_logprobs else [float(ratio.detach()) for ratio in ratios]
    if objective.name == "cispo" and not objective.recompute_old_logprobs:
        held = [float(torch.clamp(torch.tensor(ratio), *_bounds(objective))) for ratio in held]
    weights = _weights(rho, held, objective)
    costs = []
    for t, (ratio, weight) in enumerate(zip(ratios, weights, strict=True)):
        cost = -weight * _gain(ratio, logprobs[t], one.advantage, objective)
        if objective.kl_beta:
            cost = cost + objective.kl_beta * _kl(logprobs[t], one.reference[t], objective.kl_estimator)
        costs.append(cost - objective.entropy_bonus * entropies[t])
    return costs


def _gain(ratio: Tensor, logprob: Tensor, advantage: float, objective: Objective) -> Tensor:
    if objective.name == "sft":
        return logprob
    clipped = torch.clamp(ratio, *_bounds(objective))
    if objective.name == "cispo":
        return clipped.detach() * advantage * logprob
    gain = torch.minimum(ratio * advantage, clipped * advantage)
    if objective.dual_clip and advantage < 0:
        gain = torch.clamp(gain, min=objective.dual_clip * advantage)
    return gain


def _bounds(objective: Objective) -> tuple[float, float]:
    low, high = CLIP[objective.name]
    low = low if objective.clip_low is None else objective.clip_low
    high = high if objective.clip_high is None else objective.clip_high
    return 1 - low, 1 + high


def _weights(rho: list[float], held: list[float], objective: Objective) -> list[float]:
    """Of each token. rho: trainer over sampler. held: the ratio that is in the gain already, with two policies; it is
    divided out, so that what is trained in the end is the corrected ratio. With three policies it is 1."""
    floor, cap = objective.correction_floor, objective.correction_cap
    ratios = rho if objective.recompute_old_logprobs else held
    match objective.correction:
        case "none":
            return [1.0] * len(rho)
        case "token_truncate":
            weights = [min(r, cap) for r in ratios]
        case "token_mask":
            weights = [ratio if floor <= r <= cap else 0.0 for ratio, r in zip(ratios, rho, strict=True)]
        case "sequence_truncate":
            weights = [min(math.prod(rho), cap)] * len(rho)
        case "sequence_mask":
            kept = floor <= math.prod(rho) ** (1 / len(rho)) <= cap
            weights = [min(r, cap) if kept else 0.0 for r in ratios]
    return [weight / h for weight, h in zip(weights, held, strict=True)]


def _kl(logprob: Tensor, reference: float, estimator: str) -> Tensor:
    log_ratio = reference - logprob
    return {"k1": -log_ratio, "k2": log_ratio**2 / 2, "k3": torch.exp(log_ratio) - log_ratio - 1}[estimator]
