"""`python -m launch reward check`: one function, all that is tried with it, and a table of what came of it."""

import argparse
import asyncio
import sys
import textwrap
import time

from launch.reward.command import named
from protocol.cli import CONTROL
from protocol.errors import UserError
from protocol.resolve import load
from sampler.rewards.bench import prompts_of
from sampler.rewards.bench_checks import Verdict, judged
from sampler.rewards.bench_trials import Trials, tried

SAY_S = 10.0
WIDTH = 120


def check(options: argparse.Namespace, given: dict) -> int:
    """0: no check failed; 1: one did."""
    if not (options.data or options.recipe):
        raise UserError("nothing to try it on: name rows with --data, or a recipe with --recipe")
    recipe = load(options.recipe, options.overrides)
    reward = named(options.function, recipe.reward if options.recipe else [], given, options.timeout)
    source = options.data or recipe.data.train
    prompts = prompts_of(source, options.limit, recipe)
    trials = asyncio.run(tried(reward, recipe, prompts, options.kind, Reporter()))
    verdicts = judged(trials)
    print(table(trials, verdicts, source).translate(CONTROL))
    return int(any(verdict.outcome == "fail" for verdict in verdicts))


class Reporter:
    """Says now and then on stderr what is going on."""

    def __init__(self) -> None:
        self._said = time.monotonic()

    def __call__(self, what: str) -> None:
        if time.monotonic() - self._said > SAY_S:
            self._said = time.monotonic()
            print(what, file=sys.stderr, flush=True)


def table(trials: Trials, verdicts: list[Verdict], source: str) -> str:
    texts = sum(len(row.values) for row in trials.rows)
    options = "".join(f" {name}={value}" for name, value in trials.reward.options.items())
    where = f"{texts} texts on {len(trials.rows)} rows of {source}"
    head = f"{trials.reward.function}{options} as a {trials.kind} reward: {where}"
    lines = [head, *(line for verdict in verdicts for line in entry(verdict))]
    failed = [verdict.check for verdict in verdicts if verdict.outcome == "fail"]
    warned = [verdict.check for verdict in verdicts if verdict.outcome == "warn"]
    lines.append(f"failed: {', '.join(failed) or 'nothing'}   to look at: {', '.join(warned) or 'nothing'}")
    return "\n".join(lines)


def entry(verdict: Verdict) -> list[str]:
    head = f"  {verdict.outcome}  {verdict.check:15}"
    lines = textwrap.wrap(verdict.words, WIDTH, initial_indent=head, subsequent_indent=" " * len(head))
    return [*lines, *([f"{' ' * len(head)}{verdict.example}"] if verdict.example else [])]
