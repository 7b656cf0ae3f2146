"""The numbers of the record against numbers worked out by hand."""

import math

import msgspec
import numpy as np
import pytest
import torch

from protocol.messages import Span
from protocol.recipe import Objective, Recipe, TrainerTable
from tests.groups import make_group
from trainer.advantage import ADVANTAGES
from trainer.batch import make_batch
from trainer.figures import of_groups, of_tokens
from trainer.loss import objective_loss


def tokens(*completions: dict, padding: int = 0) -> dict[str, np.ndarray]:
    """One rank's figures: completions behind each other, each value for all of its tokens or one for each."""
    usual = {"kept": 1.0, "clipped_low": 0.0, "clipped_high": 0.0, "entropy": 0.0, "loss": 0.0, "mask": 1.0}
    columns = {name: [] for name in (*usual, "log_mismatch", "length", "start")}
    for completion in completions:
        n = len(completion["log_mismatch"])
        start = {"length": float(n), "start": [1.0] + [0.0] * (n - 1)}
        for name, values in (usual | start | completion).items():
            columns[name].extend(values if isinstance(values, list) else [values] * n)
    return {name: np.array(values + [0.0] * padding, np.float32) for name, values in columns.items()}


FILLER = {"log_mismatch": [9.0], "mask": 0.0, "entropy": math.nan, "loss": math.inf, "kept": 0.0, "clipped_low": 1.0}
"""Nothing of it may be counted."""


def together(*ranks: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
    """As `Ranks.gather` puts them."""
    return {name: np.concatenate([rank[name] for rank in ranks]) for name in ranks[0]}


def of_step(world: int, budget: int) -> dict[str, float]:
    """What the record shows of one and the same step."""
    objective = Objective(name="gspo", correction="sequence_mask", correction_cap=1.1, correction_floor=0.95)
    groups = [make_group(number, rewards=[0.0, 1.0, 0.0, 2.0], reference=True) for number in range(5)]
    recipe = Recipe(objective=objective, trainer=TrainerTable(tokens_per_micro_batch=budget))
    ranks = []
    for rank in range(world):
        seen = []
        for micro in make_batch(groups, recipe, ADVANTAGES["group"], rank=rank, world=world, step=0).micro_batches:
            mu = micro.sampler_logprobs
            _, found = objective_loss(mu + torch.sin(1e4 * mu) / 3, -mu, micro, objective)
            seen.append({name: values.numpy() for name, values in found.items()})
        ranks.append(together(*seen))
    widest = max(len(rank["mask"]) for rank in ranks)
    padded = [{name: np.pad(row, (0, widest - len(row))) for name, row in rank.items()} for rank in ranks]
    return of_tokens(together(*padded))


@pytest.mark.parametrize("world", [1, 3, 32])
def test_a_step_has_the_same_figures_however_it_is_cut(world):
    """Quarters apart: where a boundary falls between completions of one length, their order decides."""
    whole, parts = of_step(1, 10**6), of_step(world, 50)
    assert 0 < whole["correction/masked_fraction"] < 1 and whole["clip_ratio/region_mean"] > 0
    quarters = {name for name in whole if name.startswith("correction/masked_fraction/")}
    for name in set(whole) - quarters:
        assert parts[name] == pytest.approx(whole[name], rel=1e-4, abs=1e-6), name


def test_means_and_extremes_are_over_the_tokens_of_all_ranks_and_nothing_else():
    one = tokens({"log_mismatch": [0.1, -0.3], "loss": [1.0, 2.0], "entropy": [1.0, 3.0], "clipped_low": [1.0, 0.0]})
    two = tokens({"log_mismatch": [0.2, 0.0], "loss": -4.0, "clipped_high": 1.0, "entropy": 2.0}, FILLER, padding=3)
    figures = of_tokens(together(one, two, tokens(FILLER, padding=5)))
    assert figures["loss"] == pytest.approx(1 + 2 - 4 - 4)  # the parts add up to the step's loss
    assert figures["entropy"] == pytest.approx((1 + 3 + 2 + 2) / 4)
    assert (figures["clip_ratio/low_mean"], figures["clip_ratio/high_mean"]) == (0.25, 0.5)
    assert figures["clip_ratio/region_mean"] == 0.75
    assert figures["sampling/sampling_logp_difference/mean"] == pytest.approx((0.1 + 0.3 + 0.2 + 0.0) / 4)
    assert figures["sampling/sampling_logp_difference/max"] == pytest.approx(0.3)
    ratios = [math.exp(0.1), math.exp(-0.3), math.exp(0.2), 1.0]
    for name, value in (("min", min(ratios)), ("mean", sum(ratios) / 4), ("max", max(ratios))):
        assert figures[f"sampling/importance_sampling_ratio/{name}"] == pytest.approx(value)
    assert "kl" not in figures


def test_the_kl_is_there_when_it_was_computed():
    figures = tokens({"log_mismatch": [0.0, 0.0]}, FILLER)
    assert of_tokens(figures | {"kl": np.array([0.5, 1.0, 9.0], np.float32)})["kl"] == pytest.approx(0.75)


def test_sequence_ratios_are_products_over_completions_wherever_they_lie():
    """Of two micro-batches on one rank, a row of fillers between, and another rank with padding."""
    one = tokens({"log_mismatch": [0.1, 0.2, 0.3]}, {"log_mismatch": [-0.5]}, FILLER, {"log_mismatch": [0.1, 0.1]})
    two = tokens({"log_mismatch": [1.0, -1.0]}, FILLER, padding=4)
    figures = of_tokens(together(one, two))
    whole = [math.exp(0.6), math.exp(-0.5), math.exp(0.2), 1.0]
    assert figures["sampling/sequence_ratio/p50"] == pytest.approx((1.0 + math.exp(0.2)) / 2)  # linear between two
    assert figures["sampling/sequence_ratio/p99"] == pytest.approx(
        math.exp(0.2) + 0.97 * (math.exp(0.6) - math.exp(0.2))
    )
    assert figures["sampling/sequence_ratio/p01"] == pytest.approx(whole[1] + 0.03 * (whole[3] - whole[1]))


def test_quantiles_of_the_token_ratio():
    """101 tokens with ratios 0.50, 0.51, ... 1.50: quantile q is 0.5 + q."""
    ratios = 0.5 + np.arange(101) / 100
    shuffled = np.random.default_rng(0).permutation(np.log(ratios)).tolist()
    figures = of_tokens(tokens({"log_mismatch": shuffled[:40]}, {"log_mismatch": shuffled[40:]}))
    for name, value in (("p01", 0.51), ("p50", 1.0), ("p99", 1.49)):
        assert figures[f"sampling/importance_sampling_ratio/{name}"] == pytest.approx(value, rel=1e-5)


def test_a_product_over_a_long_completion_stays_finite():
    figures = of_tokens(tokens({"log_mismatch": [15.0] * 100}))
    assert figures["sampling/sequence_ratio/p50"] == pytest.approx(math.exp(20))


def test_the_masked_fraction_is_shown_from_short_to_long_completions():
    """16 tokens, 4 in each quarter. Of the shortest 1 is masked, of the longest 3."""
    figures = of_tokens(
        together(
            tokens({"log_mismatch": [0.0] * 8, "kept": [1.0] * 5 + [0.0] * 3}, FILLER),
            tokens({"log_mismatch": [0.0] * 3}, {"log_mismatch": [0.0], "kept": 0.0}),
            tokens({"log_mismatch": [0.0] * 4}, padding=5),
        )
    )
    assert figures["correction/masked_fraction"] == 4 / 16
    quarters = [figures[f"correction/masked_fraction/{name}"] for name in ("shortest", "short", "long", "longest")]
    assert quarters == [0.25, 0.0, 0.0, 0.75]


def test_fewer_tokens_than_quarters():
    figures = of_tokens(tokens({"log_mismatch": [0.0, 0.0], "kept": 0.0}))
    assert (
        figures["correction/masked_fraction/shortest"] == 1.0 and figures["correction/masked_fraction/longest"] == 0.0
    )


def test_a_step_in_which_nobody_had_a_signal_has_figures_that_are_zero():
    for nothing in (tokens(FILLER), tokens(FILLER, padding=3)):
        figures = of_tokens(nothing)
        assert figures["sampling/sampling_logp_difference/mean"] == figures["loss"] == figures["entropy"] == 0.0
        assert not any(figures.values())


def test_rewards_lengths_and_ages_of_the_groups():
    first = make_group(0, rewards=[1.0, 3.0], lengths=[4, 10])
    second = make_group(1, rewards=[2.0, 2.0], lengths=[2, 6])
    spans = [Span("s00000003.i0001", 0, 4), Span("s00000005.i0001", 4, 10)]
    cut = msgspec.structs.replace(first.completions[1], finish="length", spans=spans)
    groups = [msgspec.structs.replace(first, completions=[first.completions[0], cut]), second]
    found = of_groups(groups, step=5)
    assert found == {
        "reward": 2.0,
        "reward_std": pytest.approx(math.sqrt((1 + 1 + 0 + 0) / 3)),
        "frac_reward_zero_std": 0.5,
        "completions/mean_length": 5.5,
        "completions/min_length": 2.0,
        "completions/max_length": 10.0,
        "completions/mean_terminated_length": 4.0,
        "completions/clipped_ratio": 0.25,
        "staleness/mean": pytest.approx((5 * (4 + 2 + 6) + 2 * 4 + 0 * 6) / 22),
        "staleness/max": 5.0,
        "completions/tokens": 22.0,
        "rewards/gsm8k/mean": 2.0,
        "accuracy": 1.0,
    }


def test_a_reward_that_does_not_apply_is_no_zero_and_accuracy_is_the_first_functions():
    group = make_group(0, rewards=[1.0, 0.0, 2.0, 0.0])
    rewards = [{"right": 1.0, "form": 0.5}, {"right": -1.0, "form": None}, {"right": None, "form": None}]
    rewards.append({"right": 0.0, "form": 0.1})
    changed = [
        msgspec.structs.replace(one, rewards=row, finish="length")
        for one, row in zip(group.completions, rewards, strict=True)
    ]
    figures = of_groups([msgspec.structs.replace(group, completions=changed)], step=0)
    assert figures["rewards/right/mean"] == 0.0 and figures["rewards/form/mean"] == pytest.approx(0.3)
    assert figures["accuracy"] == 0.25
    assert figures["completions/clipped_ratio"] == 1.0 and figures["completions/mean_terminated_length"] == 0.0
    nobody = [msgspec.structs.replace(one, rewards={"right": None}) for one in changed]
    figures = of_groups([msgspec.structs.replace(group, completions=nobody)], step=0)
    assert math.isnan(figures["rewards/right/mean"]) and figures["accuracy"] == 0.0
