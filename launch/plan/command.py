"""`python -m launch plan RECIPE`: what a run needs and whether it can work, before any weight is loaded."""

import argparse
from dataclasses import dataclass, field
from pathlib import Path

from msgspec.structs import replace

from doctor.learning_rate import learning_rate_advice
from launch.plan import machine as machines
from launch.plan.lengths import Lengths, all_prompts, doubts, lengths, refusals
from launch.plan.machine import Machine
from launch.plan.need import of_rank, trained
from launch.plan.placement import Placement, place
from launch.plan.proposal import nearest
from launch.plan.shape import Shape, described, shape_of
from launch.plan.storage import StorageNeed, gib, storage_need
from launch.plan.surroundings import filesystem, free_bytes, unbindable, unwritable, versions
from launch.plan.verdict import Verdict
from protocol.dtypes import dtype_advice
from protocol.errors import UserError
from protocol.memory import GIB
from protocol.recipe import Recipe
from protocol.resolve import load
from trainer.arithmetic import arithmetic, consequences, micro_batches
from trainer.zero import exchanged

SLOW_GB = 5.0
"""Gloo moves about one GB a second within a machine (benchmarks/gloo.py)."""


@dataclass(slots=True)
class Plan(Verdict):
    """Of one recipe on one machine."""

    recipe: Recipe = field(kw_only=True)
    machine: Machine = field(kw_only=True)


def main(arguments: list[str]) -> int:
    options = parser().parse_args(arguments)
    if (options.gpu_gb is None) != (options.gpus is None):
        raise UserError("--gpu-gb and --gpus describe a machine together: --gpus 3 --gpu-gb 24")
    recipe = load(options.file, options.overrides, "bfloat16" if options.gpus else None)
    here = machines.here() if options.gpus is None else machines.described(options.gpus, options.gpu_gb)
    plan = Plan(recipe=recipe, machine=here)
    directory, where = described(recipe.model)
    shape = shape_of(directory)
    size = f"{shape.parameters / 1e6:.1f} M parameters, {recipe.model.dtype}, {shape.context} positions"
    plan.say("model", f"{recipe.model.path}, {size}; {where}")
    rows, longest = look_at_data(plan, directory, shape.context)
    settled = [*options.overrides, f"model.dtype={recipe.model.dtype}"]  # `auto` is another on another machine
    look_at_memory(plan, options.file, settled, shape, longest)
    plan.say("batch", arithmetic(recipe))
    if rows:
        plan.say("", consequences(recipe, longest, rows))
    look_at_exchange(plan, shape, longest)
    plan.doubtful += filter(None, (learning_rate_advice(recipe), dtype_advice(recipe) if here.kind == "cpu" else None))
    need = storage_need(shape, recipe)
    plan.say("disk", need.words())
    if not here.elsewhere:
        look_around(plan, options.run or Path("runs") / recipe.name, need)
    return plan.end("this can run")


def parser() -> argparse.ArgumentParser:
    flags = argparse.ArgumentParser("launch plan", description=__doc__, epilog="Exit code: 0 it can run, 2 it cannot.")
    flags.add_argument("file", type=Path, metavar="RECIPE")
    flags.add_argument("--run", type=Path, help="run directory (default: runs/NAME, NAME from the recipe)")
    flags.add_argument("--set", dest="overrides", action="append", default=[], metavar="TABLE.KEY=VALUE")
    flags.add_argument("--gpus", type=int, metavar="N", help="plan for a machine elsewhere: its GPUs")
    flags.add_argument("--gpu-gb", type=float, metavar="GIB", help="and the memory of each")
    return flags


def look_at_data(plan: Plan, directory: Path, context: int) -> tuple[int, int]:
    """Training prompts (0 where they cannot be read), and the tokens of the longest prompt that there can be."""
    from policy.model import load_tokenizer

    data, tokenizer = plan.recipe.data, load_tokenizer(directory)
    found: list[tuple[str, Lengths]] = []
    for source, limit in ((data.train, data.limit), (data.eval, data.eval_limit)):
        try:
            prompts = all_prompts(source, limit, data, tokenizer) if source else []
        except UserError as error:
            plan.refused.append(str(error))
            continue
        if prompts:
            found.append((source, lengths([len(prompt.ids) for prompt in prompts], data.max_prompt_tokens)))
            plan.say("data", f"{source}: {found[-1][1].words()}")
    if not found or found[0][0] != data.train:
        return 0, data.max_prompt_tokens
    plan.refused += refusals(found, plan.recipe, context)
    plan.doubtful += doubts(found, plan.recipe)
    longest = max(one.longest for _, one in found)
    return found[0][1].rows, min(data.max_prompt_tokens, longest)


def look_at_memory(plan: Plan, file: Path, overrides: list[str], shape: Shape, longest: int) -> None:
    placed = place(shape, plan.recipe, plan.machine, longest)
    plan.say("memory", plan.machine.words())
    show_memory(placed, plan)
    plan.say("", activation_words(shape, plan.recipe, longest, plan.machine.kind))
    most = plan.recipe.sampler.max_running
    full = longest + plan.recipe.sampling.max_tokens
    plan.say("", f"KV cache: {placed.completions} completions of {full} tokens at a time in an engine, of {most} asked")
    if placed.problem:
        found = nearest(file, overrides, shape, plan.machine, longest)
        way = "fits with " + " ".join(f"--set {change}" for change in found[0]) if found else "no setting here helps"
        plan.refused.append(f"{placed.problem}; {way}")
        return
    if placed.completions < min(most, plan.recipe.sampling.group_size):
        plan.doubtful.append("not one group fits into the KV cache at full length: vLLM will stop and redo completions")
    for device in placed.devices:
        if device.tight:
            plan.doubtful.append(
                f"{device.name}: {device.needed / GIB:.1f} GiB needed of {device.size / GIB:.1f}, of which "
                f"{device.free / GIB:.1f} are free now: it may not fit"
            )


def show_memory(placed: Placement, plan: Plan) -> None:
    """GiB by part and role."""
    recipe = plan.recipe
    roles = {f"sampler x{placed.engines}": placed.engine, f"rank x{recipe.trainer.gpus}": placed.rank}
    plan.say("", f"{'GiB':26}" + "".join(f"{role:>12}" for role in roles))
    for part in dict.fromkeys([*placed.rank, *placed.engine]):
        sizes = [need.get(part, 0) for need in roles.values()]
        if any(sizes):
            plan.say("", f"{part:26}" + "".join(f"{size / GIB:12.2f}" if size else f"{'-':>12}" for size in sizes))
    plan.say("", f"{'at most':26}" + "".join(f"{sum(need.values()) / GIB:12.2f}" for need in roles.values()))
    for device in placed.devices:
        of = f"of {device.size / GIB:.1f}" if device.size < float("inf") else "(its size is not known)"
        plan.say("", f"{device.name}: {device.needed / GIB:.1f} GiB {of}")


def activation_words(shape: Shape, recipe: Recipe, prompt: int, kind: str) -> str:
    """Of a rank, with gradient checkpointing and without."""

    def size(on: bool) -> float:
        changed = replace(recipe, trainer=replace(recipe.trainer, gradient_checkpointing=on))
        return of_rank(shape, changed, prompt, kind)["activations"] / GIB

    now = "with" if recipe.trainer.gradient_checkpointing else "without"
    return f"activations: {size(True):.2f} GiB with gradient checkpointing, {size(False):.2f} without; now {now}"


def look_at_exchange(plan: Plan, shape: Shape, longest: int) -> None:
    """What the ranks send each other, which counts where it goes over gloo (docs/vgpu.md)."""
    recipe, stage = plan.recipe, plan.recipe.trainer.zero_stage
    if recipe.trainer.gpus == 1:
        return

    def sent(stage: int) -> float:
        changed = replace(recipe, trainer=replace(recipe.trainer, zero_stage=stage))
        counts = trained(shape, recipe), shape.parameters, micro_batches(recipe, longest)
        return exchanged(changed, *counts) / 1e9

    plan.say("exchange", f"each rank sends and receives at most {sent(stage):.3g} GB in a step, with ZeRO {stage}")
    if recipe.trainer.backend == "gloo" and stage >= 2 and sent(stage) > SLOW_GB:
        adapters = "" if recipe.lora.rank else ", adapters (lora.rank) far less"
        plan.doubtful.append(
            f"over gloo {sent(stage):.3g} GB a step may take longer than training; trainer.zero_stage = 1 sends "
            f"{sent(1):.3g}{adapters}"
        )


def look_around(plan: Plan, run: Path, need: StorageNeed) -> None:
    """Disk, directory, address and versions of this machine."""
    free, (kind, shared) = free_bytes(run), filesystem(run)
    whose = "which other machines can see" if shared else "for this machine alone"
    plan.say("run", f"{run}, {gib(free)} free on {kind}, {whose}")
    plan.say("network", f"the trainer listens on {plan.recipe.network.bind}")
    installed, doubtful = versions(plan.recipe)
    plan.say("versions", ", ".join(f"{name} {version}" for name, version in installed.items()))
    plan.doubtful += doubtful
    plan.refused += filter(None, [unwritable(run), unbindable(plan.recipe.network.bind, plan.recipe.network.port)])
    if need.whole > free:
        plan.refused.append(
            f"disk of {run}: {gib(need.whole)} needed, {gib(free)} free; free space, name another --run, or set "
            "trainer.keep_checkpoints = 1"
        )
    local = plan.recipe.network.bind in ("127.0.0.1", "::1", "localhost")
    if shared and local:
        plan.doubtful.append("network.bind is an address that only samplers on this machine reach")
