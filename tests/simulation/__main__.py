"""python -m tests.simulation --seeds 1000 [--first 0] [--processes 1] | --seed N --verbose | --mutants [--seeds 60]"""

import argparse
import sys

from tests.simulation.audit import Violation
from tests.simulation.batch import run
from tests.simulation.history import History, simulate
from tests.simulation.mutants import table


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m tests.simulation", description=__doc__)
    parser.add_argument("--seeds", type=int)
    parser.add_argument("--first", type=int, default=0)
    parser.add_argument("--processes", type=int, default=1)
    parser.add_argument("--seed", type=int, help="replay this one")
    parser.add_argument("--verbose", action="store_true", help="tell it line by line")
    parser.add_argument("--mutants", action="store_true", help="remove one safety piece after the other")
    arguments = parser.parse_args()
    if arguments.mutants:
        print(table(arguments.seeds or 60))
        return 0
    if arguments.seed is not None:
        return replay(arguments.seed, arguments.verbose)
    batch = run(arguments.first, arguments.seeds or 1000, arguments.processes)
    print(batch.table())
    for seed, violation in batch.violations.items():
        print(f"seed {seed}: {violation}\n  python -m tests.simulation --seed {seed} --verbose", file=sys.stderr)
    return 1 if batch.violations else 0


def replay(seed: int, verbose: bool) -> int:
    print(History(seed).plan)
    try:
        counts = simulate(seed, verbose)
    except Violation as violation:
        print(f"seed {seed}: {violation}", file=sys.stderr)
        return 1
    print("\n".join(f"{name:36} {value:>14.10g}" for name, value in sorted(counts.items())))
    return 0


if __name__ == "__main__":
    sys.exit(main())
