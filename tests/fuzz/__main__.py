"""python -m tests.fuzz TARGET|all [--inputs N | --seconds S] [--engine atheris|random|both] [--seed K]

Ends with 1 when an input violated a property. The input is then in tests/fuzz/corpus/TARGET/; mend the code and
commit the file: tests/test_fuzz.py replays it from then on.
"""

import argparse
import sys

from tests.fuzz import engines
from tests.fuzz.targets import TARGETS


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m tests.fuzz", description=__doc__.split("\n\n")[1])
    parser.add_argument("target", choices=[*TARGETS, "all"])
    limit = parser.add_mutually_exclusive_group()
    limit.add_argument("--inputs", type=int, help="of each target")
    limit.add_argument("--seconds", type=float, help="for each target (default: 10)")
    parser.add_argument("--engine", choices=["random", "atheris", "both"], help="default: both where atheris is")
    parser.add_argument("--seed", type=int, default=0)
    flags = parser.parse_args()
    engine = flags.engine or ("both" if engines.has_atheris() else "random")
    if engine != "random" and not engines.has_atheris():
        parser.error("atheris is not installed; pip install atheris, or --engine random")
    seconds = None if flags.inputs else flags.seconds or 10.0
    chosen = list(TARGETS) if flags.target == "all" else [flags.target]
    runs = {"random": [engines.by_random], "atheris": [engines.by_atheris]}.get(
        engine, [engines.by_random, engines.by_atheris]
    )
    crashes = 0
    for target in chosen:
        for run in runs:
            report = run(target, inputs=flags.inputs, seconds=seconds, seed=flags.seed)
            print(report, flush=True)
            crashes += len(report.crashes)
    return 1 if crashes else 0


if __name__ == "__main__":
    sys.exit(main())
