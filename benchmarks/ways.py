"""Three ways to make one optimizer step of the same groups, for `benchmarks.trainer`.

Each is two functions: forward and backward of all its micro-batches, and the update.
"""

import argparse
import tempfile
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

from benchmarks.steps import completion_of, random_ids
from protocol.codec import unpack
from protocol.messages import Completion, Group
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


@dataclass(frozen=True, kw_only=True)
class Padded:
    """c completions, each behind its own copy of its prompt: p tokens of prompt, l of completion, with padding."""

    ids: Tensor  # [c, p + l]
    seen: Tensor  # [c, p + l], attention mask
    prompt: int  # p
    scored: Tensor  # [c, l], which completion tokens are some
    old: Tensor  # [c, l], the sampler's log-probs
    advantages: Tensor  # [c, 1]; which ones is no matter of speed


def padded_rows(groups: list[Group], rows: int) -> list[Padded]:
    """Micro-batches of at most `rows` completions, each padded to its own longest.

    TRL pads all of them to the longest of the whole batch: it does better here than in its own loop.
    """
    answers = [(group.prompt, one) for group in groups for one in group.completions]
    return [_padded(answers[at : at + rows]) for at in range(0, len(answers), rows)]


def _padded(answers: Sequence[tuple[bytes, Completion]]) -> Padded:
    prompts = [torch.from_numpy(unpack(prompt).astype(np.int64)) for prompt, _ in answers]
    tokens = [torch.from_numpy(unpack(one.tokens).astype(np.int64)) for _, one in answers]
    left = pad_sequence(prompts, batch_first=True, padding_value=-1, padding_side="left")
    ids = torch.cat([left, pad_sequence(tokens, batch_first=True, padding_value=-1)], dim=1)
    return Padded(
        ids=ids.clamp(min=0),
        seen=(ids >= 0).long(),
        prompt=left.shape[1],
        scored=ids[:, left.shape[1] :] >= 0,
        old=pad_sequence([torch.tensor(unpack(one.logprobs)) for _, one in answers], batch_first=True),
        advantages=torch.tensor([[2 * one.reward - 1] for _, one in answers]),
    )


def padded(policy: Policy, micro_batches: list[Padded]) -> Step:
    """The ancestors': logits of all tokens of padded rows, then log_softmax row by row, in the model's dtype."""
    tokens = tokens_of(micro_batches)

    def work() -> None:
        policy.model.set_attn_implementation("sdpa")
        for number, micro in enumerate(micro_batches, 1):
            policy._engine.set_gradient_accumulation_boundary(number == len(micro_batches))
            logits = policy.model(micro.ids, attention_mask=micro.seen).logits[:, :-1]
            rows = zip(logits, micro.ids[:, 1:], strict=True)
            logprobs = torch.stack([row.log_softmax(-1).gather(1, target[:, None])[:, 0] for row, target in rows])
            policy.backward(plain_loss(logprobs[:, micro.prompt - 1 :].float(), micro, tokens))

    return work, policy.update


def trl(directory: Path, micro_batches: list[Padded], options: argparse.Namespace) -> Step:
    """GRPOTrainer's `_compute_loss` of each micro-batch, and its optimizer; model, autocast and checkpointing too."""
    trainer = trl_trainer(directory, len(micro_batches), options)
    model, optimizer = trainer.model, trainer.create_optimizer()
    tokens = torch.tensor(float(tokens_of(micro_batches)))
    inputs = [
        {
            "prompt_ids": micro.ids[:, : micro.prompt], "prompt_mask": micro.seen[:, : micro.prompt],
            "completion_ids": micro.ids[:, micro.prompt :], "completion_mask": micro.scored.long(),
            "advantages": micro.advantages[:, 0], "num_items_in_batch": tokens,
        }
        for micro in micro_batches
    ]  # fmt: skip

    def work() -> None:
        for one in inputs:
            trainer._compute_loss(model, one).backward()

    def update() -> None:
        torch.nn.utils.clip_grad_norm_(model.parameters(), trainer.args.max_grad_norm)
        optimizer.step()
        optimizer.zero_grad()

    return work, update


def trl_trainer(directory: Path, micro_batches: int, options: argparse.Namespace):
    """A GRPOTrainer that accumulates so many micro-batches, as it stands when `train` has begun."""
    from datasets import Dataset
    from trl import GRPOConfig, GRPOTrainer

    trainer = GRPOTrainer(
        model=str(directory),
        reward_funcs=lambda completions, **_: [0.0] * len(completions),
        args=GRPOConfig(
            output_dir=tempfile.gettempdir(), report_to="none", use_cpu=True, bf16=options.dtype == "bfloat16",
            beta=0.0, per_device_train_batch_size=options.rows, gradient_accumulation_steps=micro_batches,
            num_generations=options.rows * micro_batches, gradient_checkpointing=options.checkpointing == "on",
            model_init_kwargs={"dtype": options.dtype},
        ),
        train_dataset=Dataset.from_list([{"prompt": ""}]),
    )  # fmt: skip
    trainer.current_gradient_accumulation_steps = micro_batches
    trainer.model.train()
    if options.checkpointing == "on":  # what the configuration says is done only in `train`
        trainer.model.gradient_checkpointing_enable(trainer.args.gradient_checkpointing_kwargs)
    return trainer


def tokens_of(micro_batches: list[Padded]) -> int:
    """Completion tokens, over which losses are means."""
    return sum(int(micro.scored.sum()) for micro in micro_batches)


def plain_loss(logprobs: Tensor, micro: Padded, tokens: int) -> Tensor:
    """PPO's clipped loss [c, l] -> the micro-batch's part of the mean over all `tokens` of the step."""
    ratio = ((logprobs - micro.old) * micro.scored).clamp(-20, 20).exp()
    losses = -torch.minimum(ratio * micro.advantages, ratio.clamp(0.8, 1.2) * micro.advantages)
    return (losses * micro.scored).sum() / tokens


if __name__ == "__main__":
    raise SystemExit("a part of another benchmark: python -m benchmarks.trainer")
