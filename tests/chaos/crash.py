"""Crash points: where a process can be killed, found by watching, not written into the program.

Every call that changes a file, and the functions below that change what a process believes, are points; each can
kill before it is called or after. A site is the call and the function of ours that made it, for example
`os.rename@protocol.snapshot.seal`.
"""

import functools
import importlib
import os
import signal
import sys
from collections.abc import Callable
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
ROOMS = ("protocol", "policy", "sampler", "trainer")
CALLS = ("open", "rename", "replace", "fsync", "mkdir", "unlink", "rmdir")
"""Of the module `os`. `open` counts only where it makes a file."""
FUNCTIONS = (
    "protocol.channel.Hub.__init__",
    "protocol.channel.Hub.send",
    "protocol.channel.Uplink.send",
    "protocol.rundir.RunDir.write_endpoint",
    "sampler.answer.Answerer.answer",
    "sampler.session.Session.on",
    "sampler.weights.Weights.load",
    "tests.chaos.toy.ToyEngine.generate",
    "tests.chaos.toy.ToyEngine.switch",
    "tests.chaos.toy.ToyPolicy._add",
    "tests.chaos.toy.ToyPolicy.load",
    "tests.chaos.toy.ToyPolicy.save",
    "tests.chaos.toy.ToyPolicy.update",
    "trainer.desk.Desk.on",
    "trainer.inbox.Inbox.commit",
    "trainer.inbox.Inbox.finish",
    "trainer.ledger.Ledger.grant",
    "trainer.ledger.Ledger.offer",
    "trainer.ledger.Ledger.restore",
    "trainer.ledger.Ledger.state",
    "trainer.ledger.Ledger.take",
    "trainer.record.Record.step",
    "trainer.store.Store.checkpoint",
    "trainer.store.Store.publish",
)


def watch(seen: Callable[[str], None]) -> None:
    """Calls `seen` with `before SITE` and `after SITE` whenever this process passes one, from now on."""
    for name in CALLS:
        original = getattr(os, name)
        setattr(os, name, _watched_call(original, name, seen))
    for dotted in FUNCTIONS:
        owner, name = _resolve(dotted)
        setattr(owner, name, _watched_function(getattr(owner, name), dotted, seen))


def kill_at(point: str, hit: int, hits: Path) -> None:
    """This process kills itself the `hit`-th time (from 1) that it comes to the point, and leaves proof in `hits`."""
    left = [hit]

    def count(found: str) -> None:
        if found == point:
            left[0] -= 1
            if left[0] == 0:
                _append(hits, point)
                os.kill(os.getpid(), signal.SIGKILL)

    watch(count)


def note_points(file: Path) -> None:
    """Writes every point that this process passes into `file`, each once."""
    known: set[str] = set()

    def note(found: str) -> None:
        if found not in known:
            known.add(found)
            _append(file, found)

    watch(note)


def _append(file: Path, line: str) -> None:
    descriptor = OPEN(file, os.O_WRONLY | os.O_APPEND | os.O_CREAT, 0o600)
    os.write(descriptor, f"{line}\n".encode())
    os.close(descriptor)


OPEN = os.open


def _watched_call(original: Callable, name: str, seen: Callable[[str], None]) -> Callable:
    @functools.wraps(original)
    def call(*arguments, **options):
        makes = name != "open" or (len(arguments) > 1 and arguments[1] & os.O_CREAT)
        site = _caller() if makes else None
        if site:
            seen(f"before os.{name}@{site}")
        result = original(*arguments, **options)
        if site:
            seen(f"after os.{name}@{site}")
        return result

    return call


def _caller() -> str | None:
    """The nearest function of ours on the stack."""
    frame = sys._getframe(2)
    while frame:
        path = Path(frame.f_code.co_filename)
        if path.is_relative_to(ROOT) and path.relative_to(ROOT).parts[0] in ROOMS:
            return ".".join([*path.relative_to(ROOT).with_suffix("").parts, frame.f_code.co_name])
        frame = frame.f_back
    return None


def _watched_function(original: Callable, name: str, seen: Callable[[str], None]) -> Callable:
    @functools.wraps(original)
    def call(*arguments, **options):
        seen(f"before {name}")
        result = original(*arguments, **options)
        if hasattr(result, "__await__"):
            return _awaited(result, name, seen)
        seen(f"after {name}")
        return result

    return call


async def _awaited(result, name: str, seen: Callable[[str], None]):
    value = await result
    seen(f"after {name}")
    return value


def _resolve(dotted: str) -> tuple[object, str]:
    """The object that holds a function: `a.b.C.f` -> (C, "f")."""
    *parents, name = dotted.split(".")
    for cut in range(len(parents), 0, -1):
        try:
            owner = importlib.import_module(".".join(parents[:cut]))
        except ModuleNotFoundError:
            continue
        for part in parents[cut:]:
            owner = getattr(owner, part)
        return owner, name
    raise LookupError(dotted)
