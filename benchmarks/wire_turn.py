"""One measurement of a way from sampler to trainer, for `benchmarks.wire`: server and clients as processes."""

import asyncio
import functools
import os
import tempfile
import threading
import time
from collections.abc import Callable
from pathlib import Path

import msgspec
import zmq

from benchmarks.hub_load import Size, agreed, answer_all, make_group, make_recipe, make_session
from benchmarks.processes import Children, free_port, spent_since, thread_seconds
from benchmarks.wire_formats import dealer, formats, receive_all, send_all
from protocol import codec
from protocol.channel import Hub
from protocol.keys import Keys, open_keys
from protocol.messages import Down, Group, Lease, Pulse, Up
from protocol.recipe import Recipe
from protocol.rundir import Endpoint, RunDir
from protocol.snapshot import snapshot_id
from trainer.desk import Desk, Letters
from trainer.inbox import Inbox
from trainer.ranks import Ranks

SHA = "0" * 64


def once(name: str, size: Size, clients: int, groups: int, window: int, per_step: int) -> dict[str, object]:
    if name.startswith("vesper"):
        return vesper(size, clients, groups, window, per_step, link=name.endswith("link"))
    return others(size, clients, groups, window, name)


def vesper(size: Size, clients: int, groups: int, window: int, per_step: int, link: bool = False) -> dict[str, object]:
    """So many groups, divided into steps; the clients share them as the desk decides."""
    with tempfile.TemporaryDirectory(prefix="wire-") as name:
        rundir = RunDir(Path(name))
        rundir.make()
        recipe, keys = make_recipe(size, per_step, groups // per_step), open_keys(rundir.keys)
        one = (lambda n: over_link(rundir, recipe, size, n, window)) if link else (
            lambda n: sample(rundir, recipe, size, keys, n, window)
        )  # fmt: skip
        return together(Path(name), lambda: serve(rundir, recipe, size, keys, clients), one, clients)


def others(size: Size, clients: int, groups: int, window: int, form: str) -> dict[str, object]:
    with tempfile.TemporaryDirectory(prefix="wire-") as name:
        found, keys, port = formats(size)[form], open_keys(Path(name) / "keys"), free_port()
        address, each = f"tcp://127.0.0.1:{port}", groups // clients
        return together(
            Path(name),
            lambda: receive_all(found, keys, port, clients, each),
            lambda n: send_all(found, keys, address, n, each, window),
            clients,
        )


def together(
    directory: Path, server: Callable[[], dict], client: Callable[[int], dict], clients: int
) -> dict[str, object]:
    """Server and clients as processes. -> groups/s from the first begun to the last booked, CPU seconds, counts, and
    how long each group took one way, in seconds. Exits where the counts do not add up."""
    works = [server, *(functools.partial(client, number) for number in range(clients))]
    outs = [directory / f"{index}.json" for index in range(len(works))]
    with Children(directory / "log") as children:
        for work, out in zip(works, outs, strict=True):
            children.start(lambda w=work, o=out: o.write_bytes(msgspec.json.encode(w())))
        children.wait()
    hub, *sides = [msgspec.json.decode(out.read_bytes()) for out in outs]
    sent = {key: begun for side in sides for key, begun in side["times"].items()}
    frames, dropped = sum(side["frames"] for side in sides), sum(hub["dropped"].values())
    if not (sent.keys() == hub["times"].keys() and frames == hub["frames"] == hub["trained"] + dropped):
        raise SystemExit(f"{frames} frames sent, {hub['frames']} received, {hub['trained']} trained, {hub['dropped']}")
    return {
        "rate": len(sent) / (max(hub["times"].values()) - min(sent.values())),
        "cpu": hub["cpu"] + sum(side["cpu"] for side in sides), "hub cpu": hub["cpu"],
        "busiest": max(side["busiest"] for side in (hub, *sides)),
        "late": [hub["times"][key] - begun for key, begun in sent.items()],
        "sent": frames, "received": hub["frames"], "trained": hub["trained"], "dropped": dropped,
    }  # fmt: skip


# -- vesper's own way ----------------------------------------------------------------------------------------


class TimedDesk(Desk):
    """Knows when it had booked each group."""

    frames = 0

    def __init__(self, **parts: object) -> None:
        super().__init__(**parts)
        self.times: dict[str, float] = {}

    def on(self, peer: bytes, message: Up, now: float) -> Letters:
        letters = super().on(peer, message, now)
        if isinstance(message, Group):
            self.frames += 1
            self.times[str(message.group_id)] = time.monotonic()
        return letters


def serve(rundir: RunDir, recipe: Recipe, size: Size, keys: Keys, clients: int) -> dict[str, object]:
    """Rank 0 for as many steps as the recipe has, once all clients have joined; trains nothing."""
    os.environ |= {"RANK": "0", "LOCAL_RANK": "0", "WORLD_SIZE": "1", "MASTER_ADDR": "127.0.0.1"}
    os.environ["MASTER_PORT"] = str(free_port())
    desk = TimedDesk(recipe=recipe, agreement=agreed(keys, recipe, size), incarnation=rundir.claim_incarnation())
    hub = Hub(keys, "127.0.0.1", 0)
    with Ranks("gloo", 1) as ranks, Inbox(ranks, desk, hub, threading.Event(), rundir) as inbox:
        inbox.serve()
        rundir.write_endpoint(Endpoint(address=hub.address, incarnation=desk.incarnation, host="x"))
        while len(desk.samplers) < clients:
            time.sleep(0.01)
        inbox.commit(Pulse(snapshot=snapshot_id(0, 1), manifest_sha256=SHA), 0)
        before, trained = thread_seconds(), 0
        for step in range(1, recipe.trainer.steps + 1):
            trained += len(inbox.take(recipe.trainer.prompts_per_step))
            inbox.commit(Pulse(snapshot=snapshot_id(step, 1), manifest_sha256=SHA), step)
        used = spent_since(before)
        inbox.finish(final=True)
    dropped = {name.removeprefix("train/"): count for name, count in desk.counts.items() if name != "train/accepted"}
    return {"times": desk.times, "frames": desk.frames, "trained": trained, "dropped": dropped} | used


def sample(rundir: RunDir, recipe: Recipe, size: Size, keys: Keys, number: int, window: int) -> dict[str, object]:
    """A sampler's session over a blocking socket, until the run is complete."""
    while (endpoint := rundir.read_endpoint()) is None:
        time.sleep(0.01)
    snapshots, times, frames, before = [snapshot_id(0, 1)], {}, 0, thread_seconds()
    session = make_session(f"client{number}", keys, recipe, size, snapshots, window)

    def hear(message: Down) -> None:
        for news in session.on(message):
            if isinstance(news, Pulse):
                snapshots[0] = news.snapshot
                session.changed()
            elif isinstance(news, Lease):
                for group_id, row in news.items:
                    times[str(group_id)] = time.monotonic()
                    session.answer(make_group(size, snapshots[0], session.name, group_id, row))

    with dealer(keys, endpoint.address, number) as socket:
        while not session.stopped:
            for message in session.due(time.monotonic()):
                frames += isinstance(message, Group)
                socket.send(codec.encode(message))
            if socket.poll(1000 * max(0.0, session.wake_at() - time.monotonic())):
                while (frame := received(socket)) is not None:
                    hear(codec.decode_down(frame))
        used = spent_since(before)
        socket.send(codec.encode(session.goodbye()))
        time.sleep(0.05)
    return {"times": times, "frames": frames} | used


def received(socket: zmq.Socket) -> bytes | None:
    try:
        return socket.recv(zmq.DONTWAIT)
    except zmq.Again:
        return None


def over_link(rundir: RunDir, recipe: Recipe, size: Size, number: int, window: int) -> dict[str, object]:
    """The same by the sampler's own link."""
    times: dict[str, float] = {}
    before = thread_seconds()
    frames = asyncio.run(answer_all(rundir, recipe, size, number, window, times))
    return {"times": times, "frames": frames} | spent_since(before)


if __name__ == "__main__":
    raise SystemExit("a part of another benchmark: python -m benchmarks.wire")
