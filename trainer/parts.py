"""What the training loop and its record ask of the parts around them.

A run with samplers has an Inbox, a Store, Exams and a MetricsWriter. A replay has others in their places.
"""

from collections.abc import Mapping
from typing import Protocol, TypeVar

from protocol.messages import Group, Pulse
from trainer.engine import Policy


class Source(Protocol):
    """Where groups come from."""

    waited_s: float

    def take(self, count: int) -> list[Group] | None:
        """The groups of the next step, the same on every rank; None when there are no more, or a stop was asked for."""
        ...

    def commit(self, pulse: Pulse, step: int) -> None:
        """The taken groups are trained, and these are the weights that came of it."""
        ...

    def counts(self) -> dict[str, float]:
        """Figures for the record."""
        ...


SourceT = TypeVar("SourceT", bound=Source)
SourceT_contra = TypeVar("SourceT_contra", bound=Source, contravariant=True)


class Spending(Protocol):
    """What keeps the weights, as the record sees it."""

    spent_s: float

    @property
    def lost(self) -> int:
        """Steps that a full disk kept out of the stream."""
        ...


class Keeper(Spending, Protocol[SourceT_contra]):
    """It keeps the weights. It may ask more of its source than the loop does, so it names the kind of source."""

    def publish(self, policy: Policy) -> Pulse: ...

    def keep(self, step: int, groups: list[Group]) -> None: ...

    def checkpoint(self, policy: Policy, inbox: SourceT_contra) -> None: ...

    def quarantine(self, policy: Policy, groups: list[Group], inbox: SourceT_contra) -> None: ...


class Examiner(Protocol):
    """What evaluates the weights."""

    over: bool

    def look(self, policy: Policy) -> None: ...


class Writer(Protocol):
    """What takes the records."""

    @property
    def lost(self) -> int:
        """Records that a full disk kept out."""
        ...

    def write(self, record: Mapping[str, object]) -> None: ...
