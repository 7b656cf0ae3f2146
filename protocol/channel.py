"""The one socket pair: Hub (ROUTER, the trainer binds) and Uplink (DEALER, a sampler connects), CURVE-encrypted.

Both speak whole messages. Nothing sent is promised to arrive; the layers above ask again. Neither may be shared
between threads. Options follow from measurements: a ROUTER that is not MANDATORY drops in silence, a DEALER
that is not IMMEDIATE queues into nowhere, and LINGER would keep a dead process alive.
"""

import contextlib
import logging
import socket
from typing import Self

import zmq
import zmq.asyncio
from zmq.auth.thread import ThreadAuthenticator

from protocol import codec
from protocol.errors import PortBusy, UserError
from protocol.keys import Keys
from protocol.messages import Down, Up

log = logging.getLogger(__name__)

NOW = int(zmq.DONTWAIT)
"""pyzmq's own flags are enums: each `|` of them takes longer than what is sent."""
DOMAIN = "rl"
"""ZAP domain; an empty one would let every client in, whatever the list of keys says."""


class Hub:
    """The trainer's end. `receive` blocks; `send` never does."""

    def __init__(self, keys: Keys, host: str, port: int) -> None:
        self._context = zmq.Context()
        self._authenticator = ThreadAuthenticator(self._context)
        self._authenticator.start()
        self._authenticator.configure_curve(domain=DOMAIN, location=str(keys.clients))
        self._socket = self._context.socket(zmq.ROUTER)
        _configure(self._socket)
        self._socket.setsockopt(zmq.ROUTER_MANDATORY, 1)
        self._socket.setsockopt(zmq.CURVE_SERVER, 1)
        self._socket.setsockopt(zmq.CURVE_SECRETKEY, keys.hub_secret)
        self._socket.setsockopt(zmq.CURVE_PUBLICKEY, keys.hub_public)
        self._socket.setsockopt_string(zmq.ZAP_DOMAIN, DOMAIN)
        self._socket.setsockopt(zmq.ZAP_ENFORCE_DOMAIN, 1)
        self.malformed = self.unsent = 0
        self._bell, self._rope = socket.socketpair()
        self._rope.setblocking(False)
        self._poller = zmq.Poller()
        self._poller.register(self._socket, zmq.POLLIN)
        self._poller.register(self._bell, zmq.POLLIN)
        try:
            self._socket.bind(f"tcp://{host}:{port or '*'}")
        except zmq.ZMQError as error:
            self.close()
            if error.errno == zmq.EADDRINUSE:
                raise PortBusy(f"port {port} on {host} is taken; set network.port = 0 to take a free one") from None
            raise UserError(f"cannot listen on {host}:{port}: {error.strerror}; is network.bind right?") from None
        self.address = self._socket.getsockopt_string(zmq.LAST_ENDPOINT).rstrip("\0")
        if self.address.startswith(("tcp://0.0.0.0:", "tcp://[::]:")):  # a name may stand for the wildcard
            self.close()
            raise UserError(f"network.bind = {host!r} listens everywhere; name one address of this machine")

    def receive(self, timeout_s: float) -> tuple[bytes, Up] | None:
        """The next message and its peer; None after `timeout_s`, after `wake`, or for bytes that are no message."""
        received = self._received() or self._await(timeout_s)
        if received is None:
            return None
        peer, *frames = received
        try:
            if len(frames) != 1:
                raise codec.Malformed(f"{len(frames)} frames; expected one")
            return peer, codec.decode_up(frames[0])
        except codec.Malformed as error:
            self.malformed += 1
            log.warning("dropped malformed message %d: %s", self.malformed, error)
            return None

    def _received(self) -> list[bytes] | None:
        try:
            return self._socket.recv_multipart(NOW)
        except zmq.Again:
            return None

    def _await(self, timeout_s: float) -> list[bytes] | None:
        events = dict(self._poller.poll(int(timeout_s * 1000)))
        if self._bell.fileno() in events:
            self._bell.recv(4096)
        return self._received() if self._socket in events else None

    def send(self, peer: bytes, message: Down) -> bool:
        """False where the peer is gone or its queue is full; it will ask again."""
        try:
            self._socket.send_multipart([peer, codec.encode(message)], NOW)
        except zmq.ZMQError:
            self.unsent += 1
            return False
        return True

    def wake(self) -> None:
        """Ends a `receive` early; the one method that any thread may call."""
        with contextlib.suppress(BlockingIOError):  # so many rings that it is full, and heard in any case
            self._rope.send(b"!")

    def close(self) -> None:
        self._socket.close()
        self._bell.close()
        self._rope.close()
        self._authenticator.stop()
        self._context.term()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


class Uplink:
    """A sampler's end, for one event loop. A new one is made after every long silence."""

    def __init__(self, keys: Keys, address: str) -> None:
        self._context = zmq.asyncio.Context()
        self._socket = self._context.socket(zmq.DEALER)
        _configure(self._socket)
        self._socket.setsockopt(zmq.IMMEDIATE, 1)
        self._socket.setsockopt(zmq.RECONNECT_IVL_MAX, 2000)
        self._socket.setsockopt(zmq.CURVE_SERVERKEY, keys.hub_public)
        self._socket.setsockopt(zmq.CURVE_SECRETKEY, keys.sampler_secret)
        self._socket.setsockopt(zmq.CURVE_PUBLICKEY, keys.sampler_public)
        self._socket.connect(address)

    async def receive(self, timeout_s: float) -> Down | None:
        """The next message; None after `timeout_s`. Raises Malformed."""
        if not await self._socket.poll(int(timeout_s * 1000)):
            return None
        try:
            return codec.decode_down(await self._socket.recv(zmq.DONTWAIT))
        except zmq.Again:  # a connection that broke may take back what it had announced
            return None

    async def send(self, message: Up) -> bool:
        """False where no connection stands or its queue is full."""
        try:
            await self._socket.send(codec.encode(message), zmq.DONTWAIT)
        except zmq.Again:
            return False
        return True

    def close(self) -> None:
        self._socket.close()
        self._context.term()


def _configure(sock: zmq.Socket) -> None:
    sock.setsockopt(zmq.LINGER, 0)
    sock.setsockopt(zmq.SNDHWM, 256)
    sock.setsockopt(zmq.RCVHWM, 256)
    sock.setsockopt(zmq.MAXMSGSIZE, codec.MAX_FRAME)
    sock.setsockopt(zmq.HANDSHAKE_IVL, 10_000)
    sock.setsockopt(zmq.HEARTBEAT_IVL, 5_000)
    sock.setsockopt(zmq.HEARTBEAT_TIMEOUT, 20_000)
    sock.setsockopt(zmq.HEARTBEAT_TTL, 20_000)
