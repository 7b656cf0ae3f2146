"""Log-probs of given tokens: the one computation that sampler and trainer must do alike.

Sequences are packed into one row, never padded, and a prompt that several completions share is computed once.
Log-probs exist for completion tokens only, and their logits for a block of the vocabulary at a time: the full [tokens,
vocabulary] logits of a row are never in memory, forward or backward.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from policy.attention import Segments
from protocol.errors import UserError

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
    chunk: as many logits exist at the same time as so many positions have.
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
        if self.model.config._attn_implementation != attention:  # transformers only warns
            raise UserError(f"{self.model.config.model_type} models cannot be computed with {attention} attention")

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
        head = self.model.get_output_embeddings()
        assert head is not None, "a causal language model has an output layer"
        return SelectedLogprobs.apply(hidden, head.weight, packed.targets, self.temperature, self.chunk)


class SelectedLogprobs(torch.autograd.Function):
    """log softmax(hidden @ weight.T / temperature) at the targets, in float32, without the full logits.

    hidden [n, d], weight [v, d], targets [n] -> log-probs [n], entropies [n]. A block of the vocabulary at a time, so
    that both factors of each product, and its logits, are small; the sums over it go on as in arXiv 1805.02867. One
    function and not a loop over the output layer: under ZeRO-3 each call of a layer is a collective, and ranks have
    different numbers of blocks.
    """

    @staticmethod
    def forward(ctx, hidden: Tensor, weight: Tensor, targets: Tensor, temperature: float, chunk: int):
        """With the largest logit m so far, `total` is the sum of exp(logit - m), `weighted` that of exp(logit - m)
        times (logit - m)."""
        top = hidden.new_full((len(hidden),), torch.finfo(torch.float32).min, dtype=torch.float32)
        total, weighted = torch.zeros_like(top), torch.zeros_like(top)
        chosen = torch.full_like(top, torch.nan)  # what a target outside the vocabulary keeps
        blocks = _blocks(len(hidden), len(weight), chunk)
        for block in blocks:
            logits = _logits(hidden, weight[block], temperature)
            inside, local = _local(targets, block)
            chosen = torch.where(inside, logits.gather(1, local[:, None])[:, 0], chosen)
            before, top = top, torch.maximum(top, logits.amax(1))
            shrink = (before - top).exp()
            logits.sub_(top[:, None])
            odds = logits.exp()
            weighted = shrink * (weighted + (before - top) * total) + torch.linalg.vecdot(odds, logits)
            total = shrink * total + odds.sum(1)
        ctx.save_for_backward(hidden, weight, targets, top, total, entropies := total.log() - weighted / total)
        ctx.temperature, ctx.blocks = temperature, blocks
        ctx.set_materialize_grads(False)
        return chosen - top - total.log(), entropies

    @staticmethod
    def backward(ctx, grad: Tensor | None, grad_entropies: Tensor | None):
        """With p the softmax, which is computed again, the temperature T and the entropy H:

        d logprob / d logits = (onehot(target) - p) / T        d H / d logits = -p (log p + H) / T
        """
        hidden, weight, targets, top, total, entropies = ctx.saved_tensors
        grad = torch.zeros_like(entropies) if grad is None else grad
        grad_hidden = torch.zeros_like(hidden, dtype=torch.float32)
        grad_weight = torch.empty_like(weight) if ctx.needs_input_grad[1] else None
        for block in ctx.blocks:
            logprobs = _logits(hidden, weight[block], ctx.temperature).sub_((top + total.log())[:, None])
            factor = -grad[:, None]
            if grad_entropies is not None:
                factor = factor - grad_entropies[:, None] * (logprobs + entropies[:, None])
            inside, local = _local(targets, block)
            grad_logits = logprobs.exp_().mul_(factor).scatter_add_(1, local[:, None], (grad * inside)[:, None])
            grad_logits = grad_logits.mul_(1 / ctx.temperature).to(weight.dtype)
            grad_hidden += grad_logits @ weight[block]
            if grad_weight is not None:
                grad_weight[block] = grad_logits.T @ hidden
        return grad_hidden.to(hidden.dtype), grad_weight, None, None, None


def _logits(hidden: Tensor, weight: Tensor, temperature: float) -> Tensor:
    """[n, b] float32, new memory."""
    logits = torch.empty(len(hidden), len(weight), dtype=torch.float32, device=hidden.device).copy_(hidden @ weight.T)
    return logits if temperature == 1.0 else logits.div_(temperature)


def _local(targets: Tensor, block: slice) -> tuple[Tensor, Tensor]:
    """Which targets [n] are in this block of the vocabulary, and where in it; 0 for the others."""
    inside = (targets >= block.start) & (targets < block.stop)
    return inside, (targets - block.start).mul_(inside)


def _blocks(positions: int, vocabulary: int, chunk: int) -> list[slice]:
    """Of the vocabulary, as large as `chunk` positions with all of it are."""
    size = max(1, chunk * vocabulary // max(1, positions))
    return [slice(start, min(start + size, vocabulary)) for start in range(0, vocabulary, size)]


def _int64(parts: list[np.ndarray]) -> Tensor:
    return torch.from_numpy(np.concatenate(parts).astype(np.int64))
