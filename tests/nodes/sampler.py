"""One engine of `python -m sampler` with the toy engine."""

import sys
from pathlib import Path

from protocol.cli import exit_with
from protocol.resolve import load
from protocol.rundir import RunDir


def main() -> int:
    from sampler.replica import run
    from tests.chaos.toy import ToyEngine

    rundir = RunDir(Path(sys.argv[1]))
    return run(rundir, load(rundir.recipe), 0, ToyEngine)


if __name__ == "__main__":
    exit_with(main)
