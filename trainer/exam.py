"""Held-out prompts being answered with one set of weights, beside training.

Samplers switch weights after every step, an exam must not: who takes part in it is told of the exam's weights until
all rows are answered. One sampler does so while there is training to be done, all of them otherwise. It also gets
prompts to train on, as long as its weights are young enough for them.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Protocol

from protocol.messages import Pulse
from protocol.snapshot import step_of
from trainer.ledger import Ledger


class Loaded(Protocol):
    """A sampler as seen from here."""

    snapshot: str | None
    moved: float


@dataclass(frozen=True, slots=True, kw_only=True)
class Plan:
    number: int
    """Ids of different exams differ, so that a late answer is never mistaken."""
    pulse: Pulse
    alone: bool
    """One sampler answers, the others go on to newer weights."""


@dataclass(slots=True)
class Exam:
    pulse: Pulse
    ledger: Ledger
    alone: bool
    examiner: str | None = None

    def has(self, session: str, samplers: Mapping[str, Loaded]) -> bool:
        """Whether a sampler takes part. Where one does alone, it is chosen here: one that has the weights already.

        Nobody does once all rows are answered: samplers go on to newer weights before anyone has looked at the answers.
        """
        if self.ledger.finished():
            return False
        if self.examiner not in samplers:
            away = {name: sampler.snapshot != self.pulse.snapshot for name, sampler in samplers.items()}
            self.examiner = min(away, key=lambda name: (away[name], name), default=None)
        return not self.alone or session == self.examiner

    def hand_over(self, session: str, samplers: Mapping[str, Loaded]) -> None:
        """A sampler stands still, or cannot read the weights: if it is the one, another takes its place, where there is
        one: the one that has moved last."""
        others = [name for name in samplers if name != session]
        if session == self.examiner and others:
            self.examiner = max(others, key=lambda name: samplers[name].moved)


def open_exam(plan: Plan, rows: int, lease_s: float) -> Exam:
    step = step_of(plan.pulse.snapshot)
    ledger = Ledger(
        rows=rows,
        per_step=max(1, rows),
        max_staleness=0,
        lease_s=lease_s,
        seed=None,
        first=plan.number * rows,
        last=(plan.number + 1) * rows,
        step=step,
    )
    ledger.lineage = {plan.pulse.snapshot: step}
    return Exam(plan.pulse, ledger, plan.alone)
