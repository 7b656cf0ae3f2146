"""Which completions a rank computes, and which of them in one forward pass: even work, few prompts computed twice."""

import itertools
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np


@dataclass(frozen=True, slots=True, kw_only=True)
class Sample:
    """One completion of a group. m prompt tokens, n completion tokens."""

    group: int
    prompt: np.ndarray  # [m]
    tokens: np.ndarray  # [n]
    logprobs: np.ndarray  # [n] float32, the sampler's
    ref_logprobs: np.ndarray | None  # [n] float32
    advantage: float
    share: float
    """Of each of its tokens in the step's loss."""


Piece = list[Sample]
"""Completions of one group; their prompt is computed once."""


def length(piece: Piece) -> int:
    """Tokens that a forward pass computes for it."""
    return len(piece[0].prompt) + sum(len(sample.tokens) for sample in piece) if piece else 0


def split_evenly(groups: Sequence[Piece], world: int) -> list[list[Piece]]:
    """Longest first, each to the rank with the least work so far (Graham's LPT rule).

    Groups are cut only where whole ones are too coarse for an even split: a cut costs its prompt once more.
    """
    limit = sum(map(length, groups)) / world / 4 if world > 1 else float("inf")
    pieces = [piece for group in groups if group for piece in _cut(group, limit)]
    shares: list[list[Piece]] = [[] for _ in range(world)]
    work = [0] * world
    for piece in sorted(pieces, key=length, reverse=True):
        rank = work.index(min(work))
        shares[rank].append(piece)
        work[rank] += length(piece)
    return [_rejoined(share) for share in shares]


def pack_rows(pieces: Sequence[Piece], budget: int) -> list[list[Piece]]:
    """First fit, longest first: rows of at most `budget` tokens; a single longer completion gets a row of its own."""
    rows: list[list[Piece]] = []
    room: list[int] = []
    fitting = [part for piece in pieces for part in _cut(piece, budget)]
    for piece in sorted(fitting, key=length, reverse=True):
        place = next((i for i, left in enumerate(room) if length(piece) <= left), None)
        if place is None:
            rows.append([piece])
            room.append(budget - length(piece))
        else:
            rows[place].append(piece)
            room[place] -= length(piece)
    return rows


def _cut(piece: Piece, limit: float) -> list[Piece]:
    """Halved until every part is within the limit or a single completion."""
    if len(piece) == 1 or length(piece) <= limit:
        return [piece]
    middle = len(piece) // 2
    return _cut(piece[:middle], limit) + _cut(piece[middle:], limit)


def _rejoined(pieces: Sequence[Piece]) -> list[Piece]:
    """Pieces of one group that met again on one rank become one."""
    samples = sorted(itertools.chain(*pieces), key=lambda sample: sample.group)
    return [list(piece) for _, piece in itertools.groupby(samples, key=lambda sample: sample.group)]
