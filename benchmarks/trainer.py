"""The trainer's optimizer step, against the same groups in padded batches and in TRL's loss step.

    python -m benchmarks.trainer                        made-up groups with lengths as different as natural ones
    python -m benchmarks.trainer --run runs/demo        the first groups of a run's recorded stream
    python -m benchmarks.trainer --memory               how much forward and backward take above the resting model

`packed` is ours: DeepSpeed's engine, prompts shared, no padding, log-probs without full logits. `padded` is the
ancestors' way in the same engine: a row for each completion, logits of all tokens, log_softmax. `trl` is GRPOTrainer's
own loss on such rows, and its own optimizer (fused AdamW; bfloat16 with its autocast). Both take `--rows` completions
in one forward pass, padded to the longest of them, and add gradients up; ours takes the whole step as one row. The ways
take turns. tokens/s counts what `packed` computes, a prompt once a group, for all of them; `of roof` is the FLOPs of
that (benchmarks/rows.py) over the fastest matrix product of the same run. Both are of forward and backward alone
(`pass`) and of the whole step (`step`).
"""

import argparse
import contextlib
import ctypes
import gc
import json
import logging
import signal
import subprocess
import sys
from pathlib import Path

import torch

from benchmarks.child import tidy_when_stopped
from benchmarks.measure import emit, interleaved, spread, timed
from benchmarks.steps import alone, forget_peak, step_flops
from benchmarks.ways import Step, made_up, packed, padded, padded_rows, recipe_of, recorded, trl
from policy.model import locate
from protocol.cli import exit_with
from protocol.errors import UserError
from protocol.memory import peak_gb
from protocol.process import die_with_parent
from protocol.recipe import Model
from trainer.engine import Policy
from trainer.ranks import Ranks

PRODUCTS = ((1024, 576, 1536), (1024, 576, 49152), (2048, 2048, 2048))
"""Rows, inner width and columns: two of SmolLM2-135M's layers, and a square one."""


def main() -> int:
    flags = argparse.ArgumentParser(prog="benchmarks.trainer", description=__doc__.splitlines()[0])
    flags.add_argument("--run", type=Path, help="a run directory with a recorded stream")
    flags.add_argument("--model", default="smollm2-135m-instruct", help="as model.path of a recipe")
    flags.add_argument("--dtype", choices=("bfloat16", "float32"), default="bfloat16")
    flags.add_argument("--tokens", type=int, default=1024, help="of a step, at least, prompts once a group")
    flags.add_argument("--prompt", type=int, default=90, help="tokens of each made-up prompt")
    flags.add_argument("--completion", type=int, default=60, help="mean tokens of a made-up completion")
    flags.add_argument("--group", type=int, default=8, help="completions of a made-up group")
    flags.add_argument("--rows", type=int, default=8, help="completions in one forward pass of `padded` and `trl`")
    flags.add_argument("--checkpointing", choices=("on", "off"), default="off")
    flags.add_argument("--ways", nargs="+", choices=("packed", "padded", "trl"), default=["packed", "padded", "trl"])
    flags.add_argument("--rounds", type=int, default=3)
    flags.add_argument("--threads", type=int, default=1)
    flags.add_argument("--memory", action="store_true")
    flags.add_argument("--alone", action="store_true", help=argparse.SUPPRESS)
    options = flags.parse_args()
    refuse(options)
    tidy_when_stopped()
    logging.disable(logging.WARNING)
    if options.memory and not options.alone:
        emit("trainer --memory", memory(options), **facts(options))
    else:
        speed(options)
    return 0


def refuse(options: argparse.Namespace) -> None:
    """Raises UserError for what gives no gradient, before anything is loaded."""
    if options.rows < 1:
        raise UserError(f"--rows {options.rows}: a forward pass takes at least one completion")
    if options.run and not recorded(options.run, 1):
        raise UserError(f"--run {options.run}: all completions of each recorded group have the same reward")
    if not options.run and options.group < 2:
        raise UserError(f"--group {options.group}: a group needs two completions, or no advantage differs from 0")


def facts(options: argparse.Namespace) -> dict[str, object]:
    names = ("model", "dtype", "tokens", "prompt", "completion", "group", "threads", "checkpointing")
    named = {name: getattr(options, name) for name in names}
    return named | {"completions_a_pass": options.rows, "run": str(options.run) if options.run else None}


def speed(options: argparse.Namespace) -> None:
    """Of all ways in one process; or, for `memory`, of one of them."""
    alone()
    with contextlib.redirect_stdout(sys.stderr), Ranks("auto", options.threads) as ranks:  # DeepSpeed prints
        directory = locate(Model(path=options.model))
        policy = Policy(recipe_of(options), directory, ranks)
        vocabulary = policy.model.config.vocab_size
        groups = recorded(options.run, options.tokens) if options.run else made_up(options, vocabulary)
        [micro] = policy.batch(groups).micro_batches
        rows_of = padded_rows(groups, options.rows)
        ways = {
            "packed": lambda: packed(policy, groups),
            "padded": lambda: padded(policy, rows_of),
            "trl": lambda: trl(directory, rows_of, options),
        }
        steps = {name: ways[name]() for name in options.ways}
        if options.alone:
            found = peak_above_rest(*steps.values())
        else:
            tokens, flops, roof = (
                micro.packed.input_ids.shape[1],
                step_flops(policy, micro),
                fastest(policy.model.dtype),
            )
            rows = [seconds_row(*one, tokens, flops / roof) for one in measured(steps, options.rounds).items()]
    if options.alone:
        print(json.dumps(found))
        return
    emit("trainer", rows, **facts(options), groups=len(groups), packed_tokens=tokens, scored=len(micro.packed.targets),
         rows_tokens=sum(int(one.seen.sum()) for one in rows_of), padded_tokens=sum(one.ids.numel() for one in rows_of),
         roof_gflops=roof / 1e9)  # fmt: skip


def measured(steps: dict[str, Step], rounds: int) -> dict[str, list[tuple[float, float]]]:
    """Seconds of forward and backward, and of the update, of each way in each round; the first of each is left out."""
    found: dict[str, list[tuple[float, float]]] = {name: [] for name in steps}

    def turn(name: str) -> float:
        work, update = steps[name]
        found[name].append((timed(work), timed(update)))
        print(f"{name}: forward and backward {found[name][-1][0]:.1f} s", file=sys.stderr, flush=True)
        return sum(found[name][-1])

    interleaved({name: lambda name=name: turn(name) for name in steps}, rounds + 1)
    return {name: times[1:] for name, times in found.items()}


def seconds_row(name: str, times: list[tuple[float, float]], tokens: int, least: float) -> dict[str, object]:
    """least: seconds that the roof allows."""
    passes, updates = (spread(column) for column in zip(*times, strict=True))
    step = spread([sum(pair) for pair in times])
    return {
        "way": name, "pass s": passes["median"], "min": passes["min"], "max": passes["max"],
        "update s": updates["median"], "tokens/s, pass": tokens / passes["median"],
        "tokens/s, step": tokens / step["median"], "pass of roof": least / passes["median"],
        "step of roof": least / step["median"],
    }  # fmt: skip


def fastest(dtype: torch.dtype) -> float:
    """FLOP/s of the fastest of some matrix products."""

    def of(rows: int, inner: int, columns: int) -> float:
        one, other = torch.randn(rows, inner, dtype=dtype), torch.randn(columns, inner, dtype=dtype)
        return 2 * rows * inner * columns / min(timed(lambda: one @ other.T) for _ in range(20))

    return max(of(*shape) for shape in PRODUCTS)


def peak_above_rest(step: Step) -> float:
    """GiB that forward and backward take above what the process has after one whole step."""
    work, update = step
    work(), update()
    gc.collect()
    with contextlib.suppress(OSError, AttributeError):
        ctypes.CDLL("libc.so.6").malloc_trim(0)
    forget_peak()
    rest = peak_gb()
    work()
    return peak_gb() - rest


def memory(options: argparse.Namespace) -> list[dict[str, object]]:
    """Each way and kind of checkpointing in a process of its own, which keeps nothing of the others."""
    rows: list[dict[str, object]] = []
    for checkpointing in ("on", "off"):
        for way in options.ways:
            same = ("model", "dtype", "tokens", "prompt", "completion", "group", "rows", "threads", "run")
            wanted = {name: value for name in same if (value := getattr(options, name))}
            command = [sys.executable, "-m", "benchmarks.trainer", "--memory", "--alone", "--ways", way]
            command += ["--checkpointing", checkpointing, *(f"--{name}={value}" for name, value in wanted.items())]
            done = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=False, preexec_fn=die_with_parent)
            if done.returncode not in (0, -signal.SIGKILL):
                raise SystemExit(f"{way} ended with {done.returncode}")
            row: dict[str, object] = {"way": way, "checkpointing": checkpointing}
            killed = {"GiB above rest": None, "ended": "killed for memory"}
            rows.append(row | (killed if done.returncode else {"GiB above rest": float(done.stdout.split()[-1])}))
    return rows


if __name__ == "__main__":
    exit_with(main)
