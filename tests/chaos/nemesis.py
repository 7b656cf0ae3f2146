"""Does to a cluster what nights and machines do to a run, and counts it."""

import contextlib
import os
import random
import signal
import time
from collections import Counter
from collections.abc import Callable
from pathlib import Path

import msgspec

from protocol.snapshot import listed
from tests.chaos.cluster import Cluster

DEAD_S = 2.0


class Nemesis:
    """Injects `faults` faults, one after the other, each after a random pause; what lasts is undone later."""

    def __init__(self, cluster: Cluster, seed: int, faults: int, tmpfs: bool, points: dict[str, list[str]]) -> None:
        """points: crash points that are still to be tried, by kind of worker; those used are removed."""
        self.cluster, self.dice, self.left, self._points = cluster, random.Random(seed), faults, points
        self.counts: Counter[str] = Counter()
        self.times: list[float] = []
        self._hits = 0
        self._arming: str | None = None
        self._later: list[tuple[float, Callable[[], None]]] = []
        self._next = time.monotonic() + 1.0
        self._spoiled_checkpoint: str | None = None
        self._faults = [
            (4, self.kill_rank), (4, self.kill_sampler), (2, self.pause_rank), (2, self.pause_sampler),
            (2, self.stop_trainer), (1, self.stop_sampler), (3, self.reset), (2, self.hole), (1, self.second_trainer),
            (1, self.zombie), (1, self.stranger), (1, self.join_late), (2, self.spoil_snapshot),
            (2, self.spoil_checkpoint), (1, self.half_written), (4, self.crash_point), *([(2, self.disk_full)] * tmpfs),
        ]  # fmt: skip
        cluster.next_point = self._point

    def __call__(self) -> None:
        """Asked all the time by the cluster."""
        now = time.monotonic()
        for due, undo in list(self._later):
            if now >= due:
                self._later.remove((due, undo))
                undo()
        hits = self.hits()
        for _ in hits[self._hits :]:
            self._count("crash_point")
        self._hits = len(hits)
        if self.left > 0 and now >= self._next and self.cluster.trainer and not self.cluster.complete():
            weights, faults = zip(*self._faults, strict=True)
            self.dice.choices(faults, weights)[0]()
            self._next = now + self.dice.uniform(0.2, 1.6)

    def _count(self, name: str) -> None:
        self.counts[name] += 1
        self.times.append(time.monotonic())
        self.left -= 1

    def _after(self, seconds: float, undo: Callable[[], None]) -> None:
        self._later.append((time.monotonic() + seconds, undo))

    def _rank(self) -> int | None:
        alive = self.cluster.trainer.alive
        return self.dice.choice(alive) if alive else None

    def _sampler(self) -> int | None:
        alive = [pid for job in self.cluster.samplers for pid in job.alive]
        return self.dice.choice(alive) if alive else None

    # -- processes -----------------------------------------------------------------------------------------------

    def kill_rank(self) -> None:
        self._signal(self._rank(), signal.SIGKILL, "kill_rank")

    def kill_sampler(self) -> None:
        self._signal(self._sampler(), signal.SIGKILL, "kill_sampler")

    def stop_trainer(self) -> None:
        for pid in self.cluster.trainer.alive:
            self.cluster.signal(pid, self.dice.choice([signal.SIGTERM, signal.SIGUSR1]))
        self._count("stop_trainer")

    def stop_sampler(self) -> None:
        self._signal(self._sampler(), signal.SIGTERM, "stop_sampler")

    def pause_rank(self) -> None:
        self._pause(self._rank(), "pause_rank")

    def pause_sampler(self) -> None:
        self._pause(self._sampler(), "pause_sampler")

    def _signal(self, pid: int | None, number: int, name: str) -> None:
        if pid:
            self.cluster.signal(pid, number)
            self._count(name)

    def _pause(self, pid: int | None, name: str) -> None:
        if pid:
            self.cluster.signal(pid, signal.SIGSTOP)
            self._after(self.dice.choice([0.2, 1.0, 2 * DEAD_S]), lambda: self.cluster.signal(pid, signal.SIGCONT))
            self._count(name)

    def second_trainer(self) -> None:
        """Started on the same run while the first one works: the later one wins, the first one must step down."""
        self._supersede()
        self._count("second_trainer")

    def zombie(self) -> None:
        """The same, but the first one sleeps through it and wakes up later."""
        old = self.cluster.trainer.alive
        for pid in old:
            self.cluster.signal(pid, signal.SIGSTOP)
        self._supersede()
        self._after(self.dice.uniform(1.0, 4.0), lambda: [self.cluster.signal(pid, signal.SIGCONT) for pid in old])
        self._count("zombie")

    def _supersede(self) -> None:
        self.cluster.zombies.append(self.cluster.trainer)
        self.cluster.trainer = self.cluster.start_trainer()

    def stranger(self) -> None:
        """A sampler that samples at another temperature than this run does."""
        sampling = msgspec.structs.replace(self.cluster.recipe.sampling, temperature=0.5)
        job = self.cluster.start_sampler(msgspec.structs.replace(self.cluster.recipe, sampling=sampling))
        self.cluster.zombies.append(job)
        self._after(5.0, lambda: self.cluster.signal(job.pids[0], signal.SIGKILL))
        self._count("stranger")

    def join_late(self) -> None:
        self.cluster.wanted_samplers = self.dice.choice([1, 2, 3])
        self._count("join_or_leave")

    def crash_point(self) -> None:
        """The next start of a worker is armed; killing that worker makes the start come soon."""
        kind = self.dice.choice(["trainer", "sampler"])
        self._arming = kind
        self.kill_rank() if kind == "trainer" else self.kill_sampler()

    def _point(self, kind: str) -> tuple[str, int] | None:
        if kind != self._arming:
            return None
        self._arming = None
        points = self._points[kind]
        return (points.pop(self.dice.randrange(len(points))), self.dice.choice([1, 1, 2, 4])) if points else None

    def hits(self) -> list[str]:
        """Crash points at which a process has really died."""
        path = self.cluster.hits
        return path.read_text().splitlines() if path.exists() else []

    # -- the network ---------------------------------------------------------------------------------------------

    def reset(self) -> None:
        self.cluster.proxy("reset")
        self._count("tcp_reset")

    def hole(self) -> None:
        seconds = self.dice.choice([0.5, 2 * DEAD_S])
        self.cluster.proxy(f"hole {seconds} {self.dice.choice(['up', 'down', 'both'])}")
        self._count("black_hole")

    # -- the disk ------------------------------------------------------------------------------------------------

    def spoil_snapshot(self) -> None:
        found = listed(self.cluster.rundir.snapshots)
        if found and self._spoil(found[-1] / self.dice.choice(["model.safetensors", "manifest.json"])):
            self._count("spoiled_snapshot")

    def spoil_checkpoint(self) -> None:
        """The newest one, and only while an older sound one is left; then the trainer has to start again."""
        found = listed(self.cluster.rundir.checkpoints)
        if len(found) < 2 or self._spoiled_checkpoint in {path.name for path in found}:
            return
        name = self.dice.choice(["manifest.json", "state.json", "manifest.hmac", "ds/rank0.safetensors"])
        if self._spoil(found[-1] / name):
            self._spoiled_checkpoint = found[-1].name
            for pid in self.cluster.trainer.alive:
                self.cluster.signal(pid, signal.SIGKILL)
            self._count("spoiled_checkpoint")

    def _spoil(self, path: Path) -> bool:
        """Flips one bit, or cuts the file."""
        with contextlib.suppress(OSError), path.open("r+b") as file:
            size = os.fstat(file.fileno()).st_size
            if self.dice.random() < 0.3:
                file.truncate(self.dice.randrange(size))
            else:
                file.seek(self.dice.randrange(size))
                byte = file.read(1)[0]
                file.seek(-1, os.SEEK_CUR)
                file.write(bytes([byte ^ 1 << self.dice.randrange(8)]))
            return True
        return False

    def half_written(self) -> None:
        """A foreign tool copies a directory with a good name and no manifest."""
        incarnation = self.cluster.rundir.newest_incarnation()
        for parent, letter in ((self.cluster.rundir.snapshots, "s"), (self.cluster.rundir.checkpoints, "c")):
            path = parent / f"{letter}00009999.i{incarnation:04d}"
            with contextlib.suppress(OSError):  # the disk may be full just now
                path.mkdir(exist_ok=True)
                (path / "model.safetensors").write_bytes(b"half")
        self._count("half_written")

    def disk_full(self) -> None:
        balloon = self.cluster.rundir.path / f"balloon-{len(self.times)}"
        with contextlib.suppress(OSError), balloon.open("wb", buffering=0) as file:
            while file.write(b"\0" * 65536):
                pass
        self._after(self.dice.uniform(0.3, 2.0), lambda: balloon.unlink(missing_ok=True))
        self._count("disk_full")

    def undo_all(self) -> None:
        for _, undo in self._later:
            undo()
        self._later = []
