"""One rank that learns from a recorded stream and publishes nothing: the real replay, without its hash of the weights.

RANK=0 ... python -m benchmarks.trainer_alone RECORDED --run runs/x
"""

import os
from pathlib import Path

from protocol.cli import exit_with, parser
from protocol.rundir import resolve_recipe
from trainer.place import here


def main() -> int:
    flags = parser("benchmarks.trainer_alone", __doc__.splitlines()[0])
    flags.add_argument("recorded", type=Path, help="a run directory with stream/")
    options = flags.parse_args()
    rundir, recipe = resolve_recipe(options.run, options.recipe, options.overrides, keep=False)
    os.environ.update(here().variables())
    from trainer import journal, replay  # torch and deepspeed, only now

    journal.weights_hash = lambda weights: ""  # it gathers them too: both are publishing's cost, not training's
    return replay.replay(rundir, recipe, options.recorded)


if __name__ == "__main__":
    exit_with(main)
