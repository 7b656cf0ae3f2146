"""Seeds of what the suite draws at random: new ones in every run, so that a month of runs looks at many.

A run prints its first seed in its header. `VESPER_TEST_SEED=N make test` draws the same again.
"""

import os

FIRST_SEED = "VESPER_TEST_SEED"
"""Environment variable, set by `tests/conftest.py` where the user has not."""


def first_seed() -> int:
    return int(os.environ[FIRST_SEED])
