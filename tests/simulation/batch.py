"""Many histories, one after the other or in several processes, and the table of what has happened in them."""

import multiprocessing
import sys
import time
from collections import Counter
from dataclasses import dataclass, field

from tests.simulation.audit import Violation
from tests.simulation.history import simulate

LOSSES = {"lost": "groups lost", "trained twice": "groups doubled", "stall": "stalls"}


@dataclass(slots=True)
class Batch:
    """violations: by seed."""

    counts: Counter[str] = field(default_factory=Counter)
    violations: dict[int, Violation] = field(default_factory=dict)
    seconds: float = 0.0

    def table(self) -> str:
        rows = {key: 0 for key in LOSSES.values()} | dict(sorted(self.counts.items()))
        for violation in self.violations.values():
            rows[LOSSES.get(violation.kind, f"violations: {violation.kind}")] = 1
        rows["seconds"] = self.seconds
        rows["seeds/s"] = (rows.get("histories", 0) + len(self.violations)) / max(self.seconds, 1e-9)
        return "\n".join(
            f"{name:36} {value:>14,.{1 if isinstance(value, float) else 0}f}" for name, value in rows.items()
        )


def run(first: int, seeds: int, processes: int = 1, stop_at: int = 1) -> Batch:
    """Histories first .. first + seeds - 1; ends at the `stop_at`th violation."""
    batch, began = Batch(), time.perf_counter()
    numbers = range(first, first + seeds)
    if processes == 1:
        results = map(attempt, numbers)
    else:
        pool = multiprocessing.get_context("spawn").Pool(processes)
        results = pool.imap(attempt, numbers, chunksize=20)
    for seed, result in zip(numbers, results, strict=False):
        if isinstance(result, Violation):
            batch.violations[seed] = result
            if len(batch.violations) >= stop_at:
                break
        else:
            batch.counts.update(result)
        done = seed - first + 1
        if done % 1000 == 0:
            spent = time.perf_counter() - began
            print(f"{done:,} of {seeds:,} histories, {done / spent:.0f} a second", file=sys.stderr, flush=True)
    if processes > 1:
        pool.terminate()
    batch.seconds = time.perf_counter() - began
    return batch


def attempt(seed: int) -> Counter[str] | Violation:
    try:
        return simulate(seed)
    except Violation as violation:
        return violation
