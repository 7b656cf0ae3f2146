"""Log-probs of given tokens: the one computation that sampler and trainer must do alike.

Sequences are packed into one row, never padded, and a prompt that several completions share is computed once.
Log-probs exist for completion tokens only, a chunk at a time: the full [tokens, vocabulary] logits of a row are
never in memory, forward or backward.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from policy.attention import Segments

Branches = tuple[np.ndarray, Sequence[np.ndarray]]
"""A prompt [m] and the completions [n_i] that continue it, as token ids."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Packed:
    """Prompts with their completions behind each other in one row. t = tokens computed, n = tokens scored."""

    input_ids: Tensor
    """[1, t] int64; the last token of a completion is only a target"""
    position_ids: Tensor
    """[1, t] int64; every completion goes on where its prompt ends"""
    segments: Segments
    """Who sees whom: a completion its prompt and itself, nobody a neighbour"""
    predictors: Tensor
    """[n] int64: the position whose hidden state predicts targets[i]"""
    targets: Tensor
    """[n] int64"""

    def to(self, device: torch.device | str) -> "Packed":
        return Packed(
            input_ids=self.input_ids.to(device),
            position_ids=self.position_ids.to(device),
            segments=self.segments.to(device),
            predictors=self.predictors.to(device),
            targets=self.targets.to(device),
        )


def pack(prompts: Sequence[Branches]) -> Packed:
    """Packs prompts with their completions; the scored tokens come out in the order given.

    Every prompt and every completion has at least one token.
    """
    ids, positions, seen, predictors = [], [], [], []
    start = 0
    for prompt, completions in prompts:
        root = start + np.arange(len(prompt))
        ids.append(prompt)
        positions.append(np.arange(len(prompt)))
        seen.append((len(prompt), root))
        start += len(prompt)
        for part in (completion[:-1] for completion in completions):
            own = start + np.arange(len(part))
            ids.append(part)
            positions.append(len(prompt) + np.arange(len(part)))
            predictors.append(np.concatenate([root[-1:], own]))
            if len(part):
                seen.append((len(part), np.concatenate([root, own])))
            start += len(part)
    return Packed(
        input_ids=_int64(ids)[None],
        position_ids=_int64(positions)[None],
        segments=Segments.of(seen),
        predictors=_int64(predictors),
        targets=_int64([completion for _, completions in prompts for completion in completions]),
    )


class TokenLogprobs(nn.Module):
    """A causal language model seen as a function from packed tokens to their log-probs.

    temperature: logits are divided by it first, as the sampler's are (processed log-probs).
    chunk: completion positions whose logits exist at the same time.
    attention: `sdpa` or `varlen` (policy/attention.py); they differ by rounding.
    """

    def __init__(self, model: PreTrainedModel, temperature: float, chunk: int, attention: str = "sdpa") -> None:
        super().__init__()
        self.model = model
        self.temperature = temperature
        self.chunk = chunk
        self.attend_by(attention)

    def attend_by(self, attention: str) -> None:
        self.attention = attention
        self.model.set_attn_implementation(attention)

    def forward(self, packed: Packed) -> tuple[Tensor, Tensor]:
        """-> log-probs [n] and entropies [n], float32, in nats."""
        if self.attention == "varlen":
            seen = {"segments": packed.segments}
        else:
            seen = {"attention_mask": packed.segments.mask(packed.input_ids.shape[1], self.model.dtype)}
        output = self.model.base_model(
            input_ids=packed.input_ids, position_ids=packed.position_ids, use_cache=False, **seen
        )
        hidden = output.last_hidden_state[0, packed.predictors]
        weight = self.model.get_output_embeddings().weight
        return SelectedLogprobs.apply(hidden, weight, packed.targets, self.temperature, self.chunk)


class SelectedLogprobs(torch.autograd.Function):
    """log softmax(hidden @ weight.T / temperature) at the targets, in float32, without the full logits.

    hidden [n, d], weight [v, d], targets [n] -> log-probs [n], entropies [n]. One function and not a loop over
    the output layer: under ZeRO-3 each call of a layer is a collective, and ranks have different numbers of chunks.
    """

    @staticmethod
    def forward(ctx, hidden: Tensor, weight: Tensor, targets: Tensor, temperature: float, chunk: int):
        logprobs = hidden.new_empty(len(targets), dtype=torch.float32)
        entropies = torch.empty_like(logprobs)
        for part in _chunks(len(targets), chunk):
            all_logprobs = _log_softmax(hidden[part], weight, temperature)
            logprobs[part] = all_logprobs.gather(1, targets[part, None])[:, 0]
            entropies[part] = -(all_logprobs.exp() * all_logprobs).sum(1)
        ctx.save_for_backward(hidden, weight, targets, entropies)
        ctx.temperature, ctx.chunk = temperature, chunk
        ctx.set_materialize_grads(False)
        return logprobs, entropies

    @staticmethod
    def backward(ctx, grad: Tensor | None, grad_entropies: Tensor | None):
        """With p the softmax, which is computed again, the temperature T and the entropy H:

        d logprob / d logits = (onehot(target) - p) / T        d H / d logits = -p (log p + H) / T
        """
        hidden, weight, targets, entropies = ctx.saved_tensors
        grad = torch.zeros_like(entropies) if grad is None else grad
        grad_hidden = torch.empty_like(hidden)
        grad_weight = torch.zeros_like(weight, dtype=torch.float32) if ctx.needs_input_grad[1] else None
        for part in _chunks(len(targets), ctx.chunk):
            all_logprobs = _log_softmax(hidden[part], weight, ctx.temperature)
            factor = -grad[part, None]
            if grad_entropies is not None:
                factor = factor - grad_entropies[part, None] * (all_logprobs + entropies[part, None])
            grad_logits = all_logprobs.exp_().mul_(factor)
            grad_logits[torch.arange(len(grad_logits)), targets[part]] += grad[part]
            grad_logits = grad_logits.div_(ctx.temperature).to(weight.dtype)
            grad_hidden[part] = grad_logits @ weight
            if grad_weight is not None:
                grad_weight += grad_logits.T @ hidden[part]
        return grad_hidden, None if grad_weight is None else grad_weight.to(weight.dtype), None, None, None


def _log_softmax(hidden: Tensor, weight: Tensor, temperature: float) -> Tensor:
    return torch.log_softmax((hidden @ weight.T).float() / temperature, dim=-1)


def _chunks(count: int, size: int) -> list[slice]:
    return [slice(start, min(start + size, count)) for start in range(0, count, size)]


def _int64(parts: list[np.ndarray]) -> Tensor:
    return torch.from_numpy(np.concatenate(parts).astype(np.int64))
