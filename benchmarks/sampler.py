"""The sampler's tokens per second against bare `vllm.LLM`, and what each addition costs.

    python -m benchmarks.sampler                                  the demo's model and prompts, completions of 32 tokens
    python -m benchmarks.sampler --natural --prompts 32           ended by the model
    python -m benchmarks.sampler --rounds 1 --prompts 8           short

Engines of the same model, lengths, cache and number of threads (benchmarks/engine_run.py), in processes of their own;
one works at a time. In each round every variant answers as many prompts of its own, each variant with all that the one
above it has:

    vllm.LLM              LLM.generate with all prompts at once; without a GPU vLLM gives the model a second process
    vllm.LLM, in process  the model in the engine's process, threads that spin as the sampler's; on a GPU no other
    AsyncLLM              the sampler's engine without log-probs, a request for each prompt
    log-probs             Engine.generate: the log-prob and the weights' version of each token
    rewards               and reward functions, packing, the record on disk
    wire                  and leases from a trainer's hub, which checks the groups and throws them away
    reference             `rewards`, and log-probs under the reference (kl_beta > 0), on the same cores

"of first" is tokens per second against the first variant, "by CPU" tokens per second of CPU time, which other work on
the machine changes less; "python" is the CPU time of the process that serves the engine; `idle` the cores that the
engines take without work.
"""

import argparse
from pathlib import Path

VARIANTS = ("vllm.LLM", "vllm.LLM, in process", "AsyncLLM", "log-probs", "rewards", "wire", "reference")


def main() -> None:
    flags = argparse.ArgumentParser(prog="benchmarks.sampler", description=__doc__.splitlines()[0])
    flags.add_argument("--recipe", type=Path, default=Path("recipes/demo.toml"))
    flags.add_argument("--set", dest="overrides", action="append", default=[], metavar="TABLE.KEY=VALUE")
    flags.add_argument("--prompts", type=int, default=16, help="that a variant answers in a round")
    flags.add_argument("--rounds", type=int, default=5)
    flags.add_argument("--natural", action="store_true", help="completions end where the model ends them")
    flags.add_argument("--variants", nargs="+", choices=VARIANTS, default=list(VARIANTS))
    options = flags.parse_args()
    from benchmarks.sampler_turns import measure  # torch, only now

    measure(options)


if __name__ == "__main__":
    main()
