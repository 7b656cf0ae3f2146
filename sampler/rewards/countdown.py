"""`countdown`: an equation out of given numbers, the task of TinyZero and GRPO-Zero."""

import re
from fractions import Fraction

from sampler.rewards.builtin import Completion, text_of

LONGEST = 200
"""Characters of an equation; more is none. Bounds the work and the size of the numbers."""
PART = re.compile(r"\s*([0-9]+|[-+*/()])")
NESTED = 20
"""Open parentheses at the same time."""


def countdown(
    completions: list[Completion],
    nums: list[list[int]],
    target: list[int],
    correct: float = 1.0,
    wrong: float = 0.0,
    **columns: list,
) -> list[float]:
    """`correct` where the last `<answer>` is an expression of `nums`, each once, that equals `target`; else `wrong`.

    The columns are those of Jiayi-Pan/Countdown-Tasks-3to4. Allowed are + - * / and parentheses; what follows `=` is
    dropped. Calculated here, exactly, and never run as code.
    """
    right = [
        _equals(text_of(completion), numbers, goal)
        for completion, numbers, goal in zip(completions, nums, target, strict=True)
    ]
    return [correct if one else wrong for one in right]


def _equals(text: str, numbers: list[int], goal: int) -> bool:
    answer = text.rpartition("<answer>")[2].partition("</answer>") if "<answer>" in text else ("", "", "")
    parts = _parts(answer[0].partition("=")[0]) if answer[1] else None
    if not parts or sorted(int(part) for part in parts if part.isdigit()) != sorted(numbers):
        return False
    try:
        value, rest = _sum(parts, 0)
    except (ValueError, ZeroDivisionError):
        return False
    return not rest and value == goal


def _parts(text: str) -> list[str] | None:
    """Numbers, operators and parentheses; None where there is anything else."""
    found = PART.findall(text) if len(text) <= LONGEST else []
    return found if "".join(found) == "".join(text.split()) else None


def _sum(parts: list[str], depth: int) -> tuple[Fraction, list[str]]:
    """The value of what `parts` begin with, and the rest of them. Raises ValueError where that is no expression."""
    value, rest = _product(parts, depth)
    while rest and rest[0] in "+-":
        sign = 1 if rest[0] == "+" else -1
        term, rest = _product(rest[1:], depth)
        value += sign * term
    return value, rest


def _product(parts: list[str], depth: int) -> tuple[Fraction, list[str]]:
    value, rest = _factor(parts, depth)
    while rest and rest[0] in "*/":
        divides = rest[0] == "/"
        factor, rest = _factor(rest[1:], depth)
        value = value / factor if divides else value * factor
    return value, rest


def _factor(parts: list[str], depth: int) -> tuple[Fraction, list[str]]:
    if parts and parts[0].isdigit():
        return Fraction(parts[0]), parts[1:]
    if not parts or parts[0] != "(" or depth == NESTED:
        raise ValueError("no number")
    value, rest = _sum(parts[1:], depth + 1)
    if not rest or rest[0] != ")":
        raise ValueError("an open parenthesis")
    return value, rest[1:]
