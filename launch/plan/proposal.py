"""The nearest settings that fit, where a recipe's own do not."""

import itertools
import math
from pathlib import Path

from launch.plan.machine import Machine
from launch.plan.need import has_reference
from launch.plan.placement import SAFE, Placement, place
from launch.plan.shape import Shape
from protocol.errors import UserError
from protocol.recipe import Recipe
from protocol.resolve import load

Option = tuple[int, list[str]]
"""A price, 0 for no change, and overrides. What changes nothing in the result is cheap; adapters, no reference and
four bits are dear."""
NONE: Option = (0, [])
SHARES = (0.2, 0.3, 0.45, 0.6, 0.75, 0.88)
"""Of a GPU for an engine; the largest is just below `SAFE`."""
WIDTHS = (2, 4, 8)
"""GPUs of an engine."""


def nearest(
    file: Path | None, overrides: list[str], shape: Shape, machine: Machine, prompt: int
) -> tuple[list[str], Placement] | None:
    """The cheapest changes with which all fits, with a reserve; None where none help. prompt: tokens of the longest."""
    recipe = load(file, overrides)
    combinations = itertools.product(*_trainer(recipe, prompt), *_sampler(recipe, machine, shape))
    for options in sorted(combinations, key=lambda options: sum(price for price, _ in options)):
        changes = [change for _, part in options for change in part]
        try:
            changed = load(file, overrides + changes)
        except UserError:  # settings that contradict others of this recipe
            continue
        found = place(shape, changed, machine, prompt)
        roomy = all(device.needed <= SAFE * device.size for device in found.devices)
        if not found.problem and roomy and found.completions >= changed.sampling.group_size:
            return changes, found
    return None


def _trainer(recipe: Recipe, prompt: int) -> list[list[Option]]:
    """A row of fewer tokens, down to one completion; recomputed activations; divided state; adapters."""
    trainer = recipe.trainer
    least, tokens = prompt + recipe.sampling.max_tokens, trainer.tokens_per_micro_batch
    halves = [(power, tokens >> power) for power in range(1, 8) if tokens >> power >= least]
    stages = [stage for stage in (2, 3) if stage > trainer.zero_stage > 0 and trainer.gpus > 1]
    return [
        [NONE, *((power, [f"trainer.tokens_per_micro_batch={half}"]) for power, half in halves)],
        [NONE, *([] if trainer.gradient_checkpointing else [(2, ["trainer.gradient_checkpointing=true"])])],
        [NONE, *((2 * stage - 3, [f"trainer.zero_stage={stage}"]) for stage in stages)],
        [NONE, *([] if recipe.lora.rank else [(20, ["lora.rank=32", "optimizer.learning_rate=1e-4"])])],
        [NONE, *([] if recipe.model.quantize == "nf4" else [(20, ["model.quantize=nf4"])])],
    ]


def _sampler(recipe: Recipe, machine: Machine, shape: Shape) -> list[list[Option]]:
    """Another KV cache; fewer processes where they share what there is, wider engines; no reference."""
    return [
        [NONE, *((price, [change]) for price, change in enumerate(_caches(recipe, machine), 1))],
        [NONE, *_processes(recipe, machine), *_wider(recipe, machine, shape)],
        [NONE, *([(10, ["objective.kl_beta=0.0"])] if has_reference(recipe) else [])],
    ]


def _caches(recipe: Recipe, machine: Machine) -> list[str]:
    """The nearest first. A larger share is for weights that leave no room, on GPUs that no rank shares."""
    sampler = recipe.sampler
    if not machine.gpus:
        return [f"sampler.cpu_kv_cache_gb={sampler.cpu_kv_cache_gb / 2**power:g}" for power in (1, 2)]
    smaller = [share for share in reversed(SHARES) if share < sampler.gpu_memory]
    larger = [share for share in SHARES if share > sampler.gpu_memory and not _crowded(recipe, machine)]
    return [f"sampler.gpu_memory={share}" for share in larger + smaller]


def _processes(recipe: Recipe, machine: Machine) -> list[Option]:
    found, crowded = [], _crowded(recipe, machine)
    if crowded and recipe.trainer.gpus > 1:
        found += [(3, ["trainer.gpus=1"])]
    if crowded and recipe.sampler.gpus > 1:
        found += [(4, ["trainer.gpus=1", "sampler.gpus=1", "sampler.tensor_parallel=1"])]
    return found


def _wider(recipe: Recipe, machine: Machine, shape: Shape) -> list[Option]:
    """Engines over more GPUs, each with a part of the weights: of the sampler's own, of those that are left, or of the
    trainer's. vLLM divides the attention's heads, so that their number must be a multiple."""
    sampler, ranks, found = recipe.sampler, recipe.trainer.gpus, []
    for width in (width for width in WIDTHS if width > sampler.tensor_parallel and shape.heads % width == 0):
        gpus = math.ceil(sampler.gpus / width) * width
        more = [f"sampler.gpus={gpus}"] if gpus > sampler.gpus else []
        fewer = ["trainer.gpus=1"] if gpus + ranks > len(machine.gpus) else []
        if gpus + (1 if fewer else ranks) <= len(machine.gpus):
            price = 3 + len(more) + 3 * len(fewer)
            found.append((price, [*more, *fewer, f"sampler.tensor_parallel={width}"]))
    return found


def _crowded(recipe: Recipe, machine: Machine) -> bool:
    """Whether samplers and ranks share devices."""
    return recipe.sampler.gpus + recipe.trainer.gpus > len(machine.gpus)
