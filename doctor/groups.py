"""Groups without signal: their rewards are all equal, and so none of their completions is better than another."""

import math

from doctor.diagnosis import Finding
from doctor.history import Seen
from doctor.window import Window, best_value

DEAD = 0.8
"""Share of groups without signal, of both kinds together, the larger of which is named: four of five completions are
sampled for nothing. A pass rate of 0.03 with groups of 8 comes to it."""


def dead_right(window: Window) -> Finding | None:
    dead, others = of_right(window), of_wrong(window)
    if not _dead(window, dead, others) or len(dead) < len(others):
        return None
    return Finding(
        evidence=f"in {len(dead)} of {len(window.groups)} groups all {len(dead[0])} completions earn {best(window)}"
        f"{_besides(others, 'are wrong')}: none is better than another{window.loss_note}",
        advice="data.train: take problems that the model does not always solve, or a stricter reward; "
        "metrics/prompts.json lists the prompts that were always solved",
        examples=[group[0] for group in dead[-3:]],
    )


def dead_wrong(window: Window) -> Finding | None:
    dead, others = of_wrong(window), of_right(window)
    if not _dead(window, dead, others) or len(dead) <= len(others):
        return None
    size, solved = window.recipe.sampling.group_size, window.share(lambda seen: seen.right)
    return Finding(
        evidence=f"in {len(dead)} of {len(window.groups)} groups all {size} completions are wrong"
        f"{_besides(others, f'earn {best(window)}')}, {solved:.1%} of all completions are right: none is better than "
        f"another{window.loss_note}",
        advice=f"sampling.group_size = {larger_group(size, solved)}: then half of the groups have a right one"
        if solved and size < larger_group(size, solved) <= 8 * size
        else "data.train: take easier problems first, show a worked example in data.prefix, or learn the form from "
        "demonstrations first (recipes/demo-sft.toml)",
        examples=[group[0] for group in dead[-3:]],
    )


def larger_group(size: int, solved: float) -> int:
    """The group size with which half of the groups hold a right completion: 1 - (1 - p)^n = 1/2; a multiple of 4."""
    return max(size, 4 * math.ceil(math.log(0.5) / math.log1p(-solved) / 4)) if solved < 1 else size


def best(window: Window) -> str:
    known = best_value(window.recipe.reward[0]) is not None
    return "the full reward" if known else f"{window.full_score or 0:g}, the best so far"


def of_right(window: Window) -> list[list[Seen]]:
    if window.full_score is None:
        return []
    return [group for group in window.groups if alike(group) and all(seen.first > window.partial for seen in group)]


def of_wrong(window: Window) -> list[list[Seen]]:
    return [group for group in window.groups if alike(group) and not any(seen.right for seen in group)]


def _dead(window: Window, dead: list, others: list) -> bool:
    return window.enough and len(dead) + len(others) >= DEAD * len(window.groups) > 0


def _besides(others: list, what: str) -> str:
    return f", in {len(others)} all {what}" if others else ""


def alike(group: list[Seen]) -> bool:
    return all(seen.reward == group[0].reward for seen in group)
