"""Renders a run's sbatch files, which anybody can read, and submits them to Slurm.

node    one node: trainer and sampler side by side
nodes   one job: the trainer on the first node or nodes, a sampler on each of the others
array   a job for the trainer, and an array of samplers that may start late, be preempted, and leave
"""

import argparse
import os
import sys
from pathlib import Path
from typing import Any

from launch.plan.command import Plan as Checks
from launch.plan.command import look_at_data
from launch.plan.machine import described as machine
from launch.plan.surroundings import filesystem, unwritable
from launch.slurm.plan import FILES, Plan
from launch.slurm.queue import refuse_if_queued, refuse_without_slurm, submit
from protocol.disk import write_atomic
from protocol.errors import UserError
from protocol.process import visible_gpus
from protocol.recipe import Recipe
from protocol.resolve import load
from protocol.rundir import RunDir, resolve_recipe


def main(arguments: list[str]) -> int:
    options = parser().parse_args(arguments)
    overrides = [*options.overrides, *of_node(options)]
    gpus = options.gpus_per_node > 0  # of the jobs; this machine's processors say nothing about those
    recipe = load(options.file, overrides, "bfloat16" if gpus else None)
    overrides += [f"model.dtype={recipe.model.dtype}"] * gpus
    run = (options.run or Path("runs") / recipe.name).absolute()
    plan = planned(options, recipe, run)
    if not options.dry_run:
        refuse_without_slurm()
        refuse_if_queued([plan.job(name) for name in FILES[plan.shape]])
    check(recipe, run, plan, options.out)
    rundir, _ = resolve_recipe(run, options.file, overrides)
    rundir.make()
    files = plan.render((options.out or run).absolute())
    for path, text in files.items():
        write_atomic(path, text.encode(), mode=0o755)
        print(f"file     {path}", flush=True)
    if options.dry_run:
        print("".join(f"submit   sbatch {path}\n" for path in files), end="", flush=True)
        return 0
    numbers = []
    for path in files:
        numbers.append(submit(path))
        log = f"slurm-{numbers[-1]}{'_N' if path.stem == 'samplers' else ''}.out"
        print(f"job      {numbers[-1]} ({plan.job(path.stem)}), log {rundir.logs / log}", flush=True)
    print(f"watch    {sys.executable} -m launch watch {run}\ncancel   scancel {' '.join(numbers)}", flush=True)
    return 0


def parser() -> argparse.ArgumentParser:
    flags = argparse.ArgumentParser(
        "launch slurm", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    flags.add_argument("file", type=Path, metavar="RECIPE")
    flags.add_argument("--run", type=Path, help="run directory, which all nodes see (default: runs/NAME)")
    flags.add_argument("--set", dest="overrides", action="append", default=[], metavar="TABLE.KEY=VALUE")
    flags.add_argument("--shape", choices=FILES, default="node", help="see above (default: node)")
    flags.add_argument("--trainer-nodes", type=int, default=1, metavar="N", help="nodes, array (default: 1)")
    flags.add_argument("--sampler-nodes", type=int, default=1, metavar="N", help="nodes (default: 1)")
    flags.add_argument("--samplers", type=int, default=2, metavar="N", help="array: jobs in it (default: 2)")
    flags.add_argument("--gpus-per-node", type=int, default=0, metavar="N", help="default: 0, no GPU is asked for")
    flags.add_argument(
        "--cpus-per-node", type=int, default=0, metavar="N",
        help="default: whole nodes, --exclusive; array: a sampler of fewer GPUs than a node has gets its part",
    )  # fmt: skip
    flags.add_argument("--time", default="", help="limit of a job, as in 24:00:00 (default: the partition's)")
    flags.add_argument("--partition", default="", help="of Slurm (default: the cluster's)")
    flags.add_argument("--sampler-partition", default="", metavar="NAME", help="array: of samplers (default: the same)")
    flags.add_argument("--account", default="")
    flags.add_argument(
        "--warning", type=int, default=300, metavar="SECONDS",
        help="before the time limit: save and start again (default: 300)",
    )  # fmt: skip
    flags.add_argument("--restarts", type=int, default=20, metavar="N", help="of a job, at most (default: 20)")
    flags.add_argument("--python", type=Path, default=Path(sys.executable), help="on the nodes (default: this one)")
    flags.add_argument(
        "--setup", action="append", default=[], metavar="LINE", help="shell, before all: module load ..."
    )
    flags.add_argument(
        "--sbatch", action="append", default=[], metavar="OPTION", help="more, as in --sbatch=--qos=high"
    )
    flags.add_argument("--out", type=Path, metavar="DIR", help="for the sbatch files (default: the run directory)")
    flags.add_argument("--dry-run", action="store_true", help="write the files, submit nothing")
    return flags


def of_node(options: argparse.Namespace) -> list[str]:
    """Settings that follow from the shape: a worker that has nodes for itself takes all their GPUs."""
    if not options.gpus_per_node or options.shape == "node":
        return []
    workers = ("trainer", "sampler") if options.shape == "nodes" else ("trainer",)
    return [f"{worker}.gpus={options.gpus_per_node}" for worker in workers]


def planned(options: argparse.Namespace, recipe: Recipe, run: Path) -> Plan:
    """Raises UserError for flags that cannot be."""
    asked: dict[str, Any] = {
        name: getattr(options, name) for name in Plan.__dataclass_fields__ if hasattr(options, name)
    }
    asked["setup"], asked["sbatch"] = tuple(options.setup), tuple(options.sbatch)
    wanted, there = recipe.trainer.gpus + recipe.sampler.gpus, options.gpus_per_node
    if options.shape == "node" and 0 < there < wanted:
        raise UserError(
            f"--gpus-per-node {there}: trainer.gpus + sampler.gpus are {wanted}; ask for {wanted}, or --set them lower"
        )
    if options.shape == "array" and 0 < there < recipe.sampler.gpus:
        raise UserError(f"--gpus-per-node {there}: sampler.gpus = {recipe.sampler.gpus} is more; --set it lower")
    own = [one.partition("=")[2].strip("\"' ") for one in options.overrides if one.startswith("network.bind=")]
    asked |= {"run": run, "directory": Path.cwd(), "python": Path(os.path.abspath(options.python))}
    asked |= {"ranks": recipe.trainer.gpus, "engine_gpus": recipe.sampler.gpus, "warning_s": options.warning}
    return Plan(**asked, bind=own[-1] if own else "")


def check(recipe: Recipe, run: Path, plan: Plan, out: Path | None) -> None:
    """What can be known before a job waits in a queue. Raises UserError; prints doubts."""
    if run.is_dir() and RunDir(run).is_complete(recipe.trainer.steps):
        raise UserError(f"{run} is complete; ask for more with --set trainer.steps=N, or name another --run")
    if problem := unwritable(run):
        raise UserError(problem)
    if out and not out.is_dir():
        raise UserError(f"--out {out}: expected a directory that is there")
    checks = Checks(recipe=recipe, machine=machine(max(1, plan.gpus_per_node), 1.0))
    from launch.plan.shape import described, shape_of

    directory, _ = described(recipe.model)
    look_at_data(checks, directory, shape_of(directory).context)
    if checks.refused:
        raise UserError(checks.refused[0])
    kind, shared = filesystem(run)
    if not shared:
        checks.doubtful.append(f"{run} is on {kind}; every node of the job must see the same directory there")
    if visible_gpus() and not plan.gpus_per_node:
        checks.doubtful.append("no GPU is asked for; --gpus-per-node N does")
    for line in checks.doubtful:
        checks.say("warning", line)
