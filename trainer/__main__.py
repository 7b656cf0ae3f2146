"""The trainer's command line.

deepspeed --num_gpus=2 --module trainer --run runs/demo
python -m trainer --gpus 2 --run runs/demo        the same, through DeepSpeed's launcher
torchrun --nproc-per-node 2 -m -- trainer --run runs/demo    the same with torchrun
srun --ntasks-per-node=2 python -m trainer --run runs/demo   each task is a rank; docs/cluster.md: several nodes
python -m trainer --replay runs/demo --run runs/again   trains from a recorded stream
python -m trainer --run runs/demo --export DIR          writes a snapshot as a model directory
"""

import argparse
import contextlib
import os
import signal
import socket
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

from protocol.cli import exit_with, log_to_console, parser
from protocol.errors import PortBusy, Superseded, UserError
from protocol.failure import died, explained, failure, put_aside, write_failure
from protocol.process import TRAINER_PID, group_alive, members, on_stop_signal, start
from protocol.resolve import load
from protocol.rundir import RunDir, resolve_recipe
from protocol.trackers import refuse_missing
from trainer.place import Place, find
from trainer.stream import replayed, resolve_replay


def main() -> int:
    flags = parser("trainer", "Learns from the groups that samplers send and publishes weights back to them.")
    flags.add_argument("--gpus", type=int, help="ranks to start; without a GPU, processes (default: trainer.gpus)")
    flags.add_argument("--backend", choices=["auto", "nccl", "gloo"], help="same as --set trainer.backend=...")
    flags.add_argument("--replay", type=Path, metavar="DIR", help="train from the stream that this run recorded")
    flags.add_argument("--export", type=Path, metavar="DIR", help="write a snapshot of --run as a model directory")
    flags.add_argument("--snapshot", metavar="NAME", help="of --export: best, latest or an id (default: best, if any)")
    flags.add_argument("--local_rank", type=int, help="set by DeepSpeed's launcher; not for you")
    options = flags.parse_args()
    if options.backend:
        options.overrides.append(f"trainer.backend={options.backend}")
    if options.export or options.snapshot:
        return main_of_export(options)
    if options.replay:
        return main_of_replay(options)
    place = find(os.environ)
    keep = not place or place.rank == 0
    rundir, recipe = resolve_recipe(options.run, options.recipe, options.overrides, keep)
    if rundir.is_complete(recipe.trainer.steps):
        print(f"trainer: {rundir.path} is complete; ask for more with --set trainer.steps=N", flush=True)
        return 0
    refuse_missing(recipe.tracking)
    if place is None:
        gpus, steps = options.gpus or recipe.trainer.gpus, recipe.trainer.steps
        return launch(gpus, rundir, lambda: rundir.is_complete(steps))
    with of_rank(place, rundir):
        from trainer.rank import run  # torch and deepspeed, only now

        return run(rundir, recipe)


@contextlib.contextmanager
def of_rank(place: Place, rundir: RunDir) -> Iterator[None]:
    """What an earlier start said is put aside before anything of this one can fail."""
    os.environ.update(place.variables())
    if place.rank == 0:
        put_aside(rundir.path, "trainer")
    with explained(rundir.path, f"trainer rank {place.rank}"):
        yield


def main_of_export(options: argparse.Namespace) -> int:
    """Only reads the run directory, whose trainer may be at work."""
    if not options.export or not options.run or options.recipe or options.replay:
        raise UserError(
            "an export takes --run RUN --export DIR, perhaps --snapshot and --set, and the run's own recipe"
        )
    rundir = RunDir(options.run)
    if not rundir.recipe.is_file():
        raise UserError(f"{rundir.path} is no run directory: it has no recipe.toml")
    recipe = load(rundir.recipe, options.overrides)
    signal.signal(signal.SIGTERM, signal.default_int_handler)  # else nobody would remove what is half written
    from trainer.export import export  # torch, only now

    log_to_console("export")
    done = export(rundir, recipe, options.export, options.snapshot)
    weights = done.verified
    print(
        f"exported {done.snapshot} (step {done.step}) to {done.path}: {weights.tensors} tensors, "
        f"{weights.size / 1e9:.3g} GB, log-probs within {weights.gap:.4f} nats of the trainer's\n"
        f'use it   model.path = "{done.path}" in a recipe, or: vllm serve {done.path}',
        flush=True,
    )
    return 0


def main_of_replay(options: argparse.Namespace) -> int:
    rundir, recipe = resolve_replay(options.replay, options.run, options.recipe, options.overrides)
    place = find(os.environ)
    if place is None:
        gpus = options.gpus or recipe.trainer.gpus
        return launch(gpus, rundir, lambda: replayed(rundir.path), ["--replay", str(options.replay)])
    with of_rank(place, rundir):
        from trainer.replay import replay

        return replay(rundir, recipe, options.replay)


def launch(gpus: int, rundir: RunDir, complete: Callable[[], bool], flags: Sequence[str] = ()) -> int:
    """Has DeepSpeed's launcher start this module once for each rank, and stays to end them well.

    complete: whether all is done that the ranks were started for. flags: for the ranks, on top of --run.

    The launcher dies at the first signal, and kills its ranks after 30 s each: a stop goes to the ranks alone.
    """
    print(f"trainer: {gpus} rank{'s' * (gpus > 1)} (GPUs; on a machine without any: processes)", flush=True)
    put_aside(rundir.path, "trainer")
    before = rundir.newest_incarnation()
    visible = os.environ.get("CUDA_VISIBLE_DEVICES", "")
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    command = [sys.executable, "-m", "deepspeed.launcher.runner", *placement(gpus, visible), "--master_port", str(port)]
    command += ["--module", "trainer", "--run", str(rundir.path), *flags]
    launcher = start(command, environment={TRAINER_PID: str(os.getpid())})
    stopped: list[bool] = []
    on_stop_signal(lambda: stopped.append(True))
    told: set[int] = set()
    while group_alive(launcher):
        if stopped:  # again and again: some ranks may not have been there yet
            told |= stop_ranks(launcher.pid, told)
        time.sleep(0.2)
    code = launcher.wait()
    if rundir.newest_incarnation() > before + 1:
        return Superseded.exit_code
    return 0 if stopped and code <= 0 else exit_code(code, rundir, complete, stopped=bool(stopped))


def exit_code(code: int, rundir: RunDir, complete: Callable[[], bool], *, stopped: bool) -> int:
    """What the ranks said, where one could; the launcher returns any one's code, and 0 after some deaths."""
    said = failure(rundir.path, "trainer")
    if said:
        return said[0]
    code = code - 256 if code > 192 else code  # it exits with -signal
    if stopped or code == PortBusy.exit_code or (code == 0 and complete()):
        return code if code >= 0 else 128 - code
    final = 128 - code if code < 0 else code or 1
    write_failure(rundir.path, "trainer", final, f"a rank or its launcher {died(code)} without a word; see its output")
    return final


def stop_ranks(group: int, but: set[int]) -> set[int]:
    """Asks the ranks to stop, each once; -> those that were asked."""
    asked = set()
    for pid in set(members(group)) - but:
        with contextlib.suppress(OSError):  # one that just ended
            if b"--local_rank=" in Path(f"/proc/{pid}/cmdline").read_bytes():
                os.kill(pid, signal.SIGTERM)
                asked.add(pid)
    return asked


def placement(gpus: int, visible: str) -> list[str]:
    """The launcher's words for `gpus` ranks. With a number it would forget CUDA_VISIBLE_DEVICES and take the first."""
    if not visible:
        return ["--num_gpus", str(gpus)]
    devices = visible.split(",")
    if len(devices) < gpus or not all(device.isdigit() for device in devices):
        raise UserError(f"CUDA_VISIBLE_DEVICES={visible}: expected {gpus} GPU numbers, for example 0,1")
    return ["--include", f"localhost:{','.join(devices[:gpus])}"]


if __name__ == "__main__":
    exit_with(main)
