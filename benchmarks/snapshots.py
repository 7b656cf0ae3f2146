"""What a snapshot costs on a disk, and how much of one is new since the one before.

    python -m benchmarks.snapshots [DIRECTORY ...]            write, read and verify 0.5 GB there, three times
    python -m benchmarks.snapshots --delta OLDER NEWER        two model.safetensors of one run

"By CPU" is work per second of CPU time, which other work on the machine does not change.
"""

import argparse
import hashlib
import lzma
import os
import tempfile
import time
import zlib
from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
import torch
from safetensors import safe_open

from benchmarks.child import tidy_when_stopped
from benchmarks.measure import emit, spread
from protocol.snapshot import Manifest, open_sealed, seal, snapshot_id, staging, write_hashed

SHARD, SHARDS, ROUNDS = 128 << 20, 4, 3


def speed(work: Callable[[], object], size: int) -> tuple[float, float]:
    """GB a second, and GB a second of CPU: what one thread would do on a core of its own, were the disk no limit."""
    start, used = time.perf_counter(), time.process_time()
    work()
    return size / 1e9 / (time.perf_counter() - start), size / 1e9 / (time.process_time() - used)


def cost(directory: Path) -> list[dict[str, object]]:
    """A snapshot's way over this disk, with the code of publisher and reader: a row for each part of it."""
    data, size = os.urandom(SHARD), SHARD * SHARDS
    found: dict[str, list[tuple[float, float]]] = {
        "write+fsync+hash": [],
        "read+verify, cached": [],
        "sha256 alone": [],
    }
    with tempfile.TemporaryDirectory(dir=directory) as name:
        for step in range(ROUNDS):
            found["write+fsync+hash"].append(speed(lambda s=step: publish(Path(name), s, data), size))
            sealed = open_sealed(Path(name) / snapshot_id(step, 1))
            found["read+verify, cached"].append(speed(sealed.verified, size))
            found["sha256 alone"].append(speed(lambda: hashlib.sha256(data), SHARD))
    return [{"directory": str(directory), "what": what, **rates(values)} for what, values in found.items()]


def rates(values: Sequence[tuple[float, float]]) -> dict[str, float]:
    """Medians with their spread, by the clock and by CPU."""
    row = {}
    for column, speeds in zip(("GB/s", "by CPU"), zip(*values, strict=True), strict=True):
        found = spread(speeds)
        row |= {column: found["median"], f"{column} min": found["min"], f"{column} max": found["max"]}
    return {name: float(f"{value:.3g}") for name, value in row.items()}


def publish(parent: Path, step: int, data: bytes) -> None:
    name = snapshot_id(step, 1)
    with staging(parent, name) as aside:
        files = {
            f"model-{index}.safetensors": write_hashed(aside / f"model-{index}.safetensors", data)
            for index in range(SHARDS)
        }
        manifest = Manifest(
            kind="full", run_id="r", id=name, parent=None, step=step, incarnation=1, model="m", files=files
        )
        seal(aside, parent / name, manifest)


def delta(older: Path, newer: Path) -> dict[str, object]:
    """Share of bf16 weights with other bits, and what is left of the newer file as a compressed XOR with the older."""
    changed, apart, total = 0, bytearray(), 0
    with safe_open(older, "pt") as one, safe_open(newer, "pt") as two:
        for name in two.keys():  # noqa: SIM118
            bits = [file.get_tensor(name).flatten().view(torch.int16).numpy() for file in (one, two)]
            different = np.bitwise_xor(*bits)
            changed, total = changed + int(np.count_nonzero(different)), total + different.size
            apart += different.view(np.uint8).reshape(-1, 2).T.tobytes()  # low bytes, then high bytes
    return {"changed": round(changed / total, 4), "weights": total} | compressed(bytes(apart))


def compressed(data: bytes) -> dict[str, float]:
    """Share of the size that is left, and MB of input a second."""
    ways: dict[str, Callable[[bytes], bytes]] = {"zlib 1": lambda data: zlib.compress(data, 1)}
    ways |= {"lzma 0": lambda data: lzma.compress(data, preset=0)}
    try:
        import zstandard
    except ImportError:
        pass
    else:
        ways["zstd 1"] = zstandard.ZstdCompressor(level=1).compress
    found = {}
    for name, way in ways.items():
        start = time.process_time()
        left = len(way(data)) / len(data)
        found |= {name: round(left, 4), f"{name} MB/s": round(len(data) / 1e6 / (time.process_time() - start))}
    return found


def main() -> None:
    flags = argparse.ArgumentParser(prog="benchmarks.snapshots", description=__doc__.splitlines()[0])
    flags.add_argument("directories", nargs="*", type=Path, default=[Path(), Path("/dev/shm")])
    flags.add_argument("--delta", nargs=2, type=Path, metavar=("OLDER", "NEWER"))
    options = flags.parse_args()
    tidy_when_stopped()
    if options.delta:
        emit("snapshots --delta", [delta(*options.delta)])
    else:
        rows = [row for directory in options.directories for row in cost(directory)]
        emit("snapshots", rows, gb=SHARD * SHARDS / 1e9, rounds=ROUNDS)


if __name__ == "__main__":
    main()
