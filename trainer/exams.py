"""Evaluation beside training: when it is due, what came of it, which weights were best, and when no more is to come."""

import logging
import os
import re
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

RESULT = re.compile(r"s\d{8,20}\.i\d{4,20}\.json")


class Exams:
    """Every method is called by all ranks together; results are on the first. `over`: `patience` is at its end."""

    def __init__(
        self, rundir: RunDir, recipe: Recipe, inbox: Inbox, record: Record, ranks: Ranks, *, step: int
    ) -> None:
        self._rundir, self._recipe, self._inbox, self._record, self._ranks = rundir, recipe, inbox, record, ranks
        self._open = False
        self._results = _known(rundir.evals, step) if ranks.first else []
        known = {result.step for result in self._results}
        flags = ranks.max([self._is_over(), *(number in known for number in range(step + 1))])
        self.over = bool(flags[0])
        self._asked = {number for number in range(step + 1) if flags[number + 1]}
        if ranks.first:
            self._link_best()

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
        elif groups is not None:
            log.warning("an evaluation came to nothing: there are no held-out prompts, or none could be answered")
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
        except StorageError as error:
            log.error("cannot keep the evaluation of %s: %s", snapshot, error)
        self._link_best()

    def _change(self, result: Evaluation) -> dict[str, float]:
        """Against the weights before training, where those were evaluated in the same way."""
        first = self._alike()[0]
        if first is result or first.step:
            return {}
        try:
            return compare(first, result)
        except UserError as error:  # of some prompts there is no answer
            log.warning("%s", error)
            return {}

    def _alike(self) -> list[Evaluation]:
        """Results that can be compared with the last one: of the same prompts, answered in the same way."""
        last = self._results[-1]
        return [one for one in self._results if (one.fingerprint, one.sampling) == (last.fingerprint, last.sampling)]

    def _best(self) -> int:
        """The first of `_alike` with the highest accuracy."""
        accuracy = [result.accuracy for result in self._alike()]
        return accuracy.index(max(accuracy))

    def _is_over(self) -> bool:
        patience = self._recipe.eval.patience
        return bool(patience and self._results) and len(self._alike()) - 1 - self._best() >= patience

    def _link_best(self) -> None:
        """Relative, so that the run directory may move; replaced at once. No link where the weights are gone."""
        link, aside = self._rundir.best, self._rundir.best.with_name(".best.new")
        best = self._rundir.snapshots / self._alike()[self._best()].snapshot if self._results else None
        try:
            aside.unlink(missing_ok=True)
            if best and best.is_dir():
                aside.symlink_to(os.path.relpath(best, link.parent))
                aside.replace(link)
            else:
                link.unlink(missing_ok=True)
        except OSError as error:
            log.error("cannot link %s to the best weights: %s", link, error)


def _known(directory: Path, step: int) -> list[Evaluation]:
    """Results of this history, in order; those of later steps belong to one that was left, and are removed.

    Other files are somebody's own.
    """
    found = []
    for name in filter(RESULT.fullmatch, names_in(directory)):
        if step_of(name.removesuffix(".json")) > step:
            (directory / name).unlink()
            continue
        try:
            found.append(read(directory / name))
        except UserError as error:
            log.error("%s", error)
    return sorted(found, key=lambda result: (result.step, result.snapshot))
