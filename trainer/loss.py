"""The objectives, on packed tokens. t: a token, i: its completion, A: the advantage, sg: no gradient.

    r_t     = pi_t / old_t          old = the sampler's log-probs; with recompute_old_logprobs the trainer's own
                                    before the step (three policies), which are those of this forward pass
    clip    = clamp(r, 1 - low, 1 + high)
    grpo    min(r_t A, clip(r_t) A), mean over a completion's tokens, mean over completions  (arXiv 2402.03300, eq. 3)
    dr_grpo the same, summed, divided by completions * max_tokens                            (arXiv 2503.20783)
    dapo    the same, mean over all tokens; high > low ("clip higher")                       (arXiv 2503.14476, eq. 8)
    gspo    min(s_i A, clip(s_i) A) with s_i = exp(mean_t log r_t)                           (arXiv 2507.18071, eq. 5)
    cispo   sg[clip(r_t)] A log pi_t, mean over all tokens                                   (arXiv 2506.13585, eq. 4)
    sft     log pi_t, mean over all tokens

Where A < 0, `dual_clip` c bounds the first four by c A (arXiv 1912.09729, eq. 5). Each is multiplied by a weight that
corrects what lies between sampler and trainer (`correction`), then

    loss    = sum_t share_t (-weight_t surrogate_t + kl_beta KL_t - entropy_bonus H_t)

where the shares, made with the batch, hold the means above. Log-ratios are masked and clamped before exp: 0 * inf at
a masked position would be NaN in the gradient.
"""

import math

import torch
from torch import Tensor

from protocol.recipe import Objective
from trainer.batch import MicroBatch

MAX_LOG_RATIO = 20.0
OWN_CLIP = {"grpo": (0.2, 0.2), "dr_grpo": (0.2, 0.2), "dapo": (0.2, 0.28), "gspo": (3e-4, 4e-4), "cispo": (1.0, 4.0)}
"""(low, high) of each objective's paper; for cispo ScaleRL's upper bound of 5 (arXiv 2510.13786)."""

Figures = dict[str, Tensor]
"""Detached, [n] float32 each: what one forward pass showed of its tokens; `figures.of_tokens` sums it up."""


def objective_loss(
    logprobs: Tensor, entropies: Tensor, micro: MicroBatch, objective: Objective
) -> tuple[Tensor, Figures]:
    """logprobs, entropies [n] float32 of `micro`'s tokens -> this micro-batch's part of the loss, and figures."""
    if objective.name == "sft":
        return _supervised(logprobs, entropies, micro)
    mask = micro.mask
    log_mismatch = _log_ratio(logprobs.detach() - micro.sampler_logprobs, mask)
    old = logprobs.detach() if objective.recompute_old_logprobs else micro.sampler_logprobs
    ratio, held, surrogate = _surrogate(logprobs, _log_ratio(logprobs - old, mask), micro, objective)
    weight, kept = correction(log_mismatch, held, micro, objective)
    loss = -weight * surrogate
    figures = {"log_mismatch": log_mismatch, "kept": kept, "entropy": entropies, **_clipped(ratio, micro, objective)}
    if objective.kl_beta and micro.ref_logprobs is not None:
        kl = kl_estimate(logprobs, micro.ref_logprobs, mask, objective.kl_estimator)
        loss = loss + objective.kl_beta * kl
        figures["kl"] = kl
    if objective.entropy_bonus:
        loss = loss - objective.entropy_bonus * entropies
    loss = torch.where(micro.shares > 0, loss, 0.0) * micro.shares
    return loss.sum(), _detached(figures | {"loss": loss}, micro)


def clip_range(objective: Objective) -> tuple[float, float]:
    """(low, high): the ratio may move within [1 - low, 1 + high]."""
    given = (objective.clip_low, objective.clip_high)
    low, high = (own if value is None else value for value, own in zip(given, OWN_CLIP[objective.name], strict=True))
    return low, high


def correction(log_mismatch: Tensor, held: Tensor, micro: MicroBatch, objective: Objective) -> tuple[Tensor, Tensor]:
    """log(trainer / sampler) [n], raw -> the weight [n] of each token's surrogate, and 1 [n] where it is not masked.

    rho_t = exp(log_mismatch_t). token_truncate: min(rho_t, cap) (TIS). sequence_truncate: min(prod_t rho_t, cap).
    token_mask: rho_t, or 0 outside [floor, cap] (IcePop). sequence_mask: min(rho_t, cap), or 0 for completions whose
    geometric mean of rho_t is outside: a product would leave [floor, cap] the sooner the longer a completion is.
    With two policies the surrogate is a multiple of rho_t already, clipped or averaged as the objective does it: of
    `held` [n]. That takes the place of rho_t then, and the weight is what is left of it.
    """
    kept = torch.ones_like(log_mismatch)
    if objective.correction == "none":
        return kept, kept
    cap = math.log(objective.correction_cap or (1 + clip_range(objective)[1] if objective.name == "cispo" else 2.0))
    floor = math.log(objective.correction_floor) if objective.correction_floor else -math.inf
    log_held = torch.zeros_like(held) if objective.recompute_old_logprobs else held.log()
    log_rho = log_mismatch if objective.recompute_old_logprobs else log_held
    log_weight = log_rho.clamp(max=cap)
    match objective.correction:
        case "sequence_truncate":
            log_weight = _summed(log_mismatch, micro).clamp(max=cap)
        case "token_mask":
            log_weight = log_rho
            kept = ((log_mismatch >= floor) & (log_mismatch <= cap)).to(kept.dtype)
        case "sequence_mask":
            mean = _mean(log_mismatch, micro)
            kept = ((mean >= floor) & (mean <= cap)).to(kept.dtype)
    return (log_weight - log_held).clamp(-MAX_LOG_RATIO, MAX_LOG_RATIO).exp() * kept, kept


def kl_estimate(logprobs: Tensor, ref_logprobs: Tensor, mask: Tensor, estimator: str) -> Tensor:
    """[n] estimates of KL(policy || reference) from the sampled tokens, 0 where masked (Schulman, "Approximating KL
    Divergence", 2020). With d = log(ref / policy): k1 = -d; k2 = d^2 / 2; k3 = exp(d) - d - 1, unbiased and never
    negative. As a term of a loss only the gradient counts. On policy that of k1 is 0 on average, that of k2 is
    KL(policy || reference)'s, that of k3 is KL(reference || policy)'s.
    """
    difference = _log_ratio(ref_logprobs - logprobs, mask)
    match estimator:
        case "k1":
            return -difference
        case "k2":
            return difference.square() / 2
    return difference.expm1() - difference


def _surrogate(
    logprobs: Tensor, log_ratio: Tensor, micro: MicroBatch, objective: Objective
) -> tuple[Tensor, Tensor, Tensor]:
    """-> the ratio before it is clipped, what the surrogate holds of it, the surrogate: [n] each."""
    low, high = clip_range(objective)
    ratio = (_mean(log_ratio, micro) if objective.name == "gspo" else log_ratio).exp()
    clipped = ratio.clamp(1 - low, 1 + high)
    if objective.name == "cispo":
        held = clipped.detach()
        return ratio, held, held * micro.advantages * torch.where(micro.mask > 0, logprobs, 0.0)
    surrogate = torch.minimum(ratio * micro.advantages, clipped * micro.advantages)
    if objective.dual_clip:
        bounded = torch.maximum(surrogate, objective.dual_clip * micro.advantages)
        surrogate = torch.where(micro.advantages < 0, bounded, surrogate)
    return ratio, ratio.detach(), surrogate


def _clipped(ratio: Tensor, micro: MicroBatch, objective: Objective) -> Figures:
    """1 where the clip is active: the token moves the policy no further (cispo: moves it with a bounded weight)."""
    low, high = clip_range(objective)
    below, above = ratio < 1 - low, ratio > 1 + high
    if objective.name != "cispo":
        below, above = below & (micro.advantages < 0), above & (micro.advantages > 0)
    return {"clipped_low": below.float(), "clipped_high": above.float()}


def _supervised(logprobs: Tensor, entropies: Tensor, micro: MicroBatch) -> tuple[Tensor, Figures]:
    loss = -torch.where(micro.shares > 0, logprobs, 0.0) * micro.shares
    nothing = torch.zeros_like(loss)
    figures = {"log_mismatch": nothing, "kept": nothing + 1, "clipped_low": nothing, "clipped_high": nothing}
    return loss.sum(), _detached(figures | {"entropy": entropies, "loss": loss}, micro)


def _detached(figures: Figures, micro: MicroBatch) -> Figures:
    starts = torch.ones_like(micro.mask)
    starts[1:] = (micro.completion.diff() != 0).float()
    figures = figures | {"mask": micro.mask, "length": micro.lengths[micro.completion], "start": starts}
    return {name: value.detach().float() for name, value in figures.items()}


def _log_ratio(difference: Tensor, mask: Tensor) -> Tensor:
    return torch.where(mask > 0, difference, 0.0).clamp(-MAX_LOG_RATIO, MAX_LOG_RATIO)


def _summed(values: Tensor, micro: MicroBatch) -> Tensor:
    """[n] -> [n]: every token gets the sum over its completion."""
    sums = values.new_zeros(len(micro.lengths)).index_add(0, micro.completion, values)
    return sums[micro.completion]


def _mean(values: Tensor, micro: MicroBatch) -> Tensor:
    """[n] -> [n]: every token gets the mean over its completion."""
    return _summed(values, micro) / micro.lengths[micro.completion]
