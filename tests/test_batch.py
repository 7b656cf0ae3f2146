"""A step's work is the same whatever it is cut into."""

import msgspec
import numpy as np
import pytest
import torch
from transformers import AutoModelForCausalLM

from policy.logprobs import TokenLogprobs
from protocol.recipe import Objective, Recipe, TrainerTable
from tests.groups import make_group
from tests.tiny import make_model
from trainer.advantage import ADVANTAGES
from trainer.batch import _samples, make_batch, token_shares
from trainer.loss import objective_loss
from trainer.packing import length, split_evenly

GROUPS = [make_group(number, rewards=[0.0, 1.0, 0.0, 2.0], reference=True) for number in range(5)]
DEAD = make_group(9, rewards=[1.0] * 4, reference=True)


@pytest.fixture(scope="module")
def tiny(tmp_path_factory):
    return AutoModelForCausalLM.from_pretrained(make_model(tmp_path_factory.mktemp("tiny")), dtype=torch.float32)


def recipe(tokens=10**6, advantage="group", **objective) -> Recipe:
    trainer = TrainerTable(tokens_per_micro_batch=tokens)
    return Recipe(objective=Objective(advantage=advantage, **objective), trainer=trainer)


def batch(groups=GROUPS, rank=0, world=1, tokens=10**6, **objective):
    settings = recipe(tokens, **objective)
    return make_batch(groups, settings, ADVANTAGES[settings.objective.advantage_name], rank=rank, world=world, step=0)


def gradient(model, batches, attention="sdpa", **objective) -> torch.Tensor:
    """All parameters' gradients of the sum over ranks and micro-batches."""
    model.zero_grad()
    for one in batches:
        for micro in one.micro_batches:
            scored = TokenLogprobs(model, 1.0, 16, attention)(micro.packed)
            loss, _ = objective_loss(*scored, micro, recipe(**objective).objective)
            loss.backward()
    return torch.cat([parameter.grad.flatten() for parameter in model.parameters()])


@pytest.mark.parametrize(
    "objective",
    [
        {"name": "grpo"},
        {"name": "dr_grpo"},
        {"name": "dapo"},
        {"name": "gspo"},
        {"name": "cispo"},
        {"name": "sft", "kl_beta": 0.0},
        {"name": "dapo", "correction": "sequence_mask", "correction_cap": 1.5, "correction_floor": 0.7},
        {"name": "grpo", "entropy_bonus": 0.01, "advantage": "reinforce++", "recompute_old_logprobs": True},
    ],
    ids=lambda settings: "-".join(map(str, settings.values())),
)
def test_the_gradient_is_the_same_for_any_ranks_rows_and_padding(tiny, objective):
    model = tiny
    whole = gradient(model, [batch(**objective)], **objective)
    scale = whole.norm()
    cuts = {
        "one rank, one sample a row": [batch(tokens=1, **objective)],
        "three ranks, nothing divides": [batch(rank=rank, world=3, tokens=50, **objective) for rank in range(3)],
    }
    if objective == {"name": "dapo"}:
        cuts["more ranks than samples"] = [batch(rank=rank, world=32, tokens=50) for rank in range(32)]
    assert scale > 0
    for name, batches in cuts.items():
        gap = (gradient(model, batches, **objective) - whole).norm() / scale
        assert gap < 1e-5, f"{name}: {gap}"
    varlen = gradient(model, cuts["three ranks, nothing divides"], "varlen", **objective)
    assert (varlen - whole).norm() / scale < 1e-5


def test_work_is_even_over_ranks_also_when_groups_are_few():
    for count in (1, 2, 3, 5):
        groups = _samples([make_group(n, rewards=[0.0, 1.0] * 8) for n in range(count)], recipe(), ADVANTAGES["group"])
        work = [sum(map(length, share)) for share in split_evenly(groups, 2)]
        assert max(work) < 1.35 * min(work), (count, work)
        together = [sample for share in split_evenly(groups, 2) for piece in share for sample in piece]
        assert sorted(map(id, together)) == sorted(id(sample) for group in groups for sample in group)


def test_ranks_get_equally_many_rows_and_every_sample_once():
    for world in (1, 2, 3, 7):
        shares = [batch(rank=rank, world=world, tokens=60) for rank in range(world)]
        assert len({len(share.micro_batches) for share in shares}) == 1
        tokens = sum(int(micro.mask.sum()) for share in shares for micro in share.micro_batches)
        assert tokens == shares[0].figures["completions/tokens"]
        total = sum(float(micro.shares.sum()) for share in shares for micro in share.micro_batches)
        assert total == pytest.approx(1.0, rel=1e-6)


def test_groups_without_signal_lower_the_shares_of_others_and_cost_nothing(tiny):
    alone = gradient(tiny, [batch(kl_beta=0.0)], kl_beta=0.0)
    more = batch([*GROUPS, DEAD], kl_beta=0.0)
    assert more.figures["train/tokens"] == batch(kl_beta=0.0).figures["train/tokens"]
    tokens = batch(kl_beta=0.0).figures["completions/tokens"] / more.figures["completions/tokens"]
    torch.testing.assert_close(
        gradient(tiny, [more], kl_beta=0.0), alone * tokens, atol=1e-6 * float(alone.abs().max()), rtol=0
    )


def test_a_batch_without_any_signal_still_steps_with_a_zero_gradient(tiny):
    assert not gradient(tiny, [batch([DEAD], kl_beta=0.0)], kl_beta=0.0).any()


def test_with_refill_only_whole_groups_without_signal_are_left_out():
    group = make_group(3, rewards=[0.0, 1.0, 2.0], reference=True)  # the second has an advantage of 0, and a KL
    settings = msgspec.structs.replace(recipe(), trainer=TrainerTable(refill=1.0))
    bare = make_group(4, rewards=[1.0, 1.0, 1.0])  # beyond the cap, without reference
    [micro] = make_batch([group, bare], settings, ADVANTAGES["group"], rank=0, world=1, step=0).micro_batches
    assert micro.lengths.tolist() == [completion.spans[-1].end for completion in group.completions]
    assert len(micro.ref_logprobs) == len(micro.mask)


def test_shares_hold_the_means_of_each_objective():
    lengths, masked = np.array([1, 4, 5]), np.array([False, False, True])
    np.testing.assert_allclose(token_shares(lengths, masked, "dapo", 10), [1 / 5, 1 / 5, 0])
    np.testing.assert_allclose(token_shares(lengths, masked, "grpo", 10), [1 / 3, 1 / 12, 0])
    np.testing.assert_allclose(token_shares(lengths, masked, "dr_grpo", 10), [1 / 30, 1 / 30, 0])
    assert not token_shares(lengths, np.ones(3, bool), "dapo", 10).any()


def test_truncated_completions_are_left_out_when_asked_for(tiny):
    group = make_group(3, rewards=[0.0, 1.0, 2.0])
    cut = msgspec.structs.replace(group.completions[2], finish="length")
    group = msgspec.structs.replace(group, completions=[*group.completions[:2], cut])
    [micro] = batch([group], mask_truncated=True, kl_beta=0.0).micro_batches
    lengths = [completion.spans[-1].end for completion in group.completions]
    assert micro.lengths.tolist() == lengths[:1]  # the second has the mean reward: advantage 0, nothing to learn
    assert float(micro.shares[0]) == pytest.approx(1 / sum(lengths[:2]))
    [both] = batch([group], kl_beta=0.0).micro_batches
    assert float(both.shares[0]) == pytest.approx(1 / sum(lengths))


def test_the_figures_say_what_the_step_was_fed_with():
    figures = batch([*GROUPS, DEAD]).figures
    assert figures["frac_reward_zero_std"] == 1 / 6
    assert figures["reward"] == np.mean([0, 1, 0, 2] * 5 + [1] * 4)
    assert figures["accuracy"] == (2 * 5 + 4) / 24
    assert figures["staleness/max"] == 0
