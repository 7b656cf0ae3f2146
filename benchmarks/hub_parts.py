"""What lies under the hub's figures: each part of the work alone, and the way to the other ranks."""

import statistics
import tempfile
import time
from collections.abc import Callable, Sequence
from pathlib import Path

from benchmarks.hub_load import Size, make_group
from benchmarks.measure import spread, timed
from benchmarks.processes import Children, free_port
from protocol import codec
from protocol.messages import Group
from trainer.accept import problem
from trainer.ranks import Ranks


def parts(size: Size) -> list[dict[str, object]]:
    """A row for each part: milliseconds of CPU for one group, with their spread."""
    group = make_group(size)
    frame, step = codec.encode(group), codec.encode_groups([group])
    checks = {
        "completions": size.completions, "max_tokens": size.length, "vocabulary": size.vocabulary,
        "reference": size.reference,
    }  # fmt: skip
    assert problem(group, **checks) is None
    works = {
        "encode": lambda: codec.encode(make_group(size)),
        "decode": lambda: codec.decode_up(frame),
        "checks": lambda: problem(group, **checks),
        "encode for ranks": lambda: codec.encode_groups([group]),
        "decode on a rank": lambda: codec.decode_groups(step),
        "copy": lambda: bytes(bytearray(frame)),
    }
    return [{"part": name, **_each(work)} for name, work in works.items()]


def _each(work: Callable[[], object], count: int = 100) -> dict[str, float]:
    """Of CPU time: other processes on the machine do not count."""
    times = []
    for _ in range(5):
        start = time.thread_time()
        for _ in range(count):
            work()
        times.append((time.thread_time() - start) / count)
    return _milliseconds(times)


def _milliseconds(seconds: Sequence[float]) -> dict[str, float]:
    found = spread(seconds)
    return {column: round(found[key] * 1e3, 4) for column, key in (("ms", "median"), ("min", "min"), ("max", "max"))}


def broadcast(groups: list[Group], world: int = 2) -> dict[str, object]:
    """One step's groups from rank 0 to the other ranks, over gloo on one machine."""
    data = codec.encode_groups(groups)
    place = {"WORLD_SIZE": world, "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": free_port()}
    with tempfile.TemporaryDirectory(prefix="hub-") as name, Children(Path(name) / "log") as children:
        out = Path(name) / "seconds"
        for rank in range(world):
            children.start(lambda r=rank: _join(r, data, out), RANK=rank, LOCAL_RANK=rank, **place)
        children.wait()
        seconds = [float(line) for line in out.read_text().split()]
    rate = len(data) / 1e6 / statistics.median(seconds)
    return {"ranks": world, "MB": round(len(data) / 1e6, 2), **_milliseconds(seconds), "MB/s": round(rate)}


def _join(rank: int, data: bytes, out: Path) -> None:
    """One rank; the first one writes seconds, one a line."""
    with Ranks("gloo", 1) as ranks:
        times = [timed(lambda: ranks.broadcast(data if rank == 0 else None, len(data))) for _ in range(12)]
    if rank == 0:
        out.write_text("\n".join(map(str, times)))


if __name__ == "__main__":
    raise SystemExit("a part of another benchmark: python -m benchmarks.hub")
