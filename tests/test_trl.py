"""Our loss and TRL's, on the same numbers.

TRL's own trainer runs: its constructor, advantages, corrections and loss. Only what it would generate, score with
rewards or compute with a model is replaced, by the answers, rewards and log-probs of our groups.
"""

import math
import os
from collections.abc import Callable
from dataclasses import dataclass
from unittest import mock

import msgspec
import numpy as np
import pytest
import torch
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

from protocol.messages import Group
from protocol.recipe import Objective, Recipe, Sampling
from tests import by_hand
from tests.groups import make_group
from tests.tiny import make_model, make_tokenizer
from trainer.advantage import ADVANTAGES
from trainer.batch import MicroBatch, make_batch
from trainer.figures import of_groups, of_tokens
from trainer.loss import objective_loss

MAX_TOKENS = 24
REWARDS = ([0.0, 1.0, 0.0, 2.0], [1.0, 1.0, 1.0, 1.0], [0.0, 3.0, 1.0, 0.0])
REPLACED = ("_generate", "_calculate_rewards", "_get_per_token_logps_and_entropies")
CALLED = ("_generate_and_score_completions", "_compute_loss")


@dataclass(frozen=True, kw_only=True)
class Step:
    """n tokens in the order of our only micro-batch; c completions in the order of the groups."""

    groups: list[Group]
    micro: MicroBatch
    objective: Objective
    everyone: list[by_hand.Answer]  # [c]
    logprobs: Tensor  # [n] float64, the policy's
    entropies: Tensor  # [n] float64

    def padded(self, values: Tensor) -> Tensor:
        """[n] -> [c, longest], with 0 where a completion was left out of the micro-batch."""
        rows = [values.new_zeros(len(one.sampler)) if one.place is None else values[one.place] for one in self.everyone]
        return pad_sequence(rows, batch_first=True)


def make_step(rewards=REWARDS, lengths=None, apart: Callable[[Tensor], Tensor] | None = None, **settings) -> Step:
    """apart: the sampler's log-probs -> how far from them the policy's are; by default up to 1 nat."""
    objective = Objective(**{"kl_beta": 0.1, "correction": "none"} | settings)
    groups = [make_group(n, rewards=row, reference=True, lengths=lengths) for n, row in enumerate(rewards)]
    for group in groups:
        group.completions[-1] = msgspec.structs.replace(group.completions[-1], finish="length")
    recipe = Recipe(objective=objective, sampling=Sampling(max_tokens=MAX_TOKENS))
    advantages = ADVANTAGES[objective.advantage_name]
    [micro] = make_batch(groups, recipe, advantages, rank=0, world=1, step=0).micro_batches
    mu = micro.sampler_logprobs.double()
    difference = torch.sin(1e4 * mu) if apart is None else apart(mu)
    return Step(
        groups=groups,
        micro=micro,
        objective=objective,
        everyone=by_hand.answers(groups, micro, objective),
        logprobs=(mu + difference).requires_grad_(),
        entropies=torch.rand(len(mu), dtype=torch.float64, generator=torch.Generator().manual_seed(0)),
    )


@pytest.fixture(scope="module")
def trainer_class():
    """TRL's configuration, and its trainer with a `step` put in; skips where TRL is absent or built otherwise."""
    with pytest.MonkeyPatch.context() as patch, mock.patch.dict(os.environ):  # TRL sets vLLM's log level
        utils = pytest.importorskip("trl.import_utils", reason="trl is not installed")
        patch.setattr(utils, "is_vllm_available", lambda *_, **__: False)  # 10 s of imports, for a client not used here
        import trl

        missing = [name for name in (*REPLACED, *CALLED) if not hasattr(trl.GRPOTrainer, name)]
        if missing:
            pytest.skip(f"trl {trl.__version__} has no GRPOTrainer.{missing[0]}; these tests know 1.16")
        yield trl.GRPOConfig, _with_step(trl.GRPOTrainer)


def _with_step(base: type) -> type:
    class Trainer(base):
        step: Step

        def _generate(self, prompts):
            end = self.processing_class.eos_token_id
            sampler = [one.sampler for one in self.step.everyone]
            last = [end - 1 if one.cut else end for one in self.step.everyone]  # this is how TRL knows
            ids = [[0] * (len(row) - 1) + [token] for row, token in zip(sampler, last, strict=True)]
            return [[0]] * len(ids), ids, None, [""] * len(ids), sampler, {}, None, None

        def _calculate_rewards(self, *_):
            rewards = [[one.reward] for group in self.step.groups for one in group.completions]
            return torch.tensor(rewards, dtype=torch.float64)

        def _get_per_token_logps_and_entropies(self, model, *_, **__):
            logprobs = self.step.micro.ref_logprobs.double() if model is self.ref_model else self.step.logprobs
            return self.step.padded(logprobs), self.step.padded(self.step.entropies), None

    return Trainer


@pytest.fixture(scope="module")
def theirs(trainer_class, tmp_path_factory):
    """(step, whether its correction for vLLM is on, its settings) -> loss, gradient [n], metrics, inputs of the loss.

    Of the two forms of its KL term ours is the older one: not multiplied by the ratio (use_bias_correction_kl).
    """
    from datasets import Dataset

    config, trainer = trainer_class
    model, out = make_model(tmp_path_factory.mktemp("model")), tmp_path_factory.mktemp("trl")

    def run(step: Step, vllm: bool = False, **settings):
        count = len(step.everyone)
        made = trainer(
            model=str(model),
            reward_funcs=lambda completions, **_: [0.0] * len(completions),
            args=config(
                output_dir=str(out), report_to="none", use_cpu=True, bf16=False, gradient_checkpointing=False,
                per_device_train_batch_size=count, num_generations=len(step.groups[0].completions),
                max_completion_length=MAX_TOKENS, **{"beta": 0.1, "use_bias_correction_kl": False} | settings,
            ),
            train_dataset=Dataset.from_list([{"prompt": ""}]),
            processing_class=make_tokenizer(),
        )  # fmt: skip
        made.step, made.use_vllm = step, vllm
        made.current_gradient_accumulation_steps = 1
        made.model.train()
        inputs = made._generate_and_score_completions([{"prompt": ""}] * count)
        if not vllm:  # two policies: the old one is the sampler's
            inputs["old_per_token_logps"] = inputs["sampling_per_token_logps"]
        loss = made._compute_loss(made.model, inputs)
        [gradient] = torch.autograd.grad(loss, step.logprobs)
        return loss.detach(), gradient, {name: values[0] for name, values in made._metrics["train"].items()}, inputs

    return run


def ours(step: Step) -> tuple[Tensor, Tensor, dict[str, float]]:
    loss, figures = objective_loss(step.logprobs, step.entropies, step.micro, step.objective)
    [gradient] = torch.autograd.grad(loss, step.logprobs)
    return loss.detach(), gradient, of_tokens({name: values.numpy() for name, values in figures.items()})


def assert_same(step: Step, theirs: tuple) -> None:
    for one, other in zip(ours(step)[:2], theirs[:2], strict=True):
        torch.testing.assert_close(one, other, atol=1e-7, rtol=1e-6)
    assert theirs[1].any()


OBJECTIVES = {
    "grpo": {"loss_type": "grpo"},
    "dr_grpo": {"loss_type": "dr_grpo", "scale_rewards": "none"},
    "dapo": {"loss_type": "dapo", "epsilon_high": 0.28},
    "gspo": {"loss_type": "grpo", "importance_sampling_level": "sequence", "epsilon": 3e-4, "epsilon_high": 4e-4},
    "cispo": {"loss_type": "cispo", "epsilon_high": 5.0},
}
"""Ours and what TRL calls them, at the papers' clips. TRL's cispo is clamped at epsilon_high, ours at 1 + clip_high."""
OPTIONS = {
    "kl": ({}, {}),
    "no kl": ({"kl_beta": 0.0}, {"beta": 0.0}),
    "clip": ({"clip_low": 0.1, "clip_high": 0.4}, {"epsilon": 0.1, "epsilon_high": 0.4}),
    "dual clip": ({"dual_clip": 1.5}, {"delta": 1.5}),
    "mask truncated": ({"mask_truncated": True}, {"mask_truncated_completions": True}),
}


@pytest.mark.parametrize("option", OPTIONS)
@pytest.mark.parametrize("name", OBJECTIVES)
def test_loss_and_gradient_are_those_of_trl(theirs, name, option):
    own, trls = OPTIONS[option]
    trls = OBJECTIVES[name] | trls
    if name == "cispo" and option == "clip":
        own, trls = {"clip_high": 0.4}, trls | {"epsilon_high": 1.4}
    step = make_step(name=name, **own)
    assert_same(step, theirs(step, **trls))


@pytest.mark.parametrize("name", OBJECTIVES)
@pytest.mark.parametrize("mode", ["token_truncate", "token_mask", "sequence_truncate"])
def test_the_correction_for_vllm_is_that_of_trl(theirs, name, mode):
    bounds = {"correction_cap": 1.4, "correction_floor": 0.7 if mode == "token_mask" else 0.0}
    step = make_step(name=name, correction=mode, recompute_old_logprobs=True, **bounds)
    trls = {"vllm_importance_sampling_clip_max": 1.4, "vllm_importance_sampling_clip_min": bounds["correction_floor"]}
    found = theirs(step, vllm=True, vllm_importance_sampling_mode=mode, **OBJECTIVES[name] | trls)
    weights = found[3]["importance_sampling_ratio"]
    assert ((weights == 0) | (weights == 1.4)).any() and ((weights > 0) & (weights < 1.4)).any()
    assert_same(step, found)


@pytest.mark.parametrize("name", ["dapo", "cispo"])
def test_the_entropy_bonus_is_that_of_trl_where_all_tokens_weigh_alike(theirs, name):
    step = make_step(name=name, entropy_bonus=0.1)
    assert_same(step, theirs(step, entropy_coef=0.1, **OBJECTIVES[name]))


def test_the_entropy_bonus_of_grpo_counts_completions_alike_and_trls_does_not(theirs):
    """TRL takes its mean over tokens with every objective, we take the objective's own mean."""
    step = make_step(name="grpo", entropy_bonus=0.1)
    gap = ours(step)[0] - theirs(step, entropy_coef=0.1, **OBJECTIVES["grpo"])[0]
    completions = torch.stack([step.entropies[one.place].mean() for one in step.everyone]).mean()
    assert abs(gap) > 1e-5
    assert float(gap) == pytest.approx(0.1 * float(step.entropies.mean() - completions), rel=1e-5)


@pytest.mark.parametrize(("own", "trls"), [("group", "group"), ("batch", "batch"), ("mean", "none")])
def test_advantages_are_those_of_trl(theirs, own, trls):
    rewards = np.random.default_rng(0).normal(size=(5, 6)).round(1)
    rewards[2] = 0.5
    inputs = theirs(make_step(rewards.tolist()), scale_rewards=trls)[3]
    np.testing.assert_allclose(ADVANTAGES[own](rewards).flatten(), inputs["advantages"], atol=1e-9)


def test_figures_with_the_same_name_are_the_same_number(theirs):
    step = make_step(name="dapo")
    own, trls = of_groups(step.groups, step=0) | ours(step)[2], theirs(step, **OBJECTIVES["dapo"])[2]
    shared = set(own) & set(trls)
    assert {"kl", "entropy", "reward", "reward_std", "frac_reward_zero_std", "clip_ratio/region_mean"} < shared
    assert {name: own[name] for name in shared} == pytest.approx({name: trls[name] for name in shared}, rel=1e-5)


def test_trl_shows_the_ratio_after_the_correction_and_we_before(theirs):
    step = make_step(name="dapo", correction="token_truncate", correction_cap=1.4, recompute_old_logprobs=True)
    mode = {"vllm_importance_sampling_mode": "token_truncate", "vllm_importance_sampling_clip_max": 1.4}
    own, trls = ours(step)[2], theirs(step, vllm=True, **mode, **OBJECTIVES["dapo"])[2]
    for name in ("sampling_logp_difference/mean", "sampling_logp_difference/max", "importance_sampling_ratio/min"):
        assert own[f"sampling/{name}"] == pytest.approx(trls[f"sampling/{name}"], rel=1e-5)
    largest = "sampling/importance_sampling_ratio/max"
    assert trls[largest] == pytest.approx(1.4)
    raw = (step.logprobs.detach() - step.micro.sampler_logprobs).exp()
    assert own[largest] == pytest.approx(float(raw.max()), rel=1e-5) and raw.max() > 2


def test_trls_sequence_mask_drops_long_answers_and_ours_does_not(theirs):
    """Every token is 10 % off. TRL's product of the ratios leaves [0.7, 1.4] from 4 tokens on; our geometric mean is
    the same for all lengths."""
    step = make_step(
        ([0.0, 1.0, 2.0, 4.0],), [2, 3, 4, 20], apart=lambda mu: torch.full_like(mu, math.log(0.9)), kl_beta=0.0,
        correction="sequence_mask", correction_cap=1.4, correction_floor=0.7, recompute_old_logprobs=True,
    )  # fmt: skip
    mode = {"vllm_importance_sampling_mode": "sequence_mask", "beta": 0.0}
    bounds = {"vllm_importance_sampling_clip_max": 1.4, "vllm_importance_sampling_clip_min": 0.7}
    _, gradient, _, inputs = theirs(step, vllm=True, **mode | bounds | OBJECTIVES["dapo"])
    assert inputs["importance_sampling_ratio"][:, 0].tolist() == pytest.approx([0.9**2, 0.9**3, 0, 0], rel=1e-5)
    assert [bool(gradient[one.place].any()) for one in step.everyone] == [True, True, False, False]
    assert ours(step)[1].all()


def test_trls_cispo_needs_an_epsilon_high_that_its_default_is_not(theirs):
    """Unset it is 0.2, and every ratio near 1 is clamped to that. Ours is 1 + clip_high in all cases."""
    step = make_step(name="cispo", kl_beta=0.0, apart=torch.zeros_like)
    _, gradient, _, _ = theirs(step, loss_type="cispo", beta=0.0)
    torch.testing.assert_close(gradient, 0.2 * ours(step)[1])
