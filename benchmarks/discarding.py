"""A trainer for one sampler that trains nothing: the real hub, desk and inbox, whose groups are thrown away."""

import contextlib
from collections.abc import Iterator

from benchmarks.rank_zero import rank_zero
from protocol.messages import Group, Pulse
from protocol.recipe import Recipe
from protocol.rundir import RunDir
from protocol.snapshot import snapshot_id
from trainer.inbox import Inbox


class Discarding:
    """Leases `count` groups a step; snapshots are only names."""

    def __init__(self, inbox: Inbox, incarnation: int, count: int) -> None:
        self._inbox, self._incarnation, self._count = inbox, incarnation, count
        self._step = 0

    def groups(self) -> list[Group]:
        """Those of one step."""
        if self._step:
            self.commit()
        taken = self._inbox.take(self._count)
        self._step += 1
        assert taken
        return taken

    def commit(self) -> None:
        pulse = Pulse(snapshot=snapshot_id(self._step, self._incarnation), manifest_sha256="")
        self._inbox.commit(pulse, self._step)


@contextlib.contextmanager
def discarding(recipe: Recipe, rundir: RunDir) -> Iterator[Discarding]:
    with rank_zero(rundir, recipe) as hub:
        hub.inbox.serve()
        trainer = Discarding(hub.inbox, hub.incarnation, recipe.trainer.prompts_per_step)
        trainer.commit()
        rundir.write_endpoint(hub.endpoint)
        yield trainer
        hub.stop.set()


if __name__ == "__main__":
    raise SystemExit("a part of another benchmark: python -m benchmarks.sampler")
