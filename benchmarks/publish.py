"""What publishing takes in memory on each rank: files written whole, as safetensors' own writer needs them, against
tensor by tensor.

    python -m benchmarks.publish                       # 0.6 GB in float32, ZeRO 1 and 3, two ranks on CPUs
    python -m benchmarks.publish --hidden 64 --layers 4 --limit-mb 0.2

Two real ranks with DeepSpeed around a random Llama. `rss` is the peak of the resident set above what it was before,
`tensors` that of torch's own allocations; both in MB, median and spread of the rounds, in which the
variants take turns.
"""

import argparse
import ctypes
import gc
import json
import os
import re
import shutil
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path

from benchmarks.child import tidy_when_stopped
from benchmarks.measure import emit, interleaved, spread, timed
from benchmarks.processes import Children, free_port

WORLD = 2
MB = 1e6


def main() -> int:
    flags = argparse.ArgumentParser(prog="benchmarks.publish", description="Peak memory of publishing, by rank.")
    flags.add_argument("--hidden", type=int, default=1024)
    flags.add_argument("--layers", type=int, default=8)
    flags.add_argument("--vocabulary", type=int, default=16_384)
    flags.add_argument("--limit-mb", type=float, default=200.0, help="size of a file")
    flags.add_argument("--stages", type=int, nargs="+", default=[1, 3])
    flags.add_argument("--rounds", type=int, default=3)
    flags.add_argument("--settings", type=Path, help=argparse.SUPPRESS)
    options = flags.parse_args()
    if options.settings:
        return measure_rank(json.loads(options.settings.read_text()))
    tidy_when_stopped()
    with tempfile.TemporaryDirectory(prefix="publish-") as directory:
        size, largest = make_model(Path(directory), options)
        rows = [row for stage in options.stages for row in measure(Path(directory), stage, options)]
    emit("publish", rows, model_mb=size / MB, largest_tensor_mb=largest / MB, file_mb=options.limit_mb)
    return 0


def make_model(directory: Path, options: argparse.Namespace) -> tuple[int, int]:
    """A random float32 model directory -> bytes of its weights and of the largest of them."""
    from transformers import LlamaConfig, LlamaForCausalLM

    config = LlamaConfig(
        vocab_size=options.vocabulary,
        hidden_size=options.hidden,
        intermediate_size=4 * options.hidden,
        num_hidden_layers=options.layers,
        num_attention_heads=options.hidden // 32,
        tie_word_embeddings=True,
    )
    model = LlamaForCausalLM(config)
    model.save_pretrained(directory / "model")
    sizes = [parameter.nbytes for parameter in model.parameters()]
    return sum(sizes), max(sizes)


def measure(directory: Path, stage: int, options: argparse.Namespace) -> list[dict[str, object]]:
    """A row for each variant and rank."""
    settings = directory / "settings.json"
    limit = int(options.limit_mb * MB)
    wanted = {"model": str(directory / "model"), "stage": stage, "limit": limit, "rounds": options.rounds}
    settings.write_text(json.dumps(wanted | {"scratch": str(directory)}))
    command = [sys.executable, "-m", "benchmarks.publish", "--settings", str(settings)]
    place = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": free_port(), "WORLD_SIZE": WORLD, "LOCAL_WORLD_SIZE": WORLD}
    place |= {"DS_ACCELERATOR": "cpu", "CUDA_VISIBLE_DEVICES": ""}
    with Children(directory / "log") as children:
        for rank in range(WORLD):  # as a new program: what this one has in memory would be counted
            children.start(lambda: os.execv(sys.executable, command), **place, RANK=rank, LOCAL_RANK=rank)
        children.wait()
    found = [json.loads((directory / f"rows-{rank}.json").read_text()) for rank in range(WORLD)]
    return [{"zero": stage, "rank": rank, **row} for rank in range(WORLD) for row in found[rank]]


def measure_rank(settings: dict) -> int:
    """One rank: writes a row for each variant as JSON."""
    from protocol.resolve import load
    from trainer.engine import Policy
    from trainer.ranks import Ranks

    overrides = [f"model.path={settings['model']}", "model.dtype=float32", "trainer.backend=gloo"]
    recipe = load(None, [*overrides, f"trainer.zero_stage={settings['stage']}"])
    with Ranks("gloo", threads=1) as ranks:
        policy = Policy(recipe, Path(settings["model"]), ranks)

        def once(write: Callable[..., None], gauge: Callable[..., float]) -> Callable[[], float]:
            def work() -> None:
                target = Path(settings["scratch"]) / "published"
                weights = policy.weights()
                if ranks.first:
                    target.mkdir()
                    write(target, policy.layout(), weights, settings["limit"])
                    shutil.rmtree(target)
                for _ in weights:
                    pass
                ranks.max([0])

            return lambda: gauge(work)

        writers = {"whole files": write_whole, "by tensor": write_by_tensor}
        for write in writers.values():
            once(write, timed)()  # first uses allocate for good
        rows: list[dict[str, object]] = [{"variant": name} for name in writers]
        for gauge, column in ((resident_peak, "rss"), (allocated_peak, "tensors"), (timed, "seconds")):
            found = interleaved({name: once(write, gauge) for name, write in writers.items()}, settings["rounds"])
            for row in rows:
                middle = spread(found[str(row["variant"])])
                row |= {column: middle["median"], f"{column} min": middle["min"], f"{column} max": middle["max"]}
        (Path(settings["scratch"]) / f"rows-{ranks.rank}.json").write_text(json.dumps(rows))
    return 0


def write_by_tensor(directory: Path, entries, weights, limit: int) -> None:
    from trainer.shards import write_shards

    write_shards(directory, entries, weights, limit)


def write_whole(directory: Path, entries, weights, limit: int) -> None:
    from safetensors.torch import save

    from trainer.shards import plan

    for number, shard in enumerate(plan(entries, limit)):
        tensors = {name: tensor.clone() for name, tensor in (next(weights) for _ in shard)}
        with (directory / f"{number}.safetensors").open("wb") as file:
            file.write(save(tensors))
            os.fsync(file.fileno())


def resident_peak(work: Callable[[], None]) -> float:
    """MB above the resting level; Linux alone."""
    gc.collect()
    ctypes.CDLL(None).malloc_trim(0)
    Path("/proc/self/clear_refs").write_text("5")  # resets VmHWM
    rest = status("VmRSS")
    work()
    return (status("VmHWM") - rest) / MB


def status(name: str) -> int:
    """Bytes."""
    found = re.search(rf"{name}:\s+(\d+) kB", Path("/proc/self/status").read_text())
    return 1024 * int(found[1]) if found else 0


def allocated_peak(work: Callable[[], None]) -> float:
    """MB that torch's tensors on the CPU had at most, above the level before."""
    from torch.profiler import ProfilerActivity, profile

    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as watched:
        work()
    level = most = 0
    for event in sorted(watched.profiler.kineto_results.events(), key=lambda event: event.start_ns()):
        if event.name() == "[memory]":
            level += event.nbytes()
            most = max(most, level)
    return most / MB


if __name__ == "__main__":
    sys.exit(main())
