"""The sampler's command line.

    python -m sampler --gpus 2 --run runs/demo

Starts `gpus / tensor_parallel` engines, each a process of its own that joins the run by itself; without a GPU the
number counts engine processes. This parent only watches: when one engine ends for good, all end.
"""

import os
import signal
import subprocess
import sys
import time

from protocol.cli import exit_with, parser
from protocol.errors import UserError
from protocol.failure import died, explained, put_aside, write_failure
from protocol.process import end, on_stop_signal, start, visible_gpus
from protocol.recipe import Recipe
from protocol.rundir import RunDir, resolve_recipe

REPLICA = "VESPER_REPLICA"
GRACE_S = 15.0


def main() -> int:
    flags = parser("sampler", "Samples and rewards groups of completions with vLLM for the trainer of the same run.")
    flags.add_argument("--gpus", type=int, help="GPUs; without a GPU, engine processes (default: sampler.gpus)")
    flags.add_argument("--tensor-parallel", type=int, help="GPUs per engine (default: sampler.tensor_parallel)")
    options = flags.parse_args()
    asked = {"gpus": options.gpus, "tensor_parallel": options.tensor_parallel}
    overrides = options.overrides + [f"sampler.{key}={value}" for key, value in asked.items() if value is not None]
    rundir, recipe = resolve_recipe(options.run, options.recipe, overrides, keep=False)
    if REPLICA in os.environ:
        with explained(rundir.path, f"sampler engine {os.environ[REPLICA]}"):
            from sampler.replica import run  # torch and vllm, only now

            return run(rundir, recipe, int(os.environ[REPLICA]))
    if rundir.is_complete(recipe.trainer.steps):
        print(f"sampler: {rundir.path} is complete, nothing to sample", flush=True)
        return 0
    put_aside(rundir.path, "sampler")
    return supervise(rundir, recipe)


def supervise(rundir: RunDir, recipe: Recipe) -> int:
    """Runs the engines' processes until all have ended. Returns the first exit code that is not 0."""
    width = recipe.sampler.tensor_parallel
    count = recipe.sampler.gpus // width
    visible = visible_gpus()[: recipe.sampler.gpus]
    if 0 < len(visible) < recipe.sampler.gpus:
        raise UserError(f"{recipe.sampler.gpus} GPUs asked for, {len(visible)} visible; use --gpus {len(visible)}")
    print(f"sampler: {count} engines ({'GPUs ' + ','.join(visible) if visible else 'CPU processes'})", flush=True)
    command = [sys.executable, "-m", "sampler", "--run", str(rundir.path), *sys.argv[1:]]
    children: list[subprocess.Popen] = []
    for index in range(count):
        environment = {REPLICA: str(index)}
        if visible:
            environment["CUDA_VISIBLE_DEVICES"] = ",".join(visible[index * width : (index + 1) * width])
        else:
            environment |= cpu_environment(recipe, count)
        children.append(start(command, environment=environment))
    stopped: list[bool] = []

    def stop() -> None:
        stopped.append(True)
        for child in children:
            if child.poll() is None:
                child.send_signal(signal.SIGTERM)

    on_stop_signal(stop)
    try:
        return wait(children, rundir, stopped)
    finally:
        for child in children:
            end(child, GRACE_S)


def wait(children: list[subprocess.Popen], rundir: RunDir, stopped: list[bool]) -> int:
    """Until all have ended well, or one has not. One that was stopped while it still loads ends well, too."""
    while True:
        codes = [0 if stopped and code and code < 0 else code for code in (child.poll() for child in children)]
        for index, code in enumerate(codes):
            if code and code < 0:  # it could not say so itself
                write_failure(rundir.path, f"sampler engine {index}", 128 - code, died(code))
            if code:
                return code if code > 0 else 128 - code
        if None not in codes:
            return 0
        time.sleep(0.2)


def cpu_environment(recipe: Recipe, engines: int) -> dict[str, str]:
    """Threads of one engine; two that spin on one core stop each other."""
    threads = recipe.sampler.threads or max(1, (os.cpu_count() or 1) // engines)
    return {"OMP_NUM_THREADS": str(threads), "OMP_WAIT_POLICY": "PASSIVE", "CUDA_VISIBLE_DEVICES": ""}


if __name__ == "__main__":
    exit_with(main)
