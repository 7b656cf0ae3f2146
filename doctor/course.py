"""The course of a run: its diagnoses, followed step by step while it grows or gone through at once when it is over.

course = Course(History.open(run))
course.follow()
course.diagnoses()
"""

from dataclasses import dataclass, field
from itertools import takewhile

from doctor.diagnosis import EXAMPLES, Diagnosis, Finding
from doctor.history import History
from doctor.rules import RULES, examine
from doctor.window import SIZE, Window


@dataclass(slots=True)
class Spell:
    """A time during which a rule spoke, with short silences."""

    rule: str
    first: int
    last: int
    finding: Finding

    @property
    def line(self) -> str:
        """Example: truncation trap: 97% of the completions are cut ... Change sampling.max_tokens = 12: ..."""
        return f"{self.rule}: {self.finding.evidence}. Change {self.finding.advice}"


@dataclass(slots=True)
class Course:
    history: History
    since: int = 0
    """Steps up to this one are not looked at."""
    spells: list[Spell] = field(default_factory=list)
    step: int = 0
    """The last one that was looked at."""
    _looked: list[dict] = field(default_factory=list)
    """Step records that were looked at."""
    _news: tuple[int, int] = (0, 0)

    def follow(self) -> list[Spell]:
        """Looks at what the history has taken in since the last time; returns what began."""
        steps = self.history.steps
        same = sum(1 for _ in takewhile(lambda pair: pair[0] is pair[1], zip(self._looked, steps, strict=False)))
        if same < len(self._looked):  # a restarted trainer does them again
            self._rewind(steps[same - 1]["step"] if same else 0)
        known, self._looked = len(self.spells), steps.copy()
        for end in range(same + 1, len(steps) + 1):
            self.step = steps[end - 1]["step"]
            if self.step > self.since:
                self._look(end)
        news = len(self.history.skipped), len(self.history.exams)
        if news != self._news:  # they come after their step
            self._look(len(steps))
        self._news = news
        return self.spells[known:]

    @property
    def holding(self) -> list[str]:
        """Rules that speak about the last window."""
        return [spell.rule for spell in self.spells if spell.last == self.step]

    def diagnoses(self) -> list[Diagnosis]:
        """All of them, those that still hold first, the worst first."""
        worst = list(RULES)
        order = sorted(self.spells, key=lambda spell: (spell.last < self.step, worst.index(spell.rule), spell.first))
        return [
            Diagnosis(
                rule=spell.rule,
                first=spell.first,
                last=spell.last,
                evidence=spell.finding.evidence,
                advice=spell.finding.advice,
                examples=[self.history.rollout(seen) for seen in spell.finding.examples[:EXAMPLES]],
            )
            for spell in order
        ]

    def _look(self, end: int) -> None:
        for rule, finding in examine(Window.at(self.history, end)).items():
            spell = next((spell for spell in reversed(self.spells) if spell.rule == rule), None)
            if spell and self.step - spell.last <= SIZE:
                spell.last, spell.finding = self.step, finding
            else:
                self.spells.append(Spell(rule, self.step, self.step, finding))

    def _rewind(self, step: int) -> None:
        self.step = step
        self.spells = [spell for spell in self.spells if spell.first <= step]
        for spell in self.spells:
            spell.last = min(spell.last, step)
