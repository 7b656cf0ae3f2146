"""The doctor's look at the run after each step, on the first rank: one line when a disease is first seen."""

import logging

from doctor.course import Course
from doctor.history import History
from doctor.window import SIZE
from protocol.recipe import Recipe
from protocol.rundir import RunDir

log = logging.getLogger(__name__)


class Checkup:
    """Reads what the run's files have grown by. An error in it stops no run: it is counted, and the first one said.

    step: the one that the run begins or resumes at. At the first look the whole history before it is read, once
    (two seconds for 100,000 completions); of it only the last window is kept and looked at.
    """

    def __init__(self, rundir: RunDir, recipe: Recipe, step: int) -> None:
        self._run, self._behind = rundir.path, SIZE + recipe.trainer.max_staleness
        self._course = Course(History(rundir, recipe), since=step)
        self._course.history.forget(step - self._behind)
        self.failed = 0

    def look(self) -> None:
        """Says what began; what is over already is left to `python -m launch doctor`."""
        try:
            self._course.history.refresh()
            began = self._course.follow()
            self._course.history.forget(self._course.step - self._behind)
        except Exception:  # whatever it is: advice is not worth a run
            self.failed += 1
            if self.failed == 1:
                log.exception("the doctor could not look at the run; the run goes on")
            return
        for spell in began:
            if spell.rule in self._course.holding:
                log.warning("%s", spell.line)

    def end(self) -> None:
        """Looks once more, at the last evaluation, and says one line about the whole run."""
        self.look()
        if self.failed:
            log.warning("the doctor failed after %d of the steps", self.failed)
        names = sorted({spell.rule for spell in self._course.spells})
        if names:
            log.info("doctor: %s; see `python -m launch doctor %s`", ", ".join(names), self._run)
        elif self._course.step > self._course.since:
            log.info("doctor: nothing wrong in steps %d to %d", self._course.since + 1, self._course.step)
