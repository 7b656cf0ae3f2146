"""A run on two machines that share one directory, each through its own client, under a seeded nemesis of that disk."""

import contextlib
import ctypes
import random
import signal
import time
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path

from protocol.rundir import RunDir
from tests.chaos.cluster import Cluster
from tests.nfs.mount import Mount, mounted

ERRORS = ("EIO", "ETIMEDOUT", "RETRY")


class Machines(Cluster):
    """The trainer on one, samplers on the other; each has its own path of the run directory, and its own view.

    A second rank is on the samplers' machine, and finds the run directory under the first one's path.
    """

    def __init__(self, directory: Path, mounts: dict[str, Mount], **settings) -> None:
        super().__init__(directory, **settings)
        self.mounts, self.proxied = mounts, False

    def _fork(self, kind: str, work: Callable[[], int], environment: dict, point: tuple[str, int] | None) -> int:
        def there() -> int:  # in the child alone: this process looks at the server itself
            self.rundir = RunDir(self.mounts[kind].path)
            if environment.get("RANK"):
                show(self.mounts["sampler"].path, at=self.rundir.path)
            return work()

        return super()._fork(kind, there, environment, point)

    def move(self) -> None:
        """The trainer dies, and it and later samplers start on the other machine."""
        self.mounts["trainer"], self.mounts["sampler"] = self.mounts["sampler"], self.mounts["trainer"]
        for pid in self.trainer.alive if self.trainer else ():
            self.signal(pid, signal.SIGKILL)

    def _children(self) -> list[str]:
        return [command for command in super()._children() if "tests.nfs.client" not in command]


def show(path: Path, *, at: Path) -> None:
    """To this process alone `at` is what others see at `path`."""
    libc, bind, private = ctypes.CDLL(None, use_errno=True), 0x1000, 0x44000
    for failed in (
        libc.unshare(0x20000),
        libc.mount(None, b"/", None, private, None),
        libc.mount(bytes(path), bytes(at), None, bind, None),
    ):
        if failed:
            raise OSError(ctypes.get_errno(), f"cannot show {path} at {at}")


@contextlib.contextmanager
def machines(place: Path, habits: dict[str, object], **settings) -> Iterator[Machines]:
    """place: an empty directory. The server's disk is `run` in it."""
    (place / "run").mkdir()
    with (
        mounted(place / "run", place / "north", **habits) as north,
        mounted(place / "run", place / "south", **habits) as south,
        Machines(place, {"trainer": north, "sampler": south}, **settings) as cluster,
    ):
        yield cluster


class BadDisk:
    """Asked all the time by the cluster; does `faults` things in all, one every few steps. away_s: of the last one."""

    def __init__(self, cluster: Machines, seed: int, faults: int, away_s: float) -> None:
        self.cluster, self.dice = cluster, random.Random(seed)
        self.counts: Counter[str] = Counter()
        self._away_s, self._every = away_s, cluster.recipe.trainer.steps / (faults + 1)
        self._calm: list[tuple[float, Callable[[], None]]] = []
        kinds = [
            self.lost_reply, self.stale_handle, self.full, self.slow, self.no_cto, self.short_break,
            self.move, self.kill_trainer, self.kill_sampler,
        ]  # fmt: skip
        more = self.dice.choices(kinds, [4, 3, 2, 2, 1, 2, 1, 1, 1], k=faults)
        self._plan = [*self.dice.sample([*kinds, *more][: faults - 1], faults - 1), self.away]

    def __call__(self) -> None:
        now = time.monotonic()
        for due, undo in [one for one in self._calm if one[0] <= now]:
            self._calm.remove((due, undo))
            undo()
        done = self.counts.total()
        if done < len(self._plan) and self.cluster.trainer and self.cluster.steps() >= self._every * (done + 1):
            self._plan[done]()
            self.counts[self._plan[done].__name__] += 1

    def _mount(self) -> Mount:
        return self.cluster.mounts[self.dice.choice(["trainer", "sampler"])]

    def _after(self, seconds: float, undo: Callable[[], None]) -> None:
        self._calm.append((time.monotonic() + seconds, undo))

    def lost_reply(self) -> None:
        self._mount().lose(self.dice.choice(["rename", "mkdir", "create"]), error=self.dice.choice(ERRORS))

    def stale_handle(self) -> None:
        error, times = self.dice.choice(["ESTALE", "EIO"]), self.dice.choice([1, 2, 5])
        self.cluster.mounts["sampler"].refuse(self.dice.choice(["open", "read"]), "s0*/*", error, times)

    def full(self) -> None:
        error = self.dice.choice(["ENOSPC", "EDQUOT"])
        self._mount().refuse(self.dice.choice(["flush", "fsync"]), error=error, times=self.dice.choice([1, 3]))

    def slow(self) -> None:
        mount = self._mount()
        mount.set(slow=0.01)
        self._after(1.0, lambda: mount.set(slow=0.0))

    def no_cto(self) -> None:
        mount = self._mount()
        mount.set(cto=False)
        self._after(2.0, lambda: mount.set(cto=True))

    def short_break(self) -> None:
        self._mount().away(self.dice.uniform(0.5, 3.0))

    def away(self) -> None:
        """The last one, and the longest."""
        for mount in self.cluster.mounts.values():
            mount.away(self._away_s)

    def move(self) -> None:
        self.cluster.move()

    def kill_trainer(self) -> None:
        for pid in self.cluster.trainer.alive:
            self.cluster.signal(pid, signal.SIGKILL)

    def kill_sampler(self) -> None:
        for job in self.cluster.samplers[:1]:
            for pid in job.alive:
                self.cluster.signal(pid, signal.SIGKILL)
