"""Starts a whole run on this machine; plans one, watches one, explains one, talks to what came of one.

python -m launch recipes/demo.toml
python -m launch watch runs/demo
"""

import argparse
import sys
from collections.abc import Callable
from pathlib import Path

from protocol.cli import exit_with

COMMANDS = {
    "plan": "what a recipe needs, before anything loads: memory, disk, lengths, versions",
    "probe": "the sampler alone for two minutes: pass rate, truncation, lengths, speed, what will come of it",
    "watch": "a live screen about a run, read from its files",
    "doctor": "what is wrong with a run, with evidence and the setting to change",
    "report": "one HTML page about one run or several",
    "chat": "talks to the newest weights of a run, or to a model",
    "reward": "tries a reward function before it is trained on; re-scores a run with another",
    "slurm": "renders a run's sbatch files and submits them",
    "data": "looks at a data set as the sampler will: lengths, missing answers, the rendered prompt",
}


def command(name: str) -> Callable[[list[str]], int]:
    """Imported only when it is asked for, so that `--help` is quick."""
    match name:
        case "plan":
            from launch.plan.command import main
        case "probe":
            from launch.probe.command import main
        case "watch":
            from launch.watch.command import main
        case "doctor":
            from launch.doctor import main
        case "report":
            from launch.report.command import main
        case "chat":
            from launch.chat import main
        case "reward":
            from launch.reward.command import main
        case "slurm":
            from launch.slurm.command import main
        case _:
            from launch.plan.data import main
    return main


def main() -> int:
    if sys.argv[1:2] and sys.argv[1] in COMMANDS:
        return command(sys.argv[1])(sys.argv[2:])
    flags = argparse.ArgumentParser(
        "launch",
        description="Runs a recipe on this machine and shows its progress.",
        epilog=usage(),
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    flags.add_argument("--run", type=Path, help="run directory (default: runs/NAME, NAME from the recipe)")
    flags.add_argument("--set", dest="overrides", action="append", default=[], metavar="TABLE.KEY=VALUE")
    flags.add_argument("file", type=Path, metavar="RECIPE", help="a file in recipes/, or one of yours")
    flags.add_argument("--fresh", action="store_true", help="never continue an old run: use a new run directory")
    options = flags.parse_args()
    from launch.local import run_local

    return run_local(options.file, options.run, options.overrides, options.fresh)


def usage() -> str:
    lines = [f"  python -m launch {name:7} {text}" for name, text in COMMANDS.items()]
    return "\n".join(["other commands, each with a --help of its own:", *lines])


if __name__ == "__main__":
    exit_with(main)
