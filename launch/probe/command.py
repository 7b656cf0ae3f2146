"""The sampler alone for two minutes: what a recipe's prompts, rewards and lengths are like before anybody trains."""

import argparse
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

import msgspec

from launch.local import Ended, last_words
from launch.probe.figures import answers, figures, grouped, histogram, looked_for, rewards, right
from launch.probe.forecast import forecast
from launch.probe.table import table
from launch.probe.warnings import hopeless, warnings
from launch.progress import duration
from protocol.cli import CONTROL
from protocol.disk import write_atomic
from protocol.errors import StorageError, UserError
from protocol.metrics import Tail
from protocol.process import end, on_stop_signal, start
from protocol.recipe import Recipe
from protocol.resolve import dump, load
from protocol.rollout import Rollout
from sampler.probed import Probed, read

PAUSE_S = 10.0
"""Between two lines of progress in a log."""
GRACE_S = 30.0
"""For the engine to end, once it has written what it knows."""


def main(arguments: list[str]) -> int:
    """0; 1 where a run could learn nothing, unless --force; 130 after Ctrl-C, with a table of what was known."""
    flags = argparse.ArgumentParser("launch probe", description=__doc__)
    flags.add_argument("recipe", type=Path, metavar="RECIPE")
    flags.add_argument("--set", dest="overrides", action="append", default=[], metavar="TABLE.KEY=VALUE")
    flags.add_argument(
        "--seconds", type=float, default=120.0, help="to sample for (default: 120); loading comes on top"
    )
    flags.add_argument("--out", type=Path, metavar="FILE.json", help="the result (default: runs/NAME-probe.json)")
    flags.add_argument("--force", action="store_true", help="exit code 0 also where a run could learn nothing")
    options = flags.parse_args(arguments)
    recipe = load(options.recipe, options.overrides)
    if recipe.objective.name == "sft":
        raise UserError("objective.name = 'sft' learns from demonstrations and samples nothing: nothing to probe")
    out = options.out or Path("runs") / f"{recipe.name}-probe.json"
    prepare(out, options.seconds)
    stopped = measure(options.recipe, options.overrides, options.seconds, out)
    probed, size = read(out), recipe.sampling.group_size
    groups = [group for group in grouped(completions(out)) if len(group) == size]  # one may be torn at a stop
    if not groups:
        raise Ended("stopped before the first prompt was answered", 130) if stopped else UserError(nothing(probed, out))
    result = explained(recipe, probed, groups)
    write_atomic(out, msgspec.json.encode(result))
    print(table(recipe, probed, result))
    for warning in result["warnings"]:
        print(f"\nwarning: {warning}".translate(CONTROL))
    print(f"\n{out} has these figures, {out.with_suffix('.jsonl')} every completion", flush=True)
    if stopped:
        return 130
    if result["hopeless"]:
        print(f"\n{'warning' if options.force else 'stop'}: {result['hopeless']}", flush=True)
    return 1 if result["hopeless"] and not options.force else 0


def prepare(out: Path, seconds: float) -> None:
    """Raises UserError for what cannot be."""
    if not seconds > 0:
        raise UserError(f"--seconds {seconds:g}: expected more than 0")
    if out.suffix != ".json":
        raise UserError(f"--out {out}: expected FILE.json")
    try:
        out.parent.mkdir(parents=True, exist_ok=True)
        for path in (out, out.with_suffix(".jsonl"), out.with_suffix(".log")):
            path.unlink(missing_ok=True)
    except OSError as error:
        raise StorageError(f"cannot write {out}: {error.strerror}") from None


def measure(recipe: Path, overrides: Sequence[str], seconds: float, out: Path) -> bool:
    """Runs the sampler, its output in a log. True when it was stopped. Raises Ended when it failed."""
    settings = [part for override in overrides for part in ("--set", override)]
    command = [sys.executable, "-m", "sampler", "--probe", str(seconds), "--recipe", str(recipe), "--out", str(out)]
    log = out.with_suffix(".log")
    print(f"the engine loads, then samples for about {duration(seconds)}; log in {log}", flush=True)
    stopping: list[bool] = []
    with log.open("wb") as file:
        child = start([*command, *settings], log=file)

    def stop() -> None:
        stopping.append(True)
        child.terminate()

    on_stop_signal(stop)
    progress = Progress(Tail(out.with_suffix(".jsonl")))
    try:
        while (code := child.poll()) is None:
            time.sleep(0.5)
            progress.show()
    finally:
        end(child, GRACE_S)
    print(flush=True)
    if stopping and not out.exists():
        raise Ended("stopped before the engine had loaded: nothing is known", 130)
    if code and not stopping:
        raise Ended(f"the sampler ended: {last_words(log, 0).removeprefix('error: ')}; see {log}", max(code, 1))
    return bool(stopping)


@dataclass(slots=True)
class Progress:
    """One line about the completions so far, rewritten on a terminal, elsewhere every ten seconds a new one."""

    tail: Tail
    prompts: set[int] = field(default_factory=set)
    completions: int = 0
    right: int = 0
    cut: int = 0
    tokens: int = 0
    began: float = 0.0
    shown: float = 0.0

    def show(self) -> None:
        for one in decoded(self.tail):
            self.prompts.add(one.group)
            self.completions += 1
            self.right += right(one)
            self.cut += one.finish == "length"
            self.tokens += one.tokens
        now, terminal = time.monotonic(), sys.stdout.isatty()
        if not self.completions or (not terminal and now - self.shown < PAUSE_S):
            return
        self.began, self.shown = self.began or now, now
        line = (
            f"{duration(now - self.began)}  {len(self.prompts)} prompts  passed {self.right / self.completions:.3f}  "
            f"cut {self.cut / self.completions:.2f}  length {self.tokens / self.completions:.0f}"
        )
        print(f"\r\033[K{line}" if terminal else line, end="" if terminal else "\n", flush=True)


def completions(out: Path) -> list[Rollout]:
    return decoded(Tail(out.with_suffix(".jsonl")))


def decoded(tail: Tail) -> list[Rollout]:
    return [msgspec.json.decode(line, type=Rollout) for _, line in tail.lines()]


def explained(recipe: Recipe, probed: Probed, groups: list[list[Rollout]]) -> dict:
    """All that is in the file and in the table."""
    numbers = answers(groups, looked_for(recipe))
    seen = figures(groups)
    by_function, ahead = rewards(groups), forecast(recipe, groups, probed.tokens_per_s)
    return {
        "format": 1,
        "recipe": dump(recipe),
        "probed": msgspec.to_builtins(probed, str_keys=True),
        "figures": seen,
        "answers": numbers,
        "histogram": histogram(groups),
        "rewards": by_function,
        "forecast": ahead,
        "warnings": warnings(recipe, probed, seen | numbers, by_function, ahead),
        "hopeless": hopeless(recipe, seen, ahead),
    }


def nothing(probed: Probed, out: Path) -> str:
    """Why no completion has a reward."""
    if probed.failed:
        return f"no prompt has a reward: {next(iter(probed.failed.values()))}"
    return (
        f"no prompt was answered in {duration(probed.seconds)} at {probed.tokens_per_s:.0f} tokens/s; use more "
        f"--seconds, or a smaller sampler.max_running; see {out.with_suffix('.log')}"
    )
