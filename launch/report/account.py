"""What a report says about one run: its figures in a table, its completions, its held-out answers."""

import math
from collections import Counter
from collections.abc import Sequence
from functools import cached_property
from pathlib import Path

import msgspec

from doctor.course import Course
from doctor.diagnosis import Diagnosis
from doctor.history import History, Seen
from launch.progress import duration
from launch.report.examples import Example, choose
from launch.report.svg import number
from protocol import evaluation, failure
from protocol.errors import UserError
from protocol.evaluation import Evaluation
from protocol.resolve import fingerprint
from protocol.rollout import Rollout

ROWS = 20
"""Prompts that were never solved, with their text."""


class Account:
    """A run under the name and the colour that the page gives it."""

    def __init__(self, name: str, colour: int, history: History) -> None:
        self.name, self.colour, self.history, self.recipe = name, colour, history, history.recipe
        self.path = history.rundir.path

    @property
    def state(self) -> str:
        done, wanted = self.history.steps[-1]["step"] if self.history.steps else 0, self.recipe.trainer.steps
        if self.history.rundir.is_complete(wanted):
            return f"complete, {done} steps" + (f" of {wanted} (patience)" if done < wanted else "")
        return f"{'failed' if self.failure else 'stopped, or still running,'} after {done} of {wanted} steps"

    @cached_property
    def failure(self) -> str:
        """FAILED.md, or nothing."""
        try:
            return (self.path / failure.NAME).read_text(errors="replace")
        except OSError:
            return ""

    @property
    def seconds(self) -> float:
        """Of all steps in the history; pauses, repeated steps and what comes after the last one are not in it."""
        return self.total("step_time")

    @property
    def device_hours(self) -> float:
        return self.seconds / 3600 * (self.recipe.sampler.gpus + self.recipe.trainer.gpus)

    def total(self, name: str) -> float:
        return math.fsum(value for _, value in values(self.history.steps, name))

    def summary(self) -> dict[str, str]:
        """The summary's rows: what -> how much."""
        history, recipe = self.history, self.recipe
        sampled = sum(max((value for _, value in values(one, "tokens", None)), default=0) for one in self.records)
        rows = {
            "state": self.state,
            **self._accuracy(),
            "model": recipe.model.path + (f", adapters of rank {recipe.lora.rank}" if recipe.lora.rank else ""),
            "objective": recipe.objective.name,
            "data": recipe.data.train,
            "batch": f"{recipe.trainer.prompts_per_step} prompts x {recipe.sampling.group_size} completions a step",
            "time": f"{duration(self.seconds)} in {len(history.steps)} steps",
            "tokens": f"{number(sampled)} sampled, " * (sampled > 0) + f"{number(self.total('train/tokens'))} trained",
            "cost": f"{self.device_hours:.3g} device-hours",
            "devices": f"{recipe.sampler.gpus} sampling, {recipe.trainer.gpus} training",
        }
        gain = history.exams[-1].get("change/difference", 0.0) if history.exams else 0.0
        if gain > 0 and self.seconds:
            rows |= {"for each point of accuracy": f"{self.device_hours / (100 * gain):.2g} device-hours"}
        troubles = {"steps skipped": len(history.skipped), "lines that are no records": history.unreadable}
        return rows | {what: str(count) for what, count in troubles.items() if count}

    @property
    def records(self) -> list[list[dict]]:
        """The samplers' records, one list for each start of one."""
        return list(self.history.samplers.values())

    def _accuracy(self) -> dict[str, str]:
        if not self.history.exams:
            return {}
        first, last = self.history.exams[0], self.history.exams[-1]
        rows = {"held out, before": interval(first)} if first["step"] == 0 else {}
        if last is first:
            return rows or {f"held out, at step {first['step']}": interval(first)}
        change = {name.removeprefix("change/"): value for name, value in last.items() if name.startswith("change/")}
        rows |= {"held out, after": f"{interval(last)} at step {last['step']}"}
        rows |= (
            {"change": f"{change['difference']:+.3f} [{change['low']:+.3f}, {change['high']:+.3f}]"} if change else {}
        )
        return rows

    def origin(self) -> dict[str, str]:
        """What the numbers hang on."""
        rows = {
            "run directory": str(self.path),
            "seed": str(self.recipe.seed),
            "model": " ".join(filter(None, [self.recipe.model.path, self.recipe.model.revision])),
            "settings that both workers agreed on": fingerprint(self.recipe),
            "trainer starts": str(len(list((self.path / "incarnations").glob("*")))),
            "sampler starts": str(len(self.records)),
        }
        if evaluated := self.evaluations:
            rows |= {
                "first evaluated weights": evaluated[0].snapshot,
                "last evaluated weights": evaluated[-1].snapshot,
                "held-out prompts": f"{len(evaluated[-1].prompts)} of {evaluated[-1].data}",
                "fingerprint of these prompts": evaluated[-1].fingerprint,
            }
        if missing := len(self.history.exams) - len(evaluated):
            rows |= {"evaluations without a readable file in evals/": str(missing)}
        return rows

    def software(self) -> list[tuple[str, dict[str, str]]]:
        """Each worker with the versions that it ran on; starts that ran on the same are one."""
        counts = Counter((worker, tuple(versions.items())) for worker, versions in self.history.starts)
        return [
            (f"{worker}, {count} starts" if count > 1 else worker, dict(versions))
            for (worker, versions), count in counts.items()
        ]

    @cached_property
    def evaluations(self) -> list[Evaluation]:
        """Every held-out answer, of those exams that are in the history and whose file can be read."""
        found = []
        for exam in self.history.exams:
            try:
                found.append(evaluation.read(self.history.rundir.evals / f"{Path(str(exam['snapshot'])).name}.json"))
            except UserError:
                continue
        return found

    @cached_property
    def answers(self) -> dict[tuple[int, int | None], list[Seen]]:
        """Held-out completions by (row, optimizer steps of their weights)."""
        found: dict[tuple[int, int | None], list[Seen]] = {}
        for seen in self.history.held_out:
            found.setdefault((seen.row, seen.version), []).append(seen)
        return found

    @cached_property
    def solved(self) -> dict[str, list[int]]:
        """Rows of the training data that were always, never, sometimes solved; {} before it is known."""
        try:
            found = (self.history.rundir.metrics / "prompts.json").read_bytes()
            return msgspec.json.decode(found, type=dict[str, list[int]])
        except (OSError, msgspec.DecodeError):
            return {}

    def never(self) -> list[Rollout]:
        """One completion of each prompt that was never solved, the first `ROWS` of them."""
        wanted = self.solved.get("never", [])[:ROWS]
        last = {seen.row: seen for seen in self.history.train if seen.row in set(wanted)}
        return [self.history.rollout(last[row]) for row in wanted if row in last]

    def examples(self) -> dict[str, list[Example]]:
        """Completions of the first weights and of the last."""
        train = self.history.train
        if not train:
            return {}
        first, last = train[0].version, train[-1].version
        parts = {f"first weights (step {first})": [seen for seen in train if seen.version == first]}
        if last != first:
            parts[f"newest weights (step {last})"] = [seen for seen in train if seen.version == last]
        return {
            title: [Example(why, seen, self.text(seen)) for why, seen in choose(part)] for title, part in parts.items()
        }

    def text(self, seen: Seen) -> Rollout:
        return self.history.rollout(seen)

    def diagnoses(self) -> tuple[list[Diagnosis], list[Diagnosis]]:
        """As `launch doctor` finds them: those that hold at the end, the worst first, and those that are over."""
        course = Course(self.history)
        course.follow()
        found = course.diagnoses()
        return [one for one in found if one.last == course.step], [one for one in found if one.last < course.step]


def values(records: Sequence[dict], name: str, step: str | None = "step") -> list[tuple[int, float]]:
    """(step, value) of the records that hold a finite number under this name; step None: their index."""
    found = [(record[step] if step else at, record.get(name)) for at, record in enumerate(records)]
    return [(at, float(value)) for at, value in found if isinstance(value, int | float) and math.isfinite(value)]


def interval(exam: dict) -> str:
    """Example: 0.662 [0.615, 0.707] (n=400)"""
    return f"{exam['accuracy']:.3f} [{exam['low']:.3f}, {exam['high']:.3f}] (n={exam['n']})"
