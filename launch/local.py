"""One machine: starts the trainer and the sampler of a recipe, shows progress, ends both, says what came of it."""

import contextlib
import os
import re
import subprocess
import sys
import time
from dataclasses import dataclass, field
from pathlib import Path

from launch.curve import draw_curve
from launch.progress import Progress, duration
from protocol.errors import CrashLoop, RunError
from protocol.failure import NAME, failure
from protocol.process import end, on_stop_signal, start, visible_gpus
from protocol.recipe import Recipe
from protocol.resolve import load
from protocol.restarts import Restarts
from protocol.rundir import RunDir, resolve_recipe
from protocol.snapshot import listed

GRACE_S = 600.0
"""For the trainer's last checkpoint; a second Ctrl-C does not wait for it."""
RESTART = {71, 73}
"""Exit codes of expected failures after which a worker is started again, as after a crash."""
FINAL = {2, 3, 66, 69, 70, 72, 74, 75, 76, 77}
"""Exit codes after which a new start would fail again."""


class Ended(RunError):
    """A worker failed in a way that a new start does not mend; the launcher passes its exit code on."""

    def __init__(self, message: str, exit_code: int) -> None:
        super().__init__(message)
        self.exit_code = exit_code


@dataclass(slots=True)
class Worker:
    """One of the two workers and how often it had to be started again."""

    name: str
    command: list[str]
    run: Path
    log: Path
    environment: dict[str, str]
    process: subprocess.Popen | None = None
    offset: int = 0
    """Where in the log its present process began."""
    restarts: Restarts = field(default_factory=Restarts)

    def start(self) -> None:
        with self.log.open("ab") as log:
            self.offset = log.tell()
            self.process = start(self.command, log=log, environment=self.environment)

    def ended(self, complete: bool) -> bool:
        """True when it ended well in a complete run (DeepSpeed's launcher returns 0 after some crashes, too).

        Starts it again after a crash; raises after too many of them, or after a user's mistake.
        """
        assert self.process is not None
        code = self.process.poll()
        if code is None:
            return False
        if code == 0 and complete:
            return True
        end(self.process, 0.0)  # nothing of the old one may be left beside the new one
        told = failure(self.run, self.name)  # behind DeepSpeed's launcher the exit code itself may be lost
        code, last = told or (code, last_words(self.log, self.offset))
        if code in FINAL or (not told and code not in RESTART and last.startswith("error: ")):
            raise Ended(f"the {self.name} ended: {last.removeprefix('error: ')}; see {self.log}", code)
        self.restarts.add()
        if self.restarts.too_many:
            raise CrashLoop(f"the {self.name} crashed {len(self.restarts)} times: {last}; see {self.log}")
        print(f"\nthe {self.name} ended with {code} and is started again ({len(self.restarts)})", flush=True)
        self.start()
        return False


def run_local(file: Path, run: Path | None, overrides: list[str], fresh: bool) -> int:
    """Exit code: 0 done and, where it was measured, held-out accuracy rose; 1 it did not; 130 stopped by Ctrl-C."""
    began = time.monotonic()
    if fresh:
        run = unused(run or Path("runs") / load(file, overrides).name)
    rundir, recipe = resolve_recipe(run, file, overrides)
    rundir.make()
    put_failures_aside(rundir)
    print(f"run directory {rundir.path}; logs in {rundir.logs}", flush=True)
    prepare(recipe)
    gpus = share_gpus(recipe.sampler.gpus, recipe.trainer.gpus, visible_gpus())
    workers = [
        Worker(
            name,
            [sys.executable, "-m", name, "--run", str(rundir.path)],
            rundir.path,
            rundir.logs / f"{name}.log",
            {"CUDA_VISIBLE_DEVICES": ",".join(gpus[name])} if name in gpus else {},
        )
        for name in ("trainer", "sampler")
    ]
    stopping: list[bool] = []
    on_stop_signal(lambda: stopping.append(True))
    progress = Progress(rundir, recipe)
    try:
        for worker in workers:
            worker.start()
        while not stopping:
            complete = rundir.is_complete(recipe.trainer.steps)
            trainer_ended, _ = [worker.ended(complete) for worker in workers]
            if trainer_ended:
                break
            progress.show()
            time.sleep(0.5)
        if stopping:
            print("\nstopping: saving a checkpoint (Ctrl-C again ends at once)", flush=True)
    finally:
        for worker in workers:
            if worker.process:
                end(worker.process, GRACE_S)
    if stopping:
        print(f"stopped; continue with: python -m launch {file} --run {rundir.path}", flush=True)
        return 130
    progress.show(final=True)
    return conclude(rundir, recipe, progress, time.monotonic() - began)


def put_failures_aside(rundir: RunDir) -> None:
    """Both workers start anew: what processes said before, on this machine or another, decides nothing any more."""
    with contextlib.suppress(FileNotFoundError):
        os.replace(rundir.path / NAME, rundir.logs / f"failed-{time.time_ns()}.md")


def conclude(rundir: RunDir, recipe: Recipe, progress: Progress, seconds: float) -> int:
    """The summary: curve, model, the command that talks to it, and the one last line."""
    curve = draw_curve(rundir, recipe)
    model = rundir.best.resolve() if rundir.best.is_dir() else listed(rundir.snapshots)[-1]
    python = os.path.relpath(sys.executable) if Path(sys.executable).is_relative_to(Path.cwd()) else sys.executable
    print(f"curve    {curve}\nmodel    {model}\ntalk     {python} -m launch chat {rundir.path}", flush=True)
    print(f"doctor   {', '.join(progress.wrong()) or 'nothing wrong'}: {python} -m launch doctor {rundir.path}")
    print(f"report   {python} -m launch report {rundir.path}", flush=True)
    before, after = progress.exam(first=True), progress.exam(first=False)
    if not before or not after or before is after:
        print(f"{recipe.name}: {recipe.trainer.steps} steps, {duration(seconds)}", flush=True)
        return 0
    for name, exam in (("before", before), ("after", after)):
        print(f"{name:8} {exam['accuracy']:.3f} [{exam['low']:.3f}, {exam['high']:.3f}] (95 % Wilson, n={exam['n']})")
    print(
        f"{recipe.name}: held-out accuracy {before['accuracy']:.2f} -> {after['accuracy']:.2f} (n={after['n']}), "
        f"{after['step']} steps, {duration(seconds)}",
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


def last_words(log: Path, offset: int) -> str:
    """What the worker said last: our own one-line `error: ...`, else an exception's line, else the last line."""
    with log.open("rb") as file:
        file.seek(offset)
        lines = [line.strip() for line in file.read().decode(errors="replace").splitlines() if line.strip()]
    ours = [line for line in lines if line.startswith("error: ")]
    exceptions = [line for line in lines if re.match(r"(\[rank\d+\]: )?\w+(\.\w+)*Error\b", line)]
    return (ours or exceptions or lines or ["it said nothing"])[-1]


def prepare(recipe: Recipe) -> None:
    """Fetches or converts the model once, before two workers would wait for it in silence. Raises UserError."""
    print("preparing the model (the first time it is fetched)", flush=True)
    from policy.model import locate

    locate(recipe.model)


def share_gpus(samplers: int, ranks: int, visible: list[str]) -> dict[str, list[str]]:
    """GPUs for each worker, the sampler's first; where there are too few, both share all. {} without GPUs."""
    if not visible:
        return {}
    if samplers + ranks <= len(visible):
        return {"sampler": visible[:samplers], "trainer": visible[samplers : samplers + ranks]}
    print(f"{samplers + ranks} GPUs asked for, {len(visible)} there: sampler and trainer share them", flush=True)
    return {"sampler": visible[:samplers]}
