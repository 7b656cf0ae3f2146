"""One lease -> one group: sample or demonstrate, reward, score under the reference, pack."""

import time
from collections.abc import Mapping, Sequence

import msgspec
import numpy as np

from protocol.codec import pack, token_array
from protocol.messages import MAX_WHY, Completion, Failure, Group, Span, Split, without_signal
from protocol.metrics import MetricsWriter
from protocol.recipe import Recipe
from protocol.rollout import Rollout
from sampler.engine import Engine, Sampled
from sampler.prompts import Prompt
from sampler.reference import Reference
from sampler.rewards.answers import canonical, extracted, gold
from sampler.rewards.pool import RewardFailed, RewardPool, Score


class Answerer:
    """prompts: of each split, by row. reference: None where nobody asks for its log-probs.

    `counts`: training groups since the start, and those among them whose rewards are all equal.
    """

    def __init__(
        self,
        recipe: Recipe,
        session: str,
        vocabulary: int,
        prompts: Mapping[Split, Sequence[Prompt]],
        engine: Engine,
        rewards: RewardPool,
        reference: Reference | None,
        rollouts: MetricsWriter,
    ) -> None:
        self._recipe, self._session, self._vocabulary, self._prompts = recipe, session, vocabulary, prompts
        self._engine, self._rewards, self._reference, self._rollouts = engine, rewards, reference, rollouts
        self.counts = {"groups": 0, "groups_without_signal": 0}

    async def answer(self, split: Split, group_id: int, row: int) -> Group | Failure:
        """Raises EngineDead; a reward that fails is an answer, too, and never a silent zero."""
        try:
            return await self._group(split, group_id, row)
        except RewardFailed as failure:
            return Failure(session=self._session, split=split, group_id=group_id, why=str(failure)[:MAX_WHY])

    async def _group(self, split: Split, group_id: int, row: int) -> Group:
        start = time.monotonic()
        prompt = self._prompts[split][row]
        training = split == "train"
        sampled = await self._sampled(prompt, split)
        score = await self._rewards.score(
            prompt.messages,
            [one.text for one in sampled],
            prompt.columns,
            completion_ids=[one.tokens.tolist() for one in sampled],
            finish_reasons=[one.finish for one in sampled],
            max_tokens=self._recipe.sampling.max_tokens,
        )
        references: Sequence[np.ndarray | None] = [None] * len(sampled)
        silent = len(sampled) > 1 and without_signal(score.rewards)
        if training:
            self.counts["groups"] += 1
            self.counts["groups_without_signal"] += silent
        if training and self._reference and not (silent and self._recipe.trainer.refill):  # else it is replaced
            references = await self._reference.logprobs(prompt.ids, [one.tokens for one in sampled])
        group = Group(
            session=self._session,
            split=split,
            group_id=group_id,
            row=row,
            prompt=pack(token_array(prompt.ids.tolist(), self._vocabulary)),
            completions=[
                self._completion(one, score, index, reference, training)
                for index, (one, reference) in enumerate(zip(sampled, references, strict=True))
            ],
            gold=None if training else gold_of(prompt.columns),
            seconds=time.monotonic() - start,
        )
        self._write(group, prompt, sampled)
        return group

    async def _sampled(self, prompt: Prompt, split: Split) -> list[Sampled]:
        """With the objective `sft` a training prompt's demonstration, as if the weights in use had sampled it; nobody
        reads its log-probs."""
        if split == "eval" or self._recipe.objective.name != "sft":
            return await self._engine.generate(prompt.ids, split)
        snapshot = self._engine.weights.snapshot
        assert prompt.demonstration is not None, "`demonstrated` gives every training prompt one"
        assert snapshot is not None, "a sampler without weights asks for no leases"
        length = len(prompt.demonstration)
        demonstration = Sampled(
            tokens=prompt.demonstration,
            logprobs=np.zeros(length, np.float32),
            text=prompt.demonstration_text,
            finish="stop",
            spans=[Span(snapshot, 0, length)],
        )
        return [demonstration]

    def _completion(self, sampled: Sampled, score: Score, index: int, reference, training: bool) -> Completion:
        return Completion(
            tokens=pack(token_array(sampled.tokens.tolist(), self._vocabulary)),
            logprobs=pack(sampled.logprobs),
            ref_logprobs=None if reference is None else pack(reference),
            finish=sampled.finish,
            spans=sampled.spans,
            reward=score.rewards[index],
            rewards={name: values[index] for name, values in score.by_function.items()},
            answers={} if training else extracted(sampled.text, self._recipe.eval.extractors),
        )

    def _write(self, group: Group, prompt: Prompt, sampled: list[Sampled]) -> None:
        """Every rollout is on disk, readable."""
        for one, completion in zip(sampled, group.completions, strict=True):
            rollout = Rollout(
                split=group.split,
                group=group.group_id,
                row=group.row,
                prompt=prompt.messages,
                completion=one.text,
                reward=completion.reward,
                rewards=completion.rewards,
                finish=completion.finish,
                tokens=len(one.tokens),
                specials=one.specials,
                gold=gold_of(prompt.columns),
                answers=completion.answers or extracted(one.text, self._recipe.eval.extractors),
                snapshots=[span.snapshot for span in one.spans],
                seconds=round(group.seconds, 3),
            )
            self._rollouts.write(msgspec.to_builtins(rollout))


def gold_of(columns: dict) -> str | None:
    """The right number of a row, written like an extracted one; None where its `answer` holds none."""
    value = gold(str(columns["answer"])) if "answer" in columns else None
    return None if value is None else canonical(value)
