"""Fixed texts whose log-probs tell one set of weights from another.

The trainer writes their log-probs into each snapshot; a sampler computes them after loading. Equal to rounding:
these are the weights. Anything else (a skipped tensor, an adapter that was not applied) and it must not sample.
"""

from collections.abc import Sequence

from transformers import PreTrainedTokenizerBase

TEXTS = (
    "A farmer has 17 sheep and buys 25 more at the market on Monday. How many sheep does the farmer have now?",
    "The quick brown fox jumps over the lazy dog while the rain falls softly on the old stone bridge.",
    "def area(width, height):\n    return width * height  # in square metres, for a rectangular room",
    "First add the two numbers, then subtract the third. 12 + 30 = 42 and 42 - 7 = 35, so the answer is 35.",
)
LENGTH = 32
TOLERANCE = {"float32": 0.01, "bfloat16": 0.15}
"""Mean absolute difference in nats that two engines may have on the same weights (measured: 1e-5 and 0.04)."""


def canary_sequences(tokenizer: PreTrainedTokenizerBase) -> list[list[int]]:
    """Token ids of the texts, [4][at most 32]."""
    return [tokenizer(text, add_special_tokens=False)["input_ids"][:LENGTH] for text in TEXTS]


def mean_gap(expected: Sequence[Sequence[float]], found: Sequence[Sequence[float]]) -> float:
    """Mean absolute difference of two sets of log-probs, in nats."""
    pairs = [(a, b) for row, other in zip(expected, found, strict=True) for a, b in zip(row, other, strict=True)]
    return sum(abs(a - b) for a, b in pairs) / max(1, len(pairs))
