"""Evaluation beside training: when it is due, what came of it, which weights were best, and when no more is to come."""

import logging
import os
from pathlib import Path

from protocol.disk import names_in
from protocol.errors import StorageError, UserError
from protocol.evaluation import Evaluation, compare, read, summary
from protocol.messages import Group
from protocol.recipe import Recipe
from protocol.rundir import RunDir
from protocol.snapshot import step_of
from trainer.engine import Policy
from trainer.inbox import Inbox
from trainer.ranks import Ranks
from trainer.record import Record

log = logging.getLogger(__name__)


class Exams:
    """Every method is called by all ranks together; results are on the first. `over`: `patience` is at its end."""

    def __init__(
        self, rundir: RunDir, recipe: Recipe, inbox: Inbox, record: Record, ranks: Ranks, *, step: int
    ) -> None:
        self._rundir, self._recipe, self._inbox, self._record, self._ranks = rundir, recipe, inbox, record, ranks
        self._open = self.over = False
        self._results = _known(rundir.evals, step) if ranks.first else []
        known = [step_of(result.snapshot) for result in self._results]
        self._asked = {step for step in range(step + 1) if ranks.max([step in known])[0]}

    def look(self, policy: Policy) -> None:
        """After a step: takes the answers of an exam that is over, and begins the one that is due."""
        self._collect(wait=False)
        if not self._is_due(policy.steps_done):
            return
        if self._open:
            log.info("the evaluation after %d steps waits for the one before", policy.steps_done)
            self._collect(wait=True)
        if not self._open:
            self._asked.add(policy.steps_done)
            beside = 0 < policy.steps_done < self._recipe.trainer.steps and not self.over
            self._inbox.start_exam(alone=beside)
            self._open = True

    def finish(self, policy: Policy) -> bool:
        """Waits for what is still open, and evaluates the last weights; False when asked to stop meanwhile."""
        self.look(policy)
        self._collect(wait=True)
        return not self._open

    def _is_due(self, step: int) -> bool:
        settings, last = self._recipe.eval, self.over or step >= self._recipe.trainer.steps
        due = (step == 0 and settings.before) or (settings.every > 0 and step > 0 and step % settings.every == 0)
        return (due or (last and settings.after)) and step not in self._asked

    def _collect(self, wait: bool) -> None:
        if not self._open:
            return
        groups = self._inbox.end_exam(wait)
        if groups:
            self._keep(groups)
        ended, over = self._ranks.max([groups is not None, self._is_over()])
        self._open, self.over = not ended, bool(over)

    def _keep(self, groups: list[Group]) -> None:
        """Rank 0: writes the result down, compares it with the first one, and links to the best weights."""
        snapshot = groups[0].completions[0].spans[0].snapshot
        result = Evaluation.from_groups(
            groups,
            step=step_of(snapshot),
            snapshot=snapshot,
            data=self._recipe.data.eval,
            fingerprint=self._inbox.data("eval").fingerprint,
            recipe=self._recipe,
        )
        self._results.append(result)
        change = self._change(result)
        self._record.exam(result, summary(result), change)
        try:
            result.write(self._rundir.evals / f"{snapshot}.json")
            if self._best() == len(self._results) - 1:
                _link(self._rundir.best, self._rundir.snapshots / snapshot)
        except (StorageError, OSError) as error:
            log.error("cannot keep the evaluation of %s: %s", snapshot, error)

    def _change(self, result: Evaluation) -> dict[str, float]:
        """Against the weights before training, where those were evaluated on the same prompts in the same way."""
        first = self._results[0]
        if first is result or first.sampling != result.sampling:
            return {}
        try:
            return compare(first, result)
        except UserError as error:
            log.warning("%s", error)
            return {}

    def _best(self) -> int:
        """The first of the results with the highest accuracy."""
        accuracy = [result.accuracy for result in self._results]
        return accuracy.index(max(accuracy))

    def _is_over(self) -> bool:
        patience = self._recipe.eval.patience
        return bool(patience and self._results) and len(self._results) - 1 - self._best() >= patience


def _known(directory: Path, step: int) -> list[Evaluation]:
    """Results of this history, in order; those of later steps belong to one that was left, and are removed."""
    found = []
    for name in names_in(directory):
        try:
            result = read(directory / name)
        except UserError as error:
            log.error("%s", error)
            continue
        if result.step is not None and result.step <= step:
            found.append(result)
        else:
            (directory / name).unlink()
    return sorted(found, key=lambda result: (result.step, result.snapshot))


def _link(link: Path, target: Path) -> None:
    """Relative, so that the run directory may move; replaced at once."""
    aside = link.with_name(f".{link.name}.new")
    aside.unlink(missing_ok=True)
    aside.symlink_to(os.path.relpath(target, link.parent))
    aside.replace(link)
