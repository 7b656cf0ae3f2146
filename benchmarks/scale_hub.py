"""Many groups through one hub, for `benchmarks.scale`."""

import os
import threading
import time
from collections import deque

from benchmarks.hub_load import Size, agreed, make_group, make_recipe, make_session
from benchmarks.processes import free_port, in_child, memory_mb
from protocol import codec
from protocol.keys import open_keys
from protocol.messages import Down, Lease, Pulse, Up
from protocol.rundir import RunDir
from protocol.snapshot import snapshot_id
from sampler.session import Session
from trainer.desk import Desk
from trainer.inbox import Inbox
from trainer.ranks import Ranks

SIZE = Size(completions=2, prompt=4, length=4, vocabulary=1024)
PER_STEP = 64
REPORTS = 10


class Loopback:
    """Stands for a Hub with one sampler behind it, in the hub thread itself. What passes is encoded and decoded."""

    malformed = unsent = 0

    def __init__(self, session: Session, used: list[str]) -> None:
        self._session, self._used = session, used
        self._up: deque[bytes] = deque()
        self._bell = threading.Event()

    def receive(self, timeout_s: float) -> tuple[bytes, Up] | None:
        if not self._up:
            self._up.extend(map(codec.encode, self._session.due(time.monotonic())))
        if not self._up:
            self._bell.wait(min(timeout_s, max(0.0, self._session.wake_at() - time.monotonic())))
            self._bell.clear()
            return None
        return b"peer", codec.decode_up(self._up.popleft())

    def send(self, _: bytes, message: Down) -> bool:
        for news in self._session.on(codec.decode_down(codec.encode(message))):
            if isinstance(news, Pulse):
                self._used[0] = news.snapshot
                self._session.changed()
            elif isinstance(news, Lease):
                for group_id, row in news.items:
                    self._session.answer(make_group(SIZE, self._used[0], self._session.name, group_id, row))
        return True

    def wake(self) -> None:
        self._bell.set()

    def close(self) -> None:
        """Nothing to close."""


def memory(groups: int) -> list[dict[str, object]]:
    """Resident memory of the process after each tenth of the groups. Exits where a group was lost or doubled."""
    return in_child(lambda directory: through_the_hub(groups, RunDir(directory)))


def through_the_hub(groups: int, rundir: RunDir) -> list[dict[str, object]]:
    os.environ |= {"RANK": "0", "LOCAL_RANK": "0", "WORLD_SIZE": "1", "MASTER_ADDR": "127.0.0.1"}
    os.environ["MASTER_PORT"] = str(free_port())
    steps, start, rows = -(-groups // PER_STEP), time.monotonic(), []
    rundir.make()
    recipe, keys, used = make_recipe(SIZE, PER_STEP, steps), open_keys(rundir.keys), [snapshot_id(0, 1)]
    desk = Desk(recipe=recipe, agreement=agreed(keys, recipe, SIZE), incarnation=rundir.claim_incarnation())
    hub = Loopback(make_session("client", keys, recipe, SIZE, used, 2 * PER_STEP), used)
    with Ranks("gloo", 1) as ranks, Inbox(ranks, desk, hub, threading.Event(), rundir) as inbox:
        inbox.serve()
        inbox.commit(Pulse(snapshot=used[0], manifest_sha256="0" * 64), 0)
        for step in range(1, steps + 1):
            taken = [group.group_id for group in inbox.take(PER_STEP)]
            assert taken == list(range((step - 1) * PER_STEP, step * PER_STEP)), f"step {step} trains {taken}"
            inbox.commit(Pulse(snapshot=snapshot_id(step, 1), manifest_sha256="0" * 64), step)
            if step * REPORTS // steps > (step - 1) * REPORTS // steps:
                rows.append(row(step * PER_STEP, time.monotonic() - start, inbox))
        inbox.finish(final=True, patience_s=0.0)
    return rows


def row(groups: int, seconds: float, inbox: Inbox) -> dict[str, object]:
    return {
        "groups": groups, "trained once": inbox.state()["ledger"]["done_below"], "groups/s": round(groups / seconds),
        "CPU us/group": round(time.process_time() / groups * 1e6), "RSS MB": round(memory_mb(), 1),
    }  # fmt: skip


if __name__ == "__main__":
    raise SystemExit("a part of another benchmark: python -m benchmarks.scale")
