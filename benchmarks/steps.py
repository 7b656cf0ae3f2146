"""Optimizer steps of random models on made-up groups, for `benchmarks.rows`."""

import argparse
import contextlib
import functools
import itertools
import logging
import os
import socket
import sys
import tempfile
from pathlib import Path

import numpy as np
import torch
from transformers import Qwen2Config, Qwen2ForCausalLM

from benchmarks.measure import emit, interleaved, spread, timed
from policy.kernels import equip
from protocol.codec import pack, token_array
from protocol.memory import GIB, peak_gb
from protocol.messages import Completion, Group, Span
from protocol.recipe import Recipe
from protocol.resolve import load
from trainer.batch import MicroBatch
from trainer.engine import Policy
from trainer.loss import objective_loss
from trainer.ranks import Ranks

SIZES = {
    "0.5b": {"hidden_size": 896, "intermediate_size": 4864, "num_hidden_layers": 24, "num_attention_heads": 14,
             "num_key_value_heads": 2, "vocab_size": 151936},
    "tiny": {"hidden_size": 64, "intermediate_size": 256, "num_hidden_layers": 2, "num_attention_heads": 4,
             "num_key_value_heads": 2, "vocab_size": 1024},
}  # fmt: skip


def measure(options: argparse.Namespace) -> None:
    """Prints the table and its JSON line."""
    logging.disable(logging.WARNING)
    alone()
    with tempfile.TemporaryDirectory() as directory, Ranks("auto", options.threads) as ranks:
        model = random_model(Path(directory), SIZES[options.size], max(options.tokens), options.dtype)
        with contextlib.redirect_stdout(sys.stderr):  # DeepSpeed prints
            policy = Policy(recipe(model, options), model, ranks)
        roof = matmul_flops(ranks.device, policy.model.dtype, 8192 if ranks.device.type == "cuda" else 1024)
        rows = [row for tokens in options.tokens for row in measured(policy, tokens, options, roof)]
        _, kernels = equip(policy.model, policy.recipe.trainer, ranks.device)
    device = torch.cuda.get_device_name() if torch.cuda.is_available() else f"{torch.get_num_threads()} CPU threads"
    emit("rows", rows, size=options.size, dtype=options.dtype, device=device, roof_tflops=roof / 1e12, auto=kernels,
         prompt=options.prompt, completion=options.completion, group=options.group, rounds=options.rounds)  # fmt: skip


def alone() -> None:
    """The environment of a launcher's only rank."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    place = {"RANK": 0, "LOCAL_RANK": 0, "WORLD_SIZE": 1, "LOCAL_WORLD_SIZE": 1, "MASTER_PORT": port}
    os.environ.update({"MASTER_ADDR": "127.0.0.1"} | {key: str(value) for key, value in place.items()})


def random_model(directory: Path, shape: dict[str, int], positions: int, dtype: str) -> Path:
    """A Qwen2 model directory without a tokenizer; nothing is sampled from it."""
    config = Qwen2Config(**shape, max_position_embeddings=2 * positions, tie_word_embeddings=True)
    torch.manual_seed(0)
    Qwen2ForCausalLM(config).to(getattr(torch, dtype)).save_pretrained(directory)
    return directory


def recipe(model: Path, options: argparse.Namespace) -> Recipe:
    """Of one rank; rows are as long as their groups make them."""
    return load(None, [
        f"model.path={model}", f"model.dtype={options.dtype}", "trainer.gpus=1", "objective.kl_beta=0.0",
        f"trainer.liger={options.liger}",
        f"sampling.group_size={options.group}", f"sampling.max_tokens={options.completion}",
        f"trainer.tokens_per_micro_batch={10**9}",
    ])  # fmt: skip


def measured(policy: Policy, tokens: int, options: argparse.Namespace, roof: float) -> list[dict[str, object]]:
    """The table's rows for one length; a variant that has not the memory for it has no figures."""
    [micro] = policy.batch(made_up(tokens, options, policy.model.config.vocab_size)).micro_batches
    computed, flops = micro.packed.input_ids.shape[1], step_flops(policy, micro)
    peaks: dict[str, tuple[float, float]] = {}
    rows, steps = [], {}
    for attention, checkpointing in itertools.product(options.attention, options.checkpointing):
        name = f"{attention}, checkpointing {checkpointing}"
        work = functools.partial(step, policy, micro, name, peaks)
        try:
            work()  # the first of each shape pays for allocation and compilation
            steps[name] = work
        except torch.OutOfMemoryError:
            rows.append({"tokens": computed, "variant": name, "seconds": None, "ended": "out of memory"})
    for name, seconds in interleaved(steps, options.rounds).items():
        middle = spread(seconds)
        rows.append({
            "tokens": computed, "variant": name, "seconds": middle["median"],
            "min": middle["min"], "max": middle["max"], "tokens/s": computed / middle["median"],
            "mfu": flops / middle["median"] / roof, "peak_gb": peaks[name][0], "reserved_gb": peaks[name][1],
        })  # fmt: skip
    return rows


def made_up(tokens: int, options: argparse.Namespace, vocabulary: int) -> list[Group]:
    """As many whole groups as fit; of a row shorter than a group, as many completions."""
    size = max(1, min(options.group, (tokens - options.prompt) // options.completion))
    random = np.random.default_rng(tokens)

    count = max(1, tokens // (options.prompt + size * options.completion))
    found = []
    for number in range(count):
        completions = [completion_of(random, options.completion, vocabulary, float(one % 2)) for one in range(size)]
        prompt = random_ids(random, options.prompt, vocabulary)
        found.append(
            Group(session="b", split="train", group_id=number, row=number, prompt=prompt, completions=completions)
        )
    return found


def random_ids(random: np.random.Generator, count: int, vocabulary: int) -> bytes:
    return pack(token_array(random.integers(0, vocabulary, count).tolist(), vocabulary))


def completion_of(random: np.random.Generator, length: int, vocabulary: int, reward: float) -> Completion:
    """Random tokens, with the log-probs that random weights give them, nearly."""
    return Completion(
        tokens=random_ids(random, length, vocabulary),
        logprobs=pack(np.full(length, -np.log(vocabulary), np.float32)),
        ref_logprobs=None,
        finish="stop",
        spans=[Span("s00000000.i0001", 0, length)],
        reward=reward,
        rewards={"made_up": reward},
    )


def step(policy: Policy, micro: MicroBatch, variant: str, peaks: dict[str, tuple[float, float]]) -> float:
    """Seconds of one optimizer step; its peak memory goes to `peaks`."""
    attention, _, checkpointing = variant.partition(", checkpointing ")
    scorer = policy._engine.module
    scorer.attend_by(attention)
    if checkpointing == "on":
        policy.model.gradient_checkpointing_enable()
    else:
        policy.model.gradient_checkpointing_disable()

    def work() -> None:
        for one in policy.accumulate([micro]):
            loss, _ = objective_loss(*policy.logprobs(one), one, policy.recipe.objective)
            policy.backward(loss)
        policy.update()
        if torch.cuda.is_available():
            torch.cuda.synchronize()

    forget_peak()
    seconds = timed(work)
    peaks[variant] = peak_memory()
    return seconds


def forget_peak() -> None:
    if torch.cuda.is_available():
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()
    else:
        with contextlib.suppress(OSError):
            Path("/proc/self/clear_refs").write_text("5")  # the kernel's word for VmHWM


def peak_memory() -> tuple[float, float]:
    """GiB that tensors have had at most, and that torch has taken; without a GPU twice that of the process."""
    if torch.cuda.is_available():
        return torch.cuda.max_memory_allocated() / GIB, torch.cuda.max_memory_reserved() / GIB
    return peak_gb(), peak_gb()


def step_flops(policy: Policy, micro: MicroBatch) -> float:
    """Of one step, by the rule in benchmarks/rows.py."""
    output = policy.model.get_output_embeddings()
    linear = sum(
        module.weight.numel()
        for module in policy.model.modules()
        if isinstance(module, torch.nn.Linear) and module is not output
    )
    config, segments = policy.model.config, micro.packed.segments
    queries, keys = segments.queries.diff().double(), segments.keys.diff().double()
    pairs = float((queries * (keys - queries) + queries * (queries + 1) / 2).sum())
    attended = config.num_hidden_layers * config.hidden_size * pairs
    tokens, scored = micro.packed.input_ids.shape[1], len(micro.packed.targets)
    return 6 * (linear * tokens + output.weight.numel() * scored) + 12 * attended


def matmul_flops(device: torch.device, dtype: torch.dtype, size: int) -> float:
    """FLOP/s of the best of twenty products of two square matrices."""
    one = torch.randn(size, size, device=device, dtype=dtype)

    def product() -> None:
        one @ one
        if device.type == "cuda":
            torch.cuda.synchronize()

    return 2 * size**3 / min(timed(product) for _ in range(20))


if __name__ == "__main__":
    raise SystemExit("a part of another benchmark: python -m benchmarks.rows")
