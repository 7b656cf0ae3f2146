"""The systems that `benchmarks.end_to_end` compares: how each is started, watched and ended."""

import shutil
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path

from benchmarks.processes import free_port, kill, processor_s
from benchmarks.window import Window, window
from launch.local import last_words
from protocol.errors import RunError, UserError
from protocol.memory import tree_gb
from protocol.metrics import read_metrics
from protocol.process import start
from protocol.recipe import Recipe
from protocol.resolve import dump, load
from protocol.rundir import RunDir
from sampler.supervisor import REPLICA, environments

PATIENCE_S = 1800.0
"""For a whole run: on a busy machine TRL's start alone may take minutes."""
CORES = 2
"""That all processes of a system share: the demo's two ranks and its sampler are laid out for so many."""
POLL_S = 0.5
MEMORY_S = 15.0
"""Between two looks at all processes' memory, which cost the kernel a walk over their pages."""
SETTINGS = [
    "data.eval=", "eval.before=false", "eval.after=false", "trainer.checkpoint_every=1000000", "network.lease_s=3600",
    f'reward=[{{function="{Path(__file__).with_name("vowels.py")}:vowels"}}]',
]  # fmt: skip


@dataclass(frozen=True, slots=True, kw_only=True)
class Workload:
    """What all systems are given. fixed: every completion has `tokens` tokens, else at most."""

    name: str
    tokens: int
    fixed: bool
    warm: int
    steps: int
    dtype: str

    def settings(self) -> list[str]:
        return [*SETTINGS, f"sampling.max_tokens={self.tokens}", f"model.dtype={self.dtype}"]


Processes = dict[str, subprocess.Popen]
"""By name; logs/NAME.log holds what each says."""
Started = Iterator[tuple[str, subprocess.Popen]]
Begin = Callable[["Peer", Workload, RunDir], Started]


@dataclass(frozen=True, slots=True, kw_only=True)
class Peer:
    """begin: starts its processes one by one, which leave records. settings: of the recipe, on top of the workload's.
    behind: steps that it goes on after the window."""

    begin: Begin
    settings: list[str] = field(default_factory=list)
    flags: list[str] = field(default_factory=list)
    behind: int = 4

    def with_settings(self, settings: Sequence[str]) -> "Peer":
        """Of the thread layout, for example. TRL takes what it has a word for."""
        return replace(self, settings=[*settings, *self.settings])

    def recipe(self, workload: Workload) -> Recipe:
        steps = workload.warm + workload.steps + self.behind
        return load(Path("recipes/demo.toml"), [*workload.settings(), f"trainer.steps={steps}", *self.settings])

    def measure(self, workload: Workload, directory: Path) -> Window:
        """One whole life. Raises RunError where a process ends too early, UserError where a run has been before."""
        recipe, rundir = self.recipe(workload), RunDir(directory)
        if (rundir.metrics / "trainer.jsonl").exists():
            raise UserError(f"{directory} holds an earlier run, whose records would be read; use another --keep")
        rundir.make()
        rundir.recipe.write_text(dump(recipe))
        children: Processes = {}
        try:
            children.update(self.begin(self, workload, rundir))
            peak, cpu = watched(children, rundir, workload.warm, workload.steps)
        finally:
            for child in children.values():
                kill(child)
        records = read_metrics(rundir.metrics / "trainer.jsonl")
        engine = [record for file in rundir.metrics.glob("sampler-*.jsonl") for record in read_metrics(file)]
        rollouts = recipe.trainer.prompts_per_step * recipe.sampling.group_size
        measured = window(records, workload.warm, workload.steps, rollouts, engine)
        return replace(measured, peak_gb=peak, cpu_s=cpu)


def watched(children: Processes, rundir: RunDir, warm: int, steps: int) -> tuple[float, dict[str, float]]:
    """Waits for the end of the window.

    -> the most that all processes together had in memory, in GiB; the processor seconds of a step, of each child.
    """
    peak, began = 0.0, {}
    look, deadline = time.monotonic(), time.monotonic() + PATIENCE_S
    while True:
        ended = [name for name, child in children.items() if child.poll() is not None]
        done = len([one for one in read_metrics(rundir.metrics / "trainer.jsonl") if one["kind"] == "step"])
        if time.monotonic() >= look:
            used = sum(tree_gb(child.pid) for child in children.values())
            peak, look = max(peak, used), time.monotonic() + MEMORY_S
        if done >= warm and not began:
            began = {name: processor_s(child.pid) for name, child in children.items()}
        if done >= warm + steps:
            return peak, {name: (processor_s(children[name].pid) - before) / steps for name, before in began.items()}
        if ended:
            last = last_words(rundir.logs / f"{ended[0]}.log", 0)
            raise RunError(f"its {ended[0]} ended after {done} of {warm + steps} steps: {last}")
        if time.monotonic() > deadline:
            raise RunError(f"{done} of {warm + steps} steps after {PATIENCE_S:.0f} s; --keep DIR keeps what was said")
        time.sleep(POLL_S)


def launch(rundir: RunDir, name: str, module: str, *flags: object, **environment: str) -> subprocess.Popen:
    command = [sys.executable, "-m", module, *map(str, flags)]
    with (rundir.logs / f"{name}.log").open("wb") as log:
        return start(command, log=log, environment=environment)


def begin_sampler(recipe: Recipe, workload: Workload, rundir: RunDir) -> subprocess.Popen:
    run = ("--run", rundir.path)
    if not workload.fixed:
        return launch(rundir, "sampler", "sampler", *run)
    own = environments(recipe, 1)[0] | {REPLICA: "0"}
    return launch(rundir, "sampler", "benchmarks.fixed_sampler", *run, **own)


def begin_ours(peer: Peer, workload: Workload, rundir: RunDir) -> Started:
    yield "trainer", launch(rundir, "trainer", "trainer", "--run", rundir.path)
    yield "sampler", begin_sampler(peer.recipe(workload), workload, rundir)


def begin_unskipped(peer: Peer, workload: Workload, rundir: RunDir) -> Started:
    yield from begin_ranks(peer.recipe(workload), rundir, "benchmarks.unskipped", "--run", rundir.path)
    yield "sampler", begin_sampler(peer.recipe(workload), workload, rundir)


def begin_trl(peer: Peer, workload: Workload, rundir: RunDir) -> Started:
    flags = [rundir.recipe, rundir.metrics / "trainer.jsonl", *peer.flags, *["--fixed"] * workload.fixed]
    yield "trl", launch(rundir, "trl", "benchmarks.trl_step", *flags, OMP_NUM_THREADS=str(CORES))


def begin_sampler_alone(peer: Peer, workload: Workload, rundir: RunDir) -> Started:
    yield "hub", launch(rundir, "hub", "benchmarks.sampler_alone", "--run", rundir.path)
    yield "sampler", begin_sampler(peer.recipe(workload), workload, rundir)


def begin_trainer_alone(peer: Peer, workload: Workload, rundir: RunDir) -> Started:
    """On what the run beside this one (`ours`) has recorded."""
    flags = (rundir.path.with_name("ours"), "--run", rundir.path)
    yield from begin_ranks(peer.recipe(workload), rundir, "benchmarks.trainer_alone", *flags)


def begin_ranks(recipe: Recipe, rundir: RunDir, module: str, *flags: object) -> Started:
    """As torchrun would start them."""
    world = str(recipe.trainer.gpus)
    common = {"WORLD_SIZE": world, "LOCAL_WORLD_SIZE": world, "MASTER_ADDR": "127.0.0.1"}
    common |= {"MASTER_PORT": str(free_port())}
    for rank in map(str, range(recipe.trainer.gpus)):
        yield f"rank-{rank}", launch(rundir, f"rank-{rank}", module, *flags, RANK=rank, LOCAL_RANK=rank, **common)


PEERS = {
    "ours": Peer(begin=begin_ours),
    "sampler-alone": Peer(
        begin=begin_sampler_alone, settings=["trainer.max_staleness=1000000", f"sampler.threads={CORES}"]
    ),
    "trainer-alone": Peer(begin=begin_trainer_alone),
    "trl-colocate": Peer(begin=begin_trl, flags=["--vllm"], behind=0),
    "trl-colocate-patched": Peer(begin=begin_trl, flags=["--vllm", "--patched"], behind=0),
    "trl-colocate-patched-uncorrected": Peer(begin=begin_trl, flags=["--vllm", "--patched", "--uncorrected"], behind=0),
    "trl-generate": Peer(begin=begin_trl, behind=0),
    "ours-staleness-0": Peer(begin=begin_ours, settings=["trainer.max_staleness=0"]),
    "ours-float32": Peer(begin=begin_ours, settings=["model.dtype=float32"]),
    "ours-gsm8k": Peer(begin=begin_ours, settings=['reward=[{function="gsm8k"}]']),
    "ours-gsm8k-unskipped": Peer(begin=begin_unskipped, settings=['reward=[{function="gsm8k"}]']),
    "ours-gsm8k-refill": Peer(begin=begin_ours, settings=['reward=[{function="gsm8k"}]', "trainer.refill=1.0"]),
}


def forget(directory: Path) -> None:
    """What a run leaves is some gigabytes."""
    shutil.rmtree(directory, ignore_errors=True)


if __name__ == "__main__":
    raise SystemExit("a part of another benchmark: python -m benchmarks.end_to_end")
