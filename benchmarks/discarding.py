"""A trainer for one sampler that trains nothing: the real hub, desk and inbox, whose groups are thrown away."""

import contextlib
import os
import threading
from collections.abc import Iterator

from benchmarks.processes import free_port
from policy.agreement import agree
from policy.model import load_tokenizer, locate
from protocol.channel import Hub
from protocol.keys import open_keys
from protocol.messages import Group, Pulse
from protocol.recipe import Recipe
from protocol.rundir import Endpoint, RunDir
from protocol.snapshot import snapshot_id
from trainer.desk import Desk
from trainer.inbox import Inbox
from trainer.ranks import Ranks


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
    os.environ |= {"RANK": "0", "LOCAL_RANK": "0", "WORLD_SIZE": "1", "LOCAL_WORLD_SIZE": "1"}
    os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free_port())}
    keys, directory = open_keys(rundir.keys), locate(recipe.model)
    agreement = agree(keys.run_id, directory, load_tokenizer(directory), recipe)
    desk = Desk(recipe=recipe, agreement=agreement, incarnation=rundir.claim_incarnation())
    hub, stop = Hub(keys, "127.0.0.1", 0), threading.Event()
    with Ranks("gloo", 1) as ranks, Inbox(ranks, desk, hub, stop, rundir) as inbox:
        inbox.serve()
        trainer = Discarding(inbox, desk.incarnation, recipe.trainer.prompts_per_step)
        trainer.commit()
        rundir.write_endpoint(Endpoint(address=hub.address, incarnation=desk.incarnation, host="x"))
        yield trainer
        stop.set()


if __name__ == "__main__":
    raise SystemExit("a part of another benchmark: python -m benchmarks.sampler")
