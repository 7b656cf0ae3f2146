"""All ranks of all nodes hold the same: run directory, recipe and software. Asked before a model is loaded.

Rank 0 says what it holds, each rank answers with what it misses, and all of them end with the same sentence.
"""

import contextlib
import hashlib
import logging
import secrets
import time
from pathlib import Path

import msgspec

from policy.model import locate
from protocol.disk import names_in
from protocol.errors import StorageError, UserError
from protocol.recipe import Model, Recipe
from protocol.rundir import RunDir
from protocol.versions import libraries
from trainer.ranks import Ranks
from trainer.rendezvous import Peer, nodes

log = logging.getLogger(__name__)

SEEN_S = 60.0
"""A network filesystem may show a new file so late."""
FETCH_S = 6 * 3600.0
"""For the slowest node to download the model."""
LOAD_S = 1800.0
"""For the slowest node to load it."""
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
    """Called by all ranks. Raises UserError on all of them, with the name of a node that differs from rank 0's, and
    StorageError with the name of one that cannot use the run directory."""
    if ranks.first and ranks.world != recipe.trainer.gpus:
        log.info(
            "the launcher started %d ranks, trainer.gpus = %d counts for nothing", ranks.world, recipe.trainer.gpus
        )
    if ranks.world == 1:
        return
    if ranks.first:
        log.info("%s", nodes(ranks.peers))
    mark = rundir.logs / f".roll-{secrets.token_hex(8)}"
    held = Held(token=mark.name, run=str(rundir.path.absolute()), recipe=plain(recipe), software=software())
    own, first = ranks.peers[ranks.rank], ranks.peers[0]
    try:
        ranks.notes.together("the run directory", lambda: _make(mark) if ranks.first else None)
        [wanted] = ranks.notes.swap("what rank 0 holds", [held] if ranks.first else [], list[Held])[0]
        ranks.notes.together("what all hold", lambda: _refuse(difference(own, first, rundir, wanted, held)))
    finally:
        if ranks.first:
            with contextlib.suppress(OSError):
                mark.unlink()


def fetch(ranks: Ranks, model: Model) -> Path:
    """The model's directory on this node, once all nodes have theirs, which may have to download it first."""
    return ranks.notes.together("the model", lambda: locate(model), FETCH_S)


def refuse_other_kernels(ranks: Ranks, kernels: str) -> None:
    """Called by all ranks. Raises UserError on all of them where one has chosen others than rank 0.

    kernels: what was chosen, without reasons: `attention varlen`. Which packages are there was compared before.
    """
    chosen = ranks.notes.swap("the kernels", kernels, str, LOAD_S)
    for peer, other in zip(ranks.peers, chosen, strict=True):
        if other != chosen[0]:
            raise UserError(
                f"{peer} would compute with {other}, {ranks.peers[0]} with {chosen[0]}: expected the same on all "
                "GPUs; set trainer.attention to what all of them can"
            )


def _refuse(problem: str) -> None:
    if problem:
        raise UserError(problem)


def difference(own: Peer, first: Peer, rundir: RunDir, wanted: Held, held: Held) -> str:
    """In one sentence what this rank (own) lacks of what rank 0 (first) wants; "" where it has all."""
    if not _sees(rundir.logs, wanted.token):
        return (
            f"{own} does not see what {first} writes into {rundir.path.absolute()}: expected one directory that all "
            "nodes share; name it with --run"
        )
    if held.run != wanted.run:
        return f"{own} has the run directory at {held.run}, {first} at {wanted.run}: expected one path on all nodes"
    for name in [*wanted.software, *held.software]:
        here, there = held.software.get(name, "none"), wanted.software.get(name, "none")
        if here != there:
            return f"{own} has {name} {here}, {first} has {there}: install the same on all nodes"
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
    of_trainer = {name: version for name, version in libraries().items() if not name.startswith("vllm")}
    return of_trainer | {"this code": digest.hexdigest()[:12]}


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
