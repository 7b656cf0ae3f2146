"""One live line about a run, read from its files: works beside the run, and after it."""

import sys
import time

from protocol.metrics import read_metrics
from protocol.recipe import Recipe
from protocol.rundir import RunDir


class Progress:
    def __init__(self, rundir: RunDir, recipe: Recipe) -> None:
        self._file, self._recipe = rundir.metrics / "trainer.jsonl", recipe
        self._began = time.time()
        self._shown = ""

    def show(self, final: bool = False) -> None:
        """Rewrites the line on a terminal; elsewhere prints a new one whenever it says something new."""
        records = read_metrics(self._file)
        steps = [record for record in records if record["kind"] == "step"]
        exams = [record for record in records if record["kind"] == "exam"]
        if steps and records[-1]["kind"] == "step":
            text = self._step_line(steps)
        elif exams:
            exam = exams[-1]
            interval = f"[{exam['low']:.3f}, {exam['high']:.3f}]"
            text = f"held-out accuracy after {exam['step']} steps: {exam['accuracy']:.3f} {interval} (n={exam['n']})"
        else:
            text = "starting: models load, then held-out accuracy before training"
        elapsed = f"{duration(time.time() - self._began)}  "
        if sys.stdout.isatty():
            print(f"\r\033[K{elapsed}{text}"[:200], end="\n" if final else "", flush=True)
        elif text != self._shown:
            print(elapsed + text, flush=True)
        self._shown = text

    def exam(self, first: bool) -> dict | None:
        exams = [record for record in read_metrics(self._file) if record["kind"] == "exam"]
        return exams[0 if first else -1] if exams else None

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
