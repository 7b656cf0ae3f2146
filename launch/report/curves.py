"""Which curves a report draws, of which figures of the record."""

from collections.abc import Sequence
from dataclasses import dataclass

from markupsafe import Markup

from launch.report.account import Account, values
from launch.report.measured import measured
from launch.report.svg import Series, chart, mean_window, number


@dataclass(frozen=True, slots=True)
class Figure:
    title: str
    names: dict[str, str]
    """In a step's record -> in the legend; the first is solid, the others dashed."""
    share: bool = False
    note: str = ""


RATIO = "sampling/importance_sampling_ratio"
HELD_OUT = "held out"
FIGURES = {
    "Learning": [
        Figure("Accuracy, held out", {HELD_OUT: ""}, True, "with 95 % intervals"),
        Figure("Reward", {"reward": ""}),
        Figure("Accuracy, training prompts", {"accuracy": ""}, True),
        Figure("Signal", {"signal": ""}, True, "share of groups whose rewards differ"),
        Figure("KL to the reference, nats a token", {"kl": ""}),
    ],
    "Completions": [
        Figure("Truncation", {"completions/clipped_ratio": ""}, True, "share that was cut at max_tokens"),
        Figure("Length, tokens", {"completions/mean_length": "all", "completions/mean_terminated_length": "ended"}),
        Figure("Entropy, nats a token", {"entropy": ""}),
    ],
    "Update": [
        Figure("Loss", {"loss": ""}),
        Figure("Gradient norm, before clipping", {"grad_norm": ""}),
        Figure("Learning rate", {"learning_rate": ""}),
        Figure("Staleness, steps", {"staleness/mean": "mean", "staleness/max": "max"}),
        Figure("Ratio of trainer to sampler", {f"{RATIO}/{name}": name for name in ("p50", "p01", "p99")}),
        Figure(
            "Difference of log-probs, nats", {"sampling/sampling_logp_difference/mean": ""}, note="trainer, sampler"
        ),
        Figure("Clipped tokens", {"clip_ratio/region_mean": ""}, note="share of them"),
    ],
    "Machines": [
        Figure("Tokens/s, sampler", {"sampler/tokens_per_s": ""}),
        Figure("Tokens/s, trainer", {"train/tokens_per_s": ""}),
        Figure("Seconds a step", {"step_time": "all", "time/wait_s": "waited", "time/publish_s": "published"}),
        Figure("Memory of the trainer, GiB at most", {"memory/peak_gb": "host", "memory/device_peak_gb": "device"}),
        Figure("Memory of a sampler, GiB at most", {"memory/tree_gb": ""}),
    ],
}


@dataclass(frozen=True, slots=True)
class Curve:
    title: str
    note: str
    svg: Markup
    keys: dict[Account, list[tuple[Series, str]]]
    """The legend: each line of each run with its first and last value."""


def curves(runs: Sequence[Account]) -> dict[str, list[Curve]]:
    """By chapter; a figure that no run has is left out."""
    drawn = {chapter: [curve(runs, figure) for figure in figures] for chapter, figures in chapters(runs).items()}
    found = {chapter: [curve for curve in some if curve] for chapter, some in drawn.items()}
    return {chapter: some for chapter, some in found.items() if some}


def chapters(runs: Sequence[Account]) -> dict[str, list[Figure]]:
    """With a figure for each reward function where there is more than one."""
    functions = dict.fromkeys(name for run in runs for step in run.history.steps for name in step if is_reward(name))
    rewards = [Figure(f"Reward {name.split('/', 1)[1].rsplit('/', 1)[0]}", {name: ""}) for name in functions]
    learning = FIGURES["Learning"] + (rewards if len(rewards) > 1 else [])
    return FIGURES | {"Learning": learning}


def is_reward(name: str) -> bool:
    return name.startswith("rewards/") and name.endswith("/mean")


def curve(runs: Sequence[Account], figure: Figure) -> Curve | None:
    """None where no run has anything to draw."""
    lines = {run: [one for one in series(run, figure) if one.points] for run in runs}
    drawn = [one for some in lines.values() for one in some]
    if not drawn:
        return None
    window = max(mean_window(one) for one in drawn)
    note = "; ".join(filter(None, [figure.note, f"thick: mean of {window} steps" if window > 1 else ""]))
    keys = {run: [(one, first_to_last(one)) for one in some] for run, some in lines.items() if some}
    return Curve(figure.title, note, chart(figure.title, drawn, figure.share), keys)


def series(run: Account, figure: Figure) -> list[Series]:
    """One line for each name; a second one only where it is not 0 throughout, as device memory without a device."""
    lines = []
    for dash, (name, shown) in enumerate(figure.names.items()):
        points = of(run, name)
        if dash == 0 or any(value for _, value in points):
            bounds = [(exam["low"], exam["high"]) for exam in run.history.exams] if name == HELD_OUT else []
            lines.append(
                Series(run=run.name, name=shown, colour=run.colour, dash=dash, points=points, intervals=bounds)
            )
    return lines


def first_to_last(one: Series) -> str:
    """Example: 0.172 -> 0.668, with an arrow."""
    ends = [number(value) for _, value in (one.points[0], one.points[-1])]
    return " \N{RIGHTWARDS ARROW} ".join(ends[: len(one.points)])


def of(run: Account, name: str) -> list[tuple[int, float]]:
    """(step, value) in the records of a run."""
    if name == HELD_OUT:
        return values(run.history.exams, "accuracy")
    if name == "signal" and run.recipe.sampling.group_size == 1:  # demonstrations: there are no groups
        return []
    if name == "signal":
        return [(step, 1 - value) for step, value in values(run.history.steps, "frac_reward_zero_std")]
    if name == "memory/tree_gb":
        return by_step(run, name)
    return values(measured(run.history.steps, name), name)


def by_step(run: Account, name: str) -> list[tuple[int, float]]:
    """The largest value of all samplers up to the end of each step: their records have times only."""
    times = sorted((record["time_s"], value) for some in run.records for record, value in holding(some, name))
    points, largest, at = [], 0.0, 0
    for step in run.history.steps:
        while at < len(times) and times[at][0] <= step["time_s"]:
            largest, at = max(largest, times[at][1]), at + 1
        if at:
            points.append((step["step"], largest))
    return points


def holding(records: Sequence[dict], name: str) -> list[tuple[dict, float]]:
    return [(records[at], value) for at, value in values(records, name, None)]
