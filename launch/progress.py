"""One live line about a run, and another where the doctor has something new to say: read from the run's files."""

import sys
import time

from doctor.course import Course
from doctor.history import History
from doctor.window import SIZE
from protocol.cli import CONTROL
from protocol.recipe import Recipe
from protocol.rundir import RunDir


class Progress:
    def __init__(self, rundir: RunDir, recipe: Recipe) -> None:
        self._recipe = recipe
        self._course = Course(History(rundir, recipe))
        self._began = time.time()
        self._shown = ""

    def show(self, final: bool = False) -> None:
        """Rewrites the line on a terminal; elsewhere prints a new one whenever it says something new."""
        elapsed = f"{duration(time.time() - self._began)}  "
        live = sys.stdout.isatty()
        for news in self._diagnosed():
            print(f"\r\033[K{elapsed}{news}" if live else elapsed + news, flush=True)
        text = self._line()
        if live:
            print(f"\r\033[K{elapsed}{text}"[:200], end="\n" if final else "", flush=True)
        elif text != self._shown:
            print(elapsed + text, flush=True)
        self._shown = text

    def wrong(self) -> list[str]:
        """What the doctor says about the last steps."""
        return self._course.holding

    def exam(self, first: bool) -> dict | None:
        exams = self._course.history.exams
        return exams[0 if first else -1] if exams else None

    def _diagnosed(self) -> list[str]:
        """Takes in what is new; what is wrong since now, a line each."""
        course, history = self._course, self._course.history
        history.refresh()
        began = course.follow()
        history.forget(course.step - SIZE - self._recipe.trainer.max_staleness)
        return [spell.line.translate(CONTROL) for spell in began if spell.rule in course.holding]

    def _line(self) -> str:
        steps, exam = self._course.history.steps, self.exam(first=False)
        if steps and not (exam and exam["time_s"] > steps[-1]["time_s"]):
            return self._step_line(steps)
        if not exam:
            return "starting: models load, then held-out accuracy before training"
        interval = f"[{exam['low']:.3f}, {exam['high']:.3f}]"
        return f"held-out accuracy after {exam['step']} steps: {exam['accuracy']:.3f} {interval} (n={exam['n']})"

    def _step_line(self, steps: list[dict]) -> str:
        last, window = steps[-1], steps[-10:]
        mean = {name: sum(step[name] for step in window) / len(window) for name in ("reward", "accuracy", "step_time")}
        total = self._recipe.trainer.steps
        return (
            f"step {last['step']}/{total}  reward {mean['reward']:.2f}  accuracy {mean['accuracy']:.2f} (last "
            f"{len(window)})  tokens/s: sampler {last['sampler/tokens_per_s']:.0f}, trainer "
            f"{last['train/tokens_per_s']:.0f}  staleness {last['staleness/mean']:.1f}  "
            f"left {duration((total - last['step']) * mean['step_time'])}"
        )


def duration(seconds: float) -> str:
    """Example: 9m12s, 2h05m."""
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}h{minutes:02d}m" if hours else f"{minutes}m{rest:02d}s" if minutes else f"{rest}s"
