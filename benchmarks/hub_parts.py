"""What lies under the hub's figures: each part of the work alone, and the way to the other ranks."""

import os
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

from benchmarks.hub_load import Size, make_group
from benchmarks.measure import timed
from benchmarks.processes import forked, free_port
from protocol import codec
from protocol.messages import Group
from trainer.accept import problem
from trainer.ranks import Ranks


def parts(size: Size) -> dict[str, object]:
    """Milliseconds of CPU for one group, each part alone."""
    group = make_group(size)
    frame, step = codec.encode(group), codec.encode_groups([group])
    checks = {
        "completions": size.completions, "max_tokens": size.length, "vocabulary": size.vocabulary,
        "reference": size.reference,
    }  # fmt: skip
    assert problem(group, **checks) is None
    return {
        "encode ms": _each(lambda: codec.encode(make_group(size))),
        "decode ms": _each(lambda: codec.decode_up(frame)),
        "checks ms": _each(lambda: problem(group, **checks)),
        "encode for ranks ms": _each(lambda: codec.encode_groups([group])),
        "decode on a rank ms": _each(lambda: codec.decode_groups(step)),
        "copy ms": _each(lambda: bytes(bytearray(frame))),
    }


def _each(work: Callable[[], object], count: int = 100) -> float:
    """Milliseconds of CPU: other processes on the machine do not count."""
    times = []
    for _ in range(5):
        start = time.thread_time()
        for _ in range(count):
            work()
        times.append(time.thread_time() - start)
    return round(min(times) / count * 1e3, 4)


def broadcast(groups: list[Group], world: int = 2) -> dict[str, object]:
    """One step's groups from rank 0 to the other ranks, over gloo on one machine."""
    data = codec.encode_groups(groups)
    place = {"WORLD_SIZE": world, "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": free_port()}
    out = Path(tempfile.mkdtemp(prefix="hub-"))

    def join(rank: int) -> None:
        with Ranks("gloo", 1) as ranks:
            times = [timed(lambda: ranks.broadcast(data if rank == 0 else None, len(data))) for _ in range(12)]
            (out / str(rank)).write_text(str(sorted(times)[len(times) // 2]))

    children = [forked(lambda r=r: join(r), out / "log", RANK=r, LOCAL_RANK=r, **place) for r in range(world)]
    for child in children:
        os.waitpid(child, 0)
    seconds = float((out / "0").read_text())
    return {
        "ranks": world, "MB": round(len(data) / 1e6, 2), "ms": round(seconds * 1e3, 1),
        "MB/s": round(len(data) / 1e6 / seconds),
    }  # fmt: skip


if __name__ == "__main__":
    raise SystemExit("a part of another benchmark: python -m benchmarks.hub")
