"""python -m tests.chaos --faults 1000     a campaign: runs under random faults until so many were survived
python -m tests.chaos --rows            the rows of docs/reliability.md that need processes, one after the other
python -m tests.chaos --points          a worker killed once at every crash point that can be found
python -m tests.chaos --demo            the real demo, every kind of process killed once
"""

import argparse
import os
import shutil
import signal
import statistics
import subprocess
import sys
import tempfile
import time
from collections import Counter
from pathlib import Path

from tests.chaos.cluster import Cluster, Violation
from tests.chaos.nemesis import Nemesis

FAULTS_PER_RUN = 25
TMPFS_MB = 16


def main() -> int:
    flags = argparse.ArgumentParser("chaos", description="Real processes under random faults; the model is the audit.")
    flags.add_argument("--faults", type=int, default=100)
    flags.add_argument("--seed", type=int, default=0)
    flags.add_argument("--rows", nargs="*", metavar="ROW", help="the scenarios of single rows; one JSON line each")
    flags.add_argument("--keep", action="store_true", help="keep the directories of runs that went well, too")
    flags.add_argument("--points", action="store_true", help="every crash point once")
    flags.add_argument("--demo", action="store_true", help="the real demo, every kind of process killed once")
    options = flags.parse_args()
    if options.demo:
        from tests.chaos import demo

        return demo.main()
    import sampler.replica  # noqa: F401
    import trainer.rank  # noqa: F401  both once, here: every process is forked from this one

    if options.rows is not None:
        from tests.chaos.rows import run_rows

        return run_rows(options.rows)
    if options.points:
        return every_point()
    return campaign(options.faults, options.seed, options.keep)


def campaign(faults: int, seed: int, keep: bool) -> int:
    total: Counter[str] = Counter()
    counts: Counter[str] = Counter()
    hit: set[str] = set()
    recoveries: list[float] = []
    began = time.monotonic()
    points = discover()
    known = sum(map(len, points.values()))
    left = {kind: list(names) for kind, names in points.items()}
    while counts.total() < faults:
        seed += 1
        for kind, names in left.items():
            if not names:  # all tried once: again, at another hit
                names += points[kind]
        try:
            with directory(keep) as (place, tmpfs):
                faults_now = min(FAULTS_PER_RUN, faults - counts.total())
                nemesis, result = one_run(place, seed, faults_now, tmpfs, left)
                hit |= set(nemesis.hits())
        except Violation as violation:
            print(f"seed {seed}: VIOLATION: {violation}", flush=True)
            return 1
        counts += nemesis.counts
        total += Counter(result)
        recoveries += recovery(nemesis)
        print(f"seed {seed}: {nemesis.counts.total()} faults, {result}", flush=True)
        if result["lost"] or result["doubled"] or result["orphans"]:
            return 1
    print_table(counts, total, recoveries, hit, known, time.monotonic() - began)
    return 0


def one_run(place: Path, seed: int, faults: int, tmpfs: bool, points: dict[str, list[str]]):
    """One run from start to end under `faults` faults -> (what was done to it, what the audit says)."""
    shape = {"ranks": 1 + seed % 2, "samplers": 1 + seed // 2 % 2, "trainer.max_staleness": (1, 0, 1, 2)[seed % 4]}
    with Cluster(place, seed=seed, steps=250, **shape) as cluster:
        nemesis = Nemesis(cluster, seed, faults, tmpfs, points)
        cluster.run(nemesis)
        nemesis.undo_all()
        result = cluster.audit()
        result["orphans"] = len(left := cluster.leftovers())
        if left:
            print(left, flush=True)
        return nemesis, result | {"runs": 1, "steps": cluster.steps()}


def every_point() -> int:
    """Kills a worker once at every crash point that there is: each start is armed with the next one, run after run."""
    points = discover()
    left = {kind: list(names) for kind, names in points.items()}
    hit: set[str] = set()
    missed: Counter[str] = Counter()
    runs = 0
    while any(left.values()):
        runs += 1
        armed = one_armed_run(
            left, "trainer" if left["trainer"] and (runs % 2 or not left["sampler"]) else "sampler", hit
        )
        for kind, point in armed:
            missed[point] += point not in hit
            if point not in hit and missed[point] < 3:  # not passed in this run: in another one perhaps
                left[kind].append(point)
        print(f"run {runs}: {len(hit)} crash points hit, {sum(map(len, left.values()))} left", flush=True)
    known = {point for names in points.values() for point in names}
    print(f"crash points {len(known)}  hit {len(hit)}  runs {runs}  lost 0  doubled 0  orphan processes 0")
    print(*[f"  not passed again: {point}" for point in sorted(known - hit)], sep="\n", flush=True)
    return 0


def one_armed_run(left: dict[str, list[str]], kind: str, hit: set[str]) -> list[tuple[str, str]]:
    """A run whose workers of one kind are armed at every start; -> the points used. Adds to `hit`. Raises Violation."""
    armed: list[tuple[str, str]] = []

    def next_point(of: str) -> tuple[str, int] | None:
        if of != kind or not left[kind]:
            return None
        armed.append((kind, left[kind].pop(0)))
        return armed[-1][1], 1

    with directory(False) as (place, _), Cluster(place, steps=12) as cluster:
        cluster.next_point = next_point
        killed: list[bool] = []

        def resume_once() -> None:
            if not killed and cluster.trainer and cluster.steps() >= 8:  # a checkpoint is there to start from
                killed.append(True)
                cluster.signal(cluster.trainer.pids[0], signal.SIGKILL)

        cluster.run(resume_once)
        result = cluster.audit()
        if result["lost"] or result["doubled"] or cluster.leftovers():
            raise Violation(f"{result} after {armed}")
        hit |= set(cluster.hits.read_text().splitlines()) if cluster.hits.exists() else set()
    return armed


def discover() -> dict[str, list[str]]:
    """All crash points that a run passes, with an orderly stop and a resume in it."""
    with directory(False) as (place, _), Cluster(place, steps=12) as cluster:
        cluster.note_points = True
        stopped: list[bool] = []

        def stop_once() -> None:
            if not stopped and cluster.trainer and cluster.steps() >= 6:
                stopped.append(True)
                cluster.signal(cluster.trainer.pids[0], 15)

        cluster.run(stop_once)
        return {kind: (place / f"points.{kind}").read_text().splitlines() for kind in ("trainer", "sampler")}


def recovery(nemesis: Nemesis) -> list[float]:
    """Seconds from each fault to the next record of the trainer."""
    records = [when for when, _ in nemesis.cluster.steps_seen]
    return [min(after) - fault for fault in nemesis.times if (after := [when for when in records if when > fault])]


def print_table(
    counts: Counter, total: Counter, recoveries: list[float], hit: set[str], known: int, seconds: float
) -> None:
    for name, count in sorted(counts.items()):
        print(f"  {name:20} {count}")
    print(
        f"faults {counts.total()}  runs {total['runs']}  steps {total['steps']}  groups trained {total['trained']}  "
        f"lost {total['lost']}  doubled {total['doubled']}  stalls 0  orphan processes {total['orphans']}\n"
        f"crash points hit {len(hit)} of {known}  "
        f"recovery p50 {statistics.median(recoveries):.1f} s  max {max(recoveries):.1f} s  "
        f"({seconds:.0f} s, {os.cpu_count()} cores)",
        flush=True,
    )


class directory:
    """A place for one run, on a small disk of its own where this user may mount one; kept after a failure."""

    def __init__(self, keep: bool) -> None:
        self._keep = keep

    def __enter__(self) -> tuple[Path, bool]:
        self.path = Path(tempfile.mkdtemp(prefix="chaos-"))
        (self.path / "run").mkdir()
        command = ["mount", "-t", "tmpfs", "-o", f"size={TMPFS_MB}m", "tmpfs", str(self.path / "run")]
        self._mounted = os.geteuid() == 0 and subprocess.run(command, capture_output=True, check=False).returncode == 0
        return self.path, self._mounted

    def __exit__(self, kind: type | None, *_: object) -> None:
        if kind is not None or self._keep:
            print(f"kept: {self.path}", file=sys.stderr)
            return
        if self._mounted:
            subprocess.run(["umount", str(self.path / "run")], check=False)
        shutil.rmtree(self.path, ignore_errors=True)


if __name__ == "__main__":
    sys.exit(main())
