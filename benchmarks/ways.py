"""Three ways to make one optimizer step of the same groups, for `benchmarks.trainer`.

Each is two functions: forward and backward, and the update.
"""

import argparse
from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
import torch
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

from benchmarks.steps import completion_of, random_ids
from protocol.codec import unpack
from protocol.messages import Group
from protocol.recipe import Recipe
from protocol.resolve import load
from trainer.engine import Policy
from trainer.loss import objective_loss
from trainer.stream import read_stream

Step = tuple[Callable[[], object], Callable[[], object]]


def recipe_of(options: argparse.Namespace) -> Recipe:
    """All that a step takes in one row."""
    return load(None, [
        f"model.path={options.model}", f"model.dtype={options.dtype}", "trainer.gpus=1", "objective.kl_beta=0.0",
        f"trainer.gradient_checkpointing={str(options.checkpointing == 'on').lower()}",
        f"trainer.tokens_per_micro_batch={10**9}", "optimizer.learning_rate=1e-6",
    ])  # fmt: skip


def recorded(run: Path, tokens: int) -> list[Group]:
    """Groups with a signal from the beginning of a run, as many as have `tokens` together."""
    found: list[Group] = []
    for _, groups in read_stream(run):
        for group in groups:
            if size(found) >= tokens:
                return found
            found += [group] if len({one.reward for one in group.completions}) > 1 else []
    return found


def made_up(options: argparse.Namespace, vocabulary: int) -> list[Group]:
    """Lengths of completions are drawn from a gamma distribution of shape 2, cut at 4 times its mean."""
    random, found = np.random.default_rng(0), []
    while size(found) < options.tokens:
        mean = options.completion
        lengths = np.clip(random.gamma(2.0, mean / 2, options.group).astype(int), 2, 4 * mean)
        completions = [completion_of(random, int(n), vocabulary, float(k % 2)) for k, n in enumerate(lengths)]
        prompt = random_ids(random, options.prompt, vocabulary)
        found.append(
            Group(session="b", split="train", group_id=len(found), row=0, prompt=prompt, completions=completions)
        )
    return found


def size(groups: Sequence[Group]) -> int:
    """Tokens, a prompt once a group."""
    return sum(
        len(unpack(group.prompt)) + sum(len(unpack(one.tokens)) for one in group.completions) for group in groups
    )


def packed(policy: Policy, groups: list[Group]) -> Step:
    """Ours, as the trainer's loop has it."""
    scorer = policy._engine.module
    attention = scorer.attention

    def work() -> None:
        scorer.attend_by(attention)
        [micro] = policy.batch(groups).micro_batches
        for one in policy.accumulate([micro]):
            loss, _ = objective_loss(*policy.logprobs(one), one, policy.recipe.objective)
            policy.backward(loss)

    return work, policy.update


def padded(policy: Policy, groups: list[Group]) -> Step:
    """The ancestors': logits of all tokens of padded rows, then log_softmax row by row, in the model's dtype."""
    ids, seen, prompts, scored = padded_rows(groups)
    old = pad_sequence([torch.from_numpy(unpack(one.logprobs)) for group in groups for one in group.completions], True)
    advantages = advantages_of(groups)[:, None]

    def work() -> None:
        policy.model.set_attn_implementation("sdpa")
        policy._engine.set_gradient_accumulation_boundary(True)
        logits = policy.model(ids, attention_mask=seen).logits[:, :-1]
        rows = zip(logits, ids[:, 1:], strict=True)
        logprobs = torch.stack([row.log_softmax(-1).gather(1, target[:, None])[:, 0] for row, target in rows])
        policy.backward(plain_loss(logprobs[:, prompts - 1 :].float(), scored, old, advantages))

    return work, policy.update


def trl(directory: Path, groups: list[Group], options: argparse.Namespace) -> Step:
    """GRPOTrainer's `_compute_loss`, its model as it loads it, AdamW of torch."""
    from datasets import Dataset
    from trl import GRPOConfig, GRPOTrainer

    count = sum(len(group.completions) for group in groups)
    trainer = GRPOTrainer(
        model=str(directory),
        reward_funcs=lambda completions, **_: [0.0] * len(completions),
        args=GRPOConfig(
            output_dir="/tmp", report_to="none", use_cpu=True, bf16=False, beta=0.0, num_generations=count,
            gradient_checkpointing=options.checkpointing == "on", per_device_train_batch_size=count,
            model_init_kwargs={"dtype": options.dtype},
        ),
        train_dataset=Dataset.from_list([{"prompt": ""}]),
    )  # fmt: skip
    trainer.current_gradient_accumulation_steps = 1
    trainer.model.train()
    optimizer = torch.optim.AdamW(trainer.model.parameters(), lr=1e-6)
    ids, seen, prompts, scored = padded_rows(groups)
    inputs = {
        "prompt_ids": ids[:, :prompts], "prompt_mask": seen[:, :prompts], "completion_ids": ids[:, prompts:],
        "completion_mask": scored.long(), "advantages": advantages_of(groups),
        "num_items_in_batch": scored.sum().float(),
    }  # fmt: skip

    def update() -> None:
        torch.nn.utils.clip_grad_norm_(trainer.model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()

    return lambda: trainer._compute_loss(trainer.model, inputs).backward(), update


def padded_rows(groups: list[Group]) -> tuple[Tensor, Tensor, int, Tensor]:
    """ids and attention mask [c, p + l], p, and which of the l completion tokens are some [c, l]."""
    prompts = [torch.from_numpy(unpack(one.prompt).astype(np.int64)) for one in groups for _ in one.completions]
    answers = [torch.from_numpy(unpack(one.tokens).astype(np.int64)) for group in groups for one in group.completions]
    left = pad_sequence(prompts, batch_first=True, padding_value=-1, padding_side="left")
    ids = torch.cat([left, pad_sequence(answers, batch_first=True, padding_value=-1)], dim=1)
    prompt = left.shape[1]
    return ids.clamp(min=0), (ids >= 0).long(), prompt, ids[:, prompt:] >= 0


def advantages_of(groups: list[Group]) -> Tensor:
    """[c]; which ones is no matter of speed."""
    return torch.tensor([2 * one.reward - 1 for group in groups for one in group.completions])


def plain_loss(logprobs: Tensor, scored: Tensor, old: Tensor, advantages: Tensor) -> Tensor:
    """PPO's clipped loss, mean over tokens."""
    ratio = ((logprobs - old) * scored).clamp(-20, 20).exp()
    losses = -torch.minimum(ratio * advantages, ratio.clamp(0.8, 1.2) * advantages)
    return (losses * scored).sum() / scored.sum()


if __name__ == "__main__":
    raise SystemExit("a part of another benchmark: python -m benchmarks.trainer")
