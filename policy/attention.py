"""Attention in a packed row: who sees whom, and the two ways to compute it.

`sdpa` is torch's, over all pairs of tokens, with a mask: t * t of them, most of them masked in a long row of short
completions. `varlen` computes only pairs that see each other: each prompt and each completion is a sequence of its
own for FlashAttention, a completion with the keys of its prompt before its own. The kernel comes with torch; without a
GPU the same is done by matrix products, one segment after the other.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn.attention.varlen import varlen_attn
from transformers import AttentionInterface

CHANGES_SCORES = ("sliding_window", "softcap", "s_aux", "position_bias")
"""What some models ask of attention and `varlen` does not do."""
PIECE = 512
"""Queries whose scores are computed together without a GPU: all of a long prompt's would be gigabytes."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Segments:
    """A segment is one prompt or one completion; it sees its prompt and itself. s segments, t tokens, k keys."""

    queries: Tensor
    """[s + 1] int32: segment i is the tokens queries[i] to queries[i + 1]"""
    keys: Tensor
    """[s + 1] int32: they see seen[keys[i]:keys[i + 1]]; the last token all of it, the one before all but one, ..."""
    seen: Tensor
    """[k] int64, tokens"""
    longest: tuple[int, int]
    """Queries and keys of the longest segments."""

    @staticmethod
    def of(seen: Sequence[tuple[int, np.ndarray]]) -> "Segments":
        """seen: of each segment in their order the number of its tokens, at least 1, and the tokens that it sees."""
        lengths = np.array([(queries, len(keys)) for queries, keys in seen])
        ends = torch.from_numpy(np.concatenate([np.zeros((1, 2), int), lengths.cumsum(0)]).astype(np.int32))
        return Segments(
            queries=ends[:, 0].contiguous(),
            keys=ends[:, 1].contiguous(),
            seen=torch.from_numpy(np.concatenate([keys for _, keys in seen])),
            longest=(int(lengths[:, 0].max()), int(lengths[:, 1].max())),
        )

    def to(self, device: torch.device | str) -> "Segments":
        return Segments(
            queries=self.queries.to(device),
            keys=self.keys.to(device),
            seen=self.seen.to(device),
            longest=self.longest,
        )

    def mask(self, tokens: int, dtype: torch.dtype) -> Tensor:
        """[1, 1, t, t], to be added to attention scores: 0, and the smallest number of `dtype` where nothing is seen.

        Not bool: torch would make such a tensor of it in every layer, and keep each for the backward pass. Its rows
        begin at multiples of 16 values, else CUDA kernels copy it. Not -inf, of which cuDNN has made NaN.
        """
        segment = torch.arange(len(self.queries) - 1, device=self.seen.device)
        sees = torch.zeros(len(segment), tokens, dtype=torch.bool, device=self.seen.device)
        # `= True` would copy a number from the host to the GPU. This one is made on the GPU.
        sees[segment.repeat_interleave(self.keys.diff(), output_size=len(self.seen)), self.seen] = sees.new_ones(())
        visible = sees[segment.repeat_interleave(self.queries.diff(), output_size=tokens)].tril_()
        added = torch.zeros(tokens, -(-tokens // 16) * 16, dtype=dtype, device=self.seen.device)[:, :tokens]
        return added.masked_fill_(visible.logical_not_(), torch.finfo(dtype).min)[None, None]


def varlen(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    segments: Segments,
    scaling: float | None = None,
    **others: object,
) -> tuple[Tensor, None]:
    """transformers' attention interface: query [1, h, t, d], key and value [1, g, t, d] -> [1, t, h, d].

    h is a multiple of g. Without a GPU one segment after the other is computed.
    """
    unknown = [name for name in CHANGES_SCORES if others.get(name) is not None]
    unknown += ["dropout"] * bool(others.get("dropout"))
    if unknown:
        raise NotImplementedError(f"varlen attention does not do {', '.join(unknown)}")
    queries, keys, values = (part[0].transpose(0, 1) for part in (query, key, value))
    attend = _flash if query.is_cuda else _one_by_one
    return attend(queries, keys[segments.seen], values[segments.seen], segments, scaling)[None], None


AttentionInterface.register("varlen", varlen)


def _flash(queries: Tensor, keys: Tensor, values: Tensor, segments: Segments, scaling: float | None) -> Tensor:
    """queries [t, h, d], keys and values [k, g, d] -> [t, h, d]. Causal is aligned to the last query and key."""
    found = varlen_attn(
        queries, keys, values, segments.queries, segments.keys, *segments.longest,
        scale=scaling, window_size=(-1, 0), enable_gqa=True,
    )  # fmt: skip
    assert isinstance(found, Tensor)
    return found


def _one_by_one(queries: Tensor, keys: Tensor, values: Tensor, segments: Segments, scaling: float | None) -> Tensor:
    """The same in plain torch, in float32 as FlashAttention sums; the query heads of a key head in one product.

    Values may have another width than keys. Queries of a long segment come in pieces, which see fewer keys each.
    """
    (t, h, d), g = queries.shape, keys.shape[1]
    dtype = torch.promote_types(queries.dtype, torch.float32)
    by_head = queries.to(dtype).view(t, g, h // g, d).permute(1, 2, 0, 3) * (scaling or d**-0.5)
    seen = (part.to(dtype).transpose(0, 1).split(segments.keys.diff().tolist(), dim=1) for part in (keys, values))
    found = []
    for q, k, v in zip(by_head.split(segments.queries.diff().tolist(), dim=2), *seen, strict=True):
        reach = k.shape[1] - q.shape[2]
        for piece in q.split(PIECE, dim=2):
            reach += piece.shape[2]
            found.append(_causal(piece, k[:, :reach], v[:, :reach]))
    return torch.cat(found, dim=2).permute(2, 0, 1, 3).reshape(t, h, -1).to(queries.dtype)


def _causal(queries: Tensor, keys: Tensor, values: Tensor) -> Tensor:
    """queries [g, r, n, d], keys [g, m, d], values [g, m, w] -> [g, r, n, w]; the last query sees all keys."""
    scores = (queries.flatten(1, 2) @ keys.mT).unflatten(1, queries.shape[1:3])
    later = torch.ones(scores.shape[2:], dtype=torch.bool).triu_(scores.shape[3] - scores.shape[2] + 1)
    shares = scores.masked_fill_(later, -torch.inf).softmax(-1)
    return (shares.flatten(1, 2) @ values).unflatten(1, queries.shape[1:3])
