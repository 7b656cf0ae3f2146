"""Which process takes how much of which device, and whether that fits."""

from collections.abc import Sequence
from dataclasses import dataclass

from launch.plan.machine import Machine
from launch.plan.need import Need, completion_bytes, of_engine, of_host, of_rank
from launch.plan.shape import Shape
from protocol.memory import GIB
from protocol.recipe import Recipe

SAFE = 0.9
"""Share of a device beyond which a plan is a gamble: the arithmetic is not better than that (docs/planning.md)."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Device:
    """What a run takes of one device, in bytes."""

    name: str
    size: float
    free: float
    needed: float

    @property
    def fits(self) -> bool:
        return self.needed <= self.size

    @property
    def tight(self) -> bool:
        return self.needed > SAFE * min(self.size, self.free)


@dataclass(frozen=True, kw_only=True, slots=True)
class Placement:
    engine: Need
    """On a GPU of each of its GPUs."""
    engines: int
    rank: Need
    devices: list[Device]
    completions: int
    """That one engine's KV cache holds at their full length."""
    problem: str
    """Empty where all fits."""


def place(shape: Shape, recipe: Recipe, machine: Machine, prompt: int) -> Placement:
    """prompt: the tokens of the longest one."""
    engine = of_engine(shape, recipe, prompt, min(machine.gpus) if machine.gpus else None)
    rank = of_rank(shape, recipe, prompt, machine.kind)
    cached = completion_bytes(shape, recipe, prompt + recipe.sampling.max_tokens)
    devices = _on_gpus(engine, rank, shape, recipe, machine) if machine.gpus else _on_cpu(engine, rank, recipe, machine)
    completions = max(0, int(engine["KV cache"] / cached))
    return Placement(
        engine=engine,
        engines=recipe.sampler.gpus // recipe.sampler.tensor_parallel,
        rank=rank,
        devices=devices,
        completions=completions,
        problem=_problem(devices, completions, recipe, machine),
    )


def _on_cpu(engine: Need, rank: Need, recipe: Recipe, machine: Machine) -> list[Device]:
    needed = recipe.sampler.gpus * sum(engine.values()) + recipe.trainer.gpus * sum(rank.values())
    return [Device(name="memory", size=machine.host, free=machine.host_free, needed=needed)]


def _on_gpus(engine: Need, rank: Need, shape: Shape, recipe: Recipe, machine: Machine) -> list[Device]:
    """The sampler's GPUs first, as `python -m launch` gives them; where there are too few, both share all."""
    samplers, ranks, count = recipe.sampler.gpus, recipe.trainer.gpus, len(machine.gpus)
    taken = [0.0] * count
    for index in range(samplers):
        taken[index % count] += sum(engine.values())
    first = samplers if samplers + ranks <= count else 0
    for index in range(ranks):
        taken[(first + index) % count] += sum(rank.values())
    devices = [
        Device(name=f"GPU {index}", size=size, free=free, needed=needed)
        for index, (size, free, needed) in enumerate(zip(machine.gpus, machine.free, taken, strict=True))
        if needed
    ]
    return [
        *devices,
        Device(name="host memory", size=machine.host, free=machine.host_free, needed=of_host(shape, recipe)),
    ]


def _problem(devices: Sequence[Device], completions: int, recipe: Recipe, machine: Machine) -> str:
    if len(machine.gpus) and recipe.sampler.gpus > len(machine.gpus):
        return f"sampler.gpus = {recipe.sampler.gpus}, and there are {len(machine.gpus)} GPUs"
    for device in devices:
        if not device.fits:
            return f"{device.name}: {device.needed / GIB:.1f} GiB needed, it has {device.size / GIB:.1f}"
    if not completions:
        return "the KV cache does not hold one completion at its full length"
    return ""
