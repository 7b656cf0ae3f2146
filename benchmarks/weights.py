"""From an optimizer step's end to the first token under the new weights, and what it costs the sampler.

    python -m benchmarks.weights                                       the demo's model: full, and adapters of rank 16
    python -m benchmarks.weights --variants full --publishes 3         short
    python -m benchmarks.weights --variants full sharded --shard-mb 32

A real sampler goes on sampling while a real publisher publishes weights that change a little between two publishes.
Steps throw their groups away: there is no optimizer, and one rank, so nothing is gathered (`benchmarks.publish` has
that, under ZeRO 3). All times are seconds:

    canary     log-probs of fixed texts, by the trainer's model
    write      check, hash, write and flush the weights, and the other files of a model directory
    announce   until the sampler's event loop has the notice
    read       the sampler's worker reads, verifies and parses, while it goes on decoding
    pause      until the engine stands still
    load       the new weights into the engine
    first      until the first token under them
    switch     all of these: from the end of the optimizer step to the first token
    checked    until the canary has passed, and completions may leave
    stall      that decoding stood still meanwhile, beyond the usual time of a step
    floor      the same bytes written, flushed, read and copied by nothing but the operating system, plus `load`

"of" is the median of the publishes (p50) and the largest (max), column by column, and of 20 publishes or more p95 too.
"""

import argparse
from pathlib import Path

VARIANTS = ("full", "sharded", "adapter")


def main() -> None:
    flags = argparse.ArgumentParser(prog="benchmarks.weights", description=__doc__.splitlines()[0])
    flags.add_argument("--recipe", type=Path, default=Path("recipes/demo.toml"))
    flags.add_argument("--set", dest="overrides", action="append", default=[], metavar="TABLE.KEY=VALUE")
    flags.add_argument("--variants", nargs="+", choices=VARIANTS, default=["full", "adapter"])
    flags.add_argument("--publishes", type=int, default=12, help="that are counted, of each variant")
    flags.add_argument("--shard-mb", type=float, default=64.0, help="largest file of the variant `sharded`")
    flags.add_argument("--rank", type=int, default=16, help="of the adapters")
    options = flags.parse_args()
    from benchmarks.weight_switches import measure  # torch, only now

    measure(options)


if __name__ == "__main__":
    main()
