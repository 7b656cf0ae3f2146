"""The screen of `launch watch`: lines for a terminal of any size, 80 x 24 and up."""

from dataclasses import dataclass
from typing import Literal

from rich.console import Console, Group
from rich.text import Text

from doctor.course import Spell
from doctor.history import History
from launch.watch.curves import ASCII_BARS, BARS, TALL, curve_table
from launch.watch.figures import Curve, Machines
from launch.watch.state import State
from protocol.cli import CONTROL
from protocol.rollout import Rollout

Choice = Literal["newest", "best", "worst"]
STYLES = {"waiting": "yellow", "running": "green", "quiet": "bold yellow", "failed": "bold red", "complete": "green"}
LEAST_CURVES, TOLD, SAMPLE = 8, 3, 8
"""Curves, lines of diagnoses and lines of samples, on a screen that has not enough for all."""
MOST_ROWS = 4
"""Of a curve; only on a large screen, and only the first `TALL` curves."""


@dataclass(frozen=True, kw_only=True)
class View:
    """All that is on the screen."""

    history: History
    state: State
    curves: list[Curve]
    machines: Machines
    disk_gb: float
    spells: list[Spell]
    """Of the doctor: those that hold, the worst first; else the latest one."""
    samples: dict[Choice, Rollout]
    """The one that was asked for first."""
    warnings: list[str]


def screen(view: View, console: Console, height: int, keys: bool) -> Group:
    """At most `height` lines. keys: whether somebody sits there to press them."""
    utf = console.encoding.startswith("utf")
    head = [*header(view), *[line(text, "yellow") for text in view.warnings]]
    head.append(line((chr(0x2500) if utf else "-") * console.width, "dim"))
    speed = machine_lines(view.machines, view.disk_gb)
    told = [text for spell in view.spells for text in diagnosis(spell, view.history, console)]
    told = told or [line("doctor    nothing wrong" if view.history.steps else "doctor    no step yet", "dim")]
    samples = [sample_lines(rollout, choice, console) for choice, rollout in view.samples.items()]
    rest = height - len(head) - len(speed) - keys - 1  # the heading of the curves
    wanted = min(SAMPLE, len(samples[0])) if samples else 0
    shown = view.curves[: max(LEAST_CURVES, rest - len(told) - wanted)]
    rest -= len(shown)
    told = cut(told, max(TOLD, rest - wanted), "... python -m launch doctor shows all")
    rest -= len(told)
    rows = max(1, min(MOST_ROWS, 1 + (rest - SAMPLE) // TALL))
    rest -= (rows - 1) * min(TALL, len(shown))
    sample = fitting(samples, rest)
    bars = BARS if utf else ASCII_BARS
    hint = [line("q ends   n newest   b best   w worst completion of the last steps", "dim")] if keys else []
    return Group(*head, curve_table(shown, console.width, bars, rows), *speed, *told, *sample, *hint)


def header(view: View) -> list[Text]:
    recipe = view.history.recipe
    what = f"{recipe.name}  {recipe.model.path}  {recipe.objective.name}  {view.history.rundir.path}"
    changed = change(view.history)
    return [line(what, "bold"), line(view.state.text, STYLES[view.state.kind]), *([line(changed)] if changed else [])]


def change(history: History) -> str:
    """Of held-out accuracy since before training; "" before it is known."""
    exam = history.exams[-1] if history.exams else {}
    if "change/difference" not in exam:
        return ""
    words = "held-out accuracy {change/difference:+.3f} [{change/low:+.3f}, {change/high:+.3f}] since the beginning"
    return f"{words} (n={{n}})".format(**exam)


def machine_lines(machines: Machines, disk_gb: float) -> list[Text]:
    """Who waits for whom, as shares of their time; speed; memory."""
    trainer = [
        amount(machines.waited, "waits {:.0%}"),
        amount(machines.trained_per_s, "{:.0f} tokens/s"),
        amount(machines.step_s, "{:.1f} s a step"),
        amount(machines.trainer_gb, "peak {:.1f} GB"),
        amount(machines.device_gb or None, "GPU {:.1f} GB"),
    ]
    sampler = [
        amount(machines.idle, "idle {:.0%}"),
        amount(machines.sampled_per_s, "{:.0f} tokens/s"),
        f"{machines.samplers} there",
        amount(machines.sampler_gb, "{:.1f} GB"),
        f"run on disk {disk_gb:.1f} GB",
    ]
    rows = {"trainer": trainer, "sampler": sampler}
    return [line(f"{name:10}" + "   ".join(part for part in parts if part)) for name, parts in rows.items()]


def diagnosis(spell: Spell, history: History, console: Console) -> list[Text]:
    over = bool(history.steps) and spell.last < history.steps[-1]["step"]
    when = f"steps {spell.first} to {spell.last}, over" if over else f"since step {spell.first}"
    said = f"{spell.rule} ({when}): {spell.finding.evidence} -> {spell.finding.advice}"
    return wrapped(said, console, "dim" if over else "yellow")


def sample_lines(rollout: Rollout, choice: Choice, console: Console) -> list[Text]:
    """Its rewards, the end of its prompt, itself."""
    rewards = "  ".join(f"{name} {'-' if value is None else f'{value:g}'}" for name, value in rollout.rewards.items())
    end = "cut" if rollout.finish == "length" else "ended"
    about = f"{choice}: reward {rollout.reward:g} ({rewards})  {rollout.tokens} tokens, {end}"
    asked = rollout.prompt if isinstance(rollout.prompt, str) else rollout.prompt[-1]["content"]
    question = wrapped(" ".join(asked.split()), console, "dim")
    return [line(about, "bold"), *question[-2:], *wrapped(rollout.completion, console)]


def fitting(samples: list[list[Text]], count: int) -> list[Text]:
    """The first one as far as there is room, the others whole or not at all."""
    lines = cut(samples[0], count, "...") if samples else []
    for sample in samples[1:]:
        lines = lines + sample if len(lines) + len(sample) <= count else lines
    return lines


def wrapped(text: str, console: Console, style: str = "") -> list[Text]:
    return list(Text(text.translate(CONTROL).expandtabs(4), style).wrap(console, console.width))


def line(text: str, style: str = "") -> Text:
    """What models and users wrote must not command the terminal."""
    return Text(text.translate(CONTROL).replace("\n", " "), style, overflow="ellipsis", no_wrap=True)


def cut(lines: list[Text], count: int, mark: str) -> list[Text]:
    """At most so many; where some are left out, the last one says so."""
    return lines if len(lines) <= count else [*lines[: max(0, count - 1)], *[line(mark, "dim")][: max(0, count)]]


def amount(value: float | None, form: str) -> str:
    return "" if value is None else form.format(value)
