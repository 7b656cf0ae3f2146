"""One machine: starts the trainer and the sampler of a recipe, shows progress, ends both, says what came of it."""

import signal
import subprocess
import sys
import time
from dataclasses import dataclass, field
from pathlib import Path

from launch.curve import draw_curve
from launch.progress import Progress, duration
from protocol.errors import RunError, UserError
from protocol.process import end, on_stop_signal, signal_group, start
from protocol.recipe import Recipe
from protocol.resolve import load
from protocol.rundir import RunDir, resolve_recipe
from protocol.snapshot import listed

GRACE_S = 40.0
"""For the trainer's last checkpoint."""
RESTART = {71, 73}
"""Exit codes after which a worker is started again, as after a signal."""
MAX_RESTARTS, WINDOW_S = 5, 600.0


class CrashLoop(RunError):
    exit_code = 70


@dataclass(slots=True)
class Worker:
    """One of the two workers and how often it had to be started again."""

    name: str
    command: list[str]
    log: Path
    process: subprocess.Popen | None = None
    restarts: list[float] = field(default_factory=list)

    def start(self) -> None:
        with self.log.open("ab") as log:
            self.process = start(self.command, log=log)

    def ended(self) -> bool:
        """True when it ended well. Starts it again after a crash; raises after too many, or after a user's mistake."""
        assert self.process is not None
        code = self.process.poll()
        if not code:
            return code == 0
        end(self.process, 0.0)  # nothing of the old one may be left beside the new one
        last = last_words(self.log)
        if code in (2, 3):
            raise UserError(f"the {self.name} refused to start: {last}")
        if code > 0 and code not in RESTART and not self.killed(code):
            raise RunError(f"the {self.name} failed with exit code {code}: {last}; see {self.log}")
        now = time.monotonic()
        self.restarts = [then for then in self.restarts if now - then < WINDOW_S] + [now]
        if len(self.restarts) > MAX_RESTARTS:
            raise CrashLoop(f"the {self.name} crashed {len(self.restarts)} times: {last}; see {self.log}")
        print(f"\nthe {self.name} ended with {code} and is started again ({len(self.restarts)})", flush=True)
        self.start()
        return False

    @staticmethod
    def killed(code: int) -> bool:
        """A signal ended it or, behind a launcher, one of its ranks."""
        return code < 0 or code in (1, 128 + signal.SIGKILL, 128 + signal.SIGTERM, 247, 250)


def run_local(file: Path, run: Path | None, overrides: list[str], fresh: bool) -> int:
    """Exit code: 0 done and, where it was measured, held-out accuracy rose; 1 it did not; 130 stopped by Ctrl-C."""
    began = time.monotonic()
    if fresh:
        run = unused(run or Path("runs") / load(file, overrides).name)
    rundir, recipe = resolve_recipe(run, file, overrides)
    rundir.make()
    workers = [
        Worker("trainer", [sys.executable, "-m", "trainer", "--run", str(rundir.path)], rundir.logs / "trainer.log"),
        Worker("sampler", [sys.executable, "-m", "sampler", "--run", str(rundir.path)], rundir.logs / "sampler.log"),
    ]
    print(f"run directory {rundir.path}; logs in {rundir.logs}", flush=True)
    stopping: list[bool] = []
    on_stop_signal(lambda: stopping.append(True))
    progress = Progress(rundir, recipe)
    try:
        for worker in workers:
            worker.start()
        while not workers[0].ended() and not stopping:
            workers[1].ended()
            progress.show()
            time.sleep(0.5)
        if stopping:
            print("\nstopping: saving a checkpoint (Ctrl-C again ends at once)", flush=True)
    finally:
        for worker in workers:
            if worker.process:
                end_worker(worker)
    if stopping:
        print(f"stopped; continue with: python -m launch {file} --run {rundir.path}", flush=True)
        return 130
    progress.show(final=True)
    return conclude(rundir, recipe, progress, time.monotonic() - began)


def end_worker(worker: Worker) -> None:
    assert worker.process is not None
    signal_group(worker.process, signal.SIGTERM)
    end(worker.process, GRACE_S)


def conclude(rundir: RunDir, recipe: Recipe, progress: Progress, seconds: float) -> int:
    """The summary: curve, model, the command that talks to it, and the one last line."""
    curve = draw_curve(rundir, recipe)
    model = listed(rundir.snapshots)[-1]
    print(f"curve    {curve}\nmodel    {model}\ntalk     python -m launch chat {rundir.path}", flush=True)
    before, after = progress.exam(first=True), progress.exam(first=False)
    if not before or not after or before is after:
        print(f"{recipe.name}: {recipe.trainer.steps} steps, {duration(seconds)}", flush=True)
        return 0
    for name, exam in (("before", before), ("after", after)):
        print(f"{name:8} {exam['accuracy']:.3f} [{exam['low']:.3f}, {exam['high']:.3f}] (95 % Wilson, n={exam['n']})")
    print(
        f"{recipe.name}: held-out accuracy {before['accuracy']:.2f} -> {after['accuracy']:.2f} (n={after['n']}), "
        f"{recipe.trainer.steps} steps, {duration(seconds)}",
        flush=True,
    )
    return 0 if after["accuracy"] > before["accuracy"] else 1


def unused(path: Path) -> Path:
    """`path`, or path-2, path-3, ... where runs are already."""
    number, candidate = 1, path
    while candidate.exists():
        number += 1
        candidate = path.with_name(f"{path.name}-{number}")
    return candidate


def last_words(log: Path) -> str:
    """The last `error: ...` line, else the last line."""
    lines = [line for line in log.read_text(errors="replace").splitlines() if line.strip()]
    errors = [line for line in lines if "error:" in line.lower()]
    return (errors or lines or ["it said nothing"])[-1].strip()
