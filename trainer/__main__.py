"""The trainer's command line.

deepspeed --num_gpus=2 --module trainer --run runs/demo
python -m trainer --gpus 2 --run runs/demo        the same, through DeepSpeed's launcher
"""

import contextlib
import os
import signal
import socket
import sys
import time
from pathlib import Path

from protocol.cli import exit_with, parser
from protocol.errors import UserError
from protocol.failure import died, explained, failure, put_aside, write_failure
from protocol.process import group_alive, members, on_stop_signal, start
from protocol.rundir import RunDir, resolve_recipe


def main() -> int:
    flags = parser("trainer", "Learns from the groups that samplers send and publishes weights back to them.")
    flags.add_argument("--gpus", type=int, help="ranks to start; without a GPU, processes (default: trainer.gpus)")
    flags.add_argument("--local_rank", type=int, help="set by DeepSpeed's launcher; not for you")
    options = flags.parse_args()
    rundir, recipe = resolve_recipe(options.run, options.recipe, options.overrides)
    if rundir.is_complete(recipe.trainer.steps):
        print(f"trainer: {rundir.path} is complete; ask for more with --set trainer.steps=N", flush=True)
        return 0
    if "RANK" not in os.environ:
        return launch(options.gpus or recipe.trainer.gpus, rundir)
    with explained(rundir.path, f"trainer rank {os.environ['RANK']}"):
        from trainer.rank import run  # torch and deepspeed, only now

        return run(rundir, recipe)


def launch(gpus: int, rundir: RunDir) -> int:
    """Has DeepSpeed's launcher start this module once for each rank, and stays to end them well.

    The launcher dies at the first signal, and kills its ranks after 30 s each: a stop goes to the ranks alone.
    """
    print(f"trainer: {gpus} ranks (GPUs; on a machine without any: processes)", flush=True)
    put_aside(rundir.path, "trainer")
    visible = os.environ.get("CUDA_VISIBLE_DEVICES", "")
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    command = [sys.executable, "-m", "deepspeed.launcher.runner", *placement(gpus, visible), "--master_port", str(port)]
    launcher = start([*command, "--module", "trainer", "--run", str(rundir.path)])
    stopped: list[bool] = []
    on_stop_signal(lambda: (stopped.append(True), stop_ranks(launcher.pid)))
    while group_alive(launcher):
        time.sleep(0.2)
    code = launcher.wait()
    if code and not stopped and not failure(rundir.path, "trainer"):  # killed ranks say nothing themselves
        write_failure(rundir.path, "trainer", abs(code), f"DeepSpeed's launcher {died(code)}, its output says more")
    return code if code >= 0 else 128 - code


def stop_ranks(group: int) -> None:
    for pid in members(group):
        with contextlib.suppress(OSError):  # one that just ended
            if b"--local_rank=" in Path(f"/proc/{pid}/cmdline").read_bytes():
                os.kill(pid, signal.SIGTERM)


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
