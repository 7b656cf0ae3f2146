"""One lease -> one group: sample, reward, score under the reference, pack."""

import time
from collections.abc import Mapping, Sequence

from protocol.codec import pack, token_array
from protocol.messages import MAX_WHY, Completion, Failure, Group, Split
from protocol.metrics import MetricsWriter
from protocol.recipe import Recipe
from sampler.engine import Engine, Sampled
from sampler.prompts import Prompt
from sampler.reference import Reference
from sampler.rewards.pool import RewardFailed, RewardPool, Score


class Answerer:
    """prompts: of each split, by row. reference: None where nobody asks for its log-probs."""

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
        count = self._recipe.sampling.group_size if training else self._recipe.eval.samples
        temperature = self._recipe.sampling.temperature if training else self._recipe.eval.temperature
        sampled = await self._engine.generate(prompt.ids, count=count, temperature=temperature)
        score = await self._rewards.score(prompt.messages, [one.text for one in sampled], prompt.columns)
        references = [None] * count
        if training and self._reference:
            references = await self._reference.logprobs(prompt.ids, [one.tokens for one in sampled])
        group = Group(
            session=self._session,
            split=split,
            group_id=group_id,
            row=row,
            prompt=pack(token_array(prompt.ids.tolist(), self._vocabulary)),
            completions=[
                self._completion(one, score, index, reference)
                for index, (one, reference) in enumerate(zip(sampled, references, strict=True))
            ],
            seconds=time.monotonic() - start,
        )
        self._write(group, prompt, sampled)
        return group

    def _completion(self, sampled: Sampled, score: Score, index: int, reference) -> Completion:
        return Completion(
            tokens=pack(token_array(sampled.tokens.tolist(), self._vocabulary)),
            logprobs=pack(sampled.logprobs),
            ref_logprobs=None if reference is None else pack(reference),
            finish=sampled.finish,
            spans=sampled.spans,
            reward=score.rewards[index],
            rewards={name: values[index] for name, values in score.by_function.items()},
        )

    def _write(self, group: Group, prompt: Prompt, sampled: list[Sampled]) -> None:
        """Every rollout is on disk, readable."""
        for one, completion in zip(sampled, group.completions, strict=True):
            self._rollouts.write(
                {
                    "split": group.split,
                    "group": group.group_id,
                    "row": group.row,
                    "prompt": prompt.messages,
                    "completion": one.text,
                    "reward": completion.reward,
                    "rewards": completion.rewards,
                    "finish": one.finish,
                    "tokens": len(one.tokens),
                    "snapshots": [span.snapshot for span in one.spans],
                    "seconds": round(group.seconds, 3),
                }
            )
