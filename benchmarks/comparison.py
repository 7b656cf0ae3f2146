"""The table of `benchmarks.end_to_end`: medians over the rounds; ratios are of windows of the same round."""

import statistics
from collections.abc import Callable, Mapping

from benchmarks.measure import spread
from benchmarks.window import Window, bounds

SAME_WORK = ("ours", "ours-staleness-0")
"""Systems that do what `sampler-alone` and `trainer-alone` do, and so have their bound."""

Rounds = Mapping[int, Window]


def table(workload: str, found: Mapping[str, Rounds]) -> list[dict[str, object]]:
    """A row for each system that has a window."""
    return [row(workload, name, rounds, found) for name, rounds in found.items() if rounds]


def row(workload: str, name: str, rounds: Rounds, found: Mapping[str, Rounds]) -> dict[str, object]:
    windows = list(rounds.values())

    def median(figure: Callable[[Window], float | None]) -> float | str:
        return middle([value for value in map(figure, windows) if value is not None])

    rate = spread([one.rate for one in windows])
    return {
        "workload": workload, "system": name, "rollouts/s": rate["median"], "min": rate["min"], "max": rate["max"],
        "tokens/s": median(lambda one: one.token_rate), "length": median(lambda one: one.tokens / one.rollouts),
        "s a step": median(lambda one: one.step_s), **ratios(rounds, found.get("ours", {})),
        **(limits(rounds, found) if name in SAME_WORK else {}),
        "waited": median(lambda one: one.waited), "published": median(lambda one: one.published),
        "idle": median(lambda one: one.idle), "wasted": median(lambda one: one.wasted),
        "staleness": median(lambda one: one.staleness), "signal/s": median(lambda one: one.signal_rate),
        **{f"{name} cpu s": median(lambda one, name=name: one.cpu_s[name]) for name in windows[0].cpu_s},
        "peak GB": median(lambda one: one.peak_gb),
    }  # fmt: skip


def ratios(rounds: Rounds, ours: Rounds) -> dict[str, object]:
    """How many times the rate of a system ours has: of rollouts with their spread, and of tokens."""
    pairs = [(ours[number], window) for number, window in rounds.items() if number in ours]
    if not pairs:
        return {}
    times = spread([one.rate / window.rate for one, window in pairs])
    return {
        "ours / it": round(times["median"], 2), "least": round(times["min"], 2), "most": round(times["max"], 2),
        "by tokens": middle([one.token_rate / window.token_rate for one, window in pairs]),
    }  # fmt: skip


def limits(rounds: Rounds, found: Mapping[str, Rounds]) -> dict[str, object]:
    """What the two alone reach in turns, and with hardware of its own for each; our share of the former."""
    sampler, trainer = found.get("sampler-alone", {}), found.get("trainer-alone", {})
    known = {
        number: bounds(window.rollouts // window.steps, sampler[number].step_s, trainer[number].step_s)
        for number, window in rounds.items()
        if number in sampler and number in trainer
    }
    if not known:
        return {}
    reached = [rounds[number].rate / bound["shared"] for number, bound in known.items()]
    columns = {"N/(G+L)": "shared", "N/max(G,L)": "own"}
    return {title: middle([bound[name] for bound in known.values()]) for title, name in columns.items()} | {
        "efficiency": middle(reached), "from": round(min(reached), 3), "to": round(max(reached), 3),
    }  # fmt: skip


def middle(values: list[float] | tuple[float, ...]) -> float | str:
    """The median; nothing of nothing."""
    return round(statistics.median(values), 3) if values else ""


if __name__ == "__main__":
    raise SystemExit("a part of another benchmark: python -m benchmarks.end_to_end")
