"""One run's processes: forked, watched, started again when they end, and audited at the end.

Forked from a process that has imported the engines' libraries already, so that a restart takes a second and not ten.
"""

import contextlib
import ctypes
import json
import os
import random
import shutil
import signal
import socket
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

import msgspec
import psutil
from safetensors.torch import load_file

from protocol.cli import exit_with
from protocol.failure import explained
from protocol.metrics import read_metrics
from protocol.resolve import dump, load
from protocol.rundir import RunDir
from protocol.snapshot import listed
from tests.chaos import crash, toy
from tests.chaos.proxy import run_proxy
from tests.tiny import make_model

PR_SET_CHILD_SUBREAPER = 36
ALL_GONE_S = 180.0
"""All ranks must have ended so long after the first one died."""
LAUNCHER_S = 2.0
"""Ranks that have not met yet are ended by their launcher so soon after one of them died."""
STALL_S = 300.0
"""No step for so long, whatever was done to the processes, is a stall."""
RETRIED = {0, 66, 71, 73, 75, -signal.SIGKILL, -signal.SIGTERM, -signal.SIGUSR1}
"""Ways to end after which a supervisor starts the process again. Others are bugs or refusals, which no fault may
cause; only a rank that has lost another one may end with a traceback."""
SETTINGS = (
    "data.train=word-problems",
    "data.eval=word-problems:test",
    "data.limit=40",
    "data.eval_limit=4",
    "eval.every=5",
    "data.system=",
    "model.dtype=float32",
    "sampling.group_size=2",
    "sampling.max_tokens=8",
    "objective.kl_beta=0.0",
    "sampler.max_running=16",
    "sampler.reward_workers=1",
    "trainer.prompts_per_step=4",
    "trainer.threads=1",
    "trainer.backend=gloo",
    "trainer.tokens_per_micro_batch=4096",
    "network.beat_s=0.3",
    "network.dead_s=2.0",
    "network.resend_s=0.5",
    "network.lease_s=5.0",
    "network.grace_s=300.0",
)


class Violation(Exception):
    """A promise that did not hold."""


@dataclass(slots=True)
class Job:
    """A trainer's ranks, or one sampler."""

    kind: str
    pids: list[int]
    codes: dict[int, int] = field(default_factory=dict)
    first_end: float | None = None

    @property
    def alive(self) -> list[int]:
        return [pid for pid in self.pids if pid not in self.codes]


class Cluster:
    """Use with `with`: whatever happens, no process is left. ranks, samplers: how many of each."""

    def __init__(self, directory: Path, *, seed: int = 0, steps: int = 20, ranks: int = 1, samplers: int = 1, **more):
        ctypes.CDLL(None).prctl(PR_SET_CHILD_SUBREAPER, 1)  # orphans become ours, so that none can hide
        self._others = {child.pid for child in psutil.Process().children(recursive=True)}
        """Processes that were there before: a test may have a fork server (tests/warm.py)."""
        self.dice = random.Random(seed)
        self.ranks, self.wanted_samplers = ranks, samplers
        model = make_model(directory / "model")
        reward = Path(__file__).parents[1] / "rewards_for_tests.py"
        overrides = [f"trainer.steps={steps}", f"trainer.gpus={ranks}", f"model.path={model}", *SETTINGS]
        overrides += [f"reward=[{{function='{reward}:vowels'}}]", "trainer.checkpoint_every=5"]
        overrides += [f"{key}={value}" for key, value in more.items()]
        self.recipe = load(None, overrides)
        self.rundir = RunDir(directory / "run")
        self.rundir.make()
        self.rundir.recipe.write_text(dump(self.recipe))
        self.hits = directory / "hits"
        self._met = directory / "met"
        """Ranks that have met the others."""
        self._met.mkdir()
        self.note_points = False
        self.proxied = True
        self.trainer: Job | None = None
        self.zombies: list[Job] = []
        self.samplers: list[Job] = []
        self.restarts: dict[str, int] = {"trainer": 0, "sampler": 0}
        self.exits: list[tuple[str, int]] = []
        self.next_point: Callable[[str], tuple[str, int] | None] = lambda kind: None
        self.steps_seen: list[tuple[float, int]] = []
        self.full_since: float | None = None
        self.come_back: float | None = None
        self.abandoned = False
        self._size = self._moved = 0
        self._progress = time.monotonic()

    # -- processes -----------------------------------------------------------------------------------------------

    def start_trainer(self, work: Callable[[], None] = lambda: None) -> Job:
        point = self.next_point("trainer")
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            port = free.getsockname()[1]
        pids = []
        for rank in range(self.ranks):
            place = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": self.ranks, "LOCAL_WORLD_SIZE": self.ranks}
            environment = place | {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
            pids.append(self._fork("trainer", self._trainer(rank, work), environment, point if rank == 0 else None))
        return Job("trainer", pids)

    def _trainer(self, rank: int, work: Callable[[], None]) -> Callable[[], int]:
        def run() -> int:
            from trainer.__main__ import of_rank
            from trainer.place import here
            from trainer.rank import Ranks, run

            join = Ranks.__init__

            def joined(*arguments) -> None:
                join(*arguments)
                (self._met / str(os.getpid())).touch()

            Ranks.__init__ = joined
            work()
            with of_rank(here(), self.rundir):
                return run(self.rundir, self.recipe, toy.ToyPolicy)

        return run

    def start_sampler(self, recipe=None, work: Callable[[], None] = lambda: None) -> Job:
        point = self.next_point("sampler") if recipe is None else None

        def run() -> int:
            from sampler.replica import run

            work()
            if self.proxied:
                self._behind_proxy()
            with explained(self.rundir.path, "sampler engine 0"):
                return run(self.rundir, recipe or self.recipe, 0, toy.ToyEngine)

        return Job("sampler", [self._fork("sampler", run, {}, point)])

    def _behind_proxy(self) -> None:
        """In the child: the run directory names the proxy instead of the trainer."""
        real, address = RunDir.read_endpoint, self.proxy_address

        def read(rundir: RunDir):
            endpoint = real(rundir)
            return endpoint and msgspec.structs.replace(endpoint, address=address)

        RunDir.read_endpoint = read

    def _fork(self, kind: str, work: Callable[[], int], environment: dict, point: tuple[str, int] | None) -> int:
        pid = os.fork()
        if pid:
            return pid
        code = 1
        try:
            os.setsid()
            log = os.open(self.rundir.path.parent / f"{kind}.log", os.O_WRONLY | os.O_APPEND | os.O_CREAT, 0o600)
            os.dup2(log, 1)
            os.dup2(log, 2)
            for number in (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1):
                signal.signal(number, signal.SIG_DFL)
            os.environ.update({key: str(value) for key, value in environment.items()})
            if self.note_points:
                crash.note_points(self.rundir.path.parent / f"points.{kind}")
            if point:
                crash.kill_at(*point, self.hits)
            exit_with(work)
        except SystemExit as error:
            code = error.code if isinstance(error.code, int) else 1
        except BaseException:
            sys.excepthook(*sys.exc_info())
        finally:
            sys.stdout.flush()
            sys.stderr.flush()
            os._exit(code)

    # -- supervision ---------------------------------------------------------------------------------------------

    def tend(self) -> None:
        """Reaps what has ended and starts it again; raises Violation for an end that no fault may cause."""
        self._reap()
        complete = self.complete()
        if self.trainer is None or self._over(self.trainer):
            if self.trainer:
                self._judge(self.trainer)
            if not complete:
                self.restarts["trainer"] += self.trainer is not None
                self.trainer = self.start_trainer()
        self.zombies = [job for job in self.zombies if not self._over(job)]
        for job in list(self.samplers):
            if self._over(job):
                self._judge(job)
                self.samplers.remove(job)
                self.restarts["sampler"] += not complete
        while not complete and len(self.samplers) < self.wanted_samplers:
            self.samplers.append(self.start_sampler())
        self._look_for_progress()

    def _reap(self) -> None:
        with contextlib.suppress(ChildProcessError):
            while (found := os.waitpid(-1, os.WNOHANG))[0]:
                pid, status = found
                for job in self.jobs():
                    if pid in job.pids:
                        job.codes[pid] = os.waitstatus_to_exitcode(status)
                        job.first_end = job.first_end or time.monotonic()
                        self.exits.append((job.kind, job.codes[pid]))

    def jobs(self) -> list[Job]:
        return [job for job in [self.trainer, *self.zombies, *self.samplers] if job]

    def _over(self, job: Job) -> bool:
        if not job.alive:
            return True
        waited = time.monotonic() - job.first_end if job.first_end else 0.0
        if waited > LAUNCHER_S and not any((self._met / str(pid)).exists() for pid in job.pids):
            for pid in job.alive:  # it still waits for the dead rank to come, which only a launcher can know of
                self.signal(pid, signal.SIGKILL)
        elif waited > ALL_GONE_S:
            raise Violation(f"a rank ended with {list(job.codes.values())}, another was alive {ALL_GONE_S:.0f} s later")
        return False

    def _judge(self, job: Job) -> None:
        lost_peer = {1, -signal.SIGABRT} if len(job.pids) > 1 else set()
        strange = [code for code in job.codes.values() if code not in RETRIED | lost_peer]
        if strange:
            raise Violation(f"a {job.kind} ended with exit code {strange}; see {self.rundir.path.parent}")

    def _look_for_progress(self) -> None:
        """A start alone is none: a trainer that is started again and again gets nowhere."""
        path = self.rundir.metrics / "trainer.jsonl"
        size = path.stat().st_size if path.exists() else 0
        now = time.monotonic()
        moved = size != self._size and len([r for r in read_metrics(path) if r["kind"] != "start"])
        self._size = size
        if moved and moved != self._moved:
            self._moved, self._progress = moved, now
            self.steps_seen.append((now, moved))
        elif now - self._progress > STALL_S:
            alive = [(job.kind, job.alive, job.codes) for job in self.jobs()]
            raise Violation(f"no step for {STALL_S:.0f} s, alive: {alive}; see {self.rundir.path.parent}")

    def complete(self) -> bool:
        return self.rundir.is_complete(self.recipe.trainer.steps)

    def run(
        self,
        each: Callable[[], None] = lambda: None,
        timeout_s: float = 600.0,
        until: Callable[[], bool] = lambda: False,
    ) -> None:
        """Tends the processes until the run is complete and every one has ended by itself, or `until` says so."""
        deadline = time.monotonic() + timeout_s
        while not (self.complete() and not self.jobs_alive()):
            each()
            self._reap()
            if until():
                return
            self.tend()
            if time.monotonic() > deadline:
                raise Violation(f"not complete after {timeout_s:.0f} s; see {self.rundir.path.parent}")
            time.sleep(0.01)

    def jobs_alive(self) -> bool:
        return any(job.alive for job in self.jobs())

    def steps(self) -> int:
        return len([r for r in read_metrics(self.rundir.metrics / "trainer.jsonl") if r["kind"] == "step"])

    def abandon(self) -> None:
        """All processes are gone at once, as with their machine."""
        for job in self.jobs():
            for pid in job.alive:
                self.signal(pid, signal.SIGKILL)
        while self.jobs_alive():
            self._reap()
        self.trainer, self.samplers, self.abandoned = None, [], True

    def move_to(self, elsewhere: Path) -> None:
        """Goes on with a copy of the run directory alone."""
        shutil.copytree(self.rundir.path, elsewhere, symlinks=True)
        for entry in self.rundir.path.iterdir():
            shutil.rmtree(entry) if entry.is_dir() and not entry.is_symlink() else entry.unlink()
        self.rundir = RunDir(elsewhere)

    # -- the audit -----------------------------------------------------------------------------------------------

    def audit(self) -> dict[str, int]:
        """Groups trained, lost and doubled, by the published weights and by the ledger in the last checkpoint."""
        newest = load_file(listed(self.rundir.snapshots)[-1] / "model.safetensors")
        weights = [int(value) for value in [*newest["first"], *newest["second"]]]
        state = json.loads((listed(self.rundir.checkpoints)[-1] / "state.json").read_text())
        ledger = state["inbox"]["ledger"]
        done = {*range(ledger["done_below"]), *ledger["done_above"]}
        aside = {int(group) for group in ledger["quarantined"]}
        trained = {group for group, weight in enumerate(weights) if weight}
        steps, per_step = self.recipe.trainer.steps, self.recipe.trainer.prompts_per_step
        if state["step"] != steps or sum(weights) != steps * per_step:
            raise Violation(f"{sum(weights)} groups in {state['step']} steps; expected {steps * per_step} in {steps}")
        return {
            "trained": len(trained),
            "lost": len(done - aside - trained),
            "doubled": len([weight for weight in weights if weight > 1]) + len(trained - done) + len(trained & aside),
            "quarantined": len(aside),
        }

    def leftovers(self) -> list[str]:
        """Half-written directories and processes that nobody will end any more."""
        deadline = time.monotonic() + 60
        while (found := self._children()) and time.monotonic() < deadline:
            self._reap()
            time.sleep(0.05)
        newest = self.rundir.newest_incarnation()
        half = [path.name for path in self.rundir.path.glob("*/.tmp-*") if f".i{newest:04d}-" in path.name]
        return [*found, *half]

    def _children(self) -> list[str]:
        alive = []
        for child in self._descendants():
            with contextlib.suppress(psutil.Error):
                if child.pid != self._proxy and child.status() != psutil.STATUS_ZOMBIE:
                    alive.append(" ".join(child.cmdline()))
        return alive

    def _descendants(self) -> list[psutil.Process]:
        children = psutil.Process().children(recursive=True)
        return [child for child in children if child.pid not in self._others]

    # -- the proxy, and the end ----------------------------------------------------------------------------------

    def __enter__(self):
        listener = socket.create_server(("127.0.0.1", 0))
        self.proxy_address = f"tcp://127.0.0.1:{listener.getsockname()[1]}"
        reading, self._commands = os.pipe()
        self._proxy = os.fork()
        if not self._proxy:
            try:
                run_proxy(self.rundir.path, listener, reading)
            finally:
                os._exit(0)
        listener.close()
        os.close(reading)
        return self

    def proxy(self, command: str) -> None:
        os.write(self._commands, f"{command}\n".encode())

    def signal(self, pid: int, number: int) -> None:
        with contextlib.suppress(ProcessLookupError):
            os.kill(pid, number)

    def __exit__(self, *_: object) -> None:
        started = self._descendants()
        for child in started:
            with contextlib.suppress(psutil.Error):
                child.kill()
        os.close(self._commands)
        psutil.wait_procs(started)
