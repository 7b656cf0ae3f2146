"""One rank of the real trainer that leaves nothing out: completions without any effect on the loss are computed, too.

RANK=0 ... python -m benchmarks.unskipped --run runs/x
"""

from protocol.cli import exit_with


def main() -> int:
    from trainer.__main__ import main as trainer

    leave_nothing_out()
    return trainer()


def leave_nothing_out() -> None:
    from trainer import batch  # torch, only now

    batch._trained = lambda piece, recipe: piece


if __name__ == "__main__":
    exit_with(main)
