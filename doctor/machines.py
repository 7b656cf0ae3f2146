"""One side waits for the other. Each waits a little in a healthy run; what is said is that one mostly waits."""

import math

from doctor.diagnosis import Finding
from doctor.window import LEAST, Window

WAITING = 0.5
"""Share of the trainer's time spent waiting for groups: more samplers pay at once."""
IDLE = 0.9
"""Share of the samplers' time without anything to decode, while the trainer never waits."""
STEADY = 5
"""Steps behind the first one, which waits for engines that start and for the exam before training."""
REPORTED_S = 60.0
"""Of a sampler's records; each counts ten seconds."""


def steady(window: Window) -> list[dict]:
    return [step for step in window.steps if step["step"] > 1]


def waited(steps: list[dict]) -> float:
    """Share of their time."""
    return sum(step["time/wait_s"] for step in steps) / max(1e-9, sum(step["step_time"] for step in steps))


def slow_sampler(window: Window) -> Finding | None:
    steps = steady(window)
    share = waited(steps)
    if len(steps) < STEADY or share < WAITING:
        return None
    trainer, sampler = window.recipe.trainer, window.recipe.sampler
    wanted = trainer.prompts_per_step * window.recipe.sampling.group_size
    engines = max(1, sampler.gpus // sampler.tensor_parallel)
    seconds = sum(step["step_time"] for step in steps) / len(steps)
    if trainer.max_staleness == 0:
        advice = "trainer.max_staleness = 1: samplers then work while the trainer does"
    elif sampler.max_running * engines < wanted:
        advice = f"sampler.max_running = {math.ceil(wanted / engines)}: a step needs {wanted} completions"
    else:
        more = max(engines + 1, math.ceil(engines * min(4.0, 1 / max(0.05, 1 - share))))
        advice = f"sampler.gpus = {more * sampler.tensor_parallel}: or start more samplers, on any machine"
    return Finding(
        evidence=f"the trainer waits for groups {share:.0%} of its time ({seconds:.1f} s a step); samplers give "
        f"{window.mean('sampler/tokens_per_s'):.0f} tokens/s, it could train {window.mean('train/tokens_per_s'):.0f}",
        advice=advice,
    )


def slow_trainer(window: Window) -> Finding | None:
    steps, idle = steady(window), idle_share(window)
    seconds = sum(step["step_time"] for step in steps) / max(1, len(steps))
    stored = sum(step["time/publish_s"] for step in steps) / max(1e-9, sum(step["step_time"] for step in steps))
    if len(steps) < STEADY or idle is None or idle < IDLE or waited(steps) > 0.1:
        return None
    if sum(step["train/tokens"] > 0 for step in steps) < STEADY or not window.grouped:
        return None  # nothing to train is not slow; demonstrations leave samplers idle
    if stored > 0.5:
        advice = "trainer.checkpoint_every: raise it, or put the run directory on a faster disk"
    elif window.recipe.trainer.gradient_checkpointing:
        advice = "trainer.gradient_checkpointing = false: if memory allows, nothing is computed twice"
    else:
        advice = f"trainer.gpus = {window.recipe.trainer.gpus + 1}: give the trainer what the samplers do not use"
    return Finding(
        evidence=f"samplers idle {idle:.0%} of their time and the trainer never waits: its steps take {seconds:.1f} s, "
        f"{stored:.0%} of them for publishing and checkpoints",
        advice=advice,
    )


def idle_share(window: Window) -> float | None:
    """Of all samplers that report it, from their own clocks; None before there is a minute of it."""
    busy = spent = 0.0
    for records in window.samplers:
        records = [record for record in records if "busy_s" in record]
        if len(records) >= LEAST:
            spent += records[-1]["time_s"] - records[0]["time_s"]
            busy += records[-1]["busy_s"] - records[0]["busy_s"]
    return 1 - busy / spent if spent >= REPORTED_S else None
