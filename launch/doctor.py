"""Says what is wrong with a run, from its files: beside it, after it, on another machine."""

import argparse
import json
from pathlib import Path

import msgspec

from doctor.course import Course
from doctor.diagnosis import Diagnosis
from doctor.history import History
from protocol.cli import CONTROL
from protocol.rollout import Rollout

WIDE = 400
"""Characters of a completion that are printed."""


def main(arguments: list[str]) -> int:
    """0: nothing is wrong at the end; 1: something is."""
    flags = argparse.ArgumentParser(
        "launch doctor", description="Says what is wrong with a run, with evidence and the setting to change."
    )
    flags.add_argument("run", type=Path, help="run directory, of a run that is going on or over")
    flags.add_argument("--json", action="store_true", help="the diagnoses as JSON")
    options = flags.parse_args(arguments)
    course = Course(History.open(options.run))
    course.follow()
    diagnoses = course.diagnoses()
    if options.json:
        print(json.dumps(msgspec.to_builtins(diagnoses), indent=2))  # ASCII: text of models commands no terminal
    else:
        tell(course, diagnoses)
    return 1 if course.holding else 0


def tell(course: Course, diagnoses: list[Diagnosis]) -> None:
    """A disease that came and went is told once, with its last evidence."""
    spells: dict[str, list[Diagnosis]] = {}
    for diagnosis in diagnoses:
        spells.setdefault(diagnosis.rule, []).append(diagnosis)
    texts = [shown(sorted(one, key=lambda spell: -spell.last), course.step) for one in spells.values()]
    ended = "nothing is wrong at the end" if diagnoses else "nothing wrong"
    seen = looked_at(course.history)
    print("\n\n".join([*texts, seen if course.holding else f"{seen}: {ended}"]).translate(CONTROL), flush=True)


def looked_at(history: History) -> str:
    """Example: 20 steps, 1,280 completions, 2 evaluations, 1 sampler"""
    parts = [
        (len(history.steps), "step"),
        (len(history.train), "completion"),
        (len(history.exams), "evaluation"),
        (len(history.samplers), "sampler"),
        (len(history.skipped), "skipped step"),
        (history.unreadable, "unreadable line"),
    ]
    return ", ".join(f"{count:,} {name}{'' if count == 1 else 's'}" for count, name in parts if count) or "no step yet"


def shown(spells: list[Diagnosis], end: int) -> str:
    """spells: of one rule, the newest first. end: the run's last step."""
    newest = spells[0]
    over = "" if newest.last == end else ", over"
    before = f"; {len(spells) - 1} earlier, from step {spells[-1].first}" if spells[1:] else ""
    return "\n".join(
        [
            f"{newest.rule}  ({steps(newest)}{over}{before})",
            f"  evidence  {newest.evidence}",
            f"  change    {newest.advice}",
            *map(example, newest.examples),
        ]
    )


def steps(diagnosis: Diagnosis) -> str:
    first, last = diagnosis.first, diagnosis.last
    return f"steps {first} to {last}" if first < last else f"step {first}"


def example(rollout: Rollout) -> str:
    rewards = ", ".join(
        f"{name} {'none' if value is None else f'{value:g}'}" for name, value in rollout.rewards.items()
    )
    asked = rollout.prompt if isinstance(rollout.prompt, str) else rollout.prompt[-1]["content"]
    gold = f"; right is {rollout.gold}" if rollout.gold is not None else ""
    end = "cut" if rollout.finish == "length" else "ended"
    return "\n".join(
        [
            f"  row {rollout.row}, weights {rollout.snapshots[-1]}, {rollout.tokens} tokens, {end}, {rewards}{gold}",
            f"    asked     {shortened(asked)}",
            f"    answered  {shortened(rollout.completion)}",
        ]
    )


def shortened(text: str) -> str:
    """On one line, the middle left out where it is long."""
    line = " / ".join(text.strip().splitlines())
    return line if len(line) <= WIDE else f"{line[: WIDE * 3 // 4]} ... {line[-WIDE // 4 :]}"
