"""All ranks of all nodes hold the same: run directory, recipe and software. Asked before a model is loaded.

Rank 0 says what it holds over the store, each rank answers with what it misses, and all read all answers, so that
all of them end with the same sentence.
"""

import hashlib
import importlib.metadata
import logging
import secrets
import time
from pathlib import Path

import msgspec
import torch.distributed as dist

from protocol.disk import names_in
from protocol.errors import StorageError, UserError
from protocol.recipe import Recipe
from protocol.rundir import RunDir
from trainer.ranks import Ranks
from trainer.rendezvous import Peer, all_have_read, nodes

log = logging.getLogger(__name__)

SEEN_S = 60.0
"""A network filesystem may show a new file so late."""
LIBRARIES = ("torch", "deepspeed", "transformers", "peft", "numpy", "safetensors")
ROOMS = ("protocol", "policy", "doctor", "trainer")


class Held(msgspec.Struct, frozen=True):
    """What rank 0 holds."""

    token: str
    """Name of a file that it has just made in the run directory."""
    run: str
    """Absolute path of the run directory; paths below it are passed on between ranks."""
    recipe: dict
    software: dict[str, str]


def call_roll(ranks: Ranks, rundir: RunDir, recipe: Recipe) -> None:
    """Called by all ranks. Raises UserError on all of them, with the name of a node that differs from rank 0's."""
    own, store = ranks.peers[ranks.rank], dist.PrefixStore("roll", ranks.store)
    mark = rundir.logs / f".roll-{secrets.token_hex(8)}"
    held = Held(token=mark.name, run=str(rundir.path.absolute()), recipe=plain(recipe), software=software())
    if ranks.first and ranks.world != recipe.trainer.gpus:
        log.info(
            "the launcher started %d ranks, trainer.gpus = %d counts for nothing", ranks.world, recipe.trainer.gpus
        )
    if ranks.world == 1:
        return
    if ranks.first:
        log.info("%s", nodes(ranks.peers))
    try:
        if ranks.first:
            _make(mark)
            store.set("held", msgspec.json.encode(held))
        wanted = msgspec.json.decode(store.get("held"), type=Held)
        store.set(f"answer/{ranks.rank}", difference(own, ranks.peers[0], rundir, wanted, held))
        answers = [store.get(f"answer/{rank}").decode() for rank in range(ranks.world)]
        all_have_read(store, ranks.rank, ranks.world)
    finally:
        if ranks.first:
            mark.unlink(missing_ok=True)
    if problems := [answer for answer in answers if answer]:
        more = f" ({len(problems) - 1} more ranks differ)" if len(problems) > 1 else ""
        raise UserError(problems[0] + more)


def difference(own: Peer, first: Peer, rundir: RunDir, wanted: Held, held: Held) -> str:
    """In one sentence what this rank (own) lacks of what rank 0 (first) wants; "" where it has all."""
    if not _sees(rundir.logs, wanted.token):
        return (
            f"{own} does not see what {first} writes into {rundir.path.absolute()}: expected one directory that all "
            "nodes share; name it with --run"
        )
    if held.run != wanted.run:
        return f"{own} has the run directory at {held.run}, {first} at {wanted.run}: expected one path on all nodes"
    for name, version in wanted.software.items():
        if held.software.get(name) != version:
            return f"{own} has {name} {held.software.get(name)}, {first} has {version}: install the same on all nodes"
    settings, mine = _flat(wanted.recipe), _flat(held.recipe)
    for name in [*settings, *mine]:
        if settings.get(name) != mine.get(name):
            return (
                f"{own} has {name} = {mine.get(name)}, {first} has {settings.get(name)}: "
                "give the trainer the same --recipe and --set on all nodes"
            )
    return ""


def plain(recipe: Recipe) -> dict:
    """As it comes out of JSON: no tuples."""
    return msgspec.json.decode(msgspec.json.encode(recipe))


def software() -> dict[str, str]:
    """Versions of what must compute alike; of this project a hash of its code."""
    digest, root = hashlib.sha256(), Path(__file__).parent.parent
    for path in sorted(path for room in ROOMS for path in (root / room).rglob("*.py")):
        digest.update(f"{path.relative_to(root)}\0".encode() + path.read_bytes())
    return {name: importlib.metadata.version(name) for name in LIBRARIES} | {"this code": digest.hexdigest()[:12]}


def _make(mark: Path) -> None:
    try:
        mark.touch(exist_ok=False)
    except OSError as error:
        raise StorageError(f"cannot write {mark}: {error.strerror}; free space or mend permissions") from None


def _sees(directory: Path, name: str) -> bool:
    """By listing: a network filesystem remembers for a while that a name was absent."""
    deadline = time.monotonic() + SEEN_S
    while name not in names_in(directory):
        if time.monotonic() > deadline:
            return False
        time.sleep(0.5)
    return True


def _flat(table: dict, above: str = "") -> dict[str, object]:
    """Settings by their dotted names."""
    found = {}
    for name, value in table.items():
        found |= _flat(value, f"{above}{name}.") if isinstance(value, dict) else {f"{above}{name}": value}
    return found
