"""The real sampler, whose completions all have `sampling.max_tokens` tokens: nothing but the length ends one.

python -m benchmarks.fixed_sampler --run runs/x
"""

from pathlib import Path

from protocol.cli import exit_with, parser
from protocol.rundir import resolve_recipe


def main() -> int:
    flags = parser("benchmarks.fixed_sampler", __doc__.splitlines()[0])
    options = flags.parse_args()
    rundir, recipe = resolve_recipe(options.run, options.recipe, options.overrides, keep=False)
    from sampler.replica import run  # torch and vllm, only now

    return run(rundir, recipe, 0, make_fixed)


def make_fixed(recipe, directory: Path, snapshots: Path, **place):
    """An Engine that goes on after tokens that end a completion."""
    from benchmarks.engine_run import sampling
    from sampler.engine import Engine, sampling_parameters

    class Fixed(Engine):
        def __init__(self) -> None:
            super().__init__(recipe, directory, snapshots, **place)
            self._parameters["train"] = sampling_parameters(*sampling(recipe, directory, fixed=True))

    return Fixed()


if __name__ == "__main__":
    exit_with(main)
