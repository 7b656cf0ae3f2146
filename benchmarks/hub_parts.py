"""What lies under the hub's figures: the same bytes over a bare socket pair, each part of the work alone, gloo."""

import os
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import zmq
from zmq.auth.thread import ThreadAuthenticator

from benchmarks.measure import timed
from benchmarks.processes import forked, free_port, stop_all
from protocol import codec
from protocol.channel import DOMAIN
from protocol.keys import Keys, open_keys
from protocol.messages import Group
from protocol.recipe import Recipe
from trainer.accept import has_reference, problem
from trainer.ranks import Ranks

WINDOW = 8
"""Messages of one client that are on their way, as with leases."""


def raw(size: int, clients: int, seconds: float) -> dict[str, object]:
    """ROUTER and DEALERs that carry messages of `size` bytes and look into none: with CURVE, without; and memcpy."""
    found: dict[str, object] = {"kB": round(size / 1e3, 1), "clients": clients}
    for name, encrypted in (("CURVE", True), ("plain", False)):
        rate, cost = _bare(size, clients, seconds, encrypted)
        found |= {f"{name} MB/s": round(rate / 1e6), f"{name} CPU s/GB": round(cost * 1e9, 2)}
    block = bytes(size)
    return found | {"memcpy CPU s/GB": round(_each(lambda: bytearray(block)) / 1e3 / size * 1e9, 2)}


def _bare(size: int, clients: int, seconds: float, encrypted: bool) -> tuple[float, float]:
    """Bytes a second, and CPU seconds a byte of the end that receives."""
    keys, port = open_keys(Path(tempfile.mkdtemp(prefix="hub-")) / "keys"), free_port()
    children = [forked(lambda: _push(keys, port, size, encrypted), Path(os.devnull)) for _ in range(clients)]
    context = zmq.Context()
    authenticator = ThreadAuthenticator(context)
    authenticator.start()
    authenticator.configure_curve(domain=DOMAIN, location=str(keys.clients))
    socket = context.socket(zmq.ROUTER)
    if encrypted:
        socket.setsockopt(zmq.CURVE_SERVER, 1)
        socket.setsockopt(zmq.CURVE_SECRETKEY, keys.hub_secret)
        socket.setsockopt(zmq.CURVE_PUBLICKEY, keys.hub_public)
        socket.setsockopt_string(zmq.ZAP_DOMAIN, DOMAIN)
    socket.bind(f"tcp://127.0.0.1:{port}")
    carried, start, used = 0, 0.0, 0.0
    while not start or time.monotonic() - start < seconds:
        peer, data = socket.recv_multipart()
        socket.send_multipart([peer, b""])
        if not start and carried > 2 * clients * WINDOW * size:
            start, used, carried = time.monotonic(), time.process_time(), 0
        carried += len(data)
    rate, cost = carried / (time.monotonic() - start), (time.process_time() - used) / carried
    stop_all(children)
    socket.close(0)
    authenticator.stop()
    context.term()
    return rate, cost


def _push(keys: Keys, port: int, size: int, encrypted: bool) -> None:
    socket = zmq.Context().socket(zmq.DEALER)
    if encrypted:
        socket.setsockopt(zmq.CURVE_SERVERKEY, keys.hub_public)
        socket.setsockopt(zmq.CURVE_SECRETKEY, keys.sampler_secret)
        socket.setsockopt(zmq.CURVE_PUBLICKEY, keys.sampler_public)
    socket.connect(f"tcp://127.0.0.1:{port}")
    data = os.urandom(size)
    for _ in range(WINDOW):
        socket.send(data)
    while True:
        socket.recv()
        socket.send(data)


def parts(group: Group, recipe: Recipe, vocabulary: int) -> dict[str, object]:
    """Milliseconds of CPU for one group, each part alone."""
    frame, step = codec.encode(group), codec.encode_groups([group])
    checks = {
        "completions": len(group.completions),
        "max_tokens": recipe.sampling.max_tokens,
        "vocabulary": vocabulary,
        "reference": has_reference(group, recipe),
    }
    assert problem(group, **checks) is None
    return {
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


def broadcast(data: bytes, size: str, world: int = 2) -> dict[str, object]:
    """One step's groups from rank 0 to the other ranks, over gloo on one machine."""
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
        "group": size, "ranks": world, "MB": round(len(data) / 1e6, 2), "ms": round(seconds * 1e3, 1),
        "MB/s": round(len(data) / 1e6 / seconds),
    }  # fmt: skip


if __name__ == "__main__":
    raise SystemExit("a part of another benchmark: python -m benchmarks.hub")
