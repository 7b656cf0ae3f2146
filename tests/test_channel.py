"""Real sockets: who gets in, what arrives, and that nothing listens beyond the one port."""

import asyncio
import os
import stat
import time

import psutil
import pytest
import zmq

from protocol import codec
from protocol.channel import Hub, Uplink
from protocol.errors import PortBusy, UserError
from protocol.keys import open_keys
from protocol.messages import Bye, Lease, Pulse
from tests.groups import make_group


@pytest.fixture
def keys(tmp_path):
    return open_keys(tmp_path / "keys")


def receive(hub: Hub, timeout_s: float = 3.0):
    return hub.receive(timeout_s)


def client(
    keys, hub: Hub, *, public: bytes | None, secret: bytes | None, server: bytes | None, patience_s: float = 1.0
) -> list:
    """What the hub hears of a client with these keys."""
    with zmq.Context() as context, context.socket(zmq.DEALER) as socket:
        socket.setsockopt(zmq.LINGER, 0)
        if server:
            socket.curve_serverkey, socket.curve_publickey, socket.curve_secretkey = server, public, secret
        socket.connect(hub.address)
        socket.send(codec.encode(Bye(session="x")))
        heard = hub.receive(patience_s)
    return [] if heard is None else [heard[1]]


@pytest.mark.fault("O1")
def test_only_a_listed_key_with_the_right_server_key_is_heard(keys):
    stranger_public, stranger_secret = zmq.curve_keypair()
    ours = {"public": keys.sampler_public, "secret": keys.sampler_secret}
    strange = {"public": stranger_public, "secret": stranger_secret}
    with Hub(keys, "127.0.0.1", 0) as hub:
        assert client(keys, hub, **ours, server=keys.hub_public, patience_s=15.0) == [Bye(session="x")]
        assert client(keys, hub, **strange, server=keys.hub_public) == []
        assert client(keys, hub, **ours, server=stranger_public) == []
        assert client(keys, hub, public=None, secret=None, server=None) == []


def test_messages_go_both_ways(keys):
    async def talk():
        with Hub(keys, "127.0.0.1", 0) as hub:
            uplink = Uplink(keys, hub.address)
            for _ in range(50):  # IMMEDIATE: nothing is queued before the connection stands
                if await uplink.send(make_group(5)):
                    break
                await asyncio.sleep(0.05)
            peer, group = await asyncio.to_thread(receive, hub)
            assert group == make_group(5)
            assert hub.send(peer, Pulse(snapshot="s00000001.i0001", manifest_sha256="h"))
            assert await uplink.receive(3.0) == Pulse(snapshot="s00000001.i0001", manifest_sha256="h")
            uplink.close()

    asyncio.run(talk())


@pytest.mark.fault("F2")
def test_sending_to_a_peer_that_is_gone_is_known_at_once(keys):
    with Hub(keys, "127.0.0.1", 0) as hub:
        assert hub.send(b"nobody", Pulse(snapshot="s00000001.i0001", manifest_sha256="h")) is False


def test_garbage_and_several_frames_are_counted_and_dropped(keys):
    with Hub(keys, "127.0.0.1", 0) as hub, zmq.Context() as context, context.socket(zmq.DEALER) as socket:
        socket.setsockopt(zmq.LINGER, 0)
        socket.curve_serverkey = keys.hub_public
        socket.curve_publickey, socket.curve_secretkey = keys.sampler_public, keys.sampler_secret
        socket.connect(hub.address)
        socket.send(b"\xff\xfegarbage")
        socket.send_multipart([b"a", b"b"])
        socket.send(codec.encode(Bye(session="x")))
        assert [receive(hub), receive(hub)] == [None, None]
        assert receive(hub)[1] == Bye(session="x")
        assert hub.malformed == 2


def test_exactly_one_port_listens_and_it_is_on_the_loopback(keys):
    before = {c.laddr for c in psutil.Process().net_connections("tcp") if c.status == "LISTEN"}
    with Hub(keys, "127.0.0.1", 0) as hub:
        after = {c.laddr for c in psutil.Process().net_connections("tcp") if c.status == "LISTEN"}
        [new] = after - before
        assert hub.address == f"tcp://{new.ip}:{new.port}" and new.ip == "127.0.0.1"


@pytest.mark.fault("H2")
def test_a_taken_port_and_a_foreign_address_are_explained(keys):
    with Hub(keys, "127.0.0.1", 0) as hub:
        port = int(hub.address.rpartition(":")[2])
        with pytest.raises(PortBusy, match="taken"):
            Hub(keys, "127.0.0.1", port)
    with pytest.raises(UserError, match=r"network\.bind"):
        Hub(keys, "192.0.2.1", 0)


def test_keys_are_private_stable_and_refused_when_shared(tmp_path):
    keys = open_keys(tmp_path / "keys")
    assert open_keys(tmp_path / "keys").run_id == keys.run_id
    for path in [tmp_path / "keys", *(tmp_path / "keys").glob("*secret"), tmp_path / "keys" / "checkpoint.key"]:
        assert not stat.S_IMODE(os.stat(path).st_mode) & 0o077
    (tmp_path / "keys" / "hub.key_secret").chmod(0o644)
    with pytest.raises(UserError, match="chmod"):
        open_keys(tmp_path / "keys")


def raw_client(context: zmq.Context, keys, address: str, queue: int = 256) -> zmq.Socket:
    """A peer with the run's key that reads only when told to."""
    socket = context.socket(zmq.DEALER)
    socket.setsockopt(zmq.LINGER, 0)
    socket.setsockopt(zmq.RCVHWM, queue)
    socket.curve_serverkey = keys.hub_public
    socket.curve_publickey, socket.curve_secretkey = keys.sampler_public, keys.sampler_secret
    socket.connect(address)
    socket.send(codec.encode(Bye(session="x")))
    return socket


@pytest.mark.fault("F2")
def test_a_peer_that_does_not_read_blocks_nobody_and_loses_nothing_in_silence(keys):
    """Each send says at once whether the message was taken: all that were taken arrive, and others are served.

    A ROUTER that is not MANDATORY answers "sent" for what it drops: 1955 of 2000 were lost like that.
    """
    lease = Lease(split="train", items=[(number, number) for number in range(5000)])
    with Hub(keys, "127.0.0.1", 0) as hub, zmq.Context() as context:
        slow = raw_client(context, keys, hub.address, queue=1)
        slow_peer = receive(hub)[0]
        other = raw_client(context, keys, hub.address)
        other_peer = receive(hub)[0]
        taken, slowest, full = 0, 0.0, False
        while not full:
            began = time.monotonic()
            full = not hub.send(slow_peer, lease)
            slowest = max(slowest, time.monotonic() - began)
            taken += not full
            assert taken < 5000, "the queue of a peer that does not read has no end"
        assert slowest < 5.0 and hub.unsent == 1
        assert hub.send(other_peer, lease) and other.poll(3000)
        arrived = 0
        while slow.poll(5000):
            assert codec.decode_down(slow.recv()) == lease
            arrived += 1
        assert arrived == taken >= 256
        assert hub.send(slow_peer, lease) and slow.poll(3000)
        slow.close()
        other.close()


@pytest.mark.fault("L3")
def test_reconnecting_samplers_leave_no_descriptor_behind(keys):
    async def visit(address: str) -> None:
        uplink = Uplink(keys, address)
        while not await uplink.send(Bye(session="x")):
            await asyncio.sleep(0.01)
        uplink.close()

    def settled(least: int) -> int:
        """Open descriptors, once there are no more than `least` or nothing has changed for long."""
        deadline = time.monotonic() + 60
        while (count := psutil.Process().num_fds()) > least and time.monotonic() < deadline:
            hub.receive(0.05)
        return count

    with Hub(keys, "127.0.0.1", 0) as hub:
        alone = psutil.Process().num_fds()
        for _ in range(40):
            asyncio.run(visit(hub.address))
        assert settled(alone) <= alone
