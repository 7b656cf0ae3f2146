"""Starts a whole run on this machine, or talks to what came of one.

python -m launch recipes/demo.toml
python -m launch chat runs/demo
"""

import sys
from pathlib import Path

from protocol.cli import exit_with, parser


def main() -> int:
    if sys.argv[1:2] == ["chat"]:
        return chat(sys.argv[2:])
    flags = parser("launch", "Runs a recipe on this machine: one trainer, one sampler, a line of progress.")
    flags.add_argument("file", type=Path, metavar="RECIPE", help="a file in recipes/, or one of yours")
    flags.add_argument("--fresh", action="store_true", help="never continue an old run: use a new run directory")
    options = flags.parse_args()
    from launch.local import run_local

    return run_local(options.file, options.run, options.overrides, options.fresh)


def chat(arguments: list[str]) -> int:
    flags = parser("launch chat", "Talks to the newest weights of a run, or to any model directory.")
    flags.add_argument("model", type=Path, help="run directory, snapshot or model directory")
    flags.add_argument("question", nargs="?", help="one question; without it, a conversation")
    options = flags.parse_args(arguments)
    from launch.chat import talk

    return talk(options.model, options.question)


if __name__ == "__main__":
    exit_with(main)
