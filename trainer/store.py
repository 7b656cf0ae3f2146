"""The run's durable side as the loop sees it: publish after every step, checkpoint now and then.

A full disk does not stop training at once: a snapshot that cannot be written is left out and samplers go on with
the one before, as long as staleness allows; a checkpoint is tried again after the next step.
"""

import logging
import time

from protocol.codec import encode_groups
from protocol.disk import write_atomic
from protocol.errors import Diverged, StorageError
from protocol.messages import Group, Pulse
from protocol.recipe import TrainerTable
from protocol.rundir import RunDir
from trainer.checkpoint import Checkpoints
from trainer.engine import Policy
from trainer.inbox import Inbox
from trainer.publish import Publisher
from trainer.retention import tidy
from trainer.stream import StreamWriter

log = logging.getLogger(__name__)

MAX_UNSAVED = 2
"""Checkpoints in a row that may fail."""
MAX_SKIPPED = 2
"""Steps in a row that may not be finite."""


class Store:
    """first: whether this rank is the one that writes snapshots. `spent_s` adds up the time that all of it took."""

    def __init__(
        self,
        rundir: RunDir,
        publisher: Publisher,
        checkpoints: Checkpoints,
        stream: StreamWriter,
        settings: TrainerTable,
        *,
        first: bool,
    ) -> None:
        self._rundir, self._publisher, self._checkpoints, self._stream = rundir, publisher, checkpoints, stream
        self._settings, self._first = settings, first
        self._pulse: Pulse | None = None
        self.unpublished = self.unsaved = 0
        """In a row."""
        self._excess = 0
        self.spent_s = 0.0

    def publish(self, policy: Policy) -> Pulse:
        """The notice of the newest snapshot: of these weights, or of older ones where the disk is full.

        Raises StorageError when more than `max_staleness` in a row could not be written, or the last one.
        """
        start = time.monotonic()
        try:
            self._pulse, self.unpublished = self._publisher.publish(policy, self._first), 0
        except StorageError as error:
            self.unpublished += 1
            last = policy.steps_done >= self._settings.steps
            if last or self._pulse is None or self.unpublished > self._settings.max_staleness:
                raise
            log.error("%s: samplers go on with %s", error, self._pulse.snapshot)
        self.spent_s += time.monotonic() - start
        return self._pulse

    def keep(self, step: int, groups: list[Group]) -> None:
        """The groups of a step that is done, for a replay."""
        if self._first:
            self._stream.keep(step, groups)

    @property
    def lost(self) -> int:
        """Steps that a full disk kept out of the stream."""
        return self._stream.lost

    def checkpoint(self, policy: Policy, inbox: Inbox, now: bool = False) -> None:
        """Saves when one is due, or `now`; and removes what nobody needs any more.

        Raises StorageError when `now`, or after MAX_UNSAVED failures in a row.
        """
        start = time.monotonic()
        if now or self.unsaved or policy.steps_done % self._settings.checkpoint_every == 0:
            try:
                self._checkpoints.save(policy, inbox)
                self.unsaved = 0
            except StorageError as error:  # the same on every rank
                self.unsaved += 1
                if now or self.unsaved > MAX_UNSAVED:
                    raise
                log.error("%s: trying again after the next step", error)
        if self._first:
            self._tidy(inbox)
        self.spent_s += time.monotonic() - start

    def _tidy(self, inbox: Inbox) -> None:
        newest = self._checkpoints.newest
        needed = inbox.loaded() | inbox.pinned() | ({newest} if newest else set())
        excess = tidy(self._rundir, self._settings, needed)
        if excess and not self._excess:
            log.warning("what is needed takes %.2f GB more than trainer.keep_gb", excess / 2**30)
        self._excess = excess

    def quarantine(self, policy: Policy, groups: list[Group], inbox: Inbox) -> None:
        """Keeps the groups of a step that was not finite for whoever looks into it; they are not trained.

        Raises Diverged after MAX_SKIPPED such steps in a row.
        """
        why = f"step {policy.steps_done + 1} was not finite"
        inbox.set_aside(why)
        if self._first:
            log.error("%s: skipped on all ranks, nothing has changed", why)
            self._keep(groups, policy.steps_done + 1)
        if policy.skipped > MAX_SKIPPED:
            raise Diverged(f"{policy.skipped} steps in a row were not finite; lower the learning rate; see quarantine/")

    def _keep(self, groups: list[Group], step: int) -> None:
        first, last = groups[0].group_id, groups[-1].group_id
        path = self._rundir.quarantine / f"step-{step}.groups-{first}-{last}.msgpack"
        try:
            path.parent.mkdir(exist_ok=True)
            write_atomic(path, encode_groups(groups))
            log.error("its %d groups are kept in %s", len(groups), path)
        except (OSError, StorageError) as error:
            log.error("its %d groups could not be kept: %s", len(groups), error)
