"""One rank's optimizer step on made-up groups: tokens per second, MFU and peak memory, by row length.

    python -m benchmarks.rows                                   Qwen2.5-0.5B's shape, rows of 1k to 16k tokens
    python -m benchmarks.rows --size tiny --tokens 256 1024     any machine, seconds

Random weights through the trainer's own Policy and loss: forward, backward, update. Variants are interleaved in one
process: both kinds of attention, with and without gradient checkpointing. FLOPs are counted as 6 for each weight of
a linear layer and token, 6 for each of the output layer and scored token, and 12 for each pair of tokens that sees
each other and value of a query; what checkpointing computes again is not counted (MFU as in arXiv 2204.02311, B).
The roof is a matmul in the same dtype, measured in the same run.
"""

import argparse
from collections.abc import Sequence


def main(arguments: Sequence[str] | None = None) -> None:
    flags = argparse.ArgumentParser(prog="benchmarks.rows", description=__doc__.splitlines()[0])
    flags.add_argument("--size", choices=("0.5b", "tiny"), default="0.5b")
    flags.add_argument(
        "--tokens", type=int, nargs="+", default=[1024, 2048, 4096, 8192, 16384], help="of one row, at most"
    )
    flags.add_argument("--prompt", type=int, default=150, help="tokens of each prompt")
    flags.add_argument("--completion", type=int, default=200, help="tokens of each completion")
    flags.add_argument("--group", type=int, default=8, help="completions of each prompt")
    flags.add_argument("--dtype", choices=("bfloat16", "float32"), default="bfloat16")
    flags.add_argument("--attention", nargs="+", choices=("sdpa", "varlen"), default=["sdpa", "varlen"])
    flags.add_argument("--checkpointing", nargs="+", choices=("on", "off"), default=["on", "off"])
    flags.add_argument("--liger", choices=("auto", "on", "off"), default="auto")
    flags.add_argument("--rounds", type=int, default=5)
    flags.add_argument("--threads", type=int, default=0, help="without a GPU; 0: one for each core")
    options = flags.parse_args(arguments)
    from benchmarks.steps import measure  # torch and deepspeed, only now

    measure(options)


if __name__ == "__main__":
    main()
