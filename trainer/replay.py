"""Training without samplers: the same loop learns from a recorded stream, step by step the same every time.

    python -m trainer --replay runs/gsm8k --run runs/again

With the same settings and ranks on the same machine, a replay comes to the bits of the run that was recorded. With
others (`--set objective.name=dr_grpo`) it compares them on the same rollouts. What it leaves in its own run directory:
metrics/trainer.jsonl, replay.jsonl (one record a step, with a hash of the weights) and a snapshot of the last step.
"""

import logging
import threading
from collections.abc import Iterator
from pathlib import Path

from policy.model import load_tokenizer, vocabulary_size
from protocol.codec import decode_groups, encode_groups
from protocol.errors import RunError, UserError
from protocol.keys import open_keys
from protocol.messages import Group, Pulse
from protocol.recipe import Recipe
from protocol.rundir import RunDir
from trainer.accept import has_reference, problem
from trainer.engine import Policy
from trainer.journal import Journal
from trainer.loop import train
from trainer.publish import Publisher
from trainer.rank import begin
from trainer.ranks import Ranks
from trainer.record import Record
from trainer.roll_call import call_roll, fetch
from trainer.shortage import shortage_explained
from trainer.stream import read_stream, recorded, stream_of

log = logging.getLogger(__name__)


def replay(rundir: RunDir, recipe: Recipe, stream: Path) -> int:
    """The whole life of one rank of a replay. 0 when every recorded step, or `trainer.steps` of them, is repeated."""
    stop = begin("replay", rundir)
    with shortage_explained(recipe), Ranks(recipe.trainer.backend, recipe.trainer.threads) as ranks:
        call_roll(ranks, rundir, recipe)
        directory = fetch(ranks, recipe.model)
        policy = Policy(recipe, directory, ranks)
        policy.steps_done = ranks.max([min(recorded(stream)) - 1 if ranks.first else 0])[0]
        source = Recorded(ranks, recipe, read_stream(stream), vocabulary_size(directory), stop)
        with Journal(rundir, ranks.first) as journal:
            journal.publish(policy)
            journal.begin(policy.steps_done)
            record = Record(journal, ranks, journal)
            train(policy, source, journal, NoExams(), record, recipe)
            if stop.is_set():
                log.info("stopped after step %d; a replay is not resumed: name another --run", policy.steps_done)
                return 0
            incarnation = ranks.max([rundir.claim_incarnation() if ranks.first else 0])[0]
            publisher = Publisher(rundir, open_keys(rundir.keys).run_id, incarnation, load_tokenizer(directory))
            pulse = publisher.publish(policy, ranks.first)
            journal.end(pulse, stream_of(stream).parent)
    return 0


class NoExams:
    """Takes the place of the Exams: nobody is there who could answer."""

    over = False

    def look(self, policy: Policy) -> None:
        pass


class Recorded:
    """Takes the place of the Inbox: all ranks construct one, rank 0 reads the files, every rank gets the same bytes."""

    waited_s = 0.0

    def __init__(
        self,
        ranks: Ranks,
        recipe: Recipe,
        stream: Iterator[tuple[int, list[Group]]],
        vocabulary: int,
        stop: threading.Event,
    ) -> None:
        self._ranks, self._recipe, self._stream, self._vocabulary = ranks, recipe, stream, vocabulary
        self._stopping = stop
        self._failure: RunError | None = None

    def take(self, count: int) -> list[Group] | None:
        """The groups of the next recorded step, however many; None after the last, or when any rank should stop.

        Raises UserError for files that are damaged, missing, or no groups for this recipe.
        """
        data = self._next() if self._ranks.first else b""
        code = self._failure.exit_code if self._failure else 0
        stopping, failed, size = self._ranks.max([self._stopping.is_set(), code, len(data)])
        if failed:
            raise self._failure or SystemExit(failed)  # the first rank says why
        if stopping:
            self._stopping.set()
        return decode_groups(self._ranks.broadcast(data, size)) if size and not stopping else None

    def commit(self, pulse: Pulse, step: int) -> None:
        """Nobody waits for these weights."""

    def set_aside(self, why: str) -> None:
        """Nobody counts these groups."""

    def counts(self) -> dict[str, float]:
        return {"sampler/tokens": 0.0}

    def _next(self) -> bytes:
        try:
            step, groups = next(self._stream, (0, []))
            self._check(step, groups)
        except RunError as error:
            self._failure = error
            return b""
        return encode_groups(groups) if groups else b""

    def _check(self, step: int, groups: list[Group]) -> None:
        """The door that groups from samplers come through, too. Reference log-probs may be there without need."""
        recipe = self._recipe
        for group in groups:
            wrong = problem(
                group,
                completions=recipe.sampling.group_size,
                max_tokens=recipe.sampling.max_tokens,
                vocabulary=self._vocabulary,
                reference=has_reference(group, recipe) or group.completions[0].ref_logprobs is not None,
            )
            if wrong:
                raise UserError(
                    f"recorded step {step}, group {group.group_id} does not fit the recipe: {wrong}; compare --set and "
                    f"--recipe with the recorded run's recipe.toml"
                )
