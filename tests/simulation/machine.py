"""One sampler process: a real Session, carried as sampler/link.py does, and a made-up engine as in sampler/loop.py."""

from __future__ import annotations

from typing import TYPE_CHECKING

import msgspec

from protocol.errors import Rejected
from protocol.messages import Down, Failure, Lease, Pulse, Up
from sampler.session import Load, Session, Work
from tests.simulation.answers import AGREED, NETWORK, SIZE, make, sets
from tests.simulation.clock import Process
from tests.simulation.network import DOWN, UP

if TYPE_CHECKING:
    from tests.simulation.history import History

PATIENCE_S = 120.0
"""For a snapshot that is not there, as in sampler/weights.py."""
SHORT_S = 0.01
"""A float that is added and subtracted may fall short of a deadline; this is beyond it."""


class Machine(Process):
    """kind: healthy, hostile (all its groups are unsound) or foreign (of another model)."""

    def __init__(self, history: History, number: int, kind: str) -> None:
        super().__init__(history.clock, history.dice.uniform(0.0, 1e6))
        self.history, self.dice, self.number, self.kind = history, history.dice, number, kind
        agreement = msgspec.structs.replace(AGREED, model="another") if kind == "foreign" else AGREED
        self.name = f"{kind} sampler {number}"
        self.session = Session(f"{number:04}", NETWORK, agreement, sets(history.plan), self._load, {})
        self.capacity = SIZE["train"] * self.dice.randint(1, 6)
        self.pace = history.plan.group_s * self.dice.choice((1.0, 1.0, 1.0, 3.0))
        self.uplink = self.uplinks = 0
        """Number of the connection; 0 while there is none."""
        self.peer, self.address = b"", 0
        self.heard = self.connected = self.time()
        self.snapshot: str | None = None
        self.wanted: Pulse | None = None
        self.loading = False
        self.running = self.progress = 0
        self.hung_until = 0.0
        self.wake = float("inf")
        self.later(self.dice.uniform(0.0, 3.0), self.turn)

    # -- the link ------------------------------------------------------------------------------------------------

    def turn(self) -> None:
        """Connects if need be, sends what is due, sleeps until more will be."""
        self._watch_silence()
        if not self.uplink:
            self._connect()
        if not self.alive:
            return
        if self.uplink:
            for message in self.session.due(self.time()):
                self._send(message)
        self._sleep()

    def _send(self, message: Up) -> None:
        history = self.history
        history.network.carry(UP, self.number, message, None, history.arrive, self, self.peer, self.address)

    def send_down(self, uplink: int, message: Down) -> None:
        """What the trainer sends to one of this machine's connections."""
        self.history.network.carry(DOWN, self.number, message, self, self._receive, uplink)

    def _receive(self, uplink: int, message: Down) -> None:
        if uplink != self.uplink:  # of a connection that is closed
            return
        self.heard = self.time()
        try:
            news = self.session.on(message)
        except Rejected as error:
            self.history.was_rejected(self, str(error))
            self.end("was rejected")
            return
        for item in news:
            match item:
                case Pulse():
                    self._want(item)
                case Lease():
                    self._work(item)
        if self.session.stopped:
            self.end("has heard that the run is complete", goodbye=True)
        else:
            self.turn()

    def end(self, why: str, goodbye: bool = False) -> None:
        self.history.say("%s %s", self.name, why)
        if goodbye and self.uplink:
            self._send(self.session.goodbye())
        self.alive = False

    def jump(self, seconds: float) -> None:
        """Its clock shows more all of a sudden."""
        self.offset += seconds
        self.later(SHORT_S, self.turn)

    def _watch_silence(self) -> None:
        now = self.clock.now + self.offset
        silent = now - self.heard
        if silent <= NETWORK.dead_s:
            return
        if silent > NETWORK.grace_s:
            self.end("has no trainer and gives up")
            self.history.join(self.kind, after_s=PATIENCE_S)
        elif self.uplink and now - self.connected > NETWORK.dead_s < silent:
            self.uplink = 0

    def _connect(self) -> None:
        endpoint = self.history.disk.endpoint
        if endpoint and endpoint.steps >= self.history.plan.steps:
            self.end("has read that the run is complete")
        elif endpoint:
            self.uplinks += 1
            self.uplink, self.address, self.connected = self.uplinks, endpoint.address, self.time()
            self.peer = self.history.new_peer(self)
            self.session.connected()

    def _sleep(self) -> None:
        now = self.clock.now
        due = self.session.wake_at() - self.offset if self.uplink else now + 0.5
        due = min(max(due + SHORT_S, now + SHORT_S), now + NETWORK.beat_s)
        if due < self.wake:
            self.wake = due
            self.clock.at(due, self, self._woken, due)

    def _woken(self, planned: float) -> None:
        if planned >= self.wake:
            self.wake = float("inf")
            self.turn()

    # -- the engine ----------------------------------------------------------------------------------------------

    def hang(self, seconds: float) -> None:
        """No token leaves the engine; the session goes on beating."""
        self.hung_until = max(self.hung_until, self.clock.now + seconds)

    def _load(self, held: set[Work]) -> Load:
        """As in sampler/replica.py."""
        if self.running and self.clock.now >= self.hung_until:
            self.progress += 1
        free = self.capacity - sum(SIZE[split] for split, _ in held)
        return Load(self.snapshot, max(0, free), self.progress)

    def _want(self, pulse: Pulse) -> None:
        self.wanted = pulse
        if not self.loading and self.snapshot != pulse.snapshot:
            self.loading = True
            self.later(
                self.history.plan.read_s * self.dice.uniform(0.1, 1.9), self._read, pulse, self.clock.now + PATIENCE_S
            )

    def _read(self, pulse: Pulse, patience: float) -> None:
        """The announced snapshot is used from now on, if it can be read; if not, the old one is."""
        here = pulse.snapshot in self.history.disk.snapshots
        self.history.counts["snapshots gone before they were read"] += not here
        if not here and self.wanted == pulse and self.clock.now < patience:
            self.later(5.0, self._read, pulse, patience)
            return
        self.loading = False
        if self.history.disk.readable(pulse.snapshot) and self.dice.random() >= self.history.plan.unreadable:
            self.snapshot = pulse.snapshot
            self.session.changed()
        elif self.wanted == pulse:
            self.history.counts["snapshots unreadable"] += 1
            self.session.unreadable(pulse, "not the sealed bytes")
        self._want(self.wanted)
        self.turn()

    def _work(self, lease: Lease) -> None:
        for group_id, row in lease.items:
            seconds = self.pace * self.dice.uniform(0.5, 1.5)
            if self.dice.random() < self.history.plan.straggle:
                seconds *= 10.0
                self.history.counts["stragglers"] += 1
            self.running += 1
            self.later(seconds, self._answer, lease.split, group_id, row, self.snapshot)

    def _answer(self, split: str, group_id: int, row: int, begun: str) -> None:
        if self.clock.now < self.hung_until:
            self.clock.at(self.hung_until, self, self._answer, split, group_id, row, begun)
            return
        self.running -= 1
        self.progress += 1
        if self.kind == "healthy" and self.history.fails(split, group_id):
            message = Failure(session=self.session.name, split=split, group_id=group_id, why="the reward crashed")
        else:
            sound = self.kind == "healthy" and not (split == "train" and group_id in self.history.plan.poisoned)
            snapshots = (begun,) if begun == self.snapshot else (begun, self.snapshot)
            flat = split == "train" and self.dice.random() < self.history.plan.flat
            message = make(self.session.name, split, group_id, row, snapshots, sound, flat)
        self.session.answer(message)
        self.turn()
