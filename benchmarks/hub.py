"""What the hub on rank 0 carries: clients that answer every lease at once, through the real sockets, desk and ledger.

    python -m benchmarks.hub [--seconds 4]

Clients are processes with a real session and link; groups have random tokens and no engine. The consumer takes and
commits steps as fast as it can. A thread is the limit when it is busy all the time, so beside what this machine
carried each row says what the busiest thread of the hub's process could carry on a core of its own (`could`).
"""

import argparse
import asyncio
import os
import tempfile
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

import msgspec
import numpy as np

from benchmarks.child import tidy_when_stopped
from benchmarks.hub_load import Size, agreed, answer_all, beats, make_group, make_recipe
from benchmarks.hub_parts import broadcast, parts
from benchmarks.measure import emit
from benchmarks.processes import Children, free_port, memory_mb, thread_seconds
from protocol import codec
from protocol.channel import Hub
from protocol.keys import Keys, open_keys
from protocol.messages import Pulse
from protocol.recipe import Recipe
from protocol.rundir import Endpoint, RunDir
from protocol.snapshot import snapshot_id
from trainer.desk import Desk
from trainer.inbox import Inbox
from trainer.ranks import Ranks

SHA = "0" * 64


def carried(size: Size, clients: int, seconds: float) -> dict[str, object]:
    """One load for so many seconds, after two more in which the clients join."""
    with tempfile.TemporaryDirectory(prefix="hub-") as name, Children(Path(name) / "log") as children:
        rundir = RunDir(Path(name))
        rundir.make()
        recipe, keys, answers, out = make_recipe(size), open_keys(rundir.keys), Path(name) / "beats", Path(name) / "out"
        want = max(2, 128 // clients)
        for number in range(clients):
            children.start(lambda n=number: asyncio.run(answer_all(rundir, recipe, size, n, want, {})))
        children.start(lambda: asyncio.run(beats(rundir, recipe, size, answers)))
        server = children.start(
            lambda: out.write_bytes(msgspec.json.encode(serve(rundir, recipe, size, keys, seconds)))
        )
        children.wait(server)
        return figures(size, clients, msgspec.json.decode(out.read_bytes()), answers.read_text().split())


def figures(size: Size, clients: int, found: Mapping, answers: Sequence[str]) -> dict[str, object]:
    """found: what `serve` returned; answers: seconds until each beat was answered."""
    times = [float(line) for line in answers]
    late = np.quantile(times[len(times) // 3 :] or [float("nan")], [0.5, 0.99]) * 1e3
    size_bytes = len(codec.encode(make_group(size)))
    return {
        **size.facts, "ref": size.reference, "clients": clients, "kB": round(size_bytes / 1e3, 1),
        "groups/s": round(found["rate"], 1), "completions/s": round(found["rate"] * size.completions),
        "MB/s": round(found["rate"] * size_bytes / 1e6, 1),
        **{name: round(share, 2) for name, share in found["busy"].items()},
        "could": round(found["rate"] / max(found["busy"].values())),
        "beat p50 ms": round(float(late[0]), 1), "beat p99 ms": round(float(late[1]), 1),
        "RSS MB": [round(one) for one in found["rss"]],
    }  # fmt: skip


def serve(rundir: RunDir, recipe: Recipe, size: Size, keys: Keys, seconds: float) -> dict[str, object]:
    """Rank 0: the real hub, desk and inbox; the consumer takes steps and trains nothing."""
    os.environ |= {"RANK": "0", "LOCAL_RANK": "0", "WORLD_SIZE": "1", "MASTER_ADDR": "127.0.0.1"}
    os.environ["MASTER_PORT"] = str(free_port())
    desk = Desk(recipe=recipe, agreement=agreed(keys, recipe, size), incarnation=rundir.claim_incarnation())
    hub = Hub(keys, "127.0.0.1", 0)
    with Ranks("gloo", 1) as ranks, Inbox(ranks, desk, hub, threading.Event(), rundir) as inbox:
        inbox.serve()
        inbox.commit(Pulse(snapshot=snapshot_id(0, 1), manifest_sha256=SHA), 0)
        rundir.write_endpoint(Endpoint(address=hub.address, incarnation=desk.incarnation, host="x"))
        step = 0
        names = {threading.get_native_id(): "consumer", inbox._thread.native_id: "hub thread"}

        def consume(until: Callable[[], bool]) -> int:
            nonlocal step
            taken = 0
            while not until():
                taken += len(inbox.take(recipe.trainer.prompts_per_step))
                step += 1
                inbox.commit(Pulse(snapshot=snapshot_id(step, 1), manifest_sha256=SHA), step)
            return taken

        joined = time.monotonic() + 2
        consume(lambda: time.monotonic() > joined and len(desk.samplers) > 1)
        before, rss, start = threads(names), [memory_mb()], time.monotonic()
        taken = consume(lambda: time.monotonic() - start > seconds / 2)
        rss.append(memory_mb())
        taken += consume(lambda: time.monotonic() - start > seconds)
        spent, after = time.monotonic() - start, threads(names)
        rss.append(memory_mb())
        assert not hub.malformed
        return {
            "rate": taken / spent,
            "busy": {name: (after[name] - before[name]) / spent for name in after},
            "rss": rss,
        }


def threads(names: dict[int, str]) -> dict[str, float]:
    """CPU seconds of each thread of this process; the busiest of those without a name is ZeroMQ's."""
    seconds = thread_seconds()
    others = [spent for thread, spent in seconds.items() if thread not in names]
    return {name: seconds[thread] for thread, name in names.items()} | {"ZeroMQ": max(others)}


def main() -> None:
    flags = argparse.ArgumentParser(prog="benchmarks.hub", description=__doc__.splitlines()[0])
    flags.add_argument("--seconds", type=float, default=4.0, help="of each load")
    flags.add_argument("--clients", type=int, nargs="+", default=[1, 4, 16, 64], help="with groups of 8 x 512")
    options = flags.parse_args()
    tidy_when_stopped()
    short, long = Size(), Size(completions=16, length=4096)
    loads = [(short, count) for count in options.clients]
    loads += [(size._replace(reference=reference), 4) for size in (short, long) for reference in (False, True)][1:]
    emit("hub", [carried(*one, options.seconds) for one in loads], prompts_per_step=64, prompt_tokens=short.prompt)
    sizes = [size._replace(reference=True) for size in (short, long)]
    emit("hub: parts", [size.facts | row for size in sizes for row in parts(size)])
    emit("hub: broadcast", [size.facts | broadcast([make_group(size)] * 16) for size in sizes])


if __name__ == "__main__":
    main()
