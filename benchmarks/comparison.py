"""The table of `benchmarks.end_to_end`: medians over the rounds; ratios are of windows of the same round."""

import statistics
from collections.abc import Callable, Mapping, Sequence

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
        "tokens/s": median(lambda one: one.tokens / one.seconds), "s a step": median(lambda one: one.step_s),
        **ratio(rounds, found.get("ours", {})), **(limits(rounds, found) if name in SAME_WORK else {}),
        "waited": median(lambda one: one.waited), "published": median(lambda one: one.published),
        "idle": median(lambda one: one.idle), "wasted": median(lambda one: one.wasted),
        "staleness": median(lambda one: one.staleness), "signal/s": median(lambda one: one.rate * (1 - one.dead)),
        "cpu s a step": costs(windows),
        "peak GB": median(lambda one: one.peak_gb),
    }  # fmt: skip


def costs(windows: Sequence[Window]) -> str:
    """Processor seconds by process: "trainer 28.4, sampler 15.5"."""
    names = windows[0].cpu_s
    return ", ".join(f"{name} {statistics.median(one.cpu_s[name] for one in windows):.3g}" for name in names)


def ratio(rounds: Rounds, ours: Rounds) -> dict[str, object]:
    """How many times the rate of a system ours has."""
    times = [ours[number].rate / window.rate for number, window in rounds.items() if number in ours]
    return {"ours is": f"{middle(times):.2f}x"} if times else {}


def limits(rounds: Rounds, found: Mapping[str, Rounds]) -> dict[str, object]:
    """The two bounds, and the share of the one for shared cores that is reached."""
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
        "efficiency": middle(reached)
    }


def middle(values: list[float] | tuple[float, ...]) -> float | str:
    """The median; nothing of nothing."""
    return round(statistics.median(values), 3) if values else ""


if __name__ == "__main__":
    raise SystemExit("a part of another benchmark: python -m benchmarks.end_to_end")
