"""The conditions of one history, all drawn from its seed. Each history has some faults and not others: a fault that
always meets all the others is never seen at its worst."""

import random
from dataclasses import dataclass

SAMPLER_FAULTS = ("kill_sampler", "leave", "join", "foreign", "pause_sampler", "hang", "partition", "jump_sampler")
TRAINER_FAULTS = ("kill_trainer", "kill_trainer", "stop_trainer", "pause_trainer", "jump_trainer", "rot")


@dataclass(frozen=True, slots=True, kw_only=True)
class Plan:
    """Pairs are (up, down): from sampler to trainer, and back."""

    steps: int
    per_step: int
    max_staleness: int
    rows: int
    checkpoint_every: int
    samplers: int
    hostile: bool
    """One more sampler, all of whose groups are unsound."""
    exams: int
    """Steps between two of them beside training, on top of the first and the last; -1: none at all."""
    flat: float
    """Share of groups without signal."""
    refill: int
    """Of them, in a step, whose place others take."""
    drop: tuple[float, float]
    repeat: tuple[float, float]
    delay_s: float
    encoded: bool
    """Every message goes through the codec; costs time."""
    fixed_port: bool
    """A restarted trainer listens where the old one did, also while it still loads its checkpoint."""
    tick_s: float
    """1 in an idle hub, more in a busy one."""
    group_s: float
    step_s: float
    read_s: float
    """To load a snapshot; a slow reader meets the one who removes old snapshots."""
    straggle: float
    fail: float
    skip: float
    unpublished: float
    unreadable: float
    stale_checkpoint: float
    """The newest checkpoint turns out to be corrupt."""
    boundary: float
    """The trainer is killed between two of a step's acts."""
    poisoned: frozenset[int]
    """Groups that nobody can answer soundly."""
    faults: tuple[str, ...]
    fault_s: float
    """Between two of them, on average."""


def draw(dice: random.Random) -> Plan:
    def sometimes(share: float, value: float) -> float:
        return value if dice.random() < share else 0.0

    def rates(share: float) -> tuple[float, float]:
        return sometimes(share, dice.uniform(0.01, 0.2)), sometimes(share, dice.uniform(0.01, 0.2))

    per_step, steps = dice.randint(2, 4), min(dice.randint(12, 40) for _ in range(3))
    chosen = [fault for fault in SAMPLER_FAULTS if dice.random() < 0.4]
    chosen += [fault for fault in TRAINER_FAULTS if dice.random() < 0.5]
    return Plan(
        steps=steps,
        per_step=per_step,
        max_staleness=dice.choice((0, 1, 1, 2, 3)),
        rows=dice.randint(per_step, 60),
        checkpoint_every=dice.randint(1, 6),
        samplers=dice.choice((1, 1, 2, 2, 2, 3, 4, 5)),
        hostile=dice.random() < 0.1,
        exams=dice.choice((0, 1, 2, 3, 5)) if dice.random() < 0.4 else -1,
        flat=sometimes(0.3, dice.uniform(0.1, 0.9)),
        refill=dice.choice((0, 1, per_step, 3 * per_step)),
        drop=rates(0.6),
        repeat=rates(0.6),
        delay_s=dice.choice((0.02, 0.02, 0.3, 1.0, 3.0, 8.0)),
        encoded=dice.random() < 0.1,
        fixed_port=dice.random() < 0.3,
        tick_s=dice.uniform(1.0, 3.0),
        group_s=dice.uniform(0.5, 4.0),
        step_s=dice.choice((0.5, 2.0, 2.0, 4.0, 15.0)),
        read_s=dice.choice((0.5, 2.0, 2.0, 2.0, 20.0)),
        straggle=sometimes(0.4, 0.05),
        fail=sometimes(0.3, 0.05),
        skip=sometimes(0.2, 0.06),
        unpublished=sometimes(0.2, 0.1),
        unreadable=sometimes(0.2, 0.1),
        stale_checkpoint=sometimes(0.4, 0.5),
        boundary=sometimes(0.4, 0.04),
        poisoned=frozenset(dice.sample(range(20), 1)) if dice.random() < 0.2 else frozenset(),
        faults=tuple(chosen),
        fault_s=dice.uniform(10.0, 60.0),
    )
