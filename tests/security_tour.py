"""Everything that reads bytes from the network or the disk, once: tests/test_security.py watches it from outside."""

import asyncio
import logging
import sys
from pathlib import Path

import msgspec
import zmq

from protocol import codec
from protocol.channel import Hub, Uplink
from protocol.keys import Keys, open_keys
from protocol.messages import Beat, Bye, Hello
from protocol.metrics import MetricsWriter, read_metrics
from protocol.resolve import load
from protocol.rundir import Endpoint, RunDir, resolve_recipe
from protocol.snapshot import Manifest, listed, open_sealed, seal, staging, write_hashed
from tests.fuzz import wire
from tests.groups import make_group
from trainer.accept import problem


def tour(directory: Path) -> int:
    """How many things were read."""
    rundir, recipe = resolve_recipe(directory, None, ["trainer.steps=3"])
    assert load(rundir.recipe) == recipe
    rundir.write_endpoint(Endpoint(address="tcp://127.0.0.1:1", incarnation=rundir.claim_incarnation(), host="h"))
    assert rundir.read_endpoint() and rundir.newest_incarnation() == 1
    return 2 + _messages() + _desk() + _sealed(rundir, open_keys(rundir.keys)) + _metrics(rundir)


def _messages() -> int:
    for frame in wire.UP:
        codec.decode_up(frame)
    for frame in wire.DOWN:
        codec.decode_down(frame)
    group = make_group(0)
    assert codec.decode_groups(codec.encode_groups([group])) == [group]
    assert len(codec.unpack(group.prompt)) == 5
    for hostile in (b"", b"\xc1", b"\x80\x04\x95", b"cos\nsystem\n(S'true'\ntR."):
        try:
            codec.decode_up(hostile)
        except codec.Malformed:
            continue
        raise AssertionError(hostile)
    return len(wire.UP) + len(wire.DOWN) + 1


def _desk() -> int:
    session = wire.Session()
    sound = make_group(0, row=session.desk.train.row(0), snapshot=wire.NOW, lengths=[2, 2])
    assert problem(sound, completions=2, max_tokens=512, vocabulary=320, reference=False) is None
    for frame in [*wire.UP[1:], codec.encode(sound)]:
        session.hear(frame)
    session.train()
    session.check(session.desk.tick(100.0))
    return len(wire.UP)


def _sealed(rundir: RunDir, keys: Keys) -> int:
    name = "s00000001.i0001"
    with staging(rundir.snapshots, name) as aside:
        files = {"model.safetensors": write_hashed(aside / "model.safetensors", b"weights")}
        manifest = Manifest(
            kind="full", run_id=keys.run_id, id=name, parent=None, step=1, incarnation=1, model="m", files=files
        )
        sha256 = seal(aside, rundir.snapshots / name, manifest, keys.checkpoint)
    [path] = listed(rundir.snapshots)
    open_sealed(path, sha256).verified()
    open_sealed(path, key=keys.checkpoint).verified()
    return 2


def _metrics(rundir: RunDir) -> int:
    with MetricsWriter(rundir.metrics / "trainer.jsonl") as writer:
        writer.write({"step": 1, "loss": float("nan")})
    return len(read_metrics(rundir.metrics / "trainer.jsonl"))


async def _session(keys: Keys, hub: Hub) -> None:
    """One sampler says what samplers say, and is answered."""
    uplink = Uplink(keys, hub.address)
    greeting = Hello(session="x", agreement=wire.AGREED, train=wire.ROWS, eval=wire.EXAM)
    for message in (
        greeting,
        Beat(session="x", snapshot=None, want=1, held=[], progress=0),
        make_group(0),
        Bye(session="x"),
    ):
        for _ in range(1000):  # until the connection stands
            if await uplink.send(message):
                break
            await asyncio.sleep(0.02)
        heard = await asyncio.to_thread(hub.receive, 20.0)
        assert heard and heard[1] == message
        assert hub.send(heard[0], wire.PULSE)
        assert await uplink.receive(20.0) == wire.PULSE
    uplink.close()


def _stranger(keys: Keys, hub: Hub) -> None:
    public, secret = zmq.curve_keypair()
    with zmq.Context() as context, context.socket(zmq.DEALER) as dealer:
        dealer.setsockopt(zmq.LINGER, 0)
        dealer.curve_serverkey, dealer.curve_publickey, dealer.curve_secretkey = keys.hub_public, public, secret
        dealer.connect(hub.address)
        assert hub.receive(2.0) is None


def main(directory: Path) -> None:
    """A session at log level DEBUG in a run directory; then, told so, a crash with the keys in its message."""
    logging.basicConfig(level=logging.DEBUG, stream=sys.stdout, force=True)
    tour(directory)
    keys = open_keys(directory / "keys")
    with Hub(keys, "127.0.0.1", 0) as hub, MetricsWriter(directory / "metrics" / "hub.jsonl") as writer:
        asyncio.run(_session(keys, hub))
        _stranger(keys, hub)
        logging.debug("%s %s", keys, msgspec.structs.asdict(wire.PULSE))
        writer.write({"malformed": hub.malformed, "address": hub.address, "keys": repr(keys)})
        print("session over", flush=True)  # noqa: T201
        sys.stdin.readline()
        raise RuntimeError(keys)


if __name__ == "__main__":
    main(Path(sys.argv[1]))
