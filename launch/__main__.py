"""Starts a whole run on this machine, or talks to what came of one.

python -m launch recipes/demo.toml
python -m launch chat runs/demo
"""

import argparse
import sys
from pathlib import Path

from protocol.cli import exit_with


def main() -> int:
    if sys.argv[1:2] == ["chat"]:
        return chat(sys.argv[2:])
    flags = argparse.ArgumentParser("launch", description="Runs a recipe on this machine and shows its progress.")
    flags.add_argument("--run", type=Path, help="run directory (default: runs/NAME, NAME from the recipe)")
    flags.add_argument("--set", dest="overrides", action="append", default=[], metavar="TABLE.KEY=VALUE")
    flags.add_argument("file", type=Path, metavar="RECIPE", help="a file in recipes/, or one of yours")
    flags.add_argument("--fresh", action="store_true", help="never continue an old run: use a new run directory")
    options = flags.parse_args()
    from launch.local import run_local

    return run_local(options.file, options.run, options.overrides, options.fresh)


def chat(arguments: list[str]) -> int:
    flags = argparse.ArgumentParser("launch chat", description="Talks to the newest weights of a run, or to a model.")
    flags.add_argument("model", type=Path, help="run directory, snapshot or model directory")
    flags.add_argument("question", nargs="?", help="one question; without it, a conversation")
    options = flags.parse_args(arguments)
    from launch.chat import talk

    return talk(options.model, options.question)


if __name__ == "__main__":
    exit_with(main)
