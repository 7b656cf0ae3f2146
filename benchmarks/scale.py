"""How the cost of a step grows with each of its sizes, beside the growth that one expects; and the hub's memory.

    python -m benchmarks.scale                                five minutes
    python -m benchmarks.scale --only hub --groups 1000000    three minutes to ten

lengths, groups (completions of one), vocabularies: an optimizer step of a tiny random model through the trainer's own
Policy, as CPU time and memory above the resting process; the work is counted as FLOPs. ranks: the batch maker of every
rank. samplers: runs with simulated engines, beside their bound. hub: groups of 2 x 4 tokens through session, codec,
desk, ledger and inbox in one process, without sockets.
"""

import argparse
from collections.abc import Sequence

from benchmarks.child import tidy_when_stopped
from benchmarks.measure import emit

PARTS = ("lengths", "groups", "vocabularies", "ranks", "samplers", "hub")
ONCE = ("samplers", "hub")
"""No rounds: one run of each."""
USUAL = {
    "lengths": (128, 256, 512, 1024, 2048), "groups": (2, 4, 8, 16, 32), "vocabularies": (1024, 8192, 49_152, 151_936),
    "ranks": (1, 2, 4, 8, 16), "samplers": (1, 2, 4, 8),
}  # fmt: skip


def main(arguments: Sequence[str] | None = None) -> None:
    flags = argparse.ArgumentParser(prog="benchmarks.scale", description=__doc__.splitlines()[0])
    flags.add_argument("--only", choices=PARTS, nargs="+", default=PARTS)
    flags.add_argument("--values", type=int, nargs="+", help="instead of the usual ones; for one part, not the hub")
    flags.add_argument("--rounds", type=int, default=5)
    flags.add_argument("--groups", type=int, default=100_000, help="through the hub")
    options = flags.parse_args(arguments)
    tidy_when_stopped()
    for part in options.only:
        rounds = {} if part in ONCE else {"rounds": options.rounds}
        emit(f"scale: {part}", measured(part, options.values or USUAL.get(part, ()), options), **rounds)


def measured(part: str, values: Sequence[int], options: argparse.Namespace) -> list[dict[str, object]]:
    if part == "hub":  # engines are imported only where they are needed: their memory would hide the hub's
        from benchmarks.scale_hub import memory

        return memory(options.groups)
    if part == "samplers":
        from benchmarks.simulated_samplers import compared

        return compared(values, steps=10)
    from benchmarks import scale_steps

    return getattr(scale_steps, part)(values, options.rounds)


if __name__ == "__main__":
    main()
