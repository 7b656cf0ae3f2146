"""A hub for samplers that trains nothing: it leases prompts without an end, takes the groups and throws them away.

    python -m benchmarks.sampler_alone --run runs/x

Leaves a record like the trainer's for every `prompts_per_step` groups.
"""

from protocol.cli import exit_with, parser
from protocol.metrics import MetricsWriter
from protocol.process import die_with_parent
from protocol.recipe import Recipe
from protocol.rundir import RunDir, resolve_recipe


def main() -> int:
    flags = parser("benchmarks.sampler_alone", __doc__.splitlines()[0])
    options = flags.parse_args()
    die_with_parent()
    rundir, recipe = resolve_recipe(options.run, options.recipe, options.overrides, keep=False)
    rundir.make()
    serve(rundir, recipe)
    return 0


def serve(rundir: RunDir, recipe: Recipe) -> None:
    """Until it is killed."""
    from benchmarks.rank_zero import rank_zero  # torch, only now
    from benchmarks.untrained import Untrained

    with rank_zero(rundir, recipe) as trainer:
        inbox, pulse = trainer.inbox, trainer.publisher.publish(Untrained(recipe, trainer.directory), True)
        inbox.serve()
        inbox.commit(pulse, 0)
        rundir.write_endpoint(trainer.endpoint)
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
