"""The processes that engines run in: each on GPUs of its own, watched, started again beside others that go on."""

import logging
import os
import signal
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from protocol.errors import CrashLoop, RunError, UserError
from protocol.failure import died, put_aside, write_failure
from protocol.process import end, on_stop_signal, start, visible_gpus
from protocol.recipe import Recipe

log = logging.getLogger(__name__)

REPLICA = "VESPER_REPLICA"
ALONE = "VESPER_ALONE"
"""Environment: this process is the engine itself, not the parent that watches it."""
GRACE_S = 15.0
FINAL = {2, 3, 66, 72}
"""Exit codes that every engine of this sampler would end with: none is started again."""
MAX_RESTARTS, WINDOW_S = 5, 600.0
"""Of one engine. A GPU that fails again and again is for whoever placed the sampler there."""


@dataclass(slots=True)
class EngineProcess:
    """One engine's process, and when it had to be started again."""

    index: int
    command: Sequence[str]
    environment: Mapping[str, str]
    run: Path
    process: subprocess.Popen = field(init=False)
    restarts: list[float] = field(default_factory=list)

    def __post_init__(self) -> None:
        self.start()

    @property
    def name(self) -> str:
        return f"sampler engine {self.index}"

    def start(self) -> None:
        environment = {REPLICA: str(self.index)} | dict(self.environment)
        self.process = start(self.command, environment=environment)

    def start_again(self, code: int) -> None:
        """Raises CrashLoop after too many times. What it said in FAILED.md moves to logs/: the run goes on."""
        now = time.monotonic()
        self.restarts = [then for then in self.restarts if now - then < WINDOW_S] + [now]
        end(self.process, 0.0)  # nothing of the old one may be left beside the new one
        put_aside(self.run, self.name)
        if len(self.restarts) > MAX_RESTARTS:
            minutes = WINDOW_S / 60
            what = f"{self.name} crashed {len(self.restarts)} times in {minutes:.0f} minutes; logs/failed-*.md say why"
            write_failure(self.run, self.name, CrashLoop.exit_code, what)
            raise CrashLoop(what)
        log.warning("%s %s and is started again (%d); the others go on", self.name, died(code), len(self.restarts))
        self.start()


def watch(command: Sequence[str], environments: Sequence[Mapping[str, str]], run: Path) -> int:
    """One process for each environment, until all have ended or one has for good: its exit code. Raises CrashLoop."""
    engines: list[EngineProcess] = []
    stopped: list[bool] = []

    def stop() -> None:
        stopped.append(True)
        for engine in engines:
            if engine.process.poll() is None:
                engine.process.send_signal(signal.SIGTERM)

    on_stop_signal(stop)
    try:
        for index, environment in enumerate(environments):
            engines.append(EngineProcess(index, command, environment, run))
        while (code := look(engines, bool(stopped))) is None:
            time.sleep(0.2)
        return code
    finally:
        for engine in engines:
            end(engine.process, GRACE_S)


def look(engines: Sequence[EngineProcess], stopped: bool) -> int | None:
    """None while there is something to wait for, else the exit code. One stopped while it still loads ends well, too.

    An engine alone is not started again here: its end is the sampler's, and whoever started that one decides.
    """
    codes = [engine.process.poll() for engine in engines]
    for engine, code in zip(engines, codes, strict=True):
        if not code or (stopped and code < 0):
            continue
        if code < 0:  # it could not say so itself
            write_failure(engine.run, engine.name, 128 - code, died(code))
        if stopped or code in FINAL or len(engines) == 1:
            return code if code > 0 else 128 - code
        engine.start_again(code)
        return None
    return None if None in codes else 0


def begin_alone(recipe: Recipe) -> int:
    """This command again, as the engine itself."""
    environment = {ALONE: "1"} | environments(recipe, 1)[0]
    return follow(start([sys.executable, "-m", "sampler", *sys.argv[1:]], environment=environment))


def follow(child: subprocess.Popen) -> int:
    """Until the child has ended, or was stopped; nothing that it started stays."""
    stopped: list[bool] = []

    def stop() -> None:
        stopped.append(True)
        child.send_signal(signal.SIGTERM)

    on_stop_signal(stop)
    try:
        while (code := child.poll()) is None:
            time.sleep(0.2)
    finally:
        end(child, GRACE_S)
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
    """Threads of each process of one engine; two that spin on one core stop each other.

    Left to itself vLLM binds the workers of every engine to the same cores, all but the last one, whatever number of
    threads it is told, and refuses tensor parallelism on a machine with fewer NUMA nodes than workers.
    """
    threads = recipe.sampler.threads or max(1, (os.cpu_count() or 1) // engines)
    own = max(1, threads // recipe.sampler.tensor_parallel)
    return {
        "OMP_NUM_THREADS": str(own),
        "OMP_WAIT_POLICY": "PASSIVE",
        "VLLM_CPU_OMP_THREADS_BIND": os.environ.get("VLLM_CPU_OMP_THREADS_BIND", "nobind"),
        "CUDA_VISIBLE_DEVICES": "",
    }
