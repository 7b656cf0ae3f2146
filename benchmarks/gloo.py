"""How fast gloo sums tensors between two processes of one machine: what a step over gloo waits for, at least.

    python -m benchmarks.gloo [--rounds 5]

CPU tensors over the loopback. CUDA tensors are copied to host memory and back besides.
"""

import argparse
import tempfile
import time
from pathlib import Path

import msgspec
import torch
import torch.distributed as dist

from benchmarks.child import tidy_when_stopped
from benchmarks.measure import emit, spread
from benchmarks.processes import Children, free_port

RANKS = 2
SIZES = (2**20, 2**24, 2**26)
"""Numbers in a tensor."""
KINDS = {
    "all-reduce float32": (torch.float32, lambda tensor, _: dist.all_reduce(tensor)),
    "all-reduce bfloat16": (torch.bfloat16, lambda tensor, _: dist.all_reduce(tensor)),
    "all-gather bfloat16": (torch.bfloat16, lambda tensor, part: dist.all_gather_single(tensor, part)),
}


def main() -> None:
    flags = argparse.ArgumentParser("benchmarks.gloo", description=__doc__.splitlines()[0])
    flags.add_argument("--rounds", type=int, default=5)
    rounds = flags.parse_args().rounds
    tidy_when_stopped()
    emit("gloo", measured(rounds), ranks=RANKS, rounds=rounds)


def measured(rounds: int) -> list[dict[str, object]]:
    port = free_port()
    with tempfile.TemporaryDirectory(prefix="gloo-") as name, Children(Path(name) / "log") as children:
        out = Path(name) / "rows"
        for number in range(RANKS):
            children.start(lambda n=number: rank(n, port, rounds, out))
        children.wait()
        return msgspec.json.decode(out.read_bytes())


def rank(number: int, port: int, rounds: int, out: Path) -> None:
    torch.set_num_threads(1)
    store = dist.TCPStore("127.0.0.1", port, RANKS, is_master=number == 0)
    dist.init_process_group("gloo", store=store, rank=number, world_size=RANKS)
    seconds = {(kind, size): [] for kind in KINDS for size in SIZES}
    for _ in range(rounds):
        for (kind, size), taken in seconds.items():
            taken.append(once(kind, size))
    if number == 0:
        out.write_bytes(msgspec.json.encode([row(kind, size, taken) for (kind, size), taken in seconds.items()]))
    dist.destroy_process_group()


def once(kind: str, size: int) -> float:
    dtype, exchange = KINDS[kind]
    tensor, part = torch.ones(size, dtype=dtype), torch.ones(size // RANKS, dtype=dtype)
    dist.barrier()
    start = time.perf_counter()
    exchange(tensor, part)
    return time.perf_counter() - start


def row(kind: str, size: int, seconds: list[float]) -> dict[str, object]:
    """GB of the whole tensor by the second."""
    gigabytes = size * KINDS[kind][0].itemsize / 1e9
    speed = spread([gigabytes / taken for taken in seconds])
    return {"what": kind, "MB": 1e3 * gigabytes, **{f"GB/s {name}": value for name, value in speed.items()}}


if __name__ == "__main__":
    main()
