"""A trainer of one rank without a policy: the real hub, desk and inbox, for benchmarks that train nothing."""

import contextlib
import os
import threading
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from benchmarks.processes import free_port
from policy.agreement import agree
from policy.model import load_tokenizer, locate
from protocol.channel import Hub
from protocol.keys import open_keys
from protocol.recipe import Recipe
from protocol.rundir import Endpoint, RunDir
from trainer.desk import Desk
from trainer.inbox import Inbox
from trainer.publish import Publisher
from trainer.ranks import Ranks


@dataclass(frozen=True, kw_only=True)
class RankZero:
    """directory: of the recipe's model. Samplers find it once `endpoint` is written and `inbox` serves."""

    inbox: Inbox
    stop: threading.Event
    publisher: Publisher
    directory: Path
    incarnation: int
    endpoint: Endpoint


@contextlib.contextmanager
def rank_zero(rundir: RunDir, recipe: Recipe) -> Iterator[RankZero]:
    """Within it this process has no GPU: what a sampler is to have must be looked up before."""
    with _environment(), _served(rundir, recipe) as trainer:
        yield trainer


@contextlib.contextmanager
def _environment() -> Iterator[None]:
    """Of a launcher's only rank, without GPUs, which are the sampler's."""
    before = dict(os.environ)
    os.environ |= {"RANK": "0", "LOCAL_RANK": "0", "WORLD_SIZE": "1", "LOCAL_WORLD_SIZE": "1"}
    os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free_port()), "CUDA_VISIBLE_DEVICES": ""}
    try:
        yield
    finally:
        os.environ.clear()
        os.environ |= before


@contextlib.contextmanager
def _served(rundir: RunDir, recipe: Recipe) -> Iterator[RankZero]:
    keys, directory = open_keys(rundir.keys), locate(recipe.model)
    tokenizer, incarnation = load_tokenizer(directory), rundir.claim_incarnation()
    desk = Desk(recipe=recipe, agreement=agree(keys.run_id, directory, tokenizer, recipe), incarnation=incarnation)
    hub, stop = Hub(keys, "127.0.0.1", 0), threading.Event()
    with Ranks("gloo", 1) as ranks, Inbox(ranks, desk, hub, stop, rundir) as inbox:
        yield RankZero(
            inbox=inbox,
            stop=stop,
            publisher=Publisher(rundir, keys.run_id, incarnation, tokenizer),
            directory=directory,
            incarnation=incarnation,
            endpoint=Endpoint(address=hub.address, incarnation=incarnation, host="x"),
        )


if __name__ == "__main__":
    raise SystemExit("a part of other benchmarks: python -m benchmarks.weights, python -m benchmarks.end_to_end")
