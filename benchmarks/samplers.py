"""What more samplers bring: real trainer loop, hub, desk, sessions and sampler loops, with engines of a fixed speed.

    python -m benchmarks.samplers            1, 2, 4, 8 samplers, simulated engines: groups a second beside the bound
    python -m benchmarks.samplers --real     one against two real samplers (the demo's model), on the CPU or a GPU each

A simulated engine samples TOKENS_PER_S and sleeps meanwhile, a simulated trainer takes STEP_S a step; all between the
two is what a run uses. The bound is the slower of the two.
"""

import argparse

from benchmarks.child import tidy_when_stopped
from benchmarks.measure import emit


def main() -> None:
    flags = argparse.ArgumentParser(prog="benchmarks.samplers", description=__doc__.splitlines()[0])
    flags.add_argument("--real", action="store_true", help="one against two real samplers")
    flags.add_argument("--counts", type=int, nargs="+", default=[1, 2, 4, 8], help="numbers of simulated samplers")
    flags.add_argument("--steps", type=int, default=10, help="steps that are counted")
    options = flags.parse_args()
    tidy_when_stopped()
    if options.real:
        from benchmarks.real_samplers import measure as measure_real  # engines, only now

        emit("samplers --real", measure_real(), unit="tokens/s, both together")
        return
    from benchmarks.simulated_samplers import measure

    measure(options.counts, options.steps)


if __name__ == "__main__":
    main()
