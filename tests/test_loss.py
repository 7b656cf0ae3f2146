"""The objectives against their papers, token by token, and the mistakes that others have made."""

import math

import msgspec
import numpy as np
import pytest
import torch

from protocol.recipe import Objective, Recipe, Sampling
from tests import by_hand
from tests.groups import make_group
from trainer.advantage import ADVANTAGES
from trainer.batch import make_batch
from trainer.figures import of_tokens
from trainer.loss import clip_range, kl_estimate, objective_loss

MAX_TOKENS = 24
CLIPPED = ("grpo", "dr_grpo", "dapo", "gspo")
LEARNED = (*CLIPPED, "cispo")
SIGNAL = ([0.0, 1.0, 0.0, 2.0], [1.0, 1.0, 1.0, 1.0], [0.0, 3.0, 1.0, 0.0], [2.0, 0.0, 0.5, 1.0])
"""Rewards of four groups; the second has no signal."""
THREE = {"recompute_old_logprobs": True}


def step(groups=None, **settings):
    """-> groups whose last answers were cut, their only micro-batch, the objective: without what is not set."""
    objective = Objective(**{"kl_beta": 0.0, "correction": "none"} | settings)
    if groups is None:
        groups = [make_group(number, rewards=row, reference=True) for number, row in enumerate(SIGNAL)]
    for group in groups:
        group.completions[-1] = msgspec.structs.replace(group.completions[-1], finish="length")
    recipe = Recipe(objective=objective, sampling=Sampling(max_tokens=MAX_TOKENS))
    advantages = ADVANTAGES[objective.advantage_name]
    [micro] = make_batch(groups, recipe, advantages, rank=0, world=1, step=0).micro_batches
    return groups, micro, objective


def apart(micro) -> torch.Tensor:
    """[n] float64 log-probs up to 1 nat away from the sampler's, of each token always the same."""
    mu = micro.sampler_logprobs.double()
    return (mu + torch.sin(1e4 * mu)).requires_grad_()


def derived(loss: torch.Tensor, *leaves: torch.Tensor) -> list[torch.Tensor]:
    """The loss and its gradient by each of the leaves."""
    return [loss.detach(), *torch.autograd.grad(loss, leaves, allow_unused=True, materialize_grads=True)]


def trained(logprobs, micro, objective, entropies=None) -> tuple[torch.Tensor, torch.Tensor, dict[str, float]]:
    """-> the loss, its gradient by the log-probs, and the figures that the record would show."""
    entropies = torch.ones_like(logprobs) if entropies is None else entropies
    loss, figures = objective_loss(logprobs, entropies, micro, objective)
    return *derived(loss, logprobs), of_tokens({name: values.numpy() for name, values in figures.items()})


CORRECTIONS = {
    "token_truncate": {"correction": "token_truncate", "correction_cap": 1.3},
    "token_mask": {"correction": "token_mask", "correction_cap": 1.5, "correction_floor": 0.7},
    "sequence_truncate": {"correction": "sequence_truncate", "correction_cap": 1.3},
    "sequence_mask": {"correction": "sequence_mask", "correction_cap": 1.2, "correction_floor": 0.9},
}
OPTIONS = {
    "none": {},
    "mask_truncated": {"mask_truncated": True},
    "clip": {"clip_low": 0.1, "clip_high": 0.4},
    "dual_clip": {"dual_clip": 1.05},
    "k1": {"kl_beta": 0.1, "kl_estimator": "k1"},
    "k2": {"kl_beta": 0.1, "kl_estimator": "k2"},
    "k3": {"kl_beta": 0.1, "kl_estimator": "k3"},
    "entropy_bonus": {"entropy_bonus": 0.1},
    **CORRECTIONS,
    "three_policies": THREE,
    **{f"three_policies_{name}": settings | THREE for name, settings in CORRECTIONS.items()},
    "many": {"kl_beta": 0.1, "entropy_bonus": 0.1, "mask_truncated": True, **CORRECTIONS["token_mask"]},
}


def compare(groups, micro, objective) -> float:
    """The loss and its gradient, ours and by definition -> the loss."""
    logprobs, entropies = apart(micro), torch.rand(len(micro.mask), dtype=torch.float64, requires_grad=True)
    found, _ = objective_loss(logprobs, entropies, micro, objective)
    everyone = by_hand.answers(groups, micro, objective)
    defined = by_hand.loss(logprobs, entropies, everyone, objective, MAX_TOKENS)
    for one, other in zip(derived(found, logprobs, entropies), derived(defined, logprobs, entropies), strict=True):
        torch.testing.assert_close(one, other, atol=1e-7, rtol=1e-6)
    return float(defined.detach())


CASES = [(name, option) for name in LEARNED for option in OPTIONS if (name, option) != ("cispo", "dual_clip")]


@pytest.mark.parametrize(("name", "option"), CASES)
def test_value_and_gradient_equal_the_definition(name, option):
    found = compare(*step(name=name, **OPTIONS[option]))
    idle = option in ("none", "three_policies") or (name, option) == (
        "gspo",
        "token_truncate",
    )  # a mean is never so far
    if not idle:  # what changes nothing would prove nothing
        _, micro, objective = step(name=name, **(THREE if option.startswith("three_policies") else {}))
        assert float(trained(apart(micro), micro, objective)[0]) != pytest.approx(found, rel=1e-5)


@pytest.mark.parametrize("settings", [{}, {"mask_truncated": True}])
def test_demonstrations_are_learned_with_the_mean_over_all_their_tokens(settings):
    compare(*step(name="sft", **settings))


@pytest.mark.parametrize("name", LEARNED)
def test_on_policy_each_gradient_is_the_policy_gradient_with_its_own_mean(name):
    """Also cispo's: clamped to [0, 0.2] instead of [0, 1 + high], as with another's default, it would be a fifth."""
    groups, micro, objective = step(name=name)
    logprobs = micro.sampler_logprobs.clone().requires_grad_()
    _, gradient, figures = trained(logprobs, micro, objective)
    everyone = by_hand.answers(groups, micro, objective)
    tokens = sum(len(one.sampler) for one in everyone)
    for one in everyone:
        n = len(one.sampler)
        mean = {"grpo": 16 * n, "gspo": 16 * n, "dr_grpo": 16 * MAX_TOKENS}.get(name, tokens)
        if one.place:
            torch.testing.assert_close(gradient[one.place], torch.full((n,), -one.advantage / mean))
    assert figures["clip_ratio/region_mean"] == 0


def test_cispo_weighs_by_the_ratio_up_to_its_bound_and_clips_no_gradient_away():
    _, micro, objective = step(name="cispo", correction="token_truncate", correction_cap=2.0, **THREE)
    _, two, plain = step(name="cispo", correction="none")
    _, both, truncated = step(name="cispo", correction="token_truncate", correction_cap=2.0)
    push = -two.advantages * two.shares
    for ratio, weight in ((0.5, 0.5), (1.0, 1.0), (4.0, 4.0), (50.0, 5.0)):
        logprobs = (two.sampler_logprobs + math.log(ratio)).requires_grad_()
        torch.testing.assert_close(trained(logprobs, two, plain)[1], weight * push, rtol=1e-5, atol=0)
        for case, settings in ((micro, objective), (both, truncated)):
            logprobs = (case.sampler_logprobs + math.log(ratio)).requires_grad_()
            torch.testing.assert_close(trained(logprobs, case, settings)[1], min(ratio, 2.0) * push, rtol=1e-5, atol=0)


def share(tokens: torch.Tensor) -> float:
    return float(tokens.float().mean())


@pytest.mark.parametrize("name", CLIPPED)
def test_a_clipped_token_moves_nothing_and_a_bad_one_stays_bounded(name):
    _, micro, objective = step(name=name, dual_clip=3.0)
    good, bad = micro.advantages > 0, micro.advantages < 0
    logprobs = (micro.sampler_logprobs + math.log(0.1)).requires_grad_()
    _, gradient, figures = trained(logprobs, micro, objective)
    assert ((gradient != 0) == good).all()
    assert (figures["clip_ratio/low_mean"], figures["clip_ratio/high_mean"]) == (pytest.approx(share(bad)), 0)
    logprobs = (micro.sampler_logprobs + math.log(10.0)).requires_grad_()
    loss, gradient, figures = trained(logprobs, micro, objective)
    assert not gradient.any()
    assert (figures["clip_ratio/low_mean"], figures["clip_ratio/high_mean"]) == (0, pytest.approx(share(good)))
    worst = float((-3.0 * micro.advantages * micro.shares)[bad].sum())
    best = float((-(1 + clip_range(objective)[1]) * micro.advantages * micro.shares)[good].sum())
    assert float(loss) == pytest.approx(worst + best, rel=1e-5)


@pytest.mark.parametrize("name", CLIPPED[:3])
def test_without_dual_clip_the_correction_bounds_a_bad_token(name):
    _, micro, objective = step(name=name, correction="token_truncate", correction_cap=2.0)
    logprobs = (micro.sampler_logprobs + 5.0).requires_grad_()
    _, gradient, _ = trained(logprobs, micro, objective)
    bad = micro.advantages < 0
    torch.testing.assert_close(gradient[bad], (-2.0 * micro.advantages * micro.shares)[bad], rtol=1e-5, atol=0)
    assert not gradient[~bad].any()


@pytest.mark.parametrize("name", [*LEARNED, "sft"])
@pytest.mark.parametrize("value", [-math.inf, math.nan])
def test_a_masked_token_can_be_anything(name, value):
    """0 * inf is NaN, forward and backward."""
    settings = {} if name == "sft" else {"kl_beta": 0.1, "entropy_bonus": 0.1, "correction": "sequence_mask"}
    _, micro, objective = step(name=name, **settings)
    micro.mask[0] = micro.shares[0] = 0.0
    logprobs, entropies = micro.sampler_logprobs.clone(), torch.ones_like(micro.mask)
    logprobs[0] = entropies[0] = value
    loss, gradient, figures = trained(logprobs.requires_grad_(), micro, objective, entropies)
    assert loss.isfinite() and gradient.isfinite().all() and gradient[0] == 0 and gradient[1:].any()
    assert np.isfinite(list(figures.values())).all()


@pytest.mark.parametrize("correction", [*CORRECTIONS, "none"])
def test_the_mismatch_is_shown_as_it_is_also_where_all_of_it_is_masked(correction):
    _, micro, objective = step(correction=correction, correction_cap=1.5, correction_floor=0.5)
    _, gradient, figures = trained((micro.sampler_logprobs + 3.0).requires_grad_(), micro, objective)
    masked = correction.endswith("mask")
    assert figures["correction/masked_fraction"] == masked and bool(gradient.any()) == (not masked)
    assert figures["sampling/sampling_logp_difference/mean"] == pytest.approx(3.0, rel=1e-5)
    for name in ("min", "p01", "p50", "mean", "p99", "max"):
        assert figures[f"sampling/importance_sampling_ratio/{name}"] == pytest.approx(math.exp(3), rel=1e-5)


def test_the_ratio_of_a_completion_is_the_product_over_its_tokens():
    groups, micro, objective = step(kl_beta=0.1)
    logprobs = apart(micro)
    _, _, figures = trained(logprobs, micro, objective)
    gap = (logprobs.detach() - micro.sampler_logprobs).tolist()
    products = [math.exp(sum(gap[one.place])) for one in by_hand.answers(groups, micro, objective)]
    for name, quantile in (("p01", 0.01), ("p50", 0.5), ("p99", 0.99)):
        assert figures[f"sampling/sequence_ratio/{name}"] == pytest.approx(np.quantile(products, quantile), rel=1e-4)


@pytest.mark.parametrize(("mismatch", "masked"), [(0.1, 0.0), (0.3, 1.0)])
def test_a_sequence_mask_treats_short_and_long_answers_alike(mismatch, masked):
    """The product of the ratios leaves [0.8, 1.2] for 20 tokens that are each 10 % off, and not for one."""
    group = make_group(0, rewards=[0.0, 1.0, 0.0, 2.0], lengths=[1, 4, 10, 20])
    _, micro, objective = step([group], correction="sequence_mask", correction_cap=1.2, correction_floor=0.8)
    _, gradient, figures = trained((micro.sampler_logprobs - mismatch).requires_grad_(), micro, objective)
    for part in ("", "/shortest", "/short", "/long", "/longest"):
        assert figures[f"correction/masked_fraction{part}"] == masked
    assert bool(gradient.any()) == (not masked)


def test_who_is_masked_is_shown_by_length():
    group = make_group(0, rewards=[0.0, 1.0, 0.0, 2.0], lengths=[20, 4, 4, 4])
    groups, micro, objective = step([group], correction="token_mask", correction_cap=1.2, correction_floor=0.8)
    logprobs, longest = micro.sampler_logprobs.clone(), by_hand.answers(groups, micro, objective)[0].place
    logprobs[longest] += 1.0
    _, gradient, figures = trained(logprobs.requires_grad_(), micro, objective)
    masked = {name.split("/")[-1]: value for name, value in figures.items() if "masked_fraction/" in name}
    assert masked == {"shortest": 0.0, "short": 0.5, "long": 1.0, "longest": 1.0}
    assert not gradient[longest].any() and int((gradient != 0).sum()) == 12


def test_advantages_survive_rewards_that_bfloat16_cannot_tell_apart():
    group = make_group(0, rewards=[256.25, 256.5, 256.75])
    assert torch.tensor([256.25, 256.5, 256.75], dtype=torch.bfloat16).std() == 0
    groups, micro, objective = step([group])
    found = [one.place and micro.advantages[one.place][0] for one in by_hand.answers(groups, micro, objective)]
    assert found[1] is None and [float(found[0]), float(found[2])] == pytest.approx([-0.9996, 0.9996], abs=1e-5)


def test_an_entropy_bonus_raises_entropy():
    _, micro, objective = step(entropy_bonus=1.0)
    micro.advantages.zero_()
    logits = torch.randn(len(micro.mask), 50, generator=torch.Generator().manual_seed(0)).requires_grad_()

    def entropies():
        return torch.distributions.Categorical(logits=logits).entropy()

    logprobs = logits.log_softmax(1)[:, 0]
    loss, _ = objective_loss(logprobs, entropies(), micro, objective)
    before = entropies().detach()
    loss.backward()
    with torch.no_grad():
        logits -= 10.0 * logits.grad
    assert (entropies() > before).all()


def test_estimates_of_the_kl_divergence():
    """The mean over samples of the policy is exact for k1 and k3 and near for k2; k3 is never negative, k1 is."""
    random = torch.Generator().manual_seed(0)
    policy, reference = torch.randn(2, 6, generator=random, dtype=torch.float64).mul(0.3).log_softmax(1)
    exact = float((policy.exp() * (policy - reference)).sum())
    mask = torch.ones(6)
    for estimator, error in (("k1", 1e-12), ("k3", 1e-12), ("k2", 0.2 * exact)):
        found = kl_estimate(policy, reference, mask, estimator)
        assert float((policy.exp() * found).sum()) == pytest.approx(exact, abs=error)
        assert not kl_estimate(policy, policy, mask, estimator).any()
        assert not kl_estimate(policy, reference, torch.zeros(6), estimator).any()
        assert estimator == "k1" or (found >= 0).all()
    assert (kl_estimate(policy, reference, mask, "k1") < 0).any()


def test_gradients_of_the_kl_estimates_on_policy():
    """On average k1's is 0, k2's that of KL(policy || reference), k3's that of KL(reference || policy)."""
    logits, other = torch.randn(2, 6, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    logits.requires_grad_()
    policy, reference = logits.log_softmax(0), other.log_softmax(0)
    exact = {
        "k1": 0 * logits.sum(),
        "k2": (policy.exp() * (policy - reference)).sum(),
        "k3": (reference.exp() * (reference - policy)).sum(),
    }
    for estimator, divergence in exact.items():
        sampled = (policy.exp().detach() * kl_estimate(policy, reference, torch.ones(6), estimator)).sum()
        [found] = torch.autograd.grad(sampled, logits, retain_graph=True)
        torch.testing.assert_close(found, torch.autograd.grad(divergence, logits, retain_graph=True)[0])


@pytest.mark.parametrize("name", LEARNED)
def test_a_clip_that_is_not_set_is_that_of_the_paper(name):
    assert clip_range(Objective(name=name)) == by_hand.CLIP[name]
    assert clip_range(Objective(name=name, clip_high=0.0)) == (by_hand.CLIP[name][0], 0.0)
    assert clip_range(Objective(name=name, clip_low=0.0)) == (0.0, by_hand.CLIP[name][1])
