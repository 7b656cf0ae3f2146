"""What a run is doing, as far as its files tell."""

import contextlib
import re
from dataclasses import dataclass
from typing import Literal

from doctor.history import History
from launch.progress import duration
from protocol.errors import StorageError
from protocol.failure import NAME

QUIET_S = 120.0
"""A sampler writes every 10 s, a trainer once a step: later than this, and than so many steps, something is wrong."""
QUIET_STEPS = 5


@dataclass(frozen=True, slots=True)
class State:
    kind: Literal["waiting", "running", "quiet", "failed", "complete"]
    text: str
    """One sentence."""


def state_of(history: History, now: float) -> State:
    """now: seconds since the epoch."""
    rundir, total = history.rundir, history.recipe.trainer.steps
    told = first_failure(history)
    if told:
        return State("failed", f"FAILED: {told}; see {NAME}")
    if rundir.is_complete(total):
        done = history.steps[-1]["step"] if history.steps else total
        return State("complete", f"complete after {done} steps" + f" of {total} (patience)" * (done < total))
    starts, endpoint = newest_start(history), rundir.read_endpoint()
    ages = {name: now - newest for name, newest in newest_records(history).items()}
    if endpoint is None and not history.steps:
        return State("waiting", "the trainer loads its model" if starts else "has not begun: no trainer was here yet")
    if endpoint and starts > endpoint.incarnation:
        return State("waiting", f"resuming: trainer start {starts} loads the last checkpoint")
    if not ages:
        return State("waiting", "the trainer waits for samplers, which load their model")
    return _at_work(history, ages)


def _at_work(history: History, ages: dict[str, float]) -> State:
    slow = max((step["step_time"] for step in history.steps[-QUIET_STEPS:]), default=0.0)
    limit, total = max(QUIET_S, QUIET_STEPS * slow), history.recipe.trainer.steps
    if history.steps and history.steps[-1]["step"] >= total and min(ages.values()) > limit:
        return State("complete", f"all {total} steps are done; nobody has said that the run is complete")
    if min(ages.values()) > limit:
        since = f"no record for {duration(min(ages.values()))}"
        return State("quiet", f"{since}: stopped, killed or stuck; the same command goes on")
    if ages.get("trainer", 0.0) > limit:
        return State("quiet", f"the trainer has written nothing for {duration(ages['trainer'])}; samplers have")
    if not history.steps:
        return State("running", f"before the first step; {len(history.held_out)} held-out answers so far")
    step = history.steps[-1]["step"]
    window = history.steps[-10:]
    left = (total - step) * sum(record["step_time"] for record in window) / len(window)
    return State("running", f"step {step}/{total}, left {duration(left)}")


def newest_records(history: History) -> dict[str, float]:
    """When the trainer and the samplers wrote last, in seconds since the epoch; only those that did."""
    trainer = [records[-1] for records in (history.steps, history.exams, history.skipped) if records]
    samplers = [records[-1] for records in history.samplers.values() if records]
    found = {"trainer": trainer, "sampler": samplers}
    return {name: max(record["time_s"] for record in records) for name, records in found.items() if records}


def newest_start(history: History) -> int:
    """How often a trainer has claimed the run; 0 also for a copy that left the claims out."""
    with contextlib.suppress(StorageError):
        return history.rundir.newest_incarnation()
    return 0


def first_failure(history: History) -> str:
    """Who failed and what it said, in one line; "" where nobody has."""
    try:
        text = (history.rundir.path / NAME).read_text(errors="replace")
    except OSError:
        return ""
    found = re.match(r"# (.*) failed first\n\n.*\n\n(.*)\n", text)
    return f"{found[1]}: {found[2]}" if found else text[:200]
