"""Figures of trained tokens: a step without any signal trains none, and records zeros that nobody measured."""

from collections.abc import Sequence

OF_TOKENS = ("loss", "entropy", "kl", "clip_ratio/", "correction/", "sampling/")
"""How their names begin (trainer/figures.py, `of_tokens`)."""


def measured(steps: Sequence[dict], name: str) -> Sequence[dict]:
    """The records whose value under this name was measured."""
    if not name.startswith(OF_TOKENS):
        return steps
    return [step for step in steps if step.get("train/tokens") != 0]
