"""`python -m launch reward diff`: a run's completions under two reward functions, and where they differ."""

import argparse
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import numpy as np

from doctor.history import History
from launch.reward.check import Reporter
from launch.reward.command import named
from launch.reward.rescore import RECORDED, Group, Rescored, groups_of, pairs, rescored
from protocol.cli import CONTROL
from protocol.errors import UserError
from protocol.messages import without_signal
from protocol.recipe import Recipe, Reward
from protocol.rollout import Rollout
from sampler.rewards.bench import prompts_of
from sampler.rewards.bench_texts import final

EXAMPLES = 5
ROWS = 10
"""Of the table by step."""
SHOWN = 160
"""Characters of a completion, its end."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Change:
    """A completion that the two functions value differently."""

    kind: str
    old: float | None
    new: float | None
    right: bool | None
    group: Group
    rollout: Rollout

    @property
    def size(self) -> float:
        return abs((self.new or 0.0) - (self.old or 0.0))


def diff(options: argparse.Namespace, given: dict) -> int:
    """0, whatever it finds."""
    history = History.open(options.run)
    recipe = history.recipe
    data, most = (
        (recipe.data.train, recipe.data.limit)
        if options.split == "train"
        else (recipe.data.eval, recipe.data.eval_limit)
    )
    old, new = side(options.old, recipe, {}, options.timeout), side(options.new, recipe, given, options.timeout)
    prompts = prompts_of(options.data or data, most, recipe)
    groups, moved = groups_of(history, options.split, prompts, options.limit)
    result = rescored(groups, moved, old, new, recipe, Reporter())
    if not result.groups:
        raise UserError(f"no group has values under both: {result.failed[0]}")
    print(page(result, options.old, " ".join([options.new, *options.option])).translate(CONTROL))
    return 0


def side(reference: str, recipe: Recipe, given: dict, timeout_s: float | None) -> Reward | str:
    if reference.partition(":")[0] == RECORDED:
        if given:
            raise UserError(f"{reference} is what the run recorded: it takes no --option")
        return reference
    return named(reference, recipe.reward, given, timeout_s)


def page(result: Rescored, old: str, new: str) -> str:
    groups = result.groups
    found = list(changes(groups))
    count = sum(len(group.rollouts) for group in groups)
    lines = [
        f"{old} -> {new}: {count} completions in {len(groups)} groups",
        *([f"{result.moved} groups left out: their row has another prompt now"] if result.moved else []),
        *([f"{len(result.failed)} groups left out: {result.failed[0]}"] if result.failed else []),
        "",
        *summary(groups, found, old, new),
        "",
        *by_step(groups),
    ]
    for kind in ("up", "down", "no longer applies", "applies now"):
        lines += examples([change for change in found if change.kind == kind], kind)
    return "\n".join(lines)


def changes(groups: Iterable[Group]) -> Iterable[Change]:
    for group, rollout, old, new, right in pairs(list(groups)):
        if old == new:
            continue
        kind = "no longer applies" if new is None else "applies now" if old is None else "up" if new > old else "down"
        yield Change(kind=kind, old=old, new=new, right=right, group=group, rollout=rollout)


def summary(groups: Sequence[Group], found: Sequence[Change], old: str, new: str) -> list[str]:
    count = sum(len(group.rollouts) for group in groups)
    kinds = {kind: sum(change.kind == kind for change in found) for kind in ("up", "down")}
    none = [change for change in found if change.kind not in kinds]
    return [
        f"  mean         {mean(groups, 'old')} -> {mean(groups, 'new')}",
        f"  same value   {1 - len(found) / count:.1%}   up {kinds['up']}, down {kinds['down']}, to or from not "
        f"applicable {len(none)}",
        f"  correlation  {correlation(groups)}",
        f"  signal       {signal(groups, 'old'):.2f} -> {signal(groups, 'new'):.2f} of the groups have unequal values",
        f"  order        {ranked(groups):.2f} of the groups rank two completions differently, ties included",
        f"  truth        {closer(groups, old, new)}",
    ]


def of(groups: Iterable[Group], name: str) -> list[float]:
    """All values of one side, `old` or `new`, that apply."""
    return [value for group in groups for value in getattr(group, name) if value is not None]


def mean(groups: Iterable[Group], name: str) -> str:
    values = of(groups, name)
    return f"{np.mean(values):.3f}" if values else "-"


def correlation(groups: Iterable[Group]) -> str:
    """Pearson's, over completions to which both apply; `-` where one side is constant."""
    both = [(old, new) for _, _, old, new, _ in pairs(list(groups)) if old is not None and new is not None]
    values = np.array(both).reshape(-1, 2).T
    if not both or (np.ptp(values, axis=1) == 0).any():
        return "-"
    return f"{np.corrcoef(values)[0, 1]:.3f}"


def signal(groups: Sequence[Group], name: str) -> float:
    """Share of groups that teach something: whose values, of those that apply, differ."""
    silent = sum(without_signal([value for value in getattr(group, name) if value is not None]) for group in groups)
    return 1 - silent / len(groups)


def ranked(groups: Sequence[Group]) -> float:
    """Share of groups in which the two sides do not rank all completions alike; ties count."""
    return sum(_differs(group) for group in groups) / len(groups)


def _differs(group: Group) -> bool:
    both = [one for one in zip(group.old, group.new, strict=True) if None not in one]
    old, new = (np.sign(np.subtract.outer(values, values)) for values in np.array(both, float).reshape(-1, 2).T)
    return bool((old != new).any())


def agreement(groups: Iterable[Group], name: str) -> float:
    """Share of the values that are above 0 exactly where the last number is the answer; NaN where none can tell."""
    hits = [
        (value > 0) == right
        for group in groups
        for value, right in zip(getattr(group, name), group.right(), strict=True)
        if value is not None and right is not None
    ]
    return float(np.mean(hits)) if hits else float("nan")


def closer(groups: Sequence[Group], old: str, new: str) -> str:
    """Which side agrees more with the answers, by the last number of each completion."""
    shares = agreement(groups, "old"), agreement(groups, "new")
    if np.isnan(shares).any():
        return "-  (no answers to compare with)"
    more = "both the same" if shares[0] == shares[1] else f"{new if shares[1] > shares[0] else old} more"
    return f"{shares[0]:.3f} -> {shares[1]:.3f} agree with the answer by the last number (right: above 0): {more}"


def by_step(groups: Sequence[Group]) -> list[str]:
    """At most ROWS lines, each of about as many steps."""
    steps = sorted({group.step for group in groups})
    width = -(-len(steps) // ROWS)
    lines = ["  steps      completions  old     new     same    signal        order"]
    for start in range(0, len(steps), width):
        part = steps[start : start + width]
        here = [group for group in groups if part[0] <= group.step <= part[-1]]
        count, differ = sum(len(group.rollouts) for group in here), len(list(changes(here)))
        name = f"{part[0]}-{part[-1]}" if len(part) > 1 else f"{part[0]}"
        lines.append(
            f"  {name:9}  {count:11}  {mean(here, 'old'):6}  {mean(here, 'new'):6}  {1 - differ / count:6.1%}  "
            f"{signal(here, 'old'):.2f} -> {signal(here, 'new'):.2f}  {ranked(here):.2f}"
        )
    return lines


def examples(found: Sequence[Change], kind: str) -> list[str]:
    """The largest changes of one kind, each from another group if there are enough."""
    largest = sorted(found, key=lambda change: -change.size)
    chosen = list({id(change.group): change for change in reversed(largest)}.values())[::-1]
    chosen = sorted(chosen, key=lambda change: -change.size)[:EXAMPLES]
    return ["", f"{kind}: {len(found)}", *(line for change in chosen for line in shown(change))] if found else []


def shown(change: Change) -> list[str]:
    said = {None: "", True: ", last number right", False: ", last number wrong"}[change.right]
    text = change.rollout.completion
    cut = "..." if len(text) > SHOWN else ""
    values = " -> ".join("none" if value is None else f"{value:g}" for value in (change.old, change.new))
    head = f"  {values}  step {change.group.step}, row {change.rollout.row}"
    answer = final(change.group.prompt.columns.get("answer"))
    expected = "" if answer is None else f", answer {answer!r:.40}"
    return [f"{head}{expected}{said}", f"      {cut}{text[-SHOWN:]!r}"]
