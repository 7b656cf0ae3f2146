"""The nearest settings that fit, where a recipe's own do not."""

import itertools
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


def nearest(
    file: Path | None, overrides: list[str], shape: Shape, machine: Machine, prompt: int
) -> tuple[list[str], Placement] | None:
    """The cheapest changes with which all fits, with a reserve; None where none help. prompt: tokens of the longest."""
    recipe = load(file, overrides)
    combinations = itertools.product(*_trainer(recipe, prompt), *_sampler(recipe, machine))
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


def _sampler(recipe: Recipe, machine: Machine) -> list[list[Option]]:
    """Less KV cache; fewer processes where they share what there is; no reference."""
    sampler = recipe.sampler
    shares = [share for share in (0.75, 0.6, 0.45, 0.3, 0.2) if share < sampler.gpu_memory]
    caches = [sampler.cpu_kv_cache_gb / 2**power for power in (1, 2)]
    own = [f"sampler.gpu_memory={share}" for share in shares]
    if not machine.gpus:
        own = [f"sampler.cpu_kv_cache_gb={size:g}" for size in caches]
    processes, crowded = [NONE], sampler.gpus + recipe.trainer.gpus > len(machine.gpus)
    if crowded and recipe.trainer.gpus > 1:
        processes += [(3, ["trainer.gpus=1"])]
    if crowded and sampler.gpus > 1:
        processes += [(4, ["trainer.gpus=1", "sampler.gpus=1", "sampler.tensor_parallel=1"])]
    return [
        [NONE, *((price, [change]) for price, change in enumerate(own, 1))],
        processes,
        [NONE, *([(10, ["objective.kl_beta=0.0"])] if has_reference(recipe) else [])],
    ]
