"""The processes that engines run in: each on GPUs of its own, watched, started again beside others that go on."""

import contextlib
import logging
import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from protocol.errors import CrashLoop, RunError, UserError
from protocol.failure import died, put_aside, write_failure
from protocol.process import end, on_stop_signal, start, visible_gpus
from protocol.recipe import Recipe
from protocol.restarts import WINDOW_S, Restarts

log = logging.getLogger(__name__)

REPLICA = "VESPER_REPLICA"
ALONE = "VESPER_ALONE"
"""Environment: this process is the engine itself, not the parent that watches it."""
GRACE_S = 15.0
POLL_S = 0.2
SPINS = "2000"
"""Of an OpenMP thread that waits for the others, before it sleeps; some ten microseconds. One that sleeps at once wakes
up late (decoding on two cores took 1.6 times as long), and one that goes on takes the core of a trainer beside it."""
COMMON = {2, 3, 66, 72, 77}
"""Exit codes for what all engines of this sampler have in common: none is started again."""


def engine_name(index: int) -> str:
    """In FAILED.md, where the engines of all samplers of a run meet."""
    return f"sampler engine {index} on {socket.gethostname()}"


@dataclass(slots=True)
class EngineProcess:
    """One engine's process, and when it had to be started again."""

    index: int
    command: Sequence[str]
    environment: Mapping[str, str]
    run: Path
    process: subprocess.Popen = field(init=False)
    restarts: Restarts = field(default_factory=Restarts)

    def __post_init__(self) -> None:
        self.start()

    @property
    def name(self) -> str:
        return engine_name(self.index)

    def start(self) -> None:
        environment = {REPLICA: str(self.index)} | dict(self.environment)
        self.process = start(self.command, environment=environment)

    def failed(self, stopped: bool) -> bool:
        """Since it was last polled. One that a stop signal ended while it still loaded has ended well."""
        code = self.process.returncode
        return bool(code) and not (stopped and code < 0)

    def explain(self) -> None:
        """Writes into FAILED.md what one that was killed could not say itself."""
        code = self.process.returncode
        if code < 0:
            write_failure(self.run, self.name, 128 - code, died(code))

    def start_again(self) -> None:
        """Raises CrashLoop after too many times. What it said in FAILED.md moves to logs/: the run goes on."""
        code = self.process.returncode
        self.restarts.add()
        end(self.process, 0.0)  # nothing of the old one may be left beside the new one
        put_aside(self.run, self.name)
        if self.restarts.too_many:
            minutes = WINDOW_S / 60
            what = f"{self.name} crashed {len(self.restarts)} times in {minutes:.0f} minutes; logs/failed-*.md say why"
            write_failure(self.run, self.name, CrashLoop.exit_code, what)
            raise CrashLoop(what)
        log.warning("%s %s and is started again (%d); the others go on", self.name, died(code), len(self.restarts))
        self.start()


@contextlib.contextmanager
def stoppable(processes: Callable[[], Iterable[subprocess.Popen]]) -> Iterator[list[bool]]:
    """A stop signal reaches those that run; afterwards nothing that they started stays. -> no longer empty once
    stopped."""
    stopped: list[bool] = []

    def stop() -> None:
        stopped.append(True)
        for process in processes():
            if process.poll() is None:
                process.send_signal(signal.SIGTERM)

    on_stop_signal(stop)
    try:
        yield stopped
    finally:
        for process in processes():
            end(process, GRACE_S)


def watch(command: Sequence[str], environments: Sequence[Mapping[str, str]], run: Path) -> int:
    """One process for each environment, until all have ended or one has for good: its exit code. Raises CrashLoop.

    An engine alone is not started again here: its end is the sampler's, and whoever started that one decides.
    """
    engines: list[EngineProcess] = []
    with stoppable(lambda: [engine.process for engine in engines]) as stopped:
        for index, environment in enumerate(environments):
            engines.append(EngineProcess(index, command, environment, run))
        while True:
            codes = [engine.process.poll() for engine in engines]
            failed = [engine for engine in engines if engine.failed(bool(stopped))]
            for engine in failed:
                engine.explain()
                code = engine.process.returncode
                if stopped or code in COMMON or len(engines) == 1:
                    return code if code > 0 else 128 - code
            for engine in failed:
                engine.start_again()
            if not failed and None not in codes:
                return 0
            time.sleep(POLL_S)


def begin_alone(recipe: Recipe) -> int:
    """This command again, as the engine itself."""
    environment = {ALONE: "1"} | environments(recipe, 1)[0]
    return follow(start([sys.executable, "-m", "sampler", *sys.argv[1:]], environment=environment))


def follow(child: subprocess.Popen) -> int:
    """Until the child has ended, or was stopped; nothing that it started stays."""
    with stoppable(lambda: [child]) as stopped:
        while (code := child.poll()) is None:
            time.sleep(POLL_S)
    if code < 0 and not stopped:  # it could not say so itself
        raise RunError(f"the engine's process {died(code)}")
    return 130 if stopped else code


def environments(recipe: Recipe, engines: int) -> list[dict[str, str]]:
    """Of each engine: its own GPUs, or without any its threads. Raises UserError where GPUs are missing.

    Names are passed on as they are: numbers, GPU-... and MIG-... alike.
    """
    width = recipe.sampler.tensor_parallel
    visible = visible_gpus()
    if not visible:
        return [cpu_environment(recipe, engines)] * engines
    if len(visible) < engines * width:
        fitting = len(visible) // width * width
        use = f"use --gpus {fitting}" if fitting else f"an engine needs {width} (sampler.tensor_parallel)"
        raise UserError(f"{engines * width} GPUs asked for, {len(visible)} visible; {use}")
    split = [visible[at : at + width] for at in range(0, engines * width, width)]
    if width > 1 and any(gpu.startswith("MIG-") for gpu in visible):
        raise UserError("parts of a GPU (MIG) cannot work together as one engine; use --tensor-parallel 1")
    return [{"CUDA_VISIBLE_DEVICES": ",".join(gpus)} for gpus in split]


def cpu_environment(recipe: Recipe, engines: int) -> dict[str, str]:
    """Threads of each process of one engine.

    Left to itself vLLM binds the workers of every engine to the same cores, all but the last one, whatever number of
    threads it is told, and refuses tensor parallelism on a machine with fewer NUMA nodes than workers.
    """
    threads = recipe.sampler.threads or max(1, (os.cpu_count() or 1) // engines)
    own = max(1, threads // recipe.sampler.tensor_parallel)
    return {
        "OMP_NUM_THREADS": str(own),
        "GOMP_SPINCOUNT": SPINS,
        "VLLM_CPU_OMP_THREADS_BIND": os.environ.get("VLLM_CPU_OMP_THREADS_BIND", "nobind"),
        "CUDA_VISIBLE_DEVICES": "",
    }
