"""The variants of `benchmarks.sampler` in turns, and a trainer that throws groups away."""

import argparse
import contextlib
import math
import tempfile
import time
from collections.abc import Collection, Mapping
from pathlib import Path

import torch
from safetensors import safe_open
from transformers import AutoConfig

from benchmarks.child import Child, roof, tidy_when_stopped
from benchmarks.discarding import Discarding, discarding
from benchmarks.measure import emit, spread
from policy.model import locate
from protocol.codec import unpack
from protocol.recipe import Recipe
from protocol.resolve import dump, load
from protocol.rundir import RunDir
from sampler.supervisor import environments

WARM = 4
"""Prompts that each variant answers before anything counts."""
IDLE_S = 3.0
SETTLE_S = 1.5
"""Before each turn: vLLM's processes spin for a second after a request, which must not be in another's turn."""
KINDS = {"vllm.LLM": "bare", "vllm.LLM, in process": "in-process"}
"""The engine of each variant that is not the sampler's ("ours")."""
SETTINGS = [
    "data.eval=", "eval.before=false", "eval.after=false", "objective.kl_beta=0.0", "lora.rank=0",
    "trainer.steps=100000", "trainer.max_staleness=0", "trainer.refill=0",
    "network.beat_s=0.5", "network.dead_s=3000", "network.lease_s=36000", "network.resend_s=3000",
]  # fmt: skip


class Measured(dict):
    """tokens, seconds, and CPU seconds: `python` of the process that serves the engine, `cpu` of all."""


class Turns:
    """Runs variants one at a time; each gets prompts that none has had."""

    def __init__(self, engines: Mapping[str, Child], leases: Discarding, rows: int) -> None:
        self._engines, self._leases, self._rows = engines, leases, rows
        self._first = 0

    def run(self, variant: str, count: int) -> Measured:
        child = self._engines[kind_of(variant)]
        time.sleep(SETTLE_S)
        own, before = time.process_time(), child.cpu_s()
        found = self._leased() if variant == "wire" else self._asked(child, variant, count)
        python, everything = (now - then for now, then in zip(child.cpu_s(), before, strict=True))
        return Measured(found, python=python, cpu=everything + time.process_time() - own)

    def _asked(self, child: Child, variant: str, count: int) -> dict:
        if self._first + count > self._rows:
            self._first = 0  # the prefix cache has forgotten them, or has them for all
        self._first += count
        return child.ask(variant=variant, first=self._first - count, count=count)

    def _leased(self) -> dict:
        start = time.perf_counter()
        groups = self._leases.groups()
        seconds = time.perf_counter() - start
        tokens = sum(len(unpack(one.tokens)) for group in groups for one in group.completions)
        return {"tokens": tokens, "seconds": seconds}


def measure(options: argparse.Namespace) -> None:
    """Prints the table and its JSON line."""
    tidy_when_stopped()
    steps = f"trainer.prompts_per_step={options.prompts}"
    recipe = load(options.recipe, ["data.limit=2000", *options.overrides, *SETTINGS, steps])
    with tempfile.TemporaryDirectory(prefix="sampler-") as name, contextlib.ExitStack() as stack:
        rundir = RunDir(Path(name))
        rundir.make()
        rundir.recipe.write_text(dump(recipe))
        settings = {"recipe": str(rundir.recipe), "run": name, "fixed": not options.natural}
        kinds = dict.fromkeys(kind_of(variant) for variant in options.variants)
        engines = {kind: stack.enter_context(engine(kind, settings, recipe)) for kind in kinds}
        rows = min(child.ask()["rows"] for child in engines.values())  # answered when the engine is up
        idle = idle_share(engines.values())
        leases = stack.enter_context(discarding(recipe, rundir))
        found = take_turns(Turns(engines, leases, rows), options)
    limits, threads = roofs(recipe), environments(recipe, 1)[0].get("OMP_NUM_THREADS")
    rows_found = [row(variant, found[variant], found[options.variants[0]], limits) for variant in options.variants]
    emit(
        "sampler", rows_found, prompts=options.prompts, group=recipe.sampling.group_size,
        max_tokens=recipe.sampling.max_tokens, fixed=not options.natural, running=recipe.sampler.max_running,
        threads=threads and int(threads), rounds=options.rounds, idle=idle, **limits,
    )  # fmt: skip


def engine(kind: str, settings: Mapping[str, object], recipe: Recipe) -> Child:
    log = Path(tempfile.gettempdir()) / f"benchmark-sampler-{kind}.log"
    return Child("engine_run", {**settings, "kind": kind}, log, environment_of(kind, recipe))


def kind_of(variant: str) -> str:
    return KINDS.get(variant, "ours")


def environment_of(kind: str, recipe: Recipe) -> dict[str, str]:
    """The sampler's own; bare vLLM has no more of it than makes its threads as many."""
    found = environments(recipe, 1)[0]
    return {name: value for name, value in found.items() if kind != "bare" or name != "GOMP_SPINCOUNT"}


def idle_share(children: Collection[Child]) -> float:
    """CPU time that engines without work take from the one that is measured, as a share of one core."""
    time.sleep(SETTLE_S)
    before = sum(child.cpu_s()[1] for child in children)
    time.sleep(IDLE_S)
    return round((sum(child.cpu_s()[1] for child in children) - before) / IDLE_S, 3)


def take_turns(turns: Turns, options: argparse.Namespace) -> dict[str, list[Measured]]:
    """A-B-A-B, in every other round backwards, so that none always follows the same one."""
    for variant in options.variants:
        turns.run(variant, WARM)
    found: dict[str, list[Measured]] = {variant: [] for variant in options.variants}
    for number in range(options.rounds):
        order = options.variants if number % 2 == 0 else reversed(options.variants)
        for variant in order:
            found[variant].append(turns.run(variant, options.prompts))
    return found


def row(variant: str, found: list[Measured], first: list[Measured], limits: dict[str, float]) -> dict[str, object]:
    """Median and spread of a variant; ratios are medians of those of each round."""
    rates = [one["tokens"] / one["seconds"] for one in found]
    ratio = spread([rate / (one["tokens"] / one["seconds"]) for rate, one in zip(rates, first, strict=True)])
    work = [(one["cpu"] / one["tokens"], base["cpu"] / base["tokens"]) for one, base in zip(found, first, strict=True)]
    rate = spread(rates)
    return {
        "variant": variant,
        "tokens/s": round(rate["median"]),
        "min": round(rate["min"]),
        "max": round(rate["max"]),
        "of first": round(ratio["median"], 3),
        "least": round(ratio["min"], 3),
        "most": round(ratio["max"], 3),
        "by CPU": round(spread([base / own for own, base in work])["median"], 3),
        "of roof": round(rate["median"] / limits["roof tokens/s"], 3),
        **{f"{name} ms/token": round(per_token(found, name), 3) for name in ("python", "cpu")},
    }


def per_token(found: list[Measured], name: str) -> float:
    """Milliseconds of CPU time, median over the rounds."""
    return spread([1e3 * one[name] / one["tokens"] for one in found])["median"]


def roofs(recipe: Recipe) -> dict[str, float]:
    """What the matrix products alone would take for one decoding step with all sequences, and reading the weights.

    2 FLOP for each weight and token (arXiv 2001.08361), at the speed of one layer's widest product; the larger of the
    two times is the limit. Weights are as wide as the recipe's dtype, whatever the model's files have.
    """
    directory, dtype = locate(recipe.model), getattr(torch, recipe.model.dtype)
    config = AutoConfig.from_pretrained(directory).get_text_config()
    weights, batch = parameters(directory), recipe.sampler.max_running
    torch.set_num_threads(int(environments(recipe, 1)[0].get("OMP_NUM_THREADS", 1)))
    left = torch.randn(batch, config.hidden_size).to(dtype)
    right = torch.randn(config.hidden_size, config.intermediate_size).to(dtype)
    flops = 2 * left.numel() * right.shape[1] * roof(lambda: left @ right)
    size = weights * dtype.itemsize
    per_s = size * roof(torch.zeros(size // 8, dtype=torch.int64).sum)
    step_s = max(batch * 2 * weights / flops, size / per_s)
    return {"GFLOP/s": round(flops / 1e9), "read GB/s": round(per_s / 1e9, 1), "roof tokens/s": round(batch / step_s)}


def parameters(directory: Path) -> int:
    """Values in a model's safetensors, by their headers."""
    count = 0
    for path in directory.glob("*.safetensors"):
        with safe_open(path, "pt") as file:
            count += sum(math.prod(file.get_slice(name).get_shape()) for name in file.keys())  # noqa: SIM118
    return count


if __name__ == "__main__":
    raise SystemExit("a part of another benchmark: python -m benchmarks.sampler")
