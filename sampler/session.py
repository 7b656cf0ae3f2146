"""The trainer as a sampler sees it: a stream of leases and weight notices that survives every restart of either.

Says hello, beats, sends each group until it is acknowledged, reconnects after silence, re-reads the endpoint in
the run directory (a trainer that was restarted listens elsewhere). One coroutine does all of it.
"""

import asyncio
import logging
import secrets
import time
from collections.abc import AsyncIterator, Callable
from dataclasses import dataclass

from protocol.channel import Uplink
from protocol.codec import Malformed
from protocol.errors import Rejected, TrainerGone
from protocol.keys import Keys
from protocol.messages import (
    Ack,
    Agreement,
    Beat,
    Bye,
    DataSet,
    Down,
    Failure,
    Group,
    Hello,
    Lease,
    Pulse,
    Rejection,
    Split,
    Stop,
    Welcome,
    Who,
)
from protocol.recipe import Recipe
from protocol.rundir import RunDir

log = logging.getLogger(__name__)

SAY_S = 30.0
"""Between two lines that say what is waited for."""

Work = tuple[Split, int]


@dataclass(slots=True)
class Load:
    """What a beat reports about the engine."""

    snapshot: str | None
    want: int
    progress: int


class Session:
    """sets: the two splits' rows. load: asked at every beat with the leases held, answers what the engine can take."""

    def __init__(
        self,
        rundir: RunDir,
        keys: Keys,
        recipe: Recipe,
        agreement: Agreement,
        sets: dict[Split, DataSet],
        load: Callable[[set[Work]], Load],
        versions: dict[str, str],
    ) -> None:
        self._rundir, self._keys, self._load = rundir, keys, load
        self._network, self._steps = recipe.network, recipe.trainer.steps
        self.name = secrets.token_hex(8)
        self._hello = Hello(
            session=self.name, agreement=agreement, train=sets["train"], eval=sets["eval"], versions=versions
        )
        self._uplink: Uplink | None = None
        self._held: set[Work] = set()
        self._outbox: dict[Work, tuple[Group | Failure, float]] = {}
        self._pulse: Pulse | None = None
        self._heard = self._beaten = time.monotonic()
        self._changed = asyncio.Event()
        self._stopped = self._greet = False
        self._connected = self._said = 0.0

    async def messages(self) -> AsyncIterator[Lease | Pulse]:
        """New leases and new weight notices, until the trainer says stop or `stop` is called.

        waits for: the trainer (until `grace_s`). Raises Rejected, TrainerGone.
        """
        changed = asyncio.ensure_future(self._changed.wait())
        try:
            while not self._stopped:
                await self._connect()
                received = await self._receive(changed)
                if changed.done():
                    self._changed.clear()
                    changed = asyncio.ensure_future(self._changed.wait())
                    self._beaten = 0.0
                for news in self._handle(received):
                    yield news
                await self._keep_up()
        finally:
            changed.cancel()
            if self._uplink:
                await self._uplink.send(Bye(session=self.name))
                await asyncio.sleep(0.05)  # LINGER is 0: give the goodbye a moment to leave
                self._uplink.close()

    async def answer(self, message: Group | Failure) -> None:
        """Sends the answer to a lease, again and again until it is acknowledged."""
        work = (message.split, message.group_id)
        self._outbox[work] = (message, time.monotonic())
        if self._uplink:
            await self._uplink.send(message)
        self.changed()

    def changed(self) -> None:
        """The engine's load is another: beat now."""
        self._changed.set()

    def stop(self) -> None:
        self._stopped = True
        self._changed.set()

    # -- inside --------------------------------------------------------------------------------------------------

    async def _receive(self, changed: asyncio.Future) -> Down | None:
        """The next message, or None when a beat is due or the load has changed."""
        assert self._uplink is not None
        due = max(0.0, self._beaten + self._network.beat_s - time.monotonic())
        receiving = asyncio.ensure_future(self._uplink.receive(due))
        await asyncio.wait({receiving, changed}, return_when=asyncio.FIRST_COMPLETED)
        if not receiving.done():
            receiving.cancel()
            return None
        try:
            return receiving.result()
        except Malformed as error:
            log.warning("dropped a malformed message: %s", error)
            return None

    def _handle(self, message: Down | None) -> list[Lease | Pulse]:
        if message is None:
            return []
        self._heard = time.monotonic()
        match message:
            case Welcome():
                log.info("joined trainer incarnation %d", message.incarnation)
                self._beaten = 0.0
            case Who():
                self._greet = True
            case Rejection():
                raise Rejected(f"the trainer refused this sampler: {message.why}")
            case Ack():
                work = (message.split, message.group_id)
                self._outbox.pop(work, None)
                self._held.discard(work)
                self._beaten = 0.0
            case Stop(final=True):
                log.info("the trainer says that the run is complete")
                self._stopped = True
            case Pulse() if message != self._pulse:
                self._pulse = message
                return [message]
            case Lease():
                fresh = [item for item in message.items if (message.split, item[0]) not in self._held]
                self._held |= {(message.split, group_id) for group_id, _ in fresh}
                return [Lease(split=message.split, items=fresh)] if fresh else []
        return []

    async def _keep_up(self) -> None:
        """Hello when asked, a beat when due, answers again that nobody acknowledged."""
        assert self._uplink is not None
        now = time.monotonic()
        if self._greet:
            self._greet = not await self._uplink.send(self._hello)
        if now - self._beaten >= self._network.beat_s:
            self._beaten = now
            load = self._load(self._held)
            held = sorted(self._held)
            beat = Beat(session=self.name, snapshot=load.snapshot, want=load.want, held=held, progress=load.progress)
            await self._uplink.send(beat)
        for work, (message, sent) in list(self._outbox.items()):
            if now - sent > self._network.resend_s:
                self._outbox[work] = (message, now)
                await self._uplink.send(message)
        silent = now - self._heard
        if silent > self._network.grace_s:
            raise TrainerGone(f"no trainer answered for {silent:.0f} s at {self._rundir.path}; is it running?")
        if now - self._connected > self._network.dead_s < silent:
            log.info("the trainer is silent for %.0f s: connecting again", silent)
            self._uplink.close()
            self._uplink = None

    async def _connect(self) -> None:
        """Waits until the run directory names an endpoint, and connects to it."""
        while self._uplink is None and not self._stopped:
            endpoint = self._rundir.read_endpoint()
            if endpoint and endpoint.steps >= self._steps:
                log.info("the run is complete")
                self._stopped = True
            elif endpoint:
                self._uplink = Uplink(self._keys, endpoint.address)
                self._greet, self._connected = True, time.monotonic()
            else:
                waited = time.monotonic() - self._heard
                if waited > self._network.grace_s:
                    raise TrainerGone(f"no trainer appeared in {self._rundir.path}; start one with --run there")
                self._say_that_it_waits(waited)
                await asyncio.sleep(0.5)

    def _say_that_it_waits(self, waited: float) -> None:
        if waited > self._said + SAY_S:
            self._said = waited
            log.info("waiting for a trainer: python -m trainer --run %s", self._rundir.path)
