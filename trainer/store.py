"""The run's durable side as the loop sees it: publish after every step, checkpoint now and then."""

import time

from protocol.messages import Pulse
from protocol.recipe import TrainerTable
from trainer.checkpoint import Checkpoints
from trainer.engine import Policy
from trainer.inbox import Inbox
from trainer.publish import Publisher


class Store:
    """first: whether this rank is the one that writes snapshots. `spent_s` adds up the time that all of it took."""

    def __init__(self, publisher: Publisher, checkpoints: Checkpoints, settings: TrainerTable, *, first: bool) -> None:
        self._publisher, self._checkpoints, self._settings, self._first = publisher, checkpoints, settings, first
        self.spent_s = 0.0

    def publish(self, policy: Policy) -> Pulse:
        start = time.monotonic()
        pulse = self._publisher.publish(policy, self._first)
        self.spent_s += time.monotonic() - start
        return pulse

    def checkpoint(self, policy: Policy, inbox: Inbox, now: bool = False) -> None:
        """Saves when one is due, or `now`; and removes snapshots that nobody needs any more."""
        start = time.monotonic()
        if now or policy.steps_done % self._settings.checkpoint_every == 0:
            self._checkpoints.save(policy, inbox, keep=self._settings.keep_checkpoints)
        if self._first:
            self._publisher.prune(keep=self._settings.max_staleness + 2, in_use=inbox.loaded())
        self.spent_s += time.monotonic() - start
