"""A step's work is the same whatever it is cut into."""

import numpy as np
import torch
from transformers import AutoModelForCausalLM

from policy.logprobs import TokenLogprobs
from protocol.recipe import Objective
from tests.groups import make_group
from tests.tiny import make_model
from trainer.batch import _samples, length, make_batch, split_evenly
from trainer.loss import grpo

GROUPS = [make_group(number, rewards=[0.0, 1.0, 0.0, 2.0], reference=True) for number in range(5)]
DEAD = make_group(9, rewards=[1.0] * 4, reference=True)


def batch(groups=GROUPS, rank=0, world=1, tokens=10**6, skip_zero=False):
    return make_batch(
        groups, rank=rank, world=world, tokens_per_micro_batch=tokens, advantage_std=True, skip_zero=skip_zero, step=0
    )


WITH_KL = Objective()


def gradient(model, batches, objective=WITH_KL) -> torch.Tensor:
    """All parameters' gradients of the sum over ranks and micro-batches."""
    model.zero_grad()
    for one in batches:
        for micro in one.micro_batches:
            loss, _ = grpo(*TokenLogprobs(model, 1.0, 16)(micro.packed), micro, objective)
            loss.backward()
    return torch.cat([parameter.grad.flatten() for parameter in model.parameters()])


def test_the_gradient_is_the_same_for_any_ranks_rows_and_padding(tmp_path):
    model = AutoModelForCausalLM.from_pretrained(make_model(tmp_path), dtype=torch.float32)
    whole = gradient(model, [batch()])
    scale = whole.norm()
    cuts = {
        "one rank, one sample a row": [batch(tokens=1)],
        "one rank, small rows": [batch(tokens=60)],
        "two ranks": [batch(rank=rank, world=2, tokens=60) for rank in range(2)],
        "three ranks, nothing divides": [batch(rank=rank, world=3, tokens=50) for rank in range(3)],
        "more ranks than samples": [batch(rank=rank, world=32, tokens=50) for rank in range(32)],
    }
    for name, batches in cuts.items():
        gap = (gradient(model, batches) - whole).norm() / scale
        assert gap < 1e-6, f"{name}: {gap}"


def test_work_is_even_over_ranks_also_when_groups_are_few():
    for count in (1, 2, 3, 5):
        groups = [[*piece] for piece in (_samples(make_group(n, rewards=[0.0, 1.0] * 8), True) for n in range(count))]
        work = [sum(map(length, share)) for share in split_evenly(groups, 2)]
        assert max(work) < 1.35 * min(work), (count, work)
        together = [sample for share in split_evenly(groups, 2) for piece in share for sample in piece]
        assert sorted(map(id, together)) == sorted(id(sample) for group in groups for sample in group)


def test_ranks_get_equally_many_rows_and_every_sample_once():
    for world in (1, 2, 3, 7):
        shares = [batch(rank=rank, world=world, tokens=60) for rank in range(world)]
        assert len({len(share.micro_batches) for share in shares}) == 1
        tokens = sum(int(micro.mask.sum()) for share in shares for micro in share.micro_batches)
        assert tokens == shares[0].micro_batches[0].denominator


def test_groups_without_signal_change_the_denominator_and_nothing_else_when_skipped(tmp_path):
    model = AutoModelForCausalLM.from_pretrained(make_model(tmp_path), dtype=torch.float32)
    objective = Objective(kl_beta=0.0)
    kept = gradient(model, [batch([*GROUPS, DEAD])], objective)
    skipped = gradient(model, [batch([*GROUPS, DEAD], skip_zero=True)], objective)
    torch.testing.assert_close(skipped, kept, atol=1e-6 * float(kept.abs().max()), rtol=0)


def test_a_batch_without_any_signal_still_steps_with_a_zero_gradient(tmp_path):
    model = AutoModelForCausalLM.from_pretrained(make_model(tmp_path), dtype=torch.float32)
    assert not gradient(model, [batch([DEAD], skip_zero=True)], Objective(kl_beta=0.0)).any()


def test_the_figures_say_what_the_step_was_fed_with():
    figures = batch([*GROUPS, DEAD]).figures
    assert figures["frac_reward_zero_std"] == 1 / 6
    assert figures["reward"] == np.mean([0, 1, 0, 2] * 5 + [1] * 4)
    assert figures["accuracy"] == (2 * 5 + 4) / 24
    assert figures["staleness/max"] == 0
