"""The sampler's command line.

    python -m sampler --gpus 2 --run runs/demo

Starts `gpus / tensor_parallel` engines, each a process of its own that joins the run by itself; without a GPU the
number counts engine processes. This parent watches (`supervisor.py`): an engine that dies beside others is started
again while they go on.

    python -m sampler --eval best --run runs/demo

evaluates one model on the held-out prompts, without a trainer.

    python -m sampler --probe 120 --recipe recipes/demo.toml --out probe.json

samples training prompts for so many seconds, without a trainer; `python -m launch probe` says what it shows.
"""

import argparse
import os
import sys
from pathlib import Path

from protocol.cli import exit_with, log_to_console, parser
from protocol.errors import UserError
from protocol.evaluation import compare, read
from protocol.failure import explained, put_aside
from protocol.process import die_with_parent
from protocol.recipe import Recipe
from protocol.resolve import load
from protocol.rundir import RunDir, resolve_recipe
from sampler.candidate import find
from sampler.scores import table, versus
from sampler.supervisor import ALONE, REPLICA, begin_alone, engine_name, environments, watch


def main() -> int:
    flags = parser("sampler", "Samples and rewards groups of completions with vLLM for the trainer of the same run.")
    flags.add_argument("--gpus", type=int, help="GPUs; without a GPU, engine processes (default: sampler.gpus)")
    flags.add_argument("--tensor-parallel", type=int, help="GPUs per engine (default: sampler.tensor_parallel)")
    add_evaluation(flags)
    options = flags.parse_args()
    asked = {"gpus": options.gpus, "tensor_parallel": options.tensor_parallel}
    overrides = options.overrides + [f"sampler.{key}={value}" for key, value in asked.items() if value is not None]
    if options.eval:
        return evaluate(options, overrides)
    if options.probe is not None:
        return probe(options, overrides)
    if unused := [name for name in ("data", "limit", "out", "against") if getattr(options, name) is not None]:
        raise UserError(f"--{unused[0]} belongs to --eval MODEL; settings of a run are changed with --set")
    rundir, recipe = resolve_recipe(options.run, options.recipe, overrides, keep=False)
    if REPLICA in os.environ:
        with explained(rundir.path, engine_name(int(os.environ[REPLICA]))):
            from sampler.replica import run  # torch and vllm, only now

            return run(rundir, recipe, int(os.environ[REPLICA]))
    if rundir.is_complete(recipe.trainer.steps):
        print(f"sampler: {rundir.path} is complete, nothing to sample", flush=True)
        return 0
    return supervise(rundir, recipe)


def supervise(rundir: RunDir, recipe: Recipe) -> int:
    """Runs one process for each engine until all have ended. -> exit code."""
    own = environments(recipe, recipe.sampler.gpus // recipe.sampler.tensor_parallel)
    for index in range(len(own)):
        put_aside(rundir.path, engine_name(index))
    gpus = ",".join(filter(None, (one["CUDA_VISIBLE_DEVICES"] for one in own)))
    print(f"sampler: {len(own)} engines ({'GPUs ' + gpus if gpus else 'CPU processes'})", flush=True)
    log_to_console("sampler")
    return watch([sys.executable, "-m", "sampler", "--run", str(rundir.path), *sys.argv[1:]], own, rundir.path)


def add_evaluation(flags: argparse.ArgumentParser) -> None:
    group = flags.add_argument_group("evaluation and probe", "of one model, without a trainer")
    group.add_argument(
        "--eval", metavar="MODEL", help="model directory, hub id or snapshot; with --run also best, latest or a name"
    )
    group.add_argument("--data", metavar="SOURCE", help="held-out rows (default: data.eval)")
    group.add_argument("--limit", type=int, metavar="N", help="the first N rows only (default: data.eval_limit)")
    group.add_argument("--out", type=Path, metavar="FILE.json", help="keep the result, and FILE.jsonl every completion")
    group.add_argument("--against", type=Path, metavar="FILE.json", help="compare with an earlier result")
    group.add_argument("--probe", type=float, metavar="SECONDS", help="sample training prompts instead; needs --out")


def evaluate(options: argparse.Namespace, overrides: list[str]) -> int:
    """What can be refused is refused here, at once; the engine runs in a child, as those of a run do."""
    if options.tensor_parallel:
        overrides = [*overrides, f"sampler.gpus={options.tensor_parallel}"]
    candidate = find(options.eval, options.run, options.recipe, overrides)
    against = read(options.against) if options.against else None
    if options.limit is not None and options.limit < 0:
        raise UserError(f"--limit {options.limit}: expected a number of rows, or 0 for all")
    refuse_out(options.out)
    if ALONE not in os.environ:
        return begin_alone(candidate.recipe)
    log_to_console("eval")
    die_with_parent()
    from sampler.evaluate import run  # torch and vllm, only now

    data = candidate.recipe.data
    limit = data.eval_limit if options.limit is None else options.limit
    result = run(candidate, options.data or data.eval, limit, options.out, against)
    if result is None:
        return 130
    evaluation, progress = result
    if options.out:
        evaluation.write(options.out)
    print(table(evaluation, progress.seconds, progress.tokens, progress.failed), flush=True)
    if against:
        print(versus(against, compare(against, evaluation)), flush=True)
    return 0


def probe(options: argparse.Namespace, overrides: list[str]) -> int:
    """The measurement alone: completions and figures go into files, for `python -m launch probe`."""
    if unused := [name for name in ("run", "data", "limit", "against") if getattr(options, name) is not None]:
        raise UserError(f"--{unused[0]} has no use with --probe: it samples data.train with the recipe's model")
    recipe = load(options.recipe, overrides)
    candidate = find(recipe.model.path, None, options.recipe, overrides)
    if not options.out or not options.probe > 0:
        raise UserError("--probe expects seconds above 0, and --out FILE.json to write to")
    if recipe.objective.name == "sft":
        raise UserError("objective.name = 'sft' learns from demonstrations and samples nothing: nothing to probe")
    refuse_out(options.out)
    if ALONE not in os.environ:
        return begin_alone(candidate.recipe)
    log_to_console("probe")
    die_with_parent()
    from sampler.probe import run  # torch and vllm, only now

    run(candidate, options.probe, options.out).write(options.out)
    return 0


def refuse_out(out: Path | None) -> None:
    if out and (out.suffix != ".json" or not out.parent.is_dir()):
        raise UserError(f"--out {out}: expected FILE.json in a directory that is there")


if __name__ == "__main__":
    exit_with(main)
