"""`python -m trainer` whose ranks train the toy policy; whatever starts ranks starts this the same way."""

import functools

from protocol.cli import exit_with
from trainer.__main__ import main


def with_toy() -> int:
    from tests.chaos.toy import ToyPolicy
    from trainer import rank

    rank.run = functools.partial(rank.run, make_policy=ToyPolicy)
    return main()


if __name__ == "__main__":
    exit_with(with_toy)
