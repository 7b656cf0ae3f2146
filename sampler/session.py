"""One sampler's side of the protocol: what it was told and what it still has to say, without socket, clock or task.

`on` takes one message, `due` says what should be sent now; `link.py` carries both. All of it may be lost at any
time: a new session starts empty and the trainer leases the old one's groups to others.
"""

import logging
from collections.abc import Callable
from dataclasses import dataclass

import msgspec

from protocol.errors import Rejected
from protocol.messages import (
    MAX_WHY,
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
    Unreadable,
    Up,
    Welcome,
    Who,
)
from protocol.recipe import Network

log = logging.getLogger(__name__)

FIRST_HELLO_S = 0.1
"""Between the first two hellos; doubled up to `beat_s` until the trainer answers."""
SOON_S = 0.5
"""After a beat, before the next one tells of answers and of the room that they left."""
NEVER = float("-inf")

Work = tuple[Split, int]


@dataclass(slots=True)
class Load:
    """What a beat reports about the engine."""

    snapshot: str | None
    want: int
    progress: int


class Session:
    """name: random, new for every process. sets: the two splits' rows.

    load: asked at every beat with the leases held, answers what the engine can take.
    """

    def __init__(
        self,
        name: str,
        network: Network,
        agreement: Agreement,
        sets: dict[Split, DataSet],
        load: Callable[[set[Work]], Load],
        versions: dict[str, str],
    ) -> None:
        self.name, self._network, self._load = name, network, load
        self.stopped = False
        self._hello = Hello(
            session=self.name, agreement=agreement, train=sets["train"], eval=sets["eval"], versions=versions
        )
        self._welcomed = False
        self._next_hello, self._hello_pause = NEVER, FIRST_HELLO_S
        self._last_beat = self._next_beat = NEVER
        self._held: set[Work] = set()
        self._outbox: dict[Work, Group | Failure] = {}
        self._sent: dict[Work, float] = {}
        self._failures = 0
        self._complaints: list[Unreadable] = []
        self._pulse: Pulse | None = None

    # -- what the trainer says -----------------------------------------------------------------------------------

    def connected(self) -> None:
        """A new connection: the trainer behind it may never have heard of this session."""
        self._welcomed = False
        self._next_hello, self._hello_pause = NEVER, FIRST_HELLO_S

    def on(self, message: Down) -> list[Lease | Pulse]:
        """New leases and new weight notices in a message. Raises Rejected."""
        match message:
            case Welcome():
                log.info("joined trainer incarnation %d", message.incarnation)
                self._welcomed = True
                self._next_beat = NEVER
                self._sent.clear()  # it may be another trainer than the one that was sent these answers
            case Who() if self._welcomed:
                self.connected()
            case Rejection():
                raise Rejected(f"the trainer refused this sampler: {message.why}")
            case Ack():
                self._forget((message.split, message.group_id))
            case Stop(final=True):
                log.info("the trainer says that the run is complete")
                self.stopped = True
            case Pulse() if message != self._pulse:
                self._pulse = message
                return [message]
            case Lease():
                fresh = [item for item in message.items if (message.split, item[0]) not in self._held]
                self._held |= {(message.split, group_id) for group_id, _ in fresh}
                return [Lease(split=message.split, items=fresh)] if fresh else []
        return []

    # -- what the engine says ------------------------------------------------------------------------------------

    def answer(self, message: Group | Failure) -> None:
        """Keeps the answer to a lease until it is acknowledged."""
        if isinstance(message, Failure):
            self._failures += 1
            message = msgspec.structs.replace(message, number=self._failures)
        self._outbox[message.split, message.group_id] = message
        self._beat_soon()

    def unreadable(self, pulse: Pulse, why: str) -> None:
        """The announced weights cannot be read: the trainer should look at them, and the next pulse tries again."""
        self._complaints.append(Unreadable(session=self.name, snapshot=pulse.snapshot, why=why[:MAX_WHY]))
        if self._pulse == pulse:
            self._pulse = None

    def changed(self) -> None:
        """The engine's load is another: beat now."""
        self._next_beat = NEVER

    # -- what is to be sent --------------------------------------------------------------------------------------

    def due(self, now: float) -> list[Up]:
        """Everything to be said at `now`; whatever of it is lost on the way becomes due again."""
        if not self._welcomed:
            return self._greeting(now)
        messages: list[Up] = []
        for work, answer in self._outbox.items():
            if now - self._sent.get(work, NEVER) >= self._network.resend_s:
                self._sent[work] = now
                messages.append(answer)
        messages += self._complaints
        self._complaints = []
        if now >= self._next_beat:
            self._last_beat, self._next_beat = now, now + self._network.beat_s
            messages.append(self._beat())
        return messages

    def wake_at(self) -> float:
        """The time at which something will be due that is not yet."""
        if not self._welcomed:
            return self._next_hello
        return min([self._next_beat, *(self._sent.get(work, NEVER) + self._network.resend_s for work in self._outbox)])

    def goodbye(self) -> Bye:
        return Bye(session=self.name)

    # -- inside --------------------------------------------------------------------------------------------------

    def _greeting(self, now: float) -> list[Up]:
        if now < self._next_hello:
            return []
        self._next_hello = now + self._hello_pause
        self._hello_pause = min(2 * self._hello_pause, self._network.beat_s)
        return [self._hello]

    def _beat(self) -> Beat:
        load = self._load(self._held)
        held = sorted(self._held)
        return Beat(session=self.name, snapshot=load.snapshot, want=load.want, held=held, progress=load.progress)

    def _forget(self, work: Work) -> None:
        self._outbox.pop(work, None)
        self._sent.pop(work, None)
        self._held.discard(work)
        self._beat_soon()  # the last beat may have counted it as held

    def _beat_soon(self) -> None:
        self._next_beat = min(self._next_beat, self._last_beat + SOON_S)
