"""Carries a session's messages to the trainer and back, and survives every restart of it.

Connects where the run directory says (a trainer that was restarted listens elsewhere), connects again after
silence, waits for a trainer until `grace_s` is over. One coroutine does all of it.
"""

import asyncio
import logging
import time
from collections.abc import AsyncIterator

from protocol.channel import Uplink
from protocol.codec import Malformed
from protocol.errors import TrainerGone
from protocol.keys import Keys
from protocol.messages import Down, Failure, Group, Lease, Pulse
from protocol.recipe import Recipe
from protocol.rundir import RunDir
from sampler.session import Session

log = logging.getLogger(__name__)

SAY_S = 30.0
"""Between two lines that say what is waited for."""


class Link:
    """The trainer, as the sampler's loop sees it: a stream of leases and weight notices, a place for answers."""

    def __init__(self, rundir: RunDir, keys: Keys, recipe: Recipe, session: Session) -> None:
        self.session = session
        self._rundir, self._keys = rundir, keys
        self._network, self._steps = recipe.network, recipe.trainer.steps
        self._uplink: Uplink | None = None
        self._heard = self._connected = time.monotonic()
        self._said = 0.0
        self._news = asyncio.Event()

    async def messages(self) -> AsyncIterator[Lease | Pulse]:
        """New leases and new weight notices, until the trainer says stop or `stop` is called.

        waits for: the trainer (until `grace_s`). Raises Rejected, TrainerGone.
        """
        try:
            while not self.session.stopped:
                await self._connect()
                await self._send()
                for news in self._handle(await self._receive()):
                    yield news
                self._watch_silence()
        finally:
            if self._uplink:
                await self._uplink.send(self.session.goodbye())
                await asyncio.sleep(0.05)  # LINGER is 0: give the goodbye a moment to leave
                self._uplink.close()

    def answer(self, message: Group | Failure) -> None:
        """Sends the answer to a lease, again and again until it is acknowledged."""
        self.session.answer(message)
        self._news.set()

    def loaded(self) -> None:
        """The engine uses other weights now."""
        self.session.changed()
        self._news.set()

    def unreadable(self, pulse: Pulse, why: str) -> None:
        """The announced weights cannot be read; the next notice of them counts as new."""
        self.session.unreadable(pulse, why)
        self._news.set()

    def stop(self) -> None:
        self.session.stopped = True
        self._news.set()

    # -- inside --------------------------------------------------------------------------------------------------

    async def _send(self) -> None:
        if self._uplink:
            for message in self.session.due(time.monotonic()):
                await self._uplink.send(message)  # what cannot leave now becomes due again

    async def _receive(self) -> Down | None:
        """The next message, or None when something is to be sent."""
        if self._uplink is None:
            return None
        wait = min(self._network.beat_s, max(0.0, self.session.wake_at() - time.monotonic()))
        receiving = asyncio.ensure_future(self._uplink.receive(wait))
        news = asyncio.ensure_future(self._news.wait())
        await asyncio.wait({receiving, news}, return_when=asyncio.FIRST_COMPLETED)
        self._news.clear()
        news.cancel()
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
        return self.session.on(message)

    def _watch_silence(self) -> None:
        now = time.monotonic()
        silent = now - self._heard
        if silent > self._network.grace_s:
            raise TrainerGone(f"no trainer answered for {silent:.0f} s; start one with --run {self._rundir.path}")
        if self._uplink and now - self._connected > self._network.dead_s < silent:
            log.info("the trainer is silent for %.0f s: connecting again", silent)
            self._uplink.close()
            self._uplink = None

    async def _connect(self) -> None:
        """Waits until the run directory names an endpoint, and connects to it."""
        while self._uplink is None and not self.session.stopped:
            endpoint = self._rundir.read_endpoint()
            if endpoint and endpoint.steps >= self._steps:
                log.info("the run is complete")
                self.session.stopped = True
            elif endpoint:
                self._uplink, self._connected = Uplink(self._keys, endpoint.address), time.monotonic()
                self.session.connected()
            else:
                self._watch_silence()
                self._say_that_it_waits(time.monotonic() - self._heard)
                await asyncio.sleep(0.5)

    def _say_that_it_waits(self, waited: float) -> None:
        if waited > self._said + SAY_S:
            self._said = waited
            log.info("waiting for a trainer: python -m trainer --run %s", self._rundir.path)
