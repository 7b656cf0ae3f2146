"""A hub for samplers that trains nothing: it leases prompts without an end, takes the groups and throws them away.

    python -m benchmarks.sampler_alone --run runs/x

Leaves a record like the trainer's for every `prompts_per_step` groups.
"""

import os
import threading

from benchmarks.processes import free_port
from protocol.cli import exit_with, parser
from protocol.metrics import MetricsWriter
from protocol.process import die_with_parent
from protocol.recipe import Recipe
from protocol.rundir import Endpoint, RunDir, resolve_recipe


def main() -> int:
    flags = parser("benchmarks.sampler_alone", __doc__.splitlines()[0])
    options = flags.parse_args()
    die_with_parent()
    rundir, recipe = resolve_recipe(options.run, options.recipe, options.overrides, keep=False)
    rundir.make()
    place = {"RANK": "0", "LOCAL_RANK": "0", "WORLD_SIZE": "1", "MASTER_ADDR": "127.0.0.1"}
    os.environ.update(place | {"MASTER_PORT": str(free_port())})
    serve(rundir, recipe)
    return 0


def serve(rundir: RunDir, recipe: Recipe) -> None:
    """Until it is killed."""
    from benchmarks.untrained import Untrained  # torch, only now
    from policy.agreement import agree
    from policy.model import load_tokenizer, locate
    from protocol.channel import Hub
    from protocol.keys import open_keys
    from trainer.desk import Desk
    from trainer.inbox import Inbox
    from trainer.publish import Publisher
    from trainer.ranks import Ranks

    keys, directory = open_keys(rundir.keys), locate(recipe.model)
    tokenizer = load_tokenizer(directory)
    incarnation = rundir.claim_incarnation()
    desk = Desk(recipe=recipe, agreement=agree(keys.run_id, directory, tokenizer, recipe), incarnation=incarnation)
    hub, stop = Hub(keys, "127.0.0.1", 0), threading.Event()
    with Ranks("gloo", 1) as ranks, Inbox(ranks, desk, hub, stop, rundir) as inbox:
        pulse = Publisher(rundir, keys.run_id, incarnation, tokenizer).publish(Untrained(recipe, directory), True)
        inbox.serve()
        inbox.commit(pulse, 0)
        rundir.write_endpoint(Endpoint(address=hub.address, incarnation=incarnation, host="x"))
        with MetricsWriter(rundir.metrics / "trainer.jsonl") as writer:
            consume(inbox, recipe, pulse, writer)


def consume(inbox, recipe: Recipe, pulse, writer: MetricsWriter) -> None:
    step = 0
    while (groups := inbox.take(recipe.trainer.prompts_per_step)) is not None:
        step += 1
        inbox.commit(pulse, step)
        lengths = [completion.spans[-1].end for group in groups for completion in group.completions]
        writer.write({"kind": "step", "step": step, "completions/tokens": sum(lengths), **inbox.counts()})


if __name__ == "__main__":
    exit_with(main)
