"""Log-probs of given tokens: the one computation that sampler and trainer must do alike.

Sequences are packed into one row, never padded. Log-probs exist for completion tokens only, a chunk at a time:
the full [tokens, vocabulary] logits of a row are never in memory, forward or backward.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor, nn
from transformers import PreTrainedModel


@dataclass(frozen=True, slots=True, kw_only=True)
class Packed:
    """Sequences behind each other in one row. t = all tokens, n = completion tokens of all sequences."""

    input_ids: Tensor
    """[1, t] int64"""
    position_ids: Tensor
    """[1, t] int64, from 0 again for every sequence: that alone keeps sequences from seeing each other"""
    predictors: Tensor
    """[n] int64: the position whose hidden state predicts targets[i]"""
    targets: Tensor
    """[n] int64"""

    def to(self, device: torch.device | str) -> "Packed":
        fields = (self.input_ids, self.position_ids, self.predictors, self.targets)
        ids, positions, predictors, targets = (tensor.to(device) for tensor in fields)
        return Packed(input_ids=ids, position_ids=positions, predictors=predictors, targets=targets)


def pack(sequences: Sequence[tuple[np.ndarray, np.ndarray]]) -> Packed:
    """Packs (prompt [m], completion [n]) pairs of token ids; every prompt has at least one token."""
    lengths = [(len(prompt), len(completion)) for prompt, completion in sequences]
    starts = np.cumsum([0, *(m + n for m, n in lengths)])
    rows = [np.concatenate([prompt, completion]) for prompt, completion in sequences]
    positions = [np.arange(m + n) for m, n in lengths]
    predictors = [start + m - 1 + np.arange(n) for start, (m, n) in zip(starts, lengths, strict=False)]
    return Packed(
        input_ids=_int64(rows)[None],
        position_ids=_int64(positions)[None],
        predictors=_int64(predictors),
        targets=_int64([completion for _, completion in sequences]),
    )


class TokenLogprobs(nn.Module):
    """A causal language model seen as a function from packed tokens to their log-probs.

    temperature: logits are divided by it first, as the sampler's are (processed log-probs).
    chunk: completion positions whose logits exist at the same time.
    """

    def __init__(self, model: PreTrainedModel, temperature: float, chunk: int) -> None:
        super().__init__()
        self.model = model
        self.temperature = temperature
        self.chunk = chunk

    def forward(self, packed: Packed) -> tuple[Tensor, Tensor]:
        """-> log-probs [n] and entropies [n] (no gradient), float32, in nats."""
        # No attention mask: an all-ones one would let packed sequences see each other (transformers 5).
        output = self.model.base_model(
            input_ids=packed.input_ids, position_ids=packed.position_ids, use_cache=False
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
        ctx.save_for_backward(hidden, weight, targets)
        ctx.temperature, ctx.chunk = temperature, chunk
        ctx.mark_non_differentiable(entropies)
        return logprobs, entropies

    @staticmethod
    def backward(ctx, grad: Tensor, _: Tensor):
        """d logprob / d logits = (onehot(target) - softmax) / temperature; the softmax is computed again."""
        hidden, weight, targets = ctx.saved_tensors
        grad_hidden = torch.empty_like(hidden)
        grad_weight = torch.zeros_like(weight, dtype=torch.float32) if ctx.needs_input_grad[1] else None
        for part in _chunks(len(targets), ctx.chunk):
            grad_logits = -_log_softmax(hidden[part], weight, ctx.temperature).exp_()
            grad_logits[torch.arange(len(grad_logits)), targets[part]] += 1
            grad_logits *= grad[part, None] / ctx.temperature
            grad_logits = grad_logits.to(weight.dtype)
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
