"""The GRPO objective (arXiv 2402.03300, equation 3) on packed tokens, and what is measured beside it.

    r_t    = pi(t) / old(t)                          old = the sampler's log-probs; with recompute_old_logprobs the
    w_t    = min(old(t) / sampler(t), cap)           trainer's own before the step, and w corrects what is between
    l_t    = -w_t * min(min(r_t, cap) A, clip(r_t, 1 - low, 1 + high) A) + beta * k3_t
    k3_t   = exp(ref - pi) - (ref - pi) - 1          (Schulman, "Approximating KL Divergence", estimator k3)
    loss   = sum_t mask_t l_t / denominator

min(r, cap) bounds what a negative advantage may do (the delta of TRL); w is truncated importance sampling.
Log-ratios are masked and clamped before exp: 0 * inf at a masked position would be NaN in the gradient.
"""

import torch
from torch import Tensor

from protocol.recipe import Objective
from trainer.batch import MicroBatch

MAX_LOG_RATIO = 20.0


def grpo(logprobs: Tensor, entropies: Tensor, micro: MicroBatch, objective: Objective) -> tuple[Tensor, dict]:
    """logprobs, entropies [n] float32 of `micro`'s tokens -> this micro-batch's share of the step's loss, and
    detached sums over its tokens (`max/...`: maxima; `sum/...`: no means) that `summarize` turns into metrics."""
    mask, advantages = micro.mask, micro.advantages
    log_mismatch = _log_ratio(logprobs.detach() - micro.sampler_logprobs, mask)
    if objective.recompute_old_logprobs:  # one step per batch: the policy before the step is this forward pass
        log_ratio = _log_ratio(logprobs - logprobs.detach(), mask)
        weight = log_mismatch.exp().clamp(max=objective.importance_cap)
    else:
        log_ratio = _log_ratio(logprobs - micro.sampler_logprobs, mask)
        weight = torch.ones_like(advantages)
    ratio = log_ratio.exp()
    clipped = ratio.clamp(1 - objective.clip_low, 1 + objective.clip_high)
    surrogate = torch.minimum(ratio.clamp(max=objective.importance_cap) * advantages, clipped * advantages)
    loss = -weight * surrogate
    stats = _stats(log_mismatch, entropies, micro)
    stats["clip_ratio/low_mean"] = ((ratio < 1 - objective.clip_low) & (advantages < 0)).float() * mask
    stats["clip_ratio/high_mean"] = ((ratio > 1 + objective.clip_high) & (advantages > 0)).float() * mask
    if objective.kl_beta and micro.ref_logprobs is not None:
        kl = k3(logprobs, micro.ref_logprobs, mask)
        loss = loss + objective.kl_beta * kl
        stats["kl"] = kl.detach() * mask
    total = (loss * mask).sum() / micro.denominator
    stats["sum/loss"] = total.detach()
    return total, {name: value.max() if name.startswith("max/") else value.sum() for name, value in stats.items()}


def k3(logprobs: Tensor, ref_logprobs: Tensor, mask: Tensor) -> Tensor:
    """[n] non-negative, unbiased estimates of KL(policy || reference), 0 where masked."""
    log_ratio = _log_ratio(ref_logprobs - logprobs, mask)
    return log_ratio.expm1() - log_ratio


def _log_ratio(difference: Tensor, mask: Tensor) -> Tensor:
    return torch.where(mask > 0, difference, 0.0).clamp(-MAX_LOG_RATIO, MAX_LOG_RATIO)


def _stats(log_mismatch: Tensor, entropies: Tensor, micro: MicroBatch) -> dict[str, Tensor]:
    """Per token, before any clipping: how far sampler and trainer are apart on the tokens that were sampled."""
    ratio = log_mismatch.exp() * micro.mask
    return {
        "tokens": micro.mask,
        "entropy": entropies * micro.mask,
        "sampling/sampling_logp_difference/mean": log_mismatch.abs(),
        "max/sampling/sampling_logp_difference/max": log_mismatch.abs(),
        "sampling/importance_sampling_ratio/mean": ratio,
        "max/sampling/importance_sampling_ratio/max": ratio,
    }


def summarize(sums: dict[str, float]) -> dict[str, float]:
    """Sums over all tokens of all ranks -> means per token; maxima and totals stay."""
    tokens = max(sums.get("tokens", 0.0), 1.0)
    whole = {name: value for name, value in sums.items() if name.startswith(("max/", "sum/"))}
    means = {name: value / tokens for name, value in sums.items() if name not in whole and name != "tokens"}
    return means | {name[4:]: value for name, value in whole.items()}
