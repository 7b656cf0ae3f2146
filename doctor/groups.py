"""Groups without signal: their rewards are all equal, and so none of their completions is better than another."""

import math

from doctor.diagnosis import Finding
from doctor.history import Seen
from doctor.window import PARTIAL, Window

DEAD = 0.8
"""Share of groups without signal of one kind: four of five completions are sampled for nothing. A pass rate of 0.03
with groups of 8 comes to it."""


def dead_right(window: Window) -> Finding | None:
    partial = PARTIAL * window.full_score
    dead = [group for group in window.groups if alike(group) and all(seen.first > partial for seen in group)]
    if not _dead(window, len(dead)):
        return None
    return Finding(
        evidence=f"in {len(dead)} of {len(window.groups)} groups all {len(dead[0])} completions earn the full reward: "
        f"none is better than another{window.loss_note}",
        advice="data.train: take problems that the model does not always solve, or a stricter reward; "
        "metrics/prompts.json lists the prompts that were always solved",
        examples=[group[0] for group in dead[-3:]],
    )


def dead_wrong(window: Window) -> Finding | None:
    dead = [group for group in window.groups if alike(group) and not any(seen.right for seen in group)]
    if not _dead(window, len(dead)):
        return None
    size, solved = window.recipe.sampling.group_size, window.share(lambda seen: seen.right)
    return Finding(
        evidence=f"in {len(dead)} of {len(window.groups)} groups all {size} completions are wrong, "
        f"{solved:.1%} of all completions are right: none is better than another{window.loss_note}",
        advice=f"sampling.group_size = {larger_group(size, solved)}: then half of the groups have a right one"
        if solved and larger_group(size, solved) <= 8 * size
        else "data.train: take easier problems first, show a worked example in data.prefix, or learn the form from "
        "demonstrations first (recipes/demo-sft.toml)",
        examples=[group[0] for group in dead[-3:]],
    )


def larger_group(size: int, solved: float) -> int:
    """The group size with which half of the groups hold a right completion: 1 - (1 - p)^n = 1/2; a multiple of 4."""
    return max(size, 4 * math.ceil(math.log(0.5) / math.log1p(-solved) / 4)) if solved < 1 else size


def _dead(window: Window, dead: int) -> bool:
    return window.enough and dead >= DEAD * len(window.groups) > 0


def alike(group: list[Seen]) -> bool:
    return all(seen.reward == group[0].reward for seen in group)
