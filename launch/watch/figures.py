"""The numbers of `launch watch`: what a history says about learning, and about the machines that do it."""

import contextlib
import math
import os
import statistics
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from doctor.history import History, Seen
from doctor.machines import idle_share, waited
from doctor.window import Window, mean
from launch.report.measured import measured
from protocol.intervals import Z95, clustered


@dataclass(frozen=True, slots=True)
class Curve:
    """One figure over the steps."""

    name: str
    points: list[tuple[int, float]]
    """(optimizer step, value), at least one."""
    now: float
    """The mean of the last steps, or the last exam."""
    interval: tuple[float, float] | None = None
    """95 %."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Machines:
    """Over the last steps; None where no record has it."""

    step_s: float | None
    waited: float | None
    """Share of the trainer's time in which it waited for samplers."""
    trained_per_s: float | None
    """Tokens, while it computed."""
    trainer_gb: float | None
    device_gb: float | None
    samplers: int
    idle: float | None
    """Share of the samplers' time without a completion at work."""
    sampled_per_s: float | None
    sampler_gb: float | None


FIGURES: dict[str, tuple[str, Callable[[float], float]]] = {
    "signal": ("frac_reward_zero_std", lambda value: 1 - value),
    "truncated": ("completions/clipped_ratio", float),
    "length": ("completions/mean_length", float),
    "entropy": ("entropy", float),
    "staleness": ("staleness/mean", float),
    "kl": ("kl", float),
    "drift": ("sampling/sampling_logp_difference/mean", float),
    "clip ratio": ("clip_ratio/region_mean", float),
    "grad norm": ("grad_norm", float),
    "loss": ("loss", float),
    "step s": ("step_time", float),
}
"""Name on the screen: name in the record, and what is shown of it; the most important first."""


def curves(history: History, window: Window) -> list[Curve]:
    """Reward, accuracy, held-out accuracy, then `FIGURES`; only those that have points."""
    groups = trained(window)
    found = [
        of_steps(history, window, "reward", "reward", interval=mean_interval(groups)),
        of_steps(history, window, "accuracy", "accuracy", interval=share_interval(groups)),
        held_out(history),
    ]
    names = [name for name in FIGURES if window.grouped or name != "signal"]
    found += [of_steps(history, window, name, *FIGURES[name]) for name in names]
    return [curve for curve in found if curve]


def of_steps(
    history: History,
    window: Window,
    name: str,
    key: str,
    shown: Callable[[float], float] = float,
    interval: tuple[float, float] | None = None,
) -> Curve | None:
    values = [(step["step"], step.get(key)) for step in measured(history.steps, key)]
    points = [(at, shown(value)) for at, value in values if isinstance(value, int | float)]
    now = mean(measured(window.steps, key), key)
    return Curve(name, points, shown(now), interval) if points and not math.isnan(now) else None


def held_out(history: History) -> Curve | None:
    if not history.exams:
        return None
    last = history.exams[-1]
    points = [(exam["step"], exam["accuracy"]) for exam in history.exams]
    return Curve("held out", points, last["accuracy"], (last["low"], last["high"]))


def trained(window: Window) -> list[list[Seen]]:
    """The groups of the last steps; those that gave no signal and were replaced are not among them.

    Of a group that was sampled again after a restart, the later completions.
    """
    ids = {group for step in window.steps for group in step["groups"]}
    found: dict[int, list[Seen]] = {}
    for seen in window.train:
        if seen.group in ids:
            found.setdefault(seen.group, []).append(seen)
    size = window.recipe.sampling.group_size
    return [group[-size:] for group in found.values()]


def mean_interval(groups: list[list[Seen]]) -> tuple[float, float] | None:
    """Of the mean reward: the normal one over the means of groups, because completions of a prompt are alike."""
    if len(groups) < 2:
        return None
    means = [statistics.fmean(seen.reward for seen in group) for group in groups]
    middle, half = statistics.fmean(means), Z95 * statistics.stdev(means) / math.sqrt(len(means))
    return middle - half, middle + half


def share_interval(groups: list[list[Seen]]) -> tuple[float, float] | None:
    right = [sum(seen.right for seen in group) for group in groups]
    return clustered(right, [len(group) for group in groups]) if groups else None


def machines(window: Window) -> Machines:
    steps = window.steps
    total = math.fsum(step["step_time"] for step in steps)
    worked = total - math.fsum(step["time/wait_s"] + step["time/publish_s"] for step in steps)
    sampled = math.fsum(step["sampler/tokens_per_s"] * step["step_time"] for step in steps)
    last = steps[-1] if steps else {}
    trees = [
        records[-1]["memory/tree_gb"] for records in window.samplers if records and "memory/tree_gb" in records[-1]
    ]
    return Machines(
        step_s=total / len(steps) if steps else None,
        waited=waited(steps) if total else None,
        trained_per_s=math.fsum(step["train/tokens"] for step in steps) / worked if worked > 0 else None,
        trainer_gb=last.get("memory/peak_gb"),
        device_gb=last.get("memory/device_peak_gb"),
        samplers=int(last.get("samplers") or 0),
        idle=idle_share(window),
        sampled_per_s=sampled / total if total else None,
        sampler_gb=math.fsum(trees) if trees else None,
    )


def disk_gb(directory: Path) -> float:
    """What the run directory takes, 1e9 bytes; a file that vanishes meanwhile counts nothing."""
    total = 0
    for folder, _, names in os.walk(directory):  # Path.rglob raises where a folder vanishes
        for path in (folder, *(os.path.join(folder, name) for name in names)):
            with contextlib.suppress(OSError):
                total += os.lstat(path).st_blocks * 512
    return total / 1e9
