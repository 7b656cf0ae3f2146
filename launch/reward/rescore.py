"""A run's completions again, in their groups, with the values that two reward functions give them now."""

import asyncio
import itertools
from collections.abc import Callable, Iterator
from dataclasses import dataclass

from doctor.history import History, Seen
from protocol.errors import UserError
from protocol.recipe import Recipe, Reward
from protocol.rollout import Rollout
from sampler.prompts import Prompt
from sampler.rewards.answers import gold, last_number
from sampler.rewards.bench import BESIDE, stand_ins
from sampler.rewards.pool import RewardFailed, RewardPool

RECORDED = "recorded"
MAX_FAILED = 10
"""Groups without values, after which the function is refused."""
Values = list[float | None]


@dataclass(slots=True, kw_only=True)
class Group:
    """Completions of one prompt, side by side."""

    step: int
    """Of the newest weights that sampled it."""
    prompt: Prompt
    rollouts: list[Rollout]
    old: Values
    new: Values

    def right(self) -> list[bool | None]:
        """Whether the last number of each completion is the answer; None where the row has none."""
        expected = gold(str(self.prompt.columns.get("answer", "")))
        return [None if expected is None else last_number(one.completion) == expected for one in self.rollouts]


@dataclass(slots=True, kw_only=True)
class Rescored:
    groups: list[Group]
    """By step."""
    moved: int
    """Groups whose prompt is no longer in the data set at their row."""
    failed: list[str]
    """Why a group has no values."""


def groups_of(history: History, split: str, prompts: list[Prompt], limit: int) -> tuple[list[Group], int]:
    """Groups by step, `limit` of them evenly over the run (0: all), and how many were left out as moved.

    Raises UserError where the run has none, or none whose prompt is that of its row.
    """
    seen = history.train if split == "train" else history.held_out
    ordered = sorted(seen, key=lambda one: (one.file, one.offset))
    found = [list(lines) for _, lines in itertools.groupby(ordered, key=lambda one: (one.file, one.group))]
    found.sort(key=newest)
    if not found:
        raise UserError(f"{history.rundir.path} has no completions of the split {split} in rollouts/")
    chosen = found[:: max(1, -(-len(found) // limit))] if limit else found
    groups = [group for lines in chosen if (group := _group(history, lines, prompts))]
    if not groups:
        row = chosen[0][0].row
        raise UserError(
            f"row {row} of the data set is not the prompt that the run had there; name its data with --data"
        )
    return groups, len(chosen) - len(groups)


def newest(lines: list[Seen]) -> int:
    return max(one.version for one in lines)


def _group(history: History, lines: list[Seen], prompts: list[Prompt]) -> Group | None:
    rollouts = [history.rollout(one) for one in lines]
    prompt = prompts[lines[0].row] if lines[0].row < len(prompts) else None
    if prompt is None or not asks(rollouts[0].prompt, prompt):
        return None
    return Group(step=newest(lines), prompt=prompt, rollouts=rollouts, old=[], new=[])


def asks(recorded: list[dict[str, str]] | str, prompt: Prompt) -> bool:
    """Whether it is this prompt; without a chat template its text alone was recorded."""
    messages = prompt.messages
    return recorded == messages or (not isinstance(messages, str) and recorded == messages[0]["content"])


def recorded(group: Group, reference: str) -> Values:
    """The run's own weighted sums, or what one function gave. Raises UserError for one that the run did not have."""
    name = reference.partition(":")[2]
    known = group.rollouts[0].rewards
    if name and name not in known:
        raise UserError(f"{reference}: the run recorded no such function; it has: {', '.join(known)}")
    return [one.rewards.get(name) if name else one.reward for one in group.rollouts]


def rescored(
    groups: list[Group],
    moved: int,
    old: Reward | str,
    new: Reward | str,
    recipe: Recipe,
    say: Callable[[str], None],
) -> Rescored:
    """old, new: a function, or `recorded[:NAME]`. Raises UserError if one cannot be called, or fails too often."""
    result = Rescored(groups=[], moved=moved, failed=[])

    def found(side: Reward | str) -> list[Values | str]:
        if isinstance(side, str):
            return [recorded(group, side) for group in groups]
        return asyncio.run(_scored(groups, side, recipe, say))

    for group, old_values, new_values in zip(groups, found(old), found(new), strict=True):
        wrong = [values for values in (old_values, new_values) if isinstance(values, str)]
        if isinstance(old_values, str) or isinstance(new_values, str):
            result.failed += wrong
            continue
        group.old, group.new = old_values, new_values
        result.groups.append(group)
    return result


async def _scored(
    groups: list[Group], reward: Reward, recipe: Recipe, say: Callable[[str], None]
) -> list[Values | str]:
    """Of each group the values, or why there are none."""
    results: list[Values | str] = []
    memory = int(recipe.sampler.reward_memory_gb * 2**30)
    async with RewardPool([reward, BESIDE], workers=1, memory_bytes=memory) as pool:
        pool.check_columns(groups[0].prompt.columns)
        for number, group in enumerate(groups):
            say(f"{reward.function}: group {number} of {len(groups)}")
            results.append(await _values(pool, group, recipe.sampling.max_tokens))
            failed = [values for values in results if isinstance(values, str)]
            if len(failed) >= MAX_FAILED:
                raise UserError(f"{len(failed)} of {len(results)} groups have no values, the last: {failed[-1]}")
    return results


async def _values(pool: RewardPool, group: Group, max_tokens: int) -> Values | str:
    rollouts = group.rollouts
    try:
        score = await pool.score(
            rollouts[0].prompt,
            [one.completion for one in rollouts],
            group.prompt.columns,
            completion_ids=[stand_ins(one.completion, one.tokens) for one in rollouts],
            finish_reasons=[one.finish for one in rollouts],
            max_tokens=max_tokens,
        )
    except RewardFailed as failure:
        return str(failure)
    return score.by_function[pool.keys[0]]


def pairs(groups: list[Group]) -> Iterator[tuple[Group, Rollout, float | None, float | None, bool | None]]:
    """group, completion, old value, new value, whether its last number is the answer."""
    for group in groups:
        for one in zip(group.rollouts, group.old, group.new, group.right(), strict=True):
            yield group, *one
