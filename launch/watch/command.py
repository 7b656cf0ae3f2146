"""A live screen about a run, from its files alone: beside it, after it, on another machine.

python -m launch watch runs/demo
python -m launch watch runs/demo --once      one screen, then the end; also where the output is no terminal
"""

import argparse
import contextlib
import io
import os
import select
import sys
import termios
import time
import tty
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

import msgspec
from rich.console import Console
from rich.live import Live

from doctor.course import Course, Spell
from doctor.history import History, Seen
from doctor.rules import RULES
from doctor.window import Window
from launch.watch.figures import curves, disk_gb, machines, trained
from launch.watch.screen import Choice, View, screen
from launch.watch.state import state_of
from protocol.mirror import mirrors
from protocol.rollout import Rollout

EVERY_S = 2.0
DISK_S = 60.0
"""Between two looks at what the run takes: on a shared disk each is hundreds of questions."""
LINES = 50
"""Where the output is no terminal."""
KEYS: dict[str, Choice] = {"n": "newest", "b": "best", "w": "worst"}


def main(arguments: list[str]) -> int:
    flags = argparse.ArgumentParser("launch watch", description="A live screen about a run, read from its files.")
    flags.add_argument("run", type=Path, help="run directory, of a run that is going on or over")
    flags.add_argument("--once", action="store_true", help="one screen, then the end")
    options = flags.parse_args(arguments)
    if isinstance(sys.stdout, io.TextIOWrapper):
        sys.stdout.reconfigure(errors="replace")  # models write what an ASCII terminal cannot show
    watcher, console = Watcher(Course(History.open(options.run))), Console(highlight=False)
    if options.once or not console.is_terminal:
        height = console.height if console.is_terminal else LINES
        console.print(screen(watcher.view(), console, height - 1, keys=False))  # the prompt comes below
        return 0
    with (
        contextlib.suppress(KeyboardInterrupt),
        keyboard() as keys,
        Live(screen=True, auto_refresh=False, console=console) as live,
    ):
        while True:
            live.update(screen(watcher.view(), console, console.height, keys=keys), refresh=True)
            key = pressed(EVERY_S) if keys else time.sleep(EVERY_S)
            if key in ("q", ""):
                break
            watcher.choice = KEYS.get(key or "", watcher.choice)
    return 0


@dataclass(slots=True)
class Watcher:
    """Takes in what is new each time that it is asked; never writes."""

    course: Course
    choice: Choice = "newest"
    _disk: tuple[float, float] = field(default=(-DISK_S, 0.0))
    """When the disk was looked at (monotonic), and what the run took."""

    def view(self) -> View:
        history = self.course.history
        history.refresh()
        self.course.follow()
        window = Window.at(history, len(history.steps))
        return View(
            history=history,
            state=state_of(history, time.time()),
            curves=curves(history, window),
            machines=machines(window),
            disk_gb=self._disk_gb(),
            spells=self._spells(),
            samples=self._samples(window),
            warnings=warnings(history),
        )

    def _disk_gb(self) -> float:
        now = time.monotonic()
        if now - self._disk[0] > DISK_S:
            self._disk = (now, disk_gb(self.course.history.rundir.path))
        return self._disk[1]

    def _spells(self) -> list[Spell]:
        spells, worst = self.course.spells, list(RULES)
        holding = [spell for spell in spells if spell.last == self.course.step]
        return sorted(holding, key=lambda spell: worst.index(spell.rule)) or sorted(spells, key=lambda s: s.last)[-1:]

    def _samples(self, window: Window) -> dict[Choice, Rollout]:
        """Of the last steps; before the first, of the held-out answers."""
        history = self.course.history
        seen = [one for group in trained(window) for one in group] or history.train or history.held_out
        order: list[Choice] = [self.choice, *(choice for choice in KEYS.values() if choice != self.choice)]
        return {choice: rollout for choice in order if (rollout := read(history, seen, choice))}


def read(history: History, seen: list[Seen], choice: Choice) -> Rollout | None:
    if not seen:
        return None
    match choice:
        case "newest":
            one = seen[-1]
        case "best":
            one = max(seen, key=lambda one: (one.reward, one.version))
        case _:
            one = min(seen, key=lambda one: (one.reward, -one.version))
    try:
        return history.rollout(one)
    except (OSError, msgspec.DecodeError):  # removed or replaced meanwhile
        return None


def warnings(history: History) -> list[str]:
    """What is not in the curves and should be seen."""
    last = history.steps[-1] if history.steps else {}
    counts = {
        "steps skipped, not finite (quarantine/)": len(history.skipped),
        "groups set aside": last.get("quarantined") or 0,
        "records lost": last.get("records_lost") or 0,
        "steps missing in stream/": last.get("stream_lost") or 0,
        "unreadable lines": history.unreadable,
    }
    told = ", ".join(f"{what}: {count:.0f}" for what, count in counts.items() if count)
    refused = [f"{name}: {state.error}" for name, state in mirrors(history.rundir).items() if state.error]
    return [told] * bool(told) + refused


@contextlib.contextmanager
def keyboard() -> Iterator[bool]:
    """Single keys without Enter and without an echo; False where no terminal is at the other end."""
    if not sys.stdin.isatty():
        yield False
        return
    before = termios.tcgetattr(sys.stdin)
    try:
        tty.setcbreak(sys.stdin)
        yield True
    finally:
        termios.tcsetattr(sys.stdin, termios.TCSADRAIN, before)


def pressed(seconds: float) -> str | None:
    """The key that is pressed within this time; "" when the terminal is gone."""
    ready, _, _ = select.select([sys.stdin], [], [], seconds)
    return os.read(sys.stdin.fileno(), 1).decode(errors="replace") if ready else None
