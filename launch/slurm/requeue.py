"""The end of a job: starts it again where the run is not complete and a new start can help.

    python -m launch.slurm.requeue --run RUN --restarts 20 CODE [CODE]

The sbatch files end with it. CODE: exit codes of the job's workers, the trainer's first.
"""

import argparse
import itertools
import os
import signal
from collections.abc import Mapping
from pathlib import Path
from typing import NamedTuple

from launch.local import FINAL
from launch.slurm.queue import cancel, queued, requeue
from protocol.cli import exit_with
from protocol.errors import TrainerGone, UserError
from protocol.failure import died, failure
from protocol.metrics import read_metrics
from protocol.resolve import load
from protocol.rundir import RunDir

STUCK = 3
"""Starts in a row without a step between them, after which there is no other."""
STOPPED = (0, 128 + signal.SIGINT, 128 + signal.SIGUSR1)
"""Exit codes of workers that were asked to end, the last of one that was still loading."""


class Decision(NamedTuple):
    again: bool
    code: int
    """The job's exit code where it does not start again."""
    why: str


def main() -> int:
    options = parser().parse_args()
    rundir, job = RunDir(options.run), own_job(os.environ)
    complete = rundir.is_complete(load(rundir.recipe).trainer.steps)
    codes = options.codes
    if not options.trainer and codes[0] and (told := failure(rundir.path, "trainer")):
        codes[0] = told[0]  # srun returns the highest of all ranks' codes, often that of a killed one
    waits = bool(options.trainer and not complete and queued(options.trainer))
    starts = 0 if complete else starts_without_a_step(rundir, job)
    done = int(os.environ.get("SLURM_RESTART_COUNT", 0))
    decision = decide(codes, complete=complete, done=done, most=options.restarts, starts=starts, trainer_waits=waits)
    print(f"job {job}: {decision.why}", flush=True)
    if decision.again:
        requeue(job)
    elif options.samplers:
        cancel(options.samplers, pending_only=complete)  # those that run see themselves that it is complete
    return decision.code


def own_job(environment: Mapping[str, str]) -> str:
    """Its number; in an array ARRAY_TASK, because the number of one of its jobs is that of them all."""
    if "SLURM_JOB_ID" not in environment:
        raise UserError("SLURM_JOB_ID is not set: this is the last line of an sbatch file, not a command for people")
    if "SLURM_ARRAY_TASK_ID" in environment:
        return f"{environment['SLURM_ARRAY_JOB_ID']}_{environment['SLURM_ARRAY_TASK_ID']}"
    return environment["SLURM_JOB_ID"]


def parser() -> argparse.ArgumentParser:
    flags = argparse.ArgumentParser("launch.slurm.requeue", description=__doc__)
    flags.add_argument("--run", type=Path, required=True)
    flags.add_argument("--restarts", type=int, required=True, help="of this job, at most")
    flags.add_argument("--trainer", metavar="JOB", help="name of the trainer's job, where it is another one")
    flags.add_argument("--samplers", metavar="JOB", help="name of the samplers' jobs, which end with this one")
    flags.add_argument("codes", type=int, nargs="+", metavar="CODE")
    return flags


def starts_without_a_step(rundir: RunDir, job: str) -> int:
    """How many starts of this job in a row have ended at the step at which the run is now, with this one."""
    records = read_metrics(rundir.metrics / "trainer.jsonl")
    step = str(max((record["step"] for record in records if record["kind"] == "step"), default=0))
    ends = rundir.logs / f"slurm-{job}.ends"
    with ends.open("a") as file:
        file.write(f"{step}\n")
    return len(list(itertools.takewhile(step.__eq__, reversed(ends.read_text().split()))))


def decide(
    codes: list[int], *, complete: bool, done: int, most: int, starts: int = 1, trainer_waits: bool = False
) -> Decision:
    """codes: of the workers. done, most: how often the job was started again, and may be. starts: those in a row that
    have brought no step. trainer_waits: it is in the queue, as another job."""
    code = next((code for code in codes if code not in STOPPED), 0)
    how = f"a worker {died(code if code < 128 else 128 - code)}" if code else "stopped before the run is complete"
    if complete:
        return Decision(False, 0 if codes[0] in STOPPED else codes[0], "the run is complete")
    if trainer_waits and code in (0, TrainerGone.exit_code):  # others may use the sampler's GPUs meanwhile
        starts = 1
    if code in FINAL and not (trainer_waits and code == TrainerGone.exit_code):
        return Decision(False, code, f"{how}; a new start would fail again")
    if starts >= STUCK:
        return Decision(False, code or 1, f"{how}; not started again: {starts} starts in a row have brought no step")
    if done >= most:
        return Decision(False, code or 1, f"{how}; not started again: it was {done} times (--restarts {most})")
    return Decision(True, code, f"{how}; starting again ({done + 1} of at most {most})")


if __name__ == "__main__":
    exit_with(main)
