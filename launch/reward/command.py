"""Tries a reward function before it is trained on, or scores a run's completions with another one.

python -m launch reward check my_reward.py:correct --data word-problems --recipe recipes/demo.toml
python -m launch reward diff recorded my_reward.py:correct --run runs/demo
"""

import argparse
import tomllib
from pathlib import Path

from protocol.errors import UserError
from protocol.recipe import Reward
from sampler.rewards.loader import find


def main(arguments: list[str]) -> int:
    """0: nothing wrong; 1: `check` found a failure."""
    options = flags().parse_args(arguments)
    given = dict(option(text) for text in options.option)
    if options.command == "check":
        from launch.reward.check import check

        return check(options, given)
    from launch.reward.diff import diff

    return diff(options, given)


def flags() -> argparse.ArgumentParser:
    result = argparse.ArgumentParser("launch reward", description="Tries a reward function, or compares two.")
    commands = result.add_subparsers(dest="command", required=True, metavar="check | diff")
    check = commands.add_parser(
        "check", help="right, wrong, empty, copied, guessed and hostile answers; speed; repeats"
    )
    check.add_argument("function", help="gsm8k, file.py:function, package.module:function, as in a recipe")
    check.add_argument("--data", metavar="SOURCE", help="rows to try it on (default: data.train of the recipe)")
    check.add_argument("--recipe", type=Path, help="its prompts, group size, and the function's options if it has them")
    check.add_argument("--limit", type=int, default=200, metavar="ROWS", help="first rows of the data (default 200)")
    check.add_argument("--set", dest="overrides", action="append", default=[], metavar="TABLE.KEY=VALUE")
    check.add_argument("--kind", choices=("correctness", "shape"), help="what it should be (default: found out)")
    diff = commands.add_parser("diff", help="scores the completions of a run with two functions")
    diff.add_argument(
        "old", metavar="OLD", help="a function, `recorded` (the run's reward) or `recorded:NAME` (one of its functions)"
    )
    diff.add_argument("new", metavar="NEW", help="the same")
    diff.add_argument("--run", type=Path, required=True, help="run directory")
    diff.add_argument("--data", metavar="SOURCE", help="where its rows lie now (default: as in its recipe)")
    diff.add_argument("--split", choices=("train", "eval"), default="train")
    diff.add_argument("--limit", type=int, default=0, metavar="GROUPS", help="evenly over the run (default: all)")
    for command, what in ((check, "the function"), (diff, "NEW; OLD has those of the recipe")):
        command.add_argument("--option", action="append", default=[], metavar="NAME=VALUE", help=f"of {what}")
        command.add_argument("--timeout", type=float, metavar="SECONDS", help="for one group (default: the recipe's)")
    return result


def option(text: str) -> tuple[str, object]:
    """`buffer=8` -> ("buffer", 8); a bare word is a string. Raises UserError."""
    name, equals, value = text.partition("=")
    if not (equals and name.isidentifier()):
        raise UserError(f"--option {text!r}: expected name=value, for example correct=1.0")
    try:
        return name, tomllib.loads(f"value = {value}")["value"]
    except ValueError:
        return name, value


def named(reference: str, rewards: list[Reward], given: dict, timeout_s: float | None) -> Reward:
    """The function with its options in `rewards`, the recipe's, where it is among them, and those given on top.

    Raises UserError for a function that cannot be there.
    """
    known = [reward for reward in rewards if find(reward.function) == find(reference)]
    reward = known[0] if known else Reward(function=reference)
    return Reward(function=reference, options=reward.options | given, timeout_s=timeout_s or reward.timeout_s)
