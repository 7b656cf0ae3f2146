"""Slurm's own commands, as far as a run needs them."""

import getpass
import os
import re
import shutil
import subprocess
from collections.abc import Sequence
from pathlib import Path

from protocol.errors import UserError


def refuse_without_slurm() -> None:
    if not shutil.which("sbatch"):
        raise UserError("no sbatch on this machine: use a login node of the cluster, or --dry-run for the files alone")


def ask(*command: str) -> str:
    """What a command prints. Raises UserError with its own words where it fails."""
    try:
        done = subprocess.run(command, capture_output=True, text=True, check=False, timeout=120)
    except (OSError, subprocess.TimeoutExpired) as error:
        raise UserError(f"{command[0]} does not answer: {error}") from None
    if done.returncode:
        said = done.stderr.strip().splitlines() or [f"exit code {done.returncode}"]
        why = re.sub(rf"^({command[0]}: )?error: ", "", said[0])
        raise UserError(f"{command[0]} fails: {why}; change what it names, or ask who runs this cluster")
    return done.stdout


def queued(*names: str) -> list[str]:
    """Numbers of this user's jobs with these names that wait or run."""
    user = os.environ.get("SLURM_JOB_USER") or getpass.getuser()
    return ask("squeue", "--noheader", "--format=%i", f"--user={user}", f"--name={','.join(names)}").split()


def refuse_if_queued(names: Sequence[str]) -> None:
    """A second trainer would take the run from the first one."""
    if numbers := queued(*names):
        raise UserError(
            f"job {', '.join(numbers)} of this run is in the queue already; scancel {' '.join(numbers)}, or name "
            "another --run"
        )


def submit(file: Path) -> str:
    """The job's number. Raises UserError with Slurm's reason."""
    return ask("sbatch", "--parsable", str(file)).strip().partition(";")[0]


def requeue(job: str) -> None:
    ask("scontrol", "requeue", job)


def cancel(name: str, *, pending_only: bool) -> None:
    user = os.environ.get("SLURM_JOB_USER") or getpass.getuser()
    ask("scancel", f"--user={user}", f"--name={name}", *["--state=PENDING"] * pending_only)
