"""What a check says, and what all checks ask of the values."""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Literal

from sampler.rewards.bench_trials import NEARLY, Row, Trials, rank

SHOWN = 160
"""Characters of an offending text."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Verdict:
    """warn: worth a look. fail: would spoil a training."""

    check: str
    outcome: Literal["pass", "warn", "fail"]
    words: str
    example: str = ""
    """The first text that is to blame."""


Found = tuple[str, Row]
"""A text by its name, on a row."""


def share(
    check: str,
    bad: Sequence[Found],
    count: int,
    good: str,
    wrong: str,
    worst: Literal["warn", "fail"] = "fail",
) -> Verdict | None:
    """pass without bad ones, warn where nearly all are good. None where nothing was tried."""
    if not count:
        return None
    if not bad:
        return Verdict(check=check, outcome="pass", words=f"{good} ({count} of {count})")
    outcome = "warn" if len(bad) <= (1 - NEARLY) * count else worst
    return Verdict(check=check, outcome=outcome, words=f"{wrong}: {len(bad)} of {count}", example=described(bad[0]))


def having(trials: Trials, prefix: str) -> list[Row]:
    return [row for row in trials.rows if row.under(prefix)]


def best(trials: Trials, row: Row) -> float:
    """The value of the right answer in the form that scores highest."""
    return max((rank(value) for value in row.under("gold/").values()), default=float("inf"))


def reached(trials: Trials, row: Row, name: str) -> bool:
    value = row.values.get(name)
    return value is not None and value >= best(trials, row)


def mean(rows: Iterable[Row], name: str) -> str:
    values = [value for row in rows if (value := row.values.get(name)) is not None]
    return f"{sum(values) / len(values):.3g}" if values else "nothing"


def described(found: Found) -> str:
    name, row = found
    value = "nothing" if row.values.get(name) is None else f"{row.values[name]:g}"
    return f"{name} (answer {row.answer!r:.40}) scores {value}: {shown(row.texts[name])}"


def shown(text: str) -> str:
    """Quoted and cut; no character of it can command a terminal."""
    return repr(text) if len(text) <= SHOWN else f"{text[:SHOWN]!r}... ({len(text)} characters)"
