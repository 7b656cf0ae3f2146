"""All that is tried with one reward function, before anybody judges it."""

from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from typing import Literal

from protocol.recipe import Recipe, Reward
from sampler.prompts import Prompt
from sampler.rewards import bench_texts
from sampler.rewards.bench import ENOUGH, Bench, Broken
from sampler.rewards.pool import RewardFailed

Kind = Literal["correctness", "shape"]
"""`correctness` tells right answers from wrong ones; `shape` looks at length, tags, style."""
Values = dict[str, float | None]
AGAIN = 20
"""Rows that are scored again: in the same process, in another order and in another process."""
ALONE = 2
"""Rows that are scored text by text."""
ATTACKED = 2
"""Rows on which hostile texts are tried."""
NEARLY = 0.98
"""Share of the rows that counts as all of them: a few golds are unreadable in any data set."""


@dataclass(slots=True, repr=False)
class Row:
    """One prompt, the texts that were tried on it and their values; a text that failed has none."""

    prompt: Prompt
    answer: str | None
    texts: dict[str, str] = field(default_factory=dict)
    values: Values = field(default_factory=dict)

    def under(self, prefix: str) -> Values:
        """Of the texts whose names begin so."""
        return {name: value for name, value in self.values.items() if name.startswith(prefix)}


@dataclass(slots=True, kw_only=True, repr=False)  # asyncio.run writes out what a task returns: minutes
class Trials:
    """What came of it."""

    reward: Reward
    rows: list[Row]
    kind: Kind = "shape"
    asked: bool = False
    """Whether the user named the kind."""
    forms: list[str] = field(default_factory=list)
    """In which the gold answer scores as high as in any, best first."""
    repeats: dict[str, list[tuple[str, Row]]] = field(default_factory=dict)
    """By how it was scored again, the names of the texts whose value was another then."""
    seconds: list[tuple[float, int]] = field(default_factory=list)
    """Of each call with usual texts, and its completions."""
    slowest: tuple[float, str] = (0.0, "")
    """Of the hostile texts: seconds, name."""
    broken: list[Broken] = field(default_factory=list)
    attacked: list[Broken] = field(default_factory=list)
    """Hostile texts without a value."""


async def tried(
    reward: Reward, recipe: Recipe, prompts: list[Prompt], kind: Kind | None, say: Callable[[str], None]
) -> Trials:
    """kind None: found out. Raises UserError for a function that cannot be called."""
    rows = [Row(prompt, bench_texts.final(prompt.columns.get("answer"))) for prompt in prompts]
    trials = Trials(reward=reward, rows=rows, asked=kind is not None)
    async with Bench(reward, recipe) as bench:
        bench.check_columns(prompts[0].columns)
        for number, row in enumerate(rows):
            say(f"right answers: row {number} of {len(rows)}")
            row.texts = bench_texts.golds(row.prompt, recipe.data.demonstration)
            row.values = await bench.values(row.prompt, row.texts)
        trials.forms = best_forms(rows)
        for number, (row, other) in enumerate(zip(rows, [*rows[1:], rows[0]], strict=True)):
            say(f"other texts: row {number} of {len(rows)}")
            more = others(row, other.answer, trials.forms)
            row.texts |= more
            row.values |= await bench.values(row.prompt, more)
        trials.seconds, trials.broken = list(bench.seconds), list(bench.broken)
        trials.kind = kind or kind_of(rows, trials.forms, "answer" in bench.needs)
        if len(trials.broken) < ENOUGH:
            await _again(bench, trials, recipe, say)
            await _attack(bench, trials, say)
    return trials


def best_forms(rows: Iterable[Row]) -> list[str]:
    """Forms in which nearly all gold answers score as high as in any form; the best alone where no form does."""
    reached: dict[str, list[bool]] = {}
    for row in rows:
        values = {name.removeprefix("gold/"): rank(value) for name, value in row.under("gold/").items()}
        for form, value in values.items():
            reached.setdefault(form, []).append(value >= max(values.values()))
    shares = {form: sum(found) / len(found) for form, found in reached.items()}
    ordered = sorted(shares, key=lambda form: -shares[form])
    return [form for form in ordered if shares[form] >= NEARLY] or ordered[:1]


def rank(value: float | None) -> float:
    """Not applicable is below every value."""
    return float("-inf") if value is None else value


def others(row: Row, other: str | None, forms: list[str]) -> dict[str, str]:
    texts = bench_texts.without_answer(row.prompt, row.answer)
    if row.answer is not None:
        frames = frames_of(row, forms)
        texts |= bench_texts.workings(row.answer, frames) | bench_texts.wrongs(row.answer, other, frames)
        texts |= bench_texts.guesses(row.answer, next(iter(frames.values())))
    return texts


def frames_of(row: Row, forms: list[str]) -> dict[str, bench_texts.Frame]:
    """At least one."""
    found = bench_texts.frames(row.texts, row.answer, forms) if row.answer else {}
    return found or {"heading": bench_texts.FORMS["heading"]}


def kind_of(rows: Iterable[Row], forms: list[str], needs_answer: bool) -> Kind:
    """`correctness` where the function asks for the answer, or where right ones mostly beat wrong ones."""
    wins = []
    for row in rows:
        for form in forms:
            wrong = [rank(value) for value in row.under(f"wrong/{form}/").values()]
            wins += [rank(row.values.get(f"gold/{form}")) > max(wrong)] if wrong else []
    return "correctness" if needs_answer or sum(wins) > len(wins) / 2 else "shape"


async def _again(bench: Bench, trials: Trials, recipe: Recipe, say: Callable[[str], None]) -> None:
    rows = trials.rows[:AGAIN]
    say("the same once more, in another order, in another process, text by text")
    trials.repeats["again"] = await _changed(bench, rows)
    trials.repeats["in another order"] = await _changed(bench, rows[::-1], backwards=True)
    async with Bench(trials.reward, recipe) as other:
        trials.repeats["in another process"] = await _changed(other, rows)
    alone = []
    for row in rows[:ALONE]:
        for name, text in row.texts.items():
            found = await bench.values(row.prompt, {name: text})
            alone += [(name, row)] if found != {name: row.values.get(name)} else []
    trials.repeats["alone"] = alone


async def _changed(bench: Bench, rows: Iterable[Row], backwards: bool = False) -> list[tuple[str, Row]]:
    changed = []
    for row in rows:
        golds = {name: text for name, text in row.texts.items() if name.startswith("gold/")}
        rest = {name: text for name, text in row.texts.items() if name not in golds}
        found = {}
        for texts in (rest, golds) if backwards else (golds, rest):  # the groups of the first time
            found |= await bench.values(row.prompt, texts, backwards)
        changed += [(name, row) for name, value in row.values.items() if name not in found or found[name] != value]
    return changed


async def _attack(bench: Bench, trials: Trials, say: Callable[[str], None]) -> None:
    """Each hostile text in a call of its own; one that fails is not tried on another row."""
    failed: set[str] = set()
    for row in [row for row in trials.rows if row.answer or trials.kind == "shape"][:ATTACKED]:
        frame = next(iter(frames_of(row, trials.forms).values()))
        for name, text in bench_texts.hostile(row.answer or "18", frame).items():
            if name in failed:
                continue
            say(f"hostile texts: {name}")
            row.texts[name] = text
            try:
                row.values[name] = await bench.alone(row.prompt, name, text)
            except RewardFailed as failure:
                failed.add(name)
                trials.attacked.append(Broken(name=name, text=text, why=f"{failure.kind}: {failure.why}"))
            else:
                trials.slowest = max(trials.slowest, (bench.seconds[-1][0], name))
