"""The objective against ten lines of float64, and what must never reach it."""

import numpy as np
import pytest
import torch

from protocol.recipe import Objective
from tests.groups import make_group
from trainer.batch import make_batch
from trainer.loss import grpo, k3, summarize


def micro_batch(**options):
    groups = [make_group(number, rewards=[0.0, 1.0, 3.0], reference=True) for number in range(3)]
    settings = {"rank": 0, "world": 1, "tokens_per_micro_batch": 10**6, "advantage_std": True, "skip_zero": False}
    [micro] = make_batch(groups, step=0, **settings | options).micro_batches
    return micro


def reference_loss(logprobs, micro, objective):
    """Equation by equation, one token after the other."""
    total = 0.0
    columns = (micro.sampler_logprobs.double(), micro.ref_logprobs.double(), micro.advantages.double())
    for lp, mu, ref, a in zip(logprobs, *columns, strict=True):
        old = lp.detach() if objective.recompute_old_logprobs else mu
        weight = min(torch.exp(old - mu).item(), objective.importance_cap) if objective.recompute_old_logprobs else 1.0
        ratio = torch.exp(lp - old)
        clipped = torch.clamp(ratio, 1 - objective.clip_low, 1 + objective.clip_high)
        surrogate = torch.minimum(torch.clamp(ratio, max=objective.importance_cap) * a, clipped * a)
        kl = torch.exp(ref - lp) - (ref - lp) - 1
        total = total - weight * surrogate + objective.kl_beta * kl
    return total / micro.denominator


@pytest.mark.parametrize("recompute", [False, True])
@pytest.mark.parametrize("kl_beta", [0.0, 0.04])
@pytest.mark.parametrize("clip", [(0.2, 0.2), (0.2, 0.28)])
def test_value_and_gradient_equal_the_definition(recompute, kl_beta, clip):
    micro = micro_batch()
    objective = Objective(kl_beta=kl_beta, clip_low=clip[0], clip_high=clip[1], recompute_old_logprobs=recompute)
    noise = torch.from_numpy(np.random.default_rng(1).normal(0, 0.5, len(micro.mask)))
    logprobs = (micro.sampler_logprobs.double() + noise).requires_grad_()
    loss, _ = grpo(logprobs, torch.zeros_like(micro.mask), micro, objective)
    expected = reference_loss(logprobs, micro, objective)
    torch.testing.assert_close(loss, expected, atol=1e-6, rtol=1e-6)
    for one, other in zip(torch.autograd.grad(loss, logprobs), torch.autograd.grad(expected, logprobs), strict=True):
        torch.testing.assert_close(one, other, atol=1e-6, rtol=1e-5)


def test_k3_is_zero_for_equal_policies_and_never_negative():
    logprobs, mask = -torch.rand(100), torch.ones(100)
    assert (k3(logprobs, logprobs, mask) == 0).all()
    assert (k3(logprobs, logprobs + torch.randn(100), mask) >= 0).all()


def test_a_masked_token_with_an_infinite_ratio_leaves_loss_and_gradient_finite():
    micro = micro_batch()
    micro.mask[0] = 0.0
    logprobs = micro.sampler_logprobs.clone()
    logprobs[0] = float("-inf")
    logprobs.requires_grad_()
    loss, sums = grpo(logprobs, torch.zeros_like(micro.mask), micro, Objective())
    loss.backward()
    assert torch.isfinite(loss) and torch.isfinite(logprobs.grad).all()
    assert all(torch.isfinite(value) for value in sums.values())


def test_a_negative_advantage_cannot_push_beyond_the_cap():
    micro = micro_batch()
    micro.advantages.fill_(-1.0)
    logprobs = (micro.sampler_logprobs + 3.0).requires_grad_()  # ratio e^3 = 20 everywhere
    loss, _ = grpo(logprobs, torch.zeros_like(micro.mask), micro, Objective(kl_beta=0.0, importance_cap=2.0))
    assert loss.item() == pytest.approx(2.0 * micro.mask.sum().item() / micro.denominator)


def test_the_mismatch_is_reported_before_anything_is_clipped():
    micro = micro_batch()
    logprobs = micro.sampler_logprobs + 3.0
    _, sums = grpo(logprobs, torch.zeros_like(micro.mask), micro, Objective())
    figures = summarize({name: float(value) for name, value in sums.items()})
    assert figures["sampling/importance_sampling_ratio/mean"] == pytest.approx(np.exp(3), rel=1e-4)
    assert figures["sampling/sampling_logp_difference/max"] == pytest.approx(3.0, rel=1e-4)
