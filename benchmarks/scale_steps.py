"""Optimizer steps and batches that grow in one direction, for `benchmarks.scale`."""

import argparse
import contextlib
import functools
import logging
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import msgspec
import numpy as np

from benchmarks.measure import spread
from benchmarks.processes import in_child
from benchmarks.steps import SIZES, alone, forget_peak, made_up, peak_memory, random_model, recipe, step, step_flops
from protocol.memory import GIB
from protocol.messages import Group
from protocol.recipe import Recipe
from trainer.advantage import ADVANTAGES
from trainer.batch import MicroBatch, make_batch
from trainer.engine import Policy
from trainer.ranks import Ranks

PROMPT = 64
VARIANT = "varlen, checkpointing off"


def lengths(values: Sequence[int], rounds: int) -> list[dict[str, object]]:
    """Tokens of a completion; groups of 2."""
    return in_child(lambda own: policy_rows(own, "length", {value: (2, value) for value in values}, 1024, rounds))


def groups(values: Sequence[int], rounds: int) -> list[dict[str, object]]:
    """Completions of a group, of 32 tokens each."""
    return in_child(lambda own: policy_rows(own, "group", {value: (value, 32) for value in values}, 1024, rounds))


def vocabularies(values: Sequence[int], rounds: int) -> list[dict[str, object]]:
    """With groups of 8 x 128. A process for each, as each has another model."""
    rows = [
        in_child(lambda own, v=value: policy_rows(own, "vocabulary", {v: (8, 128)}, v, rounds))[0] for value in values
    ]
    return beside_the_first(rows, "vocabulary")


def policy_rows(
    own: Path, what: str, shapes: Mapping[int, tuple[int, int]], vocabulary: int, rounds: int
) -> list[dict[str, object]]:
    """Steps of one tiny model, which lies in `own`, one group each. shapes: value -> completions, tokens of each."""
    logging.disable(logging.WARNING)
    alone()
    longest = PROMPT + max(count * tokens for count, tokens in shapes.values())
    with Ranks("gloo", 1) as ranks:
        model = random_model(own, SIZES["tiny"] | {"vocab_size": vocabulary}, longest, "float32")
        options = argparse.Namespace(prompt=PROMPT, dtype="float32", liger="off")
        options.group, options.completion = max(shapes.values())
        with contextlib.redirect_stdout(sys.stderr):  # DeepSpeed prints
            policy = Policy(recipe(model, options), model, ranks)
        rows = []
        for value, (options.group, options.completion) in shapes.items():
            tokens = PROMPT + options.group * options.completion
            [micro] = policy.batch(made_up(tokens, options, vocabulary)).micro_batches
            rows.append({what: value, "tokens": tokens} | cost(policy, micro, rounds))
    return beside_the_first(rows, what)


def cost(policy: Policy, micro: MicroBatch, rounds: int) -> dict[str, float]:
    """CPU time of a step and its spread; its memory above the resting process, the most of all rounds."""
    peaks: dict[str, tuple[float, float]] = {}
    seconds, above = [], []
    for _ in range(1 + rounds):  # the first one pays for allocation
        forget_peak()
        resting, used = peak_memory()[0], time.process_time()
        step(policy, micro, VARIANT, peaks)
        seconds.append(time.process_time() - used)
        above.append((peaks[VARIANT][0] - resting) * GIB / 1e6)
    return cpu_columns(spread(seconds[1:])) | {"MB": max(above), "flops": step_flops(policy, micro)}


def cpu_columns(seconds: Mapping[str, float]) -> dict[str, float]:
    return {"CPU ms": seconds["median"] * 1e3, "min": seconds["min"] * 1e3, "max": seconds["max"] * 1e3}


def beside_the_first(rows: list[dict], what: str) -> list[dict[str, object]]:
    """Growth of time beside that of the FLOPs, the tokens and the size itself. What is no FLOP (softmax, the optimizer)
    grows with the tokens, and with the vocabulary."""
    first = dict(rows[0])
    for one in rows:
        one["time x"] = one["CPU ms"] / first["CPU ms"]
        for name in ("flops", "tokens", what):
            one[f"{name} x"] = one[name] / first[name]
    return rows


def ranks(values: Sequence[int], rounds: int) -> list[dict[str, object]]:
    """64 groups of 8 completions of mixed lengths, made into each rank's micro-batches: CPU time of the slowest rank's
    batch maker and its spread, tokens of the fullest rank over the mean, and the tokens that all compute more than one
    would."""
    random = np.random.default_rng(0)
    step = []
    for number in range(64):
        options = argparse.Namespace(prompt=PROMPT, group=8, completion=int(random.integers(32, 512)))
        [group] = made_up(PROMPT + 8 * options.completion, options, 1024)
        step.append(msgspec.structs.replace(group, group_id=number, row=number))
    options = argparse.Namespace(dtype="float32", liger="off", group=8, completion=512)
    settings = recipe(Path("random"), options)
    rows = [of_world(step, settings, world, rounds) for world in values]
    for one in rows:
        one["more than with one"] = one.pop("all tokens") / of_world(step, settings, 1, 1)["all tokens"] - 1
    return rows


def of_world(step: Sequence[Group], settings: Recipe, world: int, rounds: int) -> dict[str, Any]:
    batches, seconds = [], []
    for rank in range(world):
        make = functools.partial(make_batch, step, settings, ADVANTAGES["group"], rank=rank, world=world, step=0)
        batches.append(make())
        seconds.append(spread([cpu_seconds(make) for _ in range(rounds)]))
    tokens = [sum(micro.packed.input_ids.shape[1] for micro in batch.micro_batches) for batch in batches]
    return {
        "ranks": world, **cpu_columns(max(seconds, key=lambda one: one["median"])), "tokens a rank": max(tokens),
        "fullest / mean": max(tokens) * world / sum(tokens), "all tokens": sum(tokens),
    }  # fmt: skip


def cpu_seconds(work: Callable[[], object]) -> float:
    start = time.thread_time()
    work()
    return time.thread_time() - start


if __name__ == "__main__":
    raise SystemExit("a part of another benchmark: python -m benchmarks.scale")
