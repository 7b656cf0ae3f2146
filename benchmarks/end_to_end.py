"""Rollouts a second of whole runs: ours beside its bounds, and TRL's GRPOTrainer on the same work.

    python -m benchmarks.end_to_end                                          ours, its bounds, TRL's two ways
    python -m benchmarks.end_to_end --systems ours trl-generate --workloads fixed --rounds 1

Every system runs as processes of its own on the same cores, in interleaved rounds, with the demo's model and prompts,
64 rollouts a step, one optimizer step for them, AdamW, no KL and no gradient checkpointing. Two workloads: `fixed`
(every completion has --completion tokens) and `natural` (until its end, at most 128 tokens). Start-up and --warm steps
are left out; ours goes on behind the window, so that what is sampled ahead of it at its end pays for what was sampled
ahead at its beginning.

G (the sampler alone, its groups thrown away) and L (the trainer alone, fed with the groups that our run of this round
recorded) are measured in every round, each with all cores: two threads, two ranks. In turns the two would do
N / (G + L) rollouts a second, N of a step; `efficiency` is our share of that, and can be more than 1 where two threads
are less than twice as fast as one. N / max(G, L) needs hardware of its own for each and is only printed. "cpu s" is
what a step costs each process: unlike seconds it tells something on a busy machine, too.

`ours-gsm8k` and those behind it have the demo's own reward, which leaves many groups without signal: as it is, with
nothing left out of the training, and with such groups replaced.

TRL with colocated vLLM ends at its first weight update on a CPU (`trl-colocate` shows it); `trl-colocate-patched` has
another update, see benchmarks/trl_step.py. TRL keeps its weights in bfloat16 and no float32 master, ours does.
"""

import argparse
import os
import signal
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path

from benchmarks.comparison import table
from benchmarks.measure import emit
from protocol.errors import RunError, UserError

NATURAL = 128
"""Tokens of a completion at most, where it ends by itself."""
NAMES = (
    "ours", "sampler-alone", "trainer-alone", "trl-generate", "trl-colocate-patched",
    "trl-colocate", "trl-colocate-patched-uncorrected",
    "ours-staleness-0", "ours-float32", "ours-gsm8k", "ours-gsm8k-unskipped", "ours-gsm8k-refill",
)  # fmt: skip
USUAL = NAMES[:5]


def main(arguments: Sequence[str] | None = None) -> None:
    flags = argparse.ArgumentParser(
        prog="benchmarks.end_to_end",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    flags.add_argument("--systems", nargs="+", choices=NAMES, default=USUAL)
    flags.add_argument("--workloads", nargs="+", choices=("fixed", "natural"), default=["fixed", "natural"])
    flags.add_argument("--completion", type=int, default=64, help="tokens of a completion of fixed length")
    flags.add_argument("--dtype", choices=("bfloat16", "float32"), default="bfloat16")
    flags.add_argument("--steps", type=int, default=4, help="measured in a round")
    flags.add_argument("--warm", type=int, default=2, help="steps before them")
    flags.add_argument("--rounds", type=int, default=3)
    flags.add_argument("--set", action="append", default=[], metavar="KEY=VALUE", help="of our recipe, for our rows")
    flags.add_argument("--keep", type=Path, help="a directory for the runs, which are removed otherwise")
    options = flags.parse_args(arguments)
    if options.warm < 1 or options.steps < 1:
        flags.error("--warm and --steps: at least 1, because a window begins and ends with the end of a step")
    if options.dtype == "float32" and any("colocate" in name for name in options.systems):
        flags.error("TRL starts its colocated vLLM in the model's own dtype, whatever --dtype: leave trl-colocate* out")
    run(options)


def run(options: argparse.Namespace) -> None:
    from benchmarks.peers import CORES, Workload  # the recipe's tables, only now

    cores = sorted(os.sched_getaffinity(0))[:CORES]
    if len(cores) < CORES:
        raise SystemExit(f"this process may use {len(cores)} core, all systems are laid out for {CORES}")
    os.sched_setaffinity(0, cores)  # children inherit it
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # what is running is killed on the way out
    rows = []
    for name in options.workloads:
        fixed = name == "fixed"
        workload = Workload(
            name=name, tokens=options.completion if fixed else NATURAL, fixed=fixed, warm=options.warm,
            steps=options.steps, dtype=options.dtype,
        )  # fmt: skip
        rows += table(name, rounds(workload, options))
    emit("end_to_end", rows, unit="rollouts/s", dtype=options.dtype, shared_cores=CORES, steps=options.steps,
         rounds=options.rounds, completion=options.completion, ours=options.set)  # fmt: skip


def rounds(workload, options: argparse.Namespace) -> dict[str, dict]:
    """-> the windows of each system by round. One that fails is said and left out."""
    from benchmarks.peers import PEERS, forget

    found: dict[str, dict] = {name: {} for name in NAMES if name in options.systems}
    for number in range(options.rounds):
        with tempfile.TemporaryDirectory(prefix="end-to-end-", ignore_cleanup_errors=True) as temporary:
            directory = (options.keep or Path(temporary)) / f"{workload.name}-{number}"
            for name in found:
                try:
                    window = PEERS[name].with_settings(options.set).measure(workload, directory / name)
                except (RunError, UserError) as error:
                    print(f"{workload.name}, round {number}, {name}: {error}", flush=True)
                    continue
                found[name][number] = window
                print(f"{workload.name}, round {number}, {name}: {window}", flush=True)
                if name != "ours" and not options.keep:
                    forget(directory / name)
    return found


if __name__ == "__main__":
    main()
